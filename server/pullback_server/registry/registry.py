"""Loads, replaces and unloads models while calls go on.

A version that is loaded anew is another set of modules under another id. It is staged (copied, its digest taken),
rehearsed (loaded and checked in a process apart) and installed (on the workers) before any call finds it. What bore
its number before is found until then, computes what it was asked, and is forgotten when nobody uses it any more.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from pullback_server.faults import Fault
from pullback_server.fleet.seam import Fleet, LoadFailure, Transient
from pullback_server.hosting.items import Item
from pullback_server.registry.incoming import Incoming
from pullback_server.registry.table import Origin, Table, Version, VersionState
from pullback_server.registry.threads import to_end, to_end_or_undone
from pullback_server.registry.uploads import UploadStore
from pullback_server.registry.versions import Versions
from pullback_server.scheduling import Scheduler
from pullback_wire import Reason

logger = logging.getLogger(__name__)

#: Seconds between looks whether somebody still uses what is to go.
_LOOK_AGAIN = 0.02


def conflict(name: str) -> Fault:
    """What is said to whoever wants to change a model's versions while somebody else does."""
    return Fault(Reason.LOAD_CONFLICT, f"model {name!r} is being loaded or unloaded by somebody else just now", "name")


class Registry:
    """The models of one server. Belongs to one event loop.

    versions: where they come from. state: a folder of the server's own, for copies.
    counted: told of every load: model, whether it succeeded, seconds.
    """

    def __init__(
        self,
        fleet: Fleet,
        scheduler: Scheduler,
        versions: Versions,
        state: Path,
        counted: Callable[[str, bool, float], None] = lambda model, good, seconds: None,
    ) -> None:
        self._fleet = fleet
        self._scheduler = scheduler
        self._sources = versions
        self._state = state
        self._counted = counted
        self.table = Table(lambda: fleet.signatures)
        self._busy: dict[str, asyncio.Lock] = {}
        #: How many have each of these locks, or wait for it.
        self._users: Counter[str] = Counter()
        #: Copies of what is held, by model and id.
        self._folders: dict[tuple[str, str], Path] = {}
        self._copies = 0
        self._leaving: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """Takes in what the fleet holds from its start."""
        for name, ids in self._fleet.signatures.items():
            for signature in ids.values():
                self.table.publish(name, Version(signature.version, VersionState.READY, origin="start"))

    def stop(self) -> None:
        """Interrupts what may take long."""
        self._sources.stop()

    async def close(self) -> None:
        """Waits no more for what is on its way out."""
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)

    @asynccontextmanager
    async def alone_with(self, name: str, *, wait: bool = False) -> AsyncIterator[None]:
        """While nobody else changes a model's versions.

        wait: for whoever does now; else raises Fault (LOAD_CONFLICT).
        """
        if self.busy(name) and not wait:
            raise conflict(name)
        lock = self._busy.setdefault(name, asyncio.Lock())
        self._users[name] += 1
        try:
            async with lock:
                yield
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name], self._busy[name]

    def busy(self, name: str) -> bool:
        """Whether somebody changes a model's versions just now."""
        return name in self._busy

    # Loading. To be called by whoever is alone with the model.

    async def load(self, name: str, number: str, *, uploaded: bool = False, only_if_new: bool = False) -> Version:
        """Loads a version, or loads it anew.

        uploaded: whether it is one that was uploaded before. only_if_new: not if its contents are what is served.

        Raises LoadFailure; what served before goes on serving, and the reason is kept with the version.
        """
        async with self._noting(name, number, "upload" if uploaded else "repository"):
            folder = self._fresh()
            revision = self.table.next_revision(name, number)
            try:
                architecture = ""
                if uploaded:
                    item, architecture = await self._sources.stage_kept(name, number, revision, folder)
                else:
                    item = await self._sources.stage(name, number, revision, folder)
                before = self.table.find(name, number)
                if only_if_new and before is not None and self.table.serves(name, number, item.digest):
                    self.table.note(name, number, VersionState.READY, "")
                    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
                    return before
                rehearsed = await self._fleet.rehearse(item)
                await self._fleet.install(item, rehearsed)
            except BaseException:
                await to_end(shutil.rmtree, folder, ignore_errors=True)
                raise
            return self._publish(item, folder, architecture)

    async def upload(
        self, name: str, number: str, architecture: str, incoming: Incoming, store: UploadStore
    ) -> Version:
        """Makes a version of what was uploaded. architecture: the version that is loaded with these weights.

        Raises LoadFailure, Fault (STORAGE_FULL, VERSION_EXISTS); then nothing is left of it.
        """
        async with self._leaving_nothing(name, number), self._noting(name, number, "upload"):
            folder = self._fresh()
            revision = self.table.next_revision(name, number)
            kept: Path | None = None
            try:
                item = await self._sources.stage_upload(
                    name, number, revision, architecture, incoming.weights, incoming.sha256, folder
                )
                rehearsed = await self._fleet.rehearse(item)
                kept = await to_end_or_undone(lambda: store.keep(incoming, name, number, architecture), store.remove)
                await self._fleet.install(item, rehearsed)
            except BaseException:
                await to_end(_undo, folder, store, kept)
                raise
            return self._publish(item, folder, architecture)

    @asynccontextmanager
    async def _noting(self, name: str, number: str, origin: Origin) -> AsyncIterator[None]:
        began = time.monotonic()
        before = self.table.find(name, number)
        ready = before is not None and before.state is VersionState.READY
        if before is not None and ready and before.origin != origin:
            raise self._refused(name, before, origin)
        self.table.note(
            name, number, VersionState.LOADING, "newer contents are being loaded" if ready else "loading", origin
        )
        good = False
        try:
            yield
            good = True
        except LoadFailure as error:
            self.table.note(name, number, VersionState.FAILED, self._shown(str(error)), origin)
            logger.error("model %r version %s cannot be loaded: %s", name, number, error)
            raise
        except BaseException as error:
            told = error.message if isinstance(error, Fault) else f"loading was interrupted: {type(error).__name__}"
            self.table.note(name, number, VersionState.FAILED, self._shown(told), origin)
            raise
        finally:
            self._counted(name, good, time.monotonic() - began)

    def _refused(self, name: str, before: Version, origin: Origin) -> LoadFailure:
        """Why a number that is served already is not loaded from elsewhere; kept with the version, logged once."""
        where = {"start": "what the server was started with", "upload": "an upload", "repository": "the repository"}
        text = (
            f"two models are called {name!r} version {before.number}: the one that is served comes from "
            f"{where[before.origin]}, the other from {where[origin]}"
        )
        if before.reason != text:
            logger.error("%s", text)
        self.table.note(name, before.number, VersionState.READY, text)
        # An upload may be deleted, which leaves no trace in the repository.
        return Transient(text) if before.origin == "upload" else LoadFailure(text)

    def _shown(self, text: str) -> str:
        """A message as any caller may read it, without the server's own paths."""
        return self._sources.shown(re.sub(rf"{re.escape(str(self._state))}/\d+/?", "", text))

    @asynccontextmanager
    async def _leaving_nothing(self, name: str, number: str) -> AsyncIterator[None]:
        """Where this raises, all is as before: its caller was told why, and nobody else asked for it."""
        before = self.table.find(name, number)
        reason = before.reason if before is not None else ""
        try:
            yield
        except BaseException:
            if before is None:
                self.table.forget(name, number)
            else:
                self.table.note(name, number, VersionState.FAILED, reason)
            raise

    def _fresh(self) -> Path:
        self._copies += 1
        return self._state / str(self._copies)

    def _publish(self, item: Item, folder: Path, architecture: str) -> Version:
        before = self.table.find(item.name, item.version)
        origin: Origin = "upload" if architecture else "repository"
        version = Version(item.version, VersionState.READY, "", item.revision, item.digest, origin, architecture)
        self._folders[item.name, item.id] = folder
        self.table.publish(item.name, version)
        logger.info("model %r version %s is ready", item.name, version.id)
        if before is not None and before.state is VersionState.READY:
            self._let_go(item.name, before)
        return version

    # Unloading. To be called by whoever is alone with the model.

    def unload(self, name: str, number: str, reason: str) -> None:
        """Takes a version out of service; it is forgotten when nobody uses it any more.

        Of one that could not be loaded the failure is forgotten.
        """
        version = self.table.withdraw(name, number, reason)
        if version is not None:
            logger.info("model %r version %s is unloaded: %s", name, version.id, reason)
            self._let_go(name, version)
        elif (found := self.table.find(name, number)) is not None and found.state is VersionState.FAILED:
            self.table.forget(name, number)

    def _let_go(self, name: str, version: Version) -> None:
        task = asyncio.create_task(self._forget(name, version), name=f"unload {name} {version.id}")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _forget(self, name: str, version: Version) -> None:
        id = version.id
        while True:
            if not (self._scheduler.in_flight(name, id) or self.table.holders(name, id)):
                break
            await asyncio.sleep(_LOOK_AGAIN)
        try:
            await self._fleet.uninstall(name, id)
        except Exception:
            logger.exception("model %r version %s cannot be unloaded", name, id)
        self._scheduler.forget(name, id)
        self.table.drop(name, version)
        folder = self._folders.pop((name, id), None)
        if folder is not None:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _undo(folder: Path, store: UploadStore, kept: Path | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if kept is not None:
        store.remove(kept)
