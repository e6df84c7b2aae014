"""One worker process, from the moment it is started until nothing of it is left."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from pullback_server.fleet.channel import Channel
from pullback_server.fleet.copying import Copier
from pullback_server.fleet.jobs import Jobs, Posted
from pullback_server.fleet.process import Process, Spawner
from pullback_server.fleet.reply import LocalReply
from pullback_server.fleet.seam import Obituary, StartError, WorkerLost
from pullback_server.fleet.upload import Upload
from pullback_server.fleet.watchdog import Work
from pullback_server.hosting.items import Item
from pullback_server.ipc import messages
from pullback_server.ipc.frames import Frame
from pullback_server.job import Batch, Job, Verdict
from pullback_server.ops import SessionJob

_log = logging.getLogger(__name__)


class Link:
    """A worker process and the front's end of everything shared with it. Belongs to one event loop, and starts once.

    on_lost: called when the worker can take no more jobs, before the jobs it had are told.
    on_room, limit_of: see `Jobs`.
    """

    def __init__(
        self,
        setup: messages.Setup,
        copier: Copier,
        on_lost: Callable[[], None],
        on_room: Callable[[], None],
        limit_of: Callable[[Work], float],
    ) -> None:
        self._setup = setup
        self._name = setup.name
        self._on_lost = on_lost
        loop = asyncio.get_running_loop()
        ours, self._theirs = socket.socketpair()
        self._channel = Channel(ours, self._on_frame, self._end)
        self._jobs = Jobs(setup.name, self._channel, copier, setup.idle_bytes, on_room, limit_of, self._end_overdue)
        self._overdue: float | None = None
        self._spawning: asyncio.Task[None] | None = None
        self._process: Process | None = None
        self._loaded: asyncio.Future[messages.Loaded | messages.LoadFailed | None] = loop.create_future()
        #: Changes of what it holds that it has not answered, by number.
        self._changes: dict[int, asyncio.Future[messages.Change]] = {}
        #: Those of them that it has not begun with.
        self._coming: dict[int, asyncio.Future[None]] = {}
        #: Runs out when the worker has been at one thing of its start for too long.
        self._clock: asyncio.Timeout | None = None
        self._load_timeout = 0.0
        self._numbers = itertools.count(1)
        #: The item that it was loading at its start when it was last heard of.
        self.loading: tuple[str, str] | None = None
        #: Done when the worker takes no more jobs, and what it held is lost.
        self.lost: asyncio.Future[None] = loop.create_future()
        #: Done when the process has been reaped and everything is given back; says how it ended.
        self.ended: asyncio.Future[str] = loop.create_future()
        #: Bytes that the worker's device has in all.
        self.memory = 0
        #: See `seam.Worker`.
        self.device_id = ""
        self._closing = False
        self._over = False
        self._blameless = False

    @property
    def alive(self) -> bool:
        """Whether the worker takes jobs, as far as is known."""
        return not (self._over or self._closing)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def device_memory(self) -> int | None:
        return self._jobs.device_memory

    @property
    def proven(self) -> bool:
        """Whether its worker has computed a job, so that it did not die of its start."""
        return self._jobs.proven

    @property
    def outstanding(self) -> int:
        return self._jobs.outstanding

    async def start(self, spawner: Spawner, load_timeout: float) -> messages.Loaded:
        """Starts the process and has it load its models. Raises StartError; then nothing is left of it."""
        try:
            self._spawning = asyncio.create_task(self._spawn(spawner))
            # Starting a process takes milliseconds and cannot be taken back half-way; `_kill` waits for it.
            await asyncio.shield(self._spawning)
            self._channel.send(messages.encode(self._setup))
            self._load_timeout = load_timeout
            async with asyncio.timeout(load_timeout) as self._clock:
                loaded = await self._loaded
        except TimeoutError:
            await self._kill()
            what = "its models" if self.loading is None else "model {!r} version {}".format(*self.loading)
            raise StartError(f"worker {self._name} did not load {what} within {load_timeout:g} s") from None
        except OSError as error:
            await self._kill()
            raise StartError(f"worker {self._name} cannot be started: {error}") from error
        except BaseException:
            await self._kill()
            raise
        if isinstance(loaded, messages.Loaded):
            self.memory, self.device_id = loaded.memory, loaded.device_id
            return loaded
        await self._kill()
        if loaded is None:
            raise StartError(f"worker {self._name} {self.ended.result()} while it loaded its models")
        _log.debug("worker %s: %s\n%s", self._name, loaded.message, loaded.traceback)
        raise StartError(loaded.message)

    async def _spawn(self, spawner: Spawner) -> None:
        relayed = self._name if self._setup.log_format == "json" else ""
        self._process = await spawner.spawn(self._theirs, self._setup.threads, self._exited, relayed)
        if self._over:
            self._process.kill()

    async def load(
        self, item: Item, verdict: Verdict | None, seconds: float
    ) -> messages.Installed | messages.NotInstalled:
        """Has the worker load a model when it has done what was sent before.

        Raises WorkerLost; TimeoutError when it takes longer than so many seconds, counted from when it begins.
        """
        number = next(self._numbers)
        found = await self._change(number, messages.Load(number, item, verdict), seconds)
        assert isinstance(found, messages.Installed | messages.NotInstalled)
        return found

    async def unload(self, model: str, id: str, seconds: float) -> None:
        """Has the worker forget a model when it has done what was sent before. Raises as `load`."""
        number = next(self._numbers)
        await self._change(number, messages.Unload(number, model, id), seconds)

    def forget(self, model: str, id: str) -> None:
        """As `unload`, without waiting for it."""
        self._channel.send(messages.encode(messages.Unload(next(self._numbers), model, id)))

    async def _change(self, number: int, message: messages.Load | messages.Unload, seconds: float) -> messages.Change:
        self._check_alive()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[messages.Change] = loop.create_future()
        begun: asyncio.Future[None] = loop.create_future()
        self._changes[number], self._coming[number] = answer, begun
        try:
            if not self._channel.send(messages.encode(message)):
                raise self._gone()
            # The jobs before it have limits of their own.
            either: list[asyncio.Future[Any]] = [begun, answer]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            async with asyncio.timeout(seconds):
                return await answer
        finally:
            del self._changes[number], self._coming[number]
            begun.cancel()

    def _gone(self) -> WorkerLost:
        return WorkerLost(f"worker {self._name} was lost", suspect=False)

    def run(
        self, job: Job, views: Sequence[memoryview], deadline: float, obituary: Obituary | None = None
    ) -> Coroutine[Any, Any, LocalReply | messages.Again]:
        """See `Jobs.run`. Raises WorkerLost at once when the worker is not there."""
        self._check_alive()
        return self._jobs.run(job, views, deadline, obituary)

    def post(
        self,
        job: Job | Batch | SessionJob,
        views: Sequence[memoryview],
        deadline: float,
        uploads: Sequence[Upload] = (),
    ) -> Coroutine[Any, Any, Posted]:
        """See `Jobs.post`. Raises WorkerLost at once when the worker is not there."""
        self._check_alive()
        return self._jobs.post(job, views, deadline, uploads)

    def answer(self, posted: Posted) -> Coroutine[Any, Any, LocalReply | messages.Again]:
        """See `Jobs.answer`."""
        return self._jobs.answer(posted)

    def abandon(self, posted: Posted) -> None:
        """See `Jobs.abandon`."""
        self._jobs.abandon(posted)

    def pass_over(self, posted: Posted, member: int) -> None:
        """See `Jobs.pass_over`."""
        self._jobs.pass_over(posted, member)

    @property
    def passed_over(self) -> int:
        return self._jobs.passed_over

    def upload(self, size: int) -> Upload:
        """See `Jobs.upload`. Raises WorkerLost when the worker is not there."""
        self._check_alive()
        return self._jobs.upload(size)

    def end_session(self, session: int) -> None:
        """See `Jobs.end_session`."""
        self._jobs.end_session(session)

    def _check_alive(self) -> None:
        if not self.alive:
            raise WorkerLost(f"worker {self._name} is not there", suspect=False)

    async def close(self, grace: float) -> None:
        """Lets the worker finish what it has, for `grace` seconds, and ends it. Returns when nothing is left of it."""
        self._closing = self._blameless = True
        self._channel.finish()
        await asyncio.wait([self.ended], timeout=grace)
        await self._kill()

    def _on_frame(self, frame: Frame) -> None:
        match messages.decode_to_front(frame.message):
            case messages.Loaded() | messages.LoadFailed() as loaded:
                if isinstance(loaded, messages.Loaded):
                    self.loading = None
                if not self._loaded.done():
                    self._loaded.set_result(loaded)
            case messages.Loading(model, id):
                self.loading = (model, id)
                if self._clock is not None:
                    self._clock.reschedule(asyncio.get_running_loop().time() + self._load_timeout)
            case messages.Changing(number):
                if (begun := self._coming.get(number)) is not None and not begun.done():
                    begun.set_result(None)
            case messages.Installed(number) | messages.NotInstalled(number) | messages.Unloaded(number) as change:
                if (answer := self._changes.get(number)) is not None and not answer.done():
                    answer.set_result(change)
            case messages.Leaving(text):
                _log.error("worker %s: %s", self._name, text)
                self._blameless = True
            case message:
                self._jobs.take(message, frame)

    def _end(self) -> None:
        """The worker is of no more use. What it shared is given back now; the process is reaped when it has ended."""
        if self._over:
            return
        self._over = True
        self._channel.close()
        if self._process is not None:
            self._process.kill()
        self._on_lost()
        if not self.lost.done():
            self.lost.set_result(None)
        for answer in self._changes.values():
            if not answer.done():
                answer.set_exception(self._gone())
        self._jobs.end(not self._blameless, self._overdue)

    def _end_overdue(self, seconds: float) -> None:
        _log.error(
            "worker %s has computed one job for %.1f s, which is its hard limit; it is ended", self._name, seconds
        )
        self._overdue = seconds
        self._end()

    def _exited(self) -> None:
        try:
            # What it said before it died, it said.
            self._channel.drain()
            self._end()
        finally:
            if not self._loaded.done():
                self._loaded.set_result(None)
            if self._process is not None:
                self.ended.set_result(self._process.how_it_ended())

    async def _kill(self) -> None:
        self._end()
        if self._spawning is not None:
            await asyncio.wait([self._spawning])
        if self._process is not None:
            await asyncio.shield(self.ended)
        elif not self.ended.done():
            self._theirs.close()
            self.ended.set_result("was never started")
