"""A worker as scheduling sees it: one name and one device, behind which processes are replaced when they die."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence

import msgspec

from pullback_server.faults import Fault
from pullback_server.fleet.jobs import Posted, as_views
from pullback_server.fleet.link import Link
from pullback_server.fleet.reply import LocalReply
from pullback_server.fleet.seam import Buffer, LoadFailure, Obituary, WorkerLost, WorkerState
from pullback_server.fleet.seat import LocalSeat
from pullback_server.fleet.signatures import Signatures
from pullback_server.hosting.items import Item
from pullback_server.ipc import messages
from pullback_server.job import Batch, Job, Verdict
from pullback_wire import Reason

_log = logging.getLogger(__name__)

#: Seconds between a death and the replacement: at first, and at most after one death upon another.
_FIRST_DELAY = 0.1
_LONGEST_DELAY = 30.0
#: A worker that lived this long, or has computed a job, did not die of its start. (A job that kills workers is refused
#: after its second victim, so waiting longer and longer would not help there.)
_STABLE = 30.0

Launch = Callable[["LocalWorker"], Awaitable[tuple[Link, Signatures]]]
Key = tuple[str, str]


class LocalBatch:
    """See `seam.BatchPending`."""

    def __init__(self, link: Link, posted: Posted) -> None:
        self._link = link
        self._posted = posted

    async def reply(self) -> LocalReply:
        reply = await self._link.answer(self._posted)
        if isinstance(reply, messages.Again):
            raise Fault(Reason.INTERNAL, "a model writes into its inputs although they were copied")
        return reply

    def pass_over(self, member: int) -> None:
        self._link.pass_over(self._posted, member)


class LocalWorker:
    """See `seam.Worker`.

    sharers: workers on the same device.
    launch: starts a process that holds the worker's models, and tells their signatures, or raises StartError.
    on_change: called on every change of state, and when a job has left the worker.
    """

    def __init__(self, name: str, device: str, sharers: int, launch: Launch, on_change: Callable[[], None]) -> None:
        self.name = name
        self.device = device
        self._sharers = sharers
        self.restarts = 0
        self._launch = launch
        self._on_change = on_change
        self._state = WorkerState.STARTING
        self._link: Link | None = None
        self._supervisor: asyncio.Task[None] | None = None
        #: Models that were seen to write into their inputs: their jobs are sent with `copy_inputs` at once.
        self._writers: set[tuple[str, str, bool]] = set()
        #: Ids of the versions that it holds, by model.
        self._models: dict[str, set[str]] = {}
        #: What it is loading, or forgetting, at present.
        self._changing: set[Key] = set()
        self._passed_over = 0
        self._seats: set[LocalSeat] = set()
        self._sessions = 0

    @property
    def state(self) -> WorkerState:
        return self._state

    @property
    def outstanding(self) -> int:
        return 0 if self._link is None else self._link.outstanding

    @property
    def pid(self) -> int | None:
        """Of the process behind it at present."""
        return None if self._link is None else self._link.pid

    async def start(self) -> None:
        """Starts the first process; from then on dead ones are replaced. Raises StartError."""
        await self._up()
        self._supervisor = asyncio.create_task(self._supervise(), name=f"supervise {self.name}")

    def _present(self) -> Link:
        """The process behind it. Raises WorkerLost where it takes no jobs."""
        if self._link is None or self._state is not WorkerState.READY:
            raise WorkerLost(f"worker {self.name} is not there", suspect=False)
        return self._link

    async def run(
        self, job: Job, payloads: Sequence[Buffer], deadline: float, obituary: Obituary | None = None
    ) -> LocalReply:
        link = self._present()
        views = as_views(payloads)
        key = (job.model, job.version, job.train)
        if key in self._writers and not job.copy_inputs:
            job = msgspec.structs.replace(job, copy_inputs=True)
        reply = await link.run(job, views, deadline, obituary)
        if isinstance(reply, messages.Again) and not job.copy_inputs:
            self._writers.add(key)
            # The worker's copy of the bytes is spoilt; `views` are still the caller's own.
            reply = await link.run(msgspec.structs.replace(job, copy_inputs=True), views, deadline, obituary)
        if isinstance(reply, messages.Again):
            raise Fault(Reason.INTERNAL, f"model {job.model!r} writes into its inputs although they were copied")
        return reply

    async def post(self, batch: Batch, payloads: Sequence[Buffer], deadline: float) -> LocalBatch:
        link = self._present()
        return LocalBatch(link, await link.post(batch, as_views(payloads), deadline))

    def holds(self, model: str, version: str) -> bool:
        return model in self._models and (not version or version in self._models[model])

    @property
    def held(self) -> list[Key]:
        """Models and ids of what it holds."""
        return [(model, id) for model, ids in self._models.items() for id in ids]

    @property
    def busy_changing(self) -> bool:
        return bool(self._changing)

    def changing(self, model: str, id: str) -> bool:
        return (model, id) in self._changing

    async def install(self, item: Item, verdict: Verdict | None, seconds: float) -> messages.Installed:
        """Has the process load an item. Raises LoadFailure, WorkerLost; then the process does not hold it.

        One that is at it for longer than so many seconds is ended: nobody knows what it would do next.
        """
        link = self._present()
        key = (item.name, item.id)
        self._changing.add(key)
        try:
            found = await link.load(item, verdict, seconds)
        except TimeoutError:
            await link.close(0.0)
            raise LoadFailure(f"{item.owner} did not load within {seconds:g} s") from None
        except asyncio.CancelledError:
            # It will load it all the same, and shall then forget it.
            link.forget(*key)
            raise
        finally:
            self._changing.discard(key)
            self.changed()
        if isinstance(found, messages.NotInstalled):
            _log.debug("worker %s: %s\n%s", self.name, found.message, found.traceback)
            raise LoadFailure(found.message)
        if link is not self._link or not link.alive:
            raise WorkerLost(f"worker {self.name} was lost", suspect=False)
        self._models.setdefault(item.name, set()).add(item.id)
        return found

    def withdraw(self, model: str, id: str) -> None:
        """Sends no more jobs for a model here."""
        ids = self._models.get(model, set())
        ids.discard(id)
        if not ids:
            self._models.pop(model, None)
        self._writers = {key for key in self._writers if key[:2] != (model, id)}

    async def uninstall(self, model: str, id: str, seconds: float) -> None:
        """Has the process forget a model; one that is gone holds nothing, and one that takes too long is ended."""
        self.withdraw(model, id)
        key = (model, id)
        link = self._link
        self._changing.add(key)
        try:
            await self._present().unload(model, id, seconds)
        except WorkerLost:
            pass
        except TimeoutError:
            _log.error("worker %s did not unload %s version %s within %g s; it is ended", self.name, *key, seconds)
            if link is not None:
                await link.close(0.0)
        finally:
            self._changing.discard(key)
            self.changed()

    @property
    def passed_over(self) -> int:
        """How many jobs were not begun, since their time had passed or nobody waited for them any more."""
        return self._passed_over + (0 if self._link is None else self._link.passed_over)

    @property
    def memory(self) -> int:
        return 0 if self._link is None else self._link.memory // self._sharers

    @property
    def device_id(self) -> str:
        return "" if self._link is None else self._link.device_id

    @property
    def device_memory(self) -> int | None:
        return None if self._link is None else self._link.device_memory

    @property
    def seats(self) -> Collection[LocalSeat]:
        return self._seats

    def open(self) -> LocalSeat:
        link = self._present()
        self._sessions += 1
        seat = LocalSeat(link, self._sessions, self._seats.discard)
        self._seats.add(seat)
        return seat

    async def close(self, grace: float) -> None:
        """Ends the process, and replaces none any more. Returns when nothing is left."""
        # First, so that no job is sent this way any more.
        self._set(WorkerState.DEAD)
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
            self._set(WorkerState.DEAD)
        if self._link is not None:
            await self._link.close(grace)

    def lost(self) -> None:
        """To be told by the link that its worker takes no more jobs."""
        if self._state is WorkerState.READY:
            self._set(WorkerState.DEAD)

    def changed(self) -> None:
        """Says that there may be room. Whoever listens must not break what happens here."""
        try:
            self._on_change()
        except Exception:
            _log.exception("on_change failed")

    def _set(self, state: WorkerState) -> None:
        if state is not self._state:
            self._state = state
            self.changed()

    async def _up(self) -> None:
        began = time.monotonic()
        self._set(WorkerState.STARTING)
        before = self._link
        self._link, signatures = await self._launch(self)
        if before is not None:
            self._passed_over += before.passed_over
        self._models = {name: set(ids) for name, ids in signatures.items()}
        _log.info("worker %s (pid %s) is ready after %.1f s", self.name, self.pid, time.monotonic() - began)
        # It may have died in the very turn in which it became ready.
        self._set(WorkerState.READY if self._link.alive else WorkerState.DEAD)

    async def _supervise(self) -> None:
        delay = _FIRST_DELAY
        while self._link is not None:
            since = time.monotonic()
            how = await asyncio.shield(self._link.ended)
            if self._link.proven or time.monotonic() - since >= _STABLE:
                delay = _FIRST_DELAY
            _log.error("worker %s %s; it is replaced in %.1f s", self.name, how, delay)
            while True:
                await asyncio.sleep(delay)
                delay = min(2 * delay, _LONGEST_DELAY)
                try:
                    self.restarts += 1
                    await self._up()
                    break
                # Whatever it is (no descriptors left, say), giving up would leave the device without a worker for ever.
                except Exception as error:
                    self._set(WorkerState.DEAD)
                    _log.error("worker %s cannot be replaced, next try in %.1f s: %s", self.name, delay, error)
