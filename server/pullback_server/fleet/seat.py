"""A session's place on one worker process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from pullback_server.faults import Fault
from pullback_server.fleet.jobs import Posted, as_views
from pullback_server.fleet.link import Link
from pullback_server.fleet.reply import LocalReply
from pullback_server.fleet.seam import Buffer, Upload, WorkerLost
from pullback_server.fleet.upload import Upload as LocalUpload
from pullback_server.ipc import messages
from pullback_server.job import Job
from pullback_server.ops import SessionJob, SessionOutcome
from pullback_wire import Reason


class LocalSeat:
    """See `seam.Seat`. on_close: called once, when the place is given up."""

    def __init__(self, link: Link, session: int, on_close: Callable[[LocalSeat], None]) -> None:
        self.session = session
        self.since = time.monotonic()
        self.live = 0
        self.retained = 0
        self.graphs = 0
        self._link = link
        self._on_close = on_close
        self._posted: set[Posted] = set()
        self._open = True

    @property
    def lost(self) -> asyncio.Future[None]:
        return self._link.lost

    def upload(self, size: int) -> LocalUpload:
        return self._link.upload(size)

    async def post(
        self, job: Job | SessionJob, payloads: Sequence[Buffer], deadline: float, uploads: Sequence[Upload] = ()
    ) -> LocalPending:
        if not self._open:
            raise WorkerLost("the session has ended", suspect=False)
        views = as_views(payloads)
        local = [upload for upload in uploads if isinstance(upload, LocalUpload)]
        if isinstance(job, Job) and local and not job.copy_inputs:
            # Once a model has written into an upload there are no original bytes.
            job = msgspec.structs.replace(job, copy_inputs=True)
        posted = await self._link.post(job, views, deadline, local)
        self._posted.add(posted)
        # Not when the answer is fetched: that may be long after, and others' quotas depend on it.
        posted.answer.add_done_callback(self._note)
        return LocalPending(self, posted, job, views, deadline)

    async def answer(self, pending: LocalPending) -> LocalReply:
        """Waits for what was posted."""
        posted = pending.posted
        try:
            reply = await self._link.answer(posted)
        finally:
            self._posted.discard(posted)
        if isinstance(reply, messages.Again) and isinstance(pending.job, Job) and not pending.job.copy_inputs:
            again = msgspec.structs.replace(pending.job, copy_inputs=True)
            reply = await self._link.run(again, pending.views, pending.deadline)
        if isinstance(reply, messages.Again):
            raise Fault(Reason.INTERNAL, "a model writes into its inputs although they were copied")
        return reply

    def _note(self, answer: asyncio.Future[Any]) -> None:
        outcome = None if answer.cancelled() or answer.exception() else getattr(answer.result(), "outcome", None)
        if self._open and isinstance(outcome, SessionOutcome):
            self.live, self.retained, self.graphs = outcome.live, outcome.retained, outcome.graphs

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        for posted in self._posted:
            self._link.abandon(posted)
        self._posted.clear()
        self._link.end_session(self.session)
        self.live = self.retained = self.graphs = 0
        self._on_close(self)


class LocalPending:
    """See `seam.Pending`."""

    __slots__ = ("_seat", "deadline", "job", "posted", "views")

    def __init__(
        self, seat: LocalSeat, posted: Posted, job: Job | SessionJob, views: Sequence[memoryview], deadline: float
    ) -> None:
        self._seat = seat
        self.posted = posted
        self.job = job
        self.views = views
        self.deadline = deadline

    @property
    def answered(self) -> asyncio.Future[Any]:
        return self.posted.answer

    async def reply(self) -> LocalReply:
        return await self._seat.answer(self)
