"""Follows a repository: what appears there, changes or goes is loaded, loaded anew or unloaded."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from pullback_server.fleet.seam import LoadFailure, Transient
from pullback_server.hosting.manifest import RepositoryError
from pullback_server.hosting.repository import Repository
from pullback_server.hosting.repository_watch import Change, Watch
from pullback_server.registry.registry import Registry
from pullback_server.registry.table import VersionState

logger = logging.getLogger(__name__)

#: Looks at a repository at the start, for what cannot be loaded just then.
_PATIENCE = 20


@dataclass
class _Look:
    """What came of a look at the repository. done: things that it asked for. unsettled: those to be tried again."""

    done: int = 0
    failures: list[str] = field(default_factory=list)
    unsettled: list[str] = field(default_factory=list)


class Follower:
    """See the module. Belongs to one event loop, and to one task of it.

    seconds: between looks at the repository. settle: for which files must have been the same before.
    """

    def __init__(self, registry: Registry, repository: Repository, seconds: float, settle: float) -> None:
        self._registry = registry
        self._table = registry.table
        self._repository = repository
        self._seconds = seconds
        self._settle = settle
        self._watch = Watch(settle)
        #: What is wrong with versions in the repository, as far as it was told.
        self._told: dict[tuple[str, str], str] = {}

    async def first(self, *, patient: bool) -> list[str]:
        """Loads what is there at the start, and tells what could not be.

        patient: whether to wait for what cannot be loaded just then; else that is left to `follow`.

        Raises RepositoryError.
        """
        problems: list[str] = []
        look = _Look()
        for _ in range(_PATIENCE):
            look = await self._see(at_once=True)
            problems += look.failures
            if look.unsettled:
                if not patient:
                    return problems
                await asyncio.sleep(max(self._settle, 0.5))
            # A version that gives way is told of when what replaces it is there; an older one may stand in for one that
            # failed.
            elif not look.done:
                return problems
        return problems + look.unsettled

    async def follow(self) -> None:
        """Goes on until it is cancelled."""
        while True:
            await asyncio.sleep(min(self._seconds, self._settle) if self._watch.unsettled else self._seconds)
            try:
                while (await self._see()).done:
                    pass
            except RepositoryError as error:
                # It says nothing about the models; what is served goes on being served.
                logger.error("%s", error)
            except Exception:
                logger.exception("the repository cannot be followed for now")

    async def _see(self, *, at_once: bool = False) -> _Look:
        """One look at the repository, and what it asks for. Raises RepositoryError."""
        # In a thread: of a large repository it takes a while.
        changes, problems = await asyncio.to_thread(self._changes, at_once)
        look = _Look()
        for change in changes:
            look.done += 1
            await self._do(change, look)
        look.failures += self._tell(problems)
        return look

    def _changes(self, at_once: bool) -> tuple[list[Change], dict[tuple[str, str], str]]:
        """What is to be done, and what is wrong. Blocks. Raises RepositoryError."""
        scan = self._repository.scan()
        problems = {key: str(problem) for key, problem in scan.problems().items()}
        return self._watch.see(scan, time.monotonic(), at_once), problems

    async def _do(self, change: Change, look: _Look) -> None:
        """Does what the repository asks for, and notes why it could not be done."""
        async with self._registry.alone_with(change.name, wait=True):
            if change.kind == "remove":
                self._registry.unload(change.name, change.version, "the repository has it no more, or others instead")
                return
            try:
                await self._registry.load(change.name, change.version, only_if_new=True)
            except Transient as failure:
                self._watch.later(change, time.monotonic())
                look.unsettled.append(str(failure))
            except LoadFailure as failure:
                self._watch.failed(change)
                look.failures.append(str(failure))

    def _tell(self, problems: Mapping[tuple[str, str], str]) -> list[str]:
        """Notes what is wrong in the repository, and what is not any more. Returns what is news."""
        whole: dict[str, str] = {}
        told = {}
        for (name, number), text in problems.items():
            if number.isdecimal() and number == str(int(number)):
                told[name, number] = text
            else:
                whole[name] = f"{whole[name]}\n{text}" if name in whole else text
        shown = self._repository.shown
        for (name, number), text in told.items():
            found = self._table.find(name, number)
            if self._told.get((name, number)) != text or found is None or found.state is VersionState.UNLOADING:
                self._table.note(name, number, VersionState.FAILED, shown(text))
        for key in self._told.keys() - told.keys():
            self._table.forgive(*key, shown(self._told[key]))
        news = [text for key, text in told.items() if self._told.get(key) != text]
        self._told = told
        faults = {name: shown(text) for name, text in whole.items()}
        news += [whole[name] for name, text in faults.items() if self._table.faults.get(name) != text]
        self._table.blame(faults)
        for text in news:
            logger.error("%s", text)
        return news
