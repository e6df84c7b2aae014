"""Decides which versions should be served: by what the repository holds, and by what administrators ask for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Literal

from pullback_server.faults import Fault, nearest
from pullback_server.fleet.seam import LoadFailure, StartError
from pullback_server.hosting.manifest import RepositoryError
from pullback_server.hosting.repository import NoSuchModel, Repository
from pullback_server.registry.follower import Follower
from pullback_server.registry.incoming import Incoming
from pullback_server.registry.registry import Registry, conflict
from pullback_server.registry.table import Table, VersionState
from pullback_server.registry.uploads import UploadStore
from pullback_wire import Reason

#: As Triton knows them: loaded at the start; changes are followed; only what is asked for.
Mode = Literal["none", "poll", "explicit"]


class Curator:
    """See the module. Belongs to one event loop.

    seconds: between looks at the repository, in mode "poll". settle: for which files must have been the same before.
    """

    def __init__(
        self,
        registry: Registry,
        repository: Repository | None,
        uploads: UploadStore | None,
        mode: Mode,
        seconds: float,
        settle: float,
    ) -> None:
        self._registry = registry
        self._repository = repository
        self._uploads = uploads
        self._mode = mode
        self._follower = None if repository is None else Follower(registry, repository, seconds, settle)
        self._following: asyncio.Task[None] | None = None
        self.table: Table = registry.table

    async def begin(self, wanted: Sequence[str], *, strict: bool) -> None:
        """Loads what is to be served from the start on. Returns when that has been tried.

        wanted: in mode "explicit": MODEL, or MODEL:VERSION.
        strict: whether any of it may fail. Uploads always may: they were accepted once, and what they need may be gone.

        Raises StartError: the repository cannot be read; or, if strict, with everything that could not be loaded.
        """
        self._registry.begin()
        problems: list[str] = []
        if self._repository is not None and self._follower is not None:
            try:
                await asyncio.to_thread(self._repository.check)
                if self._mode == "explicit":
                    problems += await self._asked_for(wanted)
                else:
                    problems += await self._follower.first(patient=self._mode == "none")
            except RepositoryError as error:
                raise StartError(str(error)) from error
        if problems and strict:
            raise StartError("\n".join(problems))
        for name, number in [] if self._uploads is None else await asyncio.to_thread(self._uploads.all):
            # The reason is logged, and kept with the version.
            with contextlib.suppress(LoadFailure, Fault):
                async with self._registry.alone_with(name, wait=True):
                    await self._registry.load(name, number, uploaded=True)
        if self._mode == "poll" and self._follower is not None:
            self._following = asyncio.create_task(self._follower.follow(), name="follow the repository")

    async def _asked_for(self, wanted: Sequence[str]) -> list[str]:
        refused = []
        for one in wanted:
            name, _, number = one.partition(":")
            try:
                await self.load(name, number)
            except Fault as fault:
                refused.append(fault.message)
        return refused

    def stop(self) -> None:
        """Begins nothing any more, and interrupts what may take long. `close` is still to be called."""
        if self._following is not None:
            self._following.cancel()
        self._registry.stop()

    async def close(self) -> None:
        """Follows nothing any more, and loads nothing."""
        self.stop()
        if self._following is not None:
            await asyncio.wait([self._following])
        await self._registry.close()

    # What administrators ask for.

    async def load(self, name: str, number: str) -> str:
        """Loads a version anew, or for the first time; no number: those that the model's policy picks, and unloads the
        others. Returns a version that was loaded.

        Raises Fault: ADMIN_DISABLED, MODEL_NOT_FOUND, VERSION_NOT_FOUND, NOT_IN_REPOSITORY, LOAD_CONFLICT, LOAD_FAILED.
        """
        kept = self._uploads is not None and bool(number) and self._uploads.find(name, number) is not None
        if not kept:
            self._check_mode("LoadModel")
            self._check_removable(name, number)
        async with self._registry.alone_with(name):
            try:
                wanted = [number] if kept else await asyncio.to_thread(self._wanted, name, number)
                for one in wanted:
                    await self._registry.load(name, one, uploaded=kept)
            except (LoadFailure, RepositoryError) as error:
                raise Fault(Reason.LOAD_FAILED, str(error), "version" if number else "name") from error
            if not number:
                for other in self.table.versions(name):
                    if other.origin == "repository" and other.number not in wanted:
                        self._registry.unload(name, other.number, "the version policy picks others")
        return wanted[-1]

    def _wanted(self, name: str, number: str) -> list[str]:
        """The versions to be loaded. Blocks. Raises Fault, RepositoryError."""
        assert self._repository is not None
        try:
            found = self._repository.look(name)
        except NoSuchModel as error:
            raise Fault(Reason.MODEL_NOT_FOUND, str(error), "name") from error
        if found.error is not None:
            raise found.error
        if number in found.problems:
            raise found.problems[number]
        assert found.manifest is not None
        wanted = [number] if number in found.versions else [] if number else found.manifest.picked(found.versions)
        if not wanted:
            there = ", ".join(sorted(found.versions, key=int)) or "none"
            if not number:
                raise RepositoryError(f"the version policy of model {name!r} picks none; there are: {there}")
            raise Fault(
                Reason.VERSION_NOT_FOUND,
                f"the repository has no version {number!r} of {name!r}; it has {there}",
                "version",
            )
        return wanted

    async def unload(self, name: str, number: str, *, delete: bool = False) -> None:
        """Takes a version out of service; no number: all. delete: also deletes what was uploaded.

        Raises Fault: ADMIN_DISABLED, MODEL_NOT_FOUND, VERSION_NOT_FOUND, NOT_IN_REPOSITORY, LOAD_CONFLICT.
        """
        known = {one.number: one for one in self.table.versions(name)}
        kept = self._uploads.find(name, number) if delete and number and self._uploads is not None else None
        if not known and kept is None:
            raise Fault(
                Reason.MODEL_NOT_FOUND, f"no model is called {name!r}; {nearest(name, self.table.names())}", "name"
            )
        if number and number not in known and kept is None:
            raise Fault(
                Reason.VERSION_NOT_FOUND,
                f"model {name!r} has no version {number!r}; known: {', '.join(known)}",
                "version",
            )
        chosen = [one for one in known.values() if not number or one.number == number]
        if kept is not None and self._mode != "explicit":
            # What has the number of an upload that could not be loaded for that stays.
            chosen = [one for one in chosen if one.origin == "upload"]
        elif any(one.origin == "repository" for one in chosen):
            self._check_mode("UnloadModel")
        if kept is None:
            self._check_removable(name, number)
        async with self._registry.alone_with(name):
            for one in chosen:
                if one.origin != "start":
                    self._registry.unload(name, one.number, "an administrator asked for it")
            if delete and self._uploads is not None:
                # Workers that still have it mapped keep it until they forget it.
                for one_of, stored in self._uploads.all():
                    if one_of == name and number in ("", stored) and (place := self._uploads.find(name, stored)):
                        await asyncio.to_thread(self._uploads.remove, place)

    def _check_mode(self, what: str) -> None:
        if self._mode != "explicit" or self._repository is None:
            mode = f"the mode is {self._mode!r}" if self._repository is not None else "there is no repository"
            raise Fault(Reason.ADMIN_DISABLED, f"{what} needs a repository in mode 'explicit'; {mode}")

    def _check_removable(self, name: str, number: str) -> None:
        found = [one for one in self.table.versions(name) if not number or one.number == number]
        if found and all(one.origin == "start" for one in found):
            raise Fault(
                Reason.NOT_IN_REPOSITORY,
                f"model {name!r} comes from what the server was started with, which stays as it is; only what came "
                "from a repository or an upload can be loaded or unloaded",
                "name",
            )

    # Uploads.

    def check_upload(self, name: str, number: str) -> None:
        """Whether an upload may begin. Raises Fault (VERSION_EXISTS, LOAD_CONFLICT)."""
        self._check_new(name, number)
        if self._registry.busy(name):
            raise conflict(name)

    def _check_new(self, name: str, number: str) -> None:
        found = self.table.find(name, number)
        there = found is not None and found.state is not VersionState.FAILED
        if there or (self._uploads is not None and self._uploads.find(name, number) is not None):
            raise Fault(Reason.VERSION_EXISTS, f"model {name!r} has a version {number} already", "header.version")

    def architecture(self, name: str, number: str) -> str:
        """The version whose code a version runs: its own number, unless it was uploaded itself."""
        found = self.table.find(name, number)
        return found.architecture or number if found is not None else number

    async def upload(self, name: str, number: str, architecture: str, incoming: Incoming) -> None:
        """Makes a version of what was uploaded. Raises Fault (LOAD_CONFLICT, VERSION_EXISTS, ...), LoadFailure."""
        assert self._uploads is not None
        async with self._registry.alone_with(name):
            self._check_new(name, number)
            await self._registry.upload(name, number, architecture, incoming, self._uploads)
