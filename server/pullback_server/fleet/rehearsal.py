"""A process in which models are loaded and checked before any worker that serves has to do with them.

What takes long (probing derivatives, finding the best batch) holds up nobody there, and a model that kills its process
kills no worker. The process is kept for a while, for the next model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pullback_server.fleet.link import Link
from pullback_server.fleet.process import Spawner
from pullback_server.fleet.seam import LoadFailure, Rehearsed, StartError, Transient, WorkerLost
from pullback_server.hosting.items import Item
from pullback_server.ipc import messages

#: Seconds without work after which the process is ended.
_IDLE = 20.0


class Stage:
    """Rehearses items, one at a time. make: a link to a process to be started for that."""

    def __init__(self, make: Callable[[], Link], spawner: Spawner, timeout: float) -> None:
        self._make = make
        self._spawner = spawner
        self._timeout = timeout
        self._turn = asyncio.Lock()
        #: Who waits for it, or has it.
        self.busy = 0
        self._link: Link | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._registered: list[tuple[str, str]] = []

    async def rehearse(self, item: Item) -> Rehearsed:
        """Raises LoadFailure."""
        self.busy += 1
        try:
            async with self._turn:
                self._keep()
                try:
                    return await self._rehearse(item)
                finally:
                    self._timer = asyncio.get_running_loop().call_later(_IDLE, self._end_later)
        finally:
            self.busy -= 1

    async def registered(self) -> list[tuple[str, str]]:
        """Names and versions that the sources register. Raises StartError."""
        async with self._turn:
            self._keep()
            await self._started()
            return self._registered

    async def _rehearse(self, item: Item) -> Rehearsed:
        owner = item.owner
        try:
            link = await self._started()
        except (StartError, OSError) as error:
            raise Transient(f"{owner} cannot be checked: {error}") from error
        try:
            found = await link.load(item, None, self._timeout)
            if isinstance(found, messages.Installed):
                await link.unload(item.name, item.id, self._timeout)
        except TimeoutError:
            await self._end()
            raise LoadFailure(f"{owner} did not load within {self._timeout:g} s") from None
        except WorkerLost:
            how = await asyncio.shield(link.ended)
            self._link = None
            # Nothing that a model does kills with SIGKILL: somebody did, or the system, for want of memory.
            kind = Transient if "SIGKILL" in how else LoadFailure
            raise kind(f"{owner}: the process that loaded it to check it {how}") from None
        except BaseException:
            # It would go on loading for nobody.
            await self._end()
            raise
        if isinstance(found, messages.NotInstalled):
            # Whatever it has changed in its process shall not meet the next one.
            await self._end()
            raise LoadFailure(found.message)
        return Rehearsed(found.signature, found.verdict)

    async def _started(self) -> Link:
        if self._link is None or not self._link.alive:
            link = self._make()
            self._registered = (await link.start(self._spawner, self._timeout)).registered
            self._link = link
        return self._link

    def _keep(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end_later(self) -> None:
        self._timer = None
        if not self._turn.locked():
            task = asyncio.create_task(self._end())
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _end(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.close(0.0)

    async def close(self) -> None:
        """Ends the process."""
        self._keep()
        await self._end()
