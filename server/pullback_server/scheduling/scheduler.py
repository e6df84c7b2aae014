"""Admission, the queue, and the way of one job to a worker and back."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from pullback_server.faults import Fault
from pullback_server.fleet.seam import Buffer, Fleet, Reply, Worker, WorkerLost, WorkerState
from pullback_server.job import Job
from pullback_wire import Reason

#: Jobs a worker holds at most: one that computes and one whose bytes are already there when it ends.
STAGED = 2
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


class Scheduler:
    """Hands jobs to workers first come, first served. Work-conserving: a worker that can take a job gets one at once.

    Belongs to one event loop.
    """

    def __init__(self, fleet: Fleet, limits: Limits) -> None:
        self._fleet = fleet
        self._limits = limits
        self._queue: deque[asyncio.Future[Worker]] = deque()
        # Places promised to jobs that may not have reached their worker yet. A worker's own count has these only from
        # then on, but it also has the abandoned ones.
        self._reserved: Counter[str] = Counter()
        self.calls = 0
        self.bytes = 0
        fleet.on_change = self._dispatch

    @property
    def queued(self) -> int:
        """Jobs that wait for a worker."""
        return sum(not waiting.done() for waiting in self._queue)

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

    async def _attempts(self, job: Job, payloads: Sequence[Buffer], deadline: float) -> Scheduled:
        victims = 0
        queued = 0.0
        while True:
            since = time.monotonic()
            worker = self._free_worker() or await self._wait()
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
                self._release(worker)

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
                load = max(worker.outstanding, self._reserved[worker.name])
                if load < least:
                    best, least = worker, load
        if best is not None:
            self._reserved[best.name] += 1
        return best

    async def _wait(self) -> Worker:
        place: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        try:
            return await place
        except asyncio.CancelledError:
            # A place may have been granted in the very turn of the loop in which the caller went away. Otherwise
            # awaiting has cancelled `place`, and `_dispatch` passes over it.
            if not place.cancelled():
                self._release(place.result())
            raise

    def _release(self, worker: Worker) -> None:
        self._reserved[worker.name] -= 1
        self._dispatch()

    def _dispatch(self) -> None:
        while self._queue:
            if self._queue[0].done():
                self._queue.popleft()
                continue
            worker = self._reserve()
            if worker is None:
                return
            self._queue.popleft().set_result(worker)
