"""The way of a session's ops to the one worker that can run them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from pullback_server.fleet.seam import Buffer, Pending, Reply, Seat, Upload, Worker
from pullback_server.job import Job
from pullback_server.ops import SessionJob
from pullback_server.scheduling.queue import Origin, Ticket
from pullback_server.scheduling.scheduler import Scheduler


class Pinned:
    """A session's seat and its turn in the queue. `post` is called by one task, op after op."""

    def __init__(self, scheduler: Scheduler, origin: Origin, worker: Worker, seat: Seat) -> None:
        self._scheduler = scheduler
        self._origin = origin
        self.worker = worker
        self.seat = seat

    @classmethod
    async def open(
        cls, scheduler: Scheduler, deadline: float, origin: Origin, models: Sequence[tuple[str, str]]
    ) -> Pinned:
        """models: names and versions that the session will call. Raises Fault (NOT_READY, NOT_ON_SESSION_WORKER)."""
        return cls(scheduler, origin, *await scheduler.sit(deadline, models))

    @property
    def free(self) -> bool:
        """Whether `post` would not have to wait for its turn."""
        return self._scheduler.has_place_on(self.worker)

    async def post(
        self, job: Job | SessionJob, payloads: Sequence[Buffer], deadline: float, uploads: Sequence[Upload] = ()
    ) -> OnItsWay:
        """Sends an op when its turn has come. Raises Fault, WorkerLost."""
        ticket = await self._scheduler.place_on(self.worker, deadline, self._origin)
        try:
            pending = await self.seat.post(job, payloads, deadline, uploads)
        except BaseException:
            self._scheduler.release(self.worker, ticket, None)
            raise
        return OnItsWay(self._scheduler, self.worker, ticket, pending)

    def close(self) -> None:
        """Frees everything that the session holds."""
        self.seat.close()


class OnItsWay:
    """An op that was sent. It has its place until it is answered or `give_up` is called. worker: where it went."""

    def __init__(self, scheduler: Scheduler, worker: Worker, ticket: Ticket, pending: Pending) -> None:
        self._scheduler = scheduler
        self._ticket = ticket
        self.worker = worker.name
        self._worker: Worker | None = worker
        self._pending = pending
        # The place goes to others as soon as the op is computed, however long its answer is on its way.
        pending.answered.add_done_callback(self._answered)

    async def reply(self) -> Reply:
        """Raises Fault, WorkerLost. Cancelling this abandons the op."""
        return await self._pending.reply()

    def _answered(self, answer: asyncio.Future[Any]) -> None:
        timings = None if answer.cancelled() else getattr(answer.result(), "timings", None)
        self._give_back(None if timings is None else timings["compute"])

    def then(self, told: Callable[[], None]) -> None:
        """Calls `told` when the worker has answered, however long before the answer is fetched."""
        self._pending.answered.add_done_callback(lambda _: told())

    def give_up(self) -> None:
        """Gives the place back."""
        self._give_back(None)

    def _give_back(self, seconds: float | None) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            self._scheduler.release(worker, self._ticket, seconds)
