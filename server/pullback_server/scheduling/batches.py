"""Several callers' jobs computed in one, and each caller's share of that."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from pullback_server import tracking
from pullback_server.faults import Fault
from pullback_server.fleet.seam import BatchPending, Buffer, Reply, Worker, WorkerLost
from pullback_server.job import Alone, Answered, Batch, BatchOutcome, FaultRecord, Outcome, Skip
from pullback_server.scheduling.queue import Ticket
from pullback_wire import Reason


class ComputeAlone(Exception):
    """The batch as a whole came to nothing: its members should be computed one by one."""


@dataclass
class Computed:
    """What a batch came to, for whoever counts.

    rows: that were computed. left: members whose callers had gone before.
    """

    outcome: BatchOutcome
    rows: int
    seconds: float
    left: int


class Share:
    """One member's part. answer: done when the batch is answered."""

    __slots__ = ("answer", "batch", "index")

    def __init__(self, batch: Merged, index: int) -> None:
        self.batch = batch
        self.index = index
        self.answer: asyncio.Future[MemberReply] = asyncio.get_running_loop().create_future()

    async def reply(self) -> MemberReply:
        """Raises Fault, WorkerLost, ComputeAlone. Cancelling this takes the member out of the batch."""
        try:
            return await self.answer
        except asyncio.CancelledError:
            if self.answer.cancelled():
                self.batch.left(self.index)
            elif self.answer.exception() is None:
                # It was answered in the very turn in which whoever waited went away.
                self.answer.result().leave()
            raise


class Merged:
    """A batch on its way. tickets: its members, whose turn has come; their turns are done with their shares.

    worker: where it is computed. rows: that are computed at once; 0: none, or it is not known yet.
    request: what logs and traces know it as.
    """

    def __init__(self, tickets: Sequence[Ticket], shadow: int) -> None:
        self.tickets = tickets
        jobs = [ticket.job for ticket in tickets if ticket.job is not None]
        self.first = jobs[0]
        self._jobs = jobs
        self.shares = [Share(self, index) for index in range(len(tickets))]
        self._waiting = len(tickets)
        self._shadow = shadow
        self._pending: BatchPending | None = None
        self.task: asyncio.Task[None] | None = None
        self.worker = ""
        self.rows = 0
        names: tracking.Attributes = {"pullback.model": self.first.model, "pullback.batch.calls": len(tickets)}
        self.request = tracking.together([ticket.request for ticket in tickets], names)

    def forget(self) -> None:
        """Lets go of the members, which hold on to this: their bytes must not wait for the garbage collector."""
        self.shares, self.tickets, self._jobs = [], (), []
        self._pending = self.task = None

    async def run(
        self, worker: Worker, withdrawn: Callable[[], bool], computed: Callable[[], None]
    ) -> Computed | WorkerLost | None:
        """Sends the batch and hands out what it came to. None: it came to nothing, which the members were told.

        computed: called when the worker has computed it, before anything is handed out: the next batch should be on its
            way before this one's answers are.
        withdrawn: whether it has turned out meanwhile that such jobs must not be merged.
        """
        self.worker = worker.name
        # This task was begun by whoever made room, which need not be one of the members.
        tracking.begin(self.request)
        ended = ("CANCELLED", "")
        try:
            found = await self._run(worker, withdrawn, computed)
            ended = ("OK", "")
            return found
        except WorkerLost as lost:
            ended = ("UNAVAILABLE", Reason.WORKER_LOST.value)
            self._fail(lost)
            return lost
        except Fault as error:
            ended = (error.reason.code.name, error.reason.value)
            self._fail(error)
        except asyncio.CancelledError:
            # Nobody waits any more; or the server is going.
            self._fail(WorkerLost("the batch was given up", suspect=False))
            raise
        except Exception as error:
            ended = ("INTERNAL", Reason.INTERNAL.value)
            self._fail(ComputeAlone(str(error)))
            raise
        finally:
            if self.request is not None and self.request.span is not None:
                self.request.span.end(*ended, {"pullback.batch.rows": self.rows, "pullback.worker": self.worker})
        return None

    async def _run(self, worker: Worker, withdrawn: Callable[[], bool], computed: Callable[[], None]) -> Computed:
        batch = Batch(
            self._jobs,
            [len(ticket.payloads) for ticket in self.tickets],
            [ticket.deadline for ticket in self.tickets],
            self._shadow,
        )
        payloads = [payload for ticket in self.tickets for payload in ticket.payloads]
        self._pending = await worker.post(batch, payloads, max(batch.deadlines))
        for index, share in enumerate(self.shares):
            if share.answer.done():
                self._pending.pass_over(index)
        reply = await self._pending.reply()
        computed()
        return self._hand_out(reply, withdrawn())

    def left(self, index: int) -> None:
        """The caller of a member has gone."""
        self._waiting -= 1
        if self._waiting == 0 and self.task is not None:
            self.task.cancel()
        elif self._pending is not None:
            self._pending.pass_over(index)

    def _hand_out(self, reply: Reply, withdrawn: bool) -> Computed:
        outcome = reply.outcome
        assert isinstance(outcome, BatchOutcome)
        if outcome.merged:
            self.rows = sum(
                ticket.rows
                for member, ticket in zip(outcome.members, self.tickets, strict=True)
                if not isinstance(member, Skip)
            )
        if self.request is not None and self.request.span is not None:
            tracking.computed(self.request.span, reply.timings, self.worker)
        with contextlib.ExitStack() as stack:
            # Left when the last member has been, also when there is none.
            shared = _Shared(reply)
            stack.callback(shared.leave)
            offset = left = rows = 0
            for member, share, ticket in zip(outcome.members, self.shares, self.tickets, strict=True):
                fault: Exception
                rows += 0 if isinstance(member, Skip) else ticket.rows
                count = member.count if isinstance(member, Answered) else 0
                payloads = reply.payloads[offset : offset + count]
                offset += count
                if isinstance(member, Answered) and not (withdrawn and outcome.merged):
                    if not share.answer.done():
                        share.answer.set_result(MemberReply(member.outcome, payloads, reply.timings, shared))
                    continue
                if isinstance(member, Answered | Alone):
                    fault = ComputeAlone("it could not be computed together with others")
                elif isinstance(member, FaultRecord):
                    fault = Fault(Reason[member.reason], member.message, member.field, member.retry_after)
                else:
                    left += 1
                    fault = Fault(Reason.DEADLINE_EXCEEDED, "the deadline passed before the call was computed")
                if not share.answer.done():
                    share.answer.set_exception(fault)
        return Computed(outcome, max(rows, 1), reply.timings["compute"], left)

    def _fail(self, error: Exception) -> None:
        told: Exception = error
        if isinstance(error, Fault) and error.reason is not Reason.DEADLINE_EXCEEDED:
            told = ComputeAlone(error.message)
        for share in self.shares:
            if not share.answer.done():
                share.answer.set_exception(told)
                # Whoever has gone in this very turn will not ask.
                share.answer.exception()


class _Shared:
    """A reply that several read: it is left when the last of them has."""

    def __init__(self, reply: Reply) -> None:
        self._reply: Reply | None = reply
        self._readers = 1

    def enter(self) -> None:
        self._readers += 1

    def leave(self) -> None:
        self._readers -= 1
        if self._readers == 0 and self._reply is not None:
            reply, self._reply = self._reply, None
            with reply:
                pass


class MemberReply:
    """See `seam.Reply`."""

    outcome: Outcome

    def __init__(
        self, outcome: Outcome, payloads: Sequence[Buffer], timings: Mapping[str, float], shared: _Shared
    ) -> None:
        self.outcome = outcome
        self.payloads = payloads
        self.timings = timings
        self._shared: _Shared | None = shared
        shared.enter()

    def __enter__(self) -> MemberReply:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """The payloads are not looked at any more."""
        shared, self._shared = self._shared, None
        self.payloads = ()
        if shared is not None:
            shared.leave()
