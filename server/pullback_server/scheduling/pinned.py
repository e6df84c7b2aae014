"""The way of a session's ops to the one worker that can run them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pullback_server.fleet.seam import Buffer, Pending, Reply, Seat, Upload, Worker
from pullback_server.job import Job
from pullback_server.ops import SessionJob
from pullback_server.scheduling.scheduler import Scheduler


class Pinned:
    """A session's seat and its turn in the queue. `post` is called by one task, op after op."""

    def __init__(self, scheduler: Scheduler, worker: Worker, seat: Seat) -> None:
        self._scheduler = scheduler
        self.worker = worker
        self.seat = seat

    @classmethod
    async def open(cls, scheduler: Scheduler, deadline: float) -> Pinned:
        """Raises Fault (NOT_READY)."""
        return cls(scheduler, *await scheduler.sit(deadline))

    async def post(
        self, job: Job | SessionJob, payloads: Sequence[Buffer], deadline: float, uploads: Sequence[Upload] = ()
    ) -> OnItsWay:
        """Sends an op when its turn has come. Raises Fault, WorkerLost."""
        since = time.monotonic()
        await self._scheduler.place_on(self.worker, deadline)
        queued = time.monotonic() - since
        try:
            pending = await self.seat.post(job, payloads, deadline, uploads)
        except BaseException:
            self._scheduler.release(self.worker)
            raise
        return OnItsWay(self._scheduler, self.worker, pending, queued)

    def close(self) -> None:
        """Frees everything that the session holds."""
        self.seat.close()


class OnItsWay:
    """An op that was sent. It has its place until `reply` returns or `give_up` is called. queued: seconds it waited."""

    def __init__(self, scheduler: Scheduler, worker: Worker, pending: Pending, queued: float) -> None:
        self._scheduler = scheduler
        self._worker: Worker | None = worker
        self._pending = pending
        self.queued = queued

    async def reply(self) -> Reply:
        """Raises Fault, WorkerLost."""
        try:
            return await self._pending.reply()
        finally:
            self.give_up()

    def give_up(self) -> None:
        """Gives the place back."""
        worker, self._worker = self._worker, None
        if worker is not None:
            self._scheduler.release(worker)
