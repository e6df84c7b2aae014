"""Admission, the queue, and the way of one job to a worker and back."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from pullback_server.faults import Fault
from pullback_server.fleet.seam import Buffer, Fleet, Reply, Seat, Worker, WorkerLost, WorkerState
from pullback_server.job import Job
from pullback_wire import Reason

#: Jobs a worker holds at most: one that computes and one whose bytes are already there when it ends.
STAGED = 2
#: Seconds between looks for a worker that is ready.
_LOOK_AGAIN = 0.05
#: Workers that one job may take down with it. A job that kills is refused, not retried for ever.
VICTIMS = 2


@dataclass(frozen=True)
class Limits:
    """What may be in the house at once. Calls over a limit are refused with OVERLOADED at once."""

    calls: int = 1024
    bytes: int = 4 << 30


@dataclass
class Scheduled:
    """A computed job and how long it had waited, in seconds."""

    reply: Reply
    queued: float


@dataclass(eq=False)
class _Waiting:
    """Somebody who waits for a place: on this worker, or (None) on any."""

    place: asyncio.Future[Worker]
    worker: Worker | None


class Scheduler:
    """Hands jobs to workers first come, first served. Work-conserving: a worker that can take a job gets one at once.

    A session's ops wait in the same queue, for places on the session's worker, and one at a time; so a session with
    thousands of ops in flight takes turns with everybody else.

    Belongs to one event loop.
    """

    def __init__(self, fleet: Fleet, limits: Limits) -> None:
        self._fleet = fleet
        self._limits = limits
        self._queue: deque[_Waiting] = deque()
        # Places promised to jobs that may not have reached their worker yet. A worker's own count has these only from
        # then on, but it also has the abandoned ones.
        self._reserved: Counter[str] = Counter()
        self.calls = 0
        self.bytes = 0
        fleet.on_change = self._dispatch

    @property
    def queued(self) -> int:
        """Jobs that wait for a worker."""
        return sum(not waiting.place.done() for waiting in self._queue)

    async def submit(self, job: Job, payloads: Sequence[Buffer], deadline: float) -> Scheduled:
        """Computes a job on some worker.

        payloads: the bytes of the job's tensors; they must stay as they are until this returns, since a retry is
        computed from them.
        deadline: on the time.monotonic clock.

        Cancelling the awaiting task abandons the job wherever it is.

        Raises Fault: OVERLOADED, DEADLINE_EXCEEDED, WORKER_LOST, or what the worker says of the job.
        """
        size = sum(len(payload) for payload in payloads)
        self._admit(size)
        self.calls += 1
        self.bytes += size
        try:
            async with asyncio.timeout_at(deadline):
                return await self._attempts(job, payloads, deadline)
        except TimeoutError:
            raise Fault(Reason.DEADLINE_EXCEEDED, "the deadline passed before the call was computed") from None
        finally:
            self.calls -= 1
            self.bytes -= size

    def _admit(self, size: int) -> None:
        if self.calls >= self._limits.calls:
            raise Fault(
                Reason.OVERLOADED, f"{self.calls} calls are in flight, the limit is {self._limits.calls}", "", 0.5
            )
        if self.bytes + size > self._limits.bytes:
            # A call that could never fit must not be retried; one that can, may.
            fits = size <= self._limits.bytes
            raise Fault(
                Reason.OVERLOADED if fits else Reason.RESULT_TOO_LARGE,
                f"{self.bytes} bytes are in flight and this call brings {size}, the limit is {self._limits.bytes}",
                "payloads",
                0.5 if fits else None,
            )

    async def sit(self, deadline: float) -> tuple[Worker, Seat]:
        """A session's place: on the worker that has the fewest, as soon as there is one that is ready.

        Raises Fault (NOT_READY).
        """
        while True:
            ready = [worker for worker in self._fleet.workers if worker.state is WorkerState.READY]
            if ready:
                worker = min(ready, key=lambda one: (len(one.seats), self._load(one)))
                try:
                    return worker, worker.open()
                except WorkerLost:
                    # Its death is about to be told.
                    await asyncio.sleep(0)
                    continue
            if time.monotonic() >= deadline:
                raise Fault(Reason.NOT_READY, "no worker is ready; they are starting", "", 1.0)
            await asyncio.sleep(_LOOK_AGAIN)

    def has_place_on(self, worker: Worker) -> bool:
        """Whether `place_on` would return at once."""
        return not self._queue and (worker.state is not WorkerState.READY or self._load(worker) < STAGED)

    async def place_on(self, worker: Worker, deadline: float) -> None:
        """Waits for a place on one worker, which `release` gives back. Raises Fault (DEADLINE_EXCEEDED)."""
        if not self._queue and self._reserve_on(worker):
            return
        try:
            async with asyncio.timeout_at(deadline):
                await self._wait(worker)
        except TimeoutError:
            raise Fault(Reason.DEADLINE_EXCEEDED, "the op's time passed before a worker could take it") from None

    def admit_upload(self, size: int) -> None:
        """Counts bytes that come in by chunks. Raises Fault (OVERLOADED)."""
        self._admit(size)
        self.bytes += size

    def forget_upload(self, size: int) -> None:
        """They are with a worker, or were given up."""
        self.bytes -= size

    async def _attempts(self, job: Job, payloads: Sequence[Buffer], deadline: float) -> Scheduled:
        victims = 0
        queued = 0.0
        while True:
            since = time.monotonic()
            worker = self._free_worker() or await self._wait(None)
            queued += time.monotonic() - since
            try:
                return Scheduled(await worker.run(job, payloads, deadline), queued)
            except WorkerLost as lost:
                victims += lost.suspect
                if victims == VICTIMS:
                    raise Fault(
                        Reason.WORKER_LOST,
                        f"the worker died while it computed this call, and so did the one that retried it: {lost}",
                    ) from lost
                # The loop must get the chance to learn of the death before the next attempt picks a worker.
                await asyncio.sleep(0)
            finally:
                self.release(worker)

    def _free_worker(self) -> Worker | None:
        """Reserves a place on the least busy worker, if nobody waits for one and there is one."""
        if self._queue:
            return None
        return self._reserve()

    def _reserve(self) -> Worker | None:
        best: Worker | None = None
        least = STAGED
        for worker in self._fleet.workers:
            if worker.state is WorkerState.READY:
                load = self._load(worker)
                if load < least:
                    best, least = worker, load
        if best is not None:
            self._reserved[best.name] += 1
        return best

    def _reserve_on(self, worker: Worker) -> bool:
        # On a dead worker too: what is sent there fails at once, and says why.
        if worker.state is WorkerState.READY and self._load(worker) >= STAGED:
            return False
        self._reserved[worker.name] += 1
        return True

    def _load(self, worker: Worker) -> int:
        return max(worker.outstanding, self._reserved[worker.name])

    async def _wait(self, worker: Worker | None) -> Worker:
        place: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(place, worker))
        # Those before it may wait for other workers.
        self._dispatch()
        try:
            return await place
        except asyncio.CancelledError:
            # A place may have been granted in the very turn of the loop in which the caller went away. Otherwise
            # awaiting has cancelled `place`, and `_dispatch` passes over it.
            if not place.cancelled():
                self.release(place.result())
            raise

    def release(self, worker: Worker) -> None:
        """Gives a place back."""
        self._reserved[worker.name] -= 1
        self._dispatch()

    def _dispatch(self) -> None:
        if not self._queue:
            return
        left: deque[_Waiting] = deque()
        for waiting in self._queue:
            if waiting.place.done():
                continue
            # A worker that is busy keeps those waiting who wait for it, and nobody else.
            if waiting.worker is None:
                worker = self._reserve()
            else:
                worker = waiting.worker if self._reserve_on(waiting.worker) else None
            if worker is None:
                left.append(waiting)
            else:
                waiting.place.set_result(worker)
        self._queue = left
