"""The way of one job to a worker and back: admission, the queue, merging, retries."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from pullback_server.faults import Fault
from pullback_server.fleet.seam import Buffer, Fleet, Reply, Seat, Worker, WorkerLost, WorkerState
from pullback_server.job import Job, Signature
from pullback_server.scheduling.admission import Admission
from pullback_server.scheduling.batches import ComputeAlone, Computed, MemberReply, Merged, Share
from pullback_server.scheduling.costs import Costs, OpCosts
from pullback_server.scheduling.merging import MergeRules
from pullback_server.scheduling.places import Places
from pullback_server.scheduling.policy import Policy, Tally
from pullback_server.scheduling.quarantine import VICTIMS, Quarantine
from pullback_server.scheduling.queue import NOBODY, FairQueue, Lane, Origin, Ticket, computations
from pullback_server.tracking import Request
from pullback_wire import Reason

logger = logging.getLogger(__name__)

#: Seconds between looks for a worker that is ready.
_LOOK_AGAIN = 0.05


@dataclass
class Scheduled:
    """A computed job and how long it had waited, in seconds.

    worker: where it was computed. rows: of the computation, where it was merged with others; else 0.
    batch: what that computation is known as.
    """

    reply: Reply | MemberReply
    queued: float
    worker: str = ""
    rows: int = 0
    batch: Request | None = None


class Scheduler:
    """Hands jobs to workers: fair across callers, merged where they may be.

    Work-conserving: a worker that can take a job gets one at once, unless the model's operator had requests wait for
    others. A session's ops wait in the same queue, for places on the session's worker, and one at a time; so a session
    with thousands of ops in flight takes turns with everybody else.

    Belongs to one event loop.
    """

    def __init__(self, fleet: Fleet, policy: Policy, tally: Tally | None = None) -> None:
        self._fleet = fleet
        self._policy = policy
        self._tally = tally or Tally()
        self._admission = Admission(policy.limits)
        self._queue = FairQueue(policy.weights)
        self._costs = Costs()
        self._op_costs = OpCosts()
        self._merging = MergeRules(policy.merge)
        self._places = Places(fleet)
        self._quarantine = Quarantine(policy.quarantine_seconds)
        #: Calls in flight, by model and id.
        self._in_flight: Counter[Hashable] = Counter()
        self._background: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        fleet.on_change = self._dispatch

    @property
    def calls(self) -> int:
        """In flight."""
        return self._admission.calls

    @property
    def bytes(self) -> int:
        """Of the tensors of the calls in flight."""
        return self._admission.bytes

    @property
    def queued(self) -> int:
        """Jobs that wait for a worker."""
        return len(self._queue)

    @property
    def oldest(self) -> float:
        """Seconds that the job has waited which has waited longest."""
        since = self._queue.oldest()
        return 0.0 if since is None else time.monotonic() - since

    def in_flight(self, model: str, id: str) -> int:
        """Calls for one version of a model that have not been answered, by its id."""
        return self._in_flight[model, id]

    def forget(self, model: str, id: str) -> None:
        """Forgets what was learned of a model that is no more."""
        self._costs.forget((model, id))
        self._merging.forget((model, id))

    def unmerged(self, signature: Signature) -> str:
        """Why requests for a model are not merged, whatever its signature says; empty: nothing stands against it."""
        return self._merging.why_not((signature.name, signature.id))

    async def submit(
        self,
        job: Job,
        payloads: Sequence[Buffer],
        deadline: float,
        origin: Origin = NOBODY,
    ) -> Scheduled:
        """Computes a job on some worker.

        payloads: the bytes of the job's tensors; they must stay as they are until this returns, since a retry is
        computed from them.
        deadline: on the time.monotonic clock.
        origin: whose call it is.

        Cancelling the awaiting task abandons the job wherever it is.

        Raises Fault: OVERLOADED, QUARANTINED, DEADLINE_EXCEEDED, HARD_TIMEOUT, WORKER_LOST, or what the worker says of
        the job.
        """
        ticket = self._ticket(job, payloads, deadline, origin)
        self._admit(ticket)
        answered = False
        try:
            async with asyncio.timeout_at(deadline):
                await self._quarantine.check(job, payloads)
                found = await self._attempts(ticket, job, payloads)
            answered = True
            return found
        except Fault as fault:
            # A call that fails has been answered like any other.
            answered = fault.reason not in (Reason.OVERLOADED, Reason.QUARANTINED, Reason.DEADLINE_EXCEEDED)
            raise
        except TimeoutError:
            raise Fault(Reason.DEADLINE_EXCEEDED, "the deadline passed before the call was computed") from None
        finally:
            if answered:
                self._admission.rate.answered()
            self._leave(ticket)

    def _ticket(
        self, job: Job, payloads: Sequence[Buffer], deadline: float, origin: Origin, *, alone: bool = False
    ) -> Ticket:
        signature = self._fleet.signatures.get(job.model, {}).get(job.version)
        lane, rows = self._merging.lane(job, signature, alone=alone)
        kind = (job.model, job.version, job.kind, lane.max_rows > 1)
        cost = self._costs.estimate(kind, rows)
        size = sum(len(payload) for payload in payloads)
        return Ticket(lane, origin, kind, cost, time.monotonic(), deadline, job, payloads, rows, size)

    # Coming in and going out.

    def _admit(self, ticket: Ticket) -> None:
        """Raises Fault (OVERLOADED)."""
        admission = self._admission
        caller, size = ticket.origin.caller, ticket.size
        assert ticket.job is not None
        # A house that one caller fills is not closed to the others.
        while admission.full and self._make_room(admission.largest(caller)):
            pass
        while admission.bytes + size > admission.limits.bytes and self._make_room(admission.heaviest(caller, size)):
            pass
        admission.check(caller, ticket.job.model, size)
        admission.enter(caller, ticket.job.model, size)
        self._in_flight[ticket.job.model, ticket.job.version] += 1
        ticket.inside = True

    def _make_room(self, caller: str | None) -> bool:
        """Refuses the latest waiting call of a caller. Returns whether there was one."""
        victim = None if caller is None else self._queue.latest_call_of(caller)
        if victim is None:
            return False
        self._queue.out(victim)
        victim.turn.set_exception(
            self._admission.overloaded(
                f"the house is full, and others want in: {self._admission.calls} calls with {self._admission.bytes} "
                f"bytes are in flight, {self._admission.by_caller[caller or '']} of them of this caller",
                (self._admission.calls + 1) // 2,
            )
        )
        # Its task may have gone in this very turn, and will not ask.
        victim.turn.exception()
        self._leave(victim)
        return True

    def _leave(self, ticket: Ticket) -> None:
        if ticket.inside and ticket.model is not None:
            ticket.inside = False
            self._admission.leave(ticket.origin.caller, ticket.model, ticket.size)
            assert ticket.job is not None
            key = (ticket.job.model, ticket.job.version)
            self._in_flight[key] -= 1
            if not self._in_flight[key]:
                del self._in_flight[key]

    async def sit(self, deadline: float, models: Sequence[tuple[str, str]] = ()) -> tuple[Worker, Seat]:
        """A session's place: on the worker that has the fewest, of those that hold the models.

        models: none: of those that hold most.

        Raises Fault (NOT_READY; NOT_ON_SESSION_WORKER where no one worker holds them all).
        """
        while True:
            holding = [worker for worker in self._fleet.workers if all(worker.holds(*model) for model in models)]
            ready = [worker for worker in holding if worker.state is WorkerState.READY]
            if ready:
                worker = min(ready, key=lambda one: (-self._held(one), len(one.seats), self._places.load(one)))
                try:
                    return worker, worker.open()
                except WorkerLost:
                    # Its death is about to be told.
                    await asyncio.sleep(0)
                    continue
            if not holding:
                names = ", ".join(repr(name) for name, _ in models)
                raise Fault(Reason.NOT_ON_SESSION_WORKER, f"no worker holds all of {names}", "open.models")
            if time.monotonic() >= deadline:
                raise Fault(Reason.NOT_READY, "no worker is ready; they are starting", "", 1.0)
            await asyncio.sleep(_LOOK_AGAIN)

    def _held(self, worker: Worker) -> int:
        """How many models a worker holds."""
        signatures = self._fleet.signatures
        return sum(worker.holds(name, version) for name, versions in signatures.items() for version in versions)

    # A session's ops.

    def has_place_on(self, worker: Worker) -> bool:
        """Whether `place_on` would return at once."""
        return not self._queue and self._places.has_room(worker)

    async def place_on(self, worker: Worker, deadline: float, origin: Origin = NOBODY) -> Ticket:
        """Waits for a place on one worker, which `release` gives back. Raises Fault (DEADLINE_EXCEEDED)."""
        kind = ("op", worker.name, origin.caller)
        lane = Lane(("worker", worker.name), None, worker)
        ticket = Ticket(lane, origin, kind, self._op_costs.estimate(kind), time.monotonic(), deadline)
        self._queue.tag(ticket)
        if self.has_place_on(worker):
            self._places.take(worker, ticket.cost)
            return ticket
        try:
            async with asyncio.timeout_at(deadline):
                await self._turn(ticket)
        except TimeoutError:
            raise Fault(Reason.DEADLINE_EXCEEDED, "the op's time passed before a worker could take it") from None
        return ticket

    def release(self, worker: Worker, ticket: Ticket, seconds: float | None) -> None:
        """Gives an op's place back. seconds: that it computed, where that is known."""
        if seconds is not None:
            self._queue.settle(ticket, seconds)
            self._op_costs.observe(ticket.kind, seconds)
        self._release(worker, ticket.cost)

    def admit_upload(self, size: int) -> None:
        """Counts bytes that come in by chunks. Raises Fault (OVERLOADED)."""
        self._admission.check_bytes(size)
        self._admission.bytes += size

    def forget_upload(self, size: int) -> None:
        """They are with a worker, or were given up."""
        self._admission.bytes -= size

    # One job.

    async def _attempts(self, ticket: Ticket, job: Job, payloads: Sequence[Buffer]) -> Scheduled:
        victims = 0
        queued = 0.0
        self._queue.tag(ticket)
        while True:
            since = time.monotonic()
            turn = self._free_worker(ticket) or await self._queued(ticket, queued)
            queued += time.monotonic() - since
            try:
                if isinstance(turn, Share):
                    merged = turn.batch
                    return Scheduled(await turn.reply(), queued, merged.worker, merged.rows, merged.request)
                try:
                    reply = await turn.run(job, payloads, ticket.deadline, self._obituary(job, payloads))
                finally:
                    self._release(turn, ticket.cost)
                seconds = reply.timings["compute"]
                self._costs.observe(ticket.kind, ticket.rows, seconds)
                self._queue.settle(ticket, seconds)
                if splits := getattr(reply.outcome, "splits", 0):
                    self._tally.split(job.model, splits)
                return Scheduled(reply, queued, turn.name)
            except ComputeAlone:
                pass
            except WorkerLost as lost:
                alone = not isinstance(turn, Share)
                if lost.suspect:
                    victims += 1
                    if alone:
                        await self._blame(job, payloads, lost)
                if lost.overdue and alone:
                    raise Fault(Reason.HARD_TIMEOUT, f"model {job.model!r}: {lost}") from lost
                if victims >= VICTIMS:
                    # Also where the first one died of a batch, and it was not known of which member.
                    await self._quarantine.victim(job, payloads, VICTIMS)
                    raise Fault(
                        Reason.WORKER_LOST,
                        f"the worker died while it computed this call, and so did the one that retried it: {lost}",
                    ) from lost
                # The loop must get the chance to learn of the death before the next attempt picks a worker.
                await asyncio.sleep(0)
            ticket = self._anew(ticket, job, payloads)

    def _anew(self, ticket: Ticket, job: Job, payloads: Sequence[Buffer]) -> Ticket:
        """A ticket for computing a job again, alone, in its old place in the order."""
        again = self._ticket(job, payloads, ticket.deadline, ticket.origin, alone=True)
        # What its caller was charged is what is settled in the end.
        again.cost, again.arrived, again.rerun = ticket.cost, ticket.arrived, True
        again.tag, again.number, again.came = ticket.tag, ticket.number, ticket.came
        # The admission is that of the first ticket, which `submit` holds.
        again.model = None
        return again

    def _obituary(self, job: Job, payloads: Sequence[Buffer]) -> Callable[[WorkerLost], None]:
        """For the worker that dies of a call whose caller has gone: the next such call should be known."""

        def tell(lost: WorkerLost) -> None:
            self._do(self._blame(job, payloads, lost))

        return tell

    async def _blame(self, job: Job, payloads: Sequence[Buffer], lost: WorkerLost) -> None:
        self._tally.killed(job.model, "timeout" if lost.overdue else "died")
        await self._quarantine.victim(job, payloads)

    def _do(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs something that nobody waits for."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _queued(self, ticket: Ticket, queued: float) -> Worker | Share:
        """Waits for a turn. queued: seconds it has waited already.

        Raises Fault (OVERLOADED) when that takes, or will take, too long.
        """
        now = time.monotonic()
        limit = self._policy.limits.queue_seconds
        allowed = ticket.deadline - now if limit is None else min(ticket.deadline - now, limit - queued)
        # Who has been computed once, in vain, came in long ago.
        if not ticket.rerun and (expected := self._expected(ticket, allowed)) > allowed:
            raise self._admission.overloaded(
                f"{len(self._queue)} calls wait, and those before this one will take about {expected:.2f} s; it has "
                f"{allowed:.2f} s",
                len(self._queue),
            )
        try:
            if limit is None or now + limit - queued >= ticket.deadline:
                return await self._turn(ticket)
            try:
                async with asyncio.timeout_at(now + limit - queued):
                    return await self._turn(ticket)
            except TimeoutError:
                raise self._admission.overloaded(
                    f"no worker was free for {limit:g} s, as long as a call may wait", len(self._queue)
                ) from None
        except asyncio.CancelledError:
            # The caller went away, or its deadline passed.
            self._tally.dropped("queue")
            raise

    def _expected(self, ticket: Ticket, allowed: float) -> float:
        """Seconds until a ticket's turn comes, roughly; 0 where there is no doubt that it comes soon enough."""
        mine = self._places.holders(ticket.lane.model)
        if not mine or self._queue.cost / len(mine) <= allowed:
            return 0.0
        total = 0.0
        for lane, ahead in self._queue.ahead_of(ticket):
            if any(one is lane.worker if lane.model is None else one.holds(*lane.model) for one in mine):
                cost = sum(other.cost for other in ahead)
                if lane.max_rows > 1:
                    cost = min(cost, computations(lane, ahead) * self._costs.computation(ahead[0].kind))
                total += cost
        return total / len(mine)

    # Places and turns.

    def _free_worker(self, ticket: Ticket) -> Worker | None:
        """Reserves a place on the least busy worker, if nobody waits for one and there is one."""
        if self._queue or (ticket.lane.max_delay and ticket.lane.max_rows > ticket.rows):
            return None
        worker = self._places.least_busy(ticket)
        if worker is not None:
            self._places.take(worker, ticket.cost)
        return worker

    async def _turn(self, ticket: Ticket) -> Worker | Share:
        self._queue.push(ticket)
        # Those before it may wait for other workers.
        self._dispatch()
        try:
            turn: Worker | Share = await ticket.turn
            return turn
        except asyncio.CancelledError:
            # A turn may have come in the very turn of the loop in which the caller went away.
            self._queue.out(ticket)
            if not ticket.turn.cancelled() and ticket.turn.exception() is None:
                turn = ticket.turn.result()
                if isinstance(turn, Share):
                    turn.answer.cancel()
                    turn.batch.left(turn.index)
                else:
                    self._release(turn, ticket.cost)
            raise

    def _release(self, worker: Worker, cost: float) -> None:
        self._places.give_back(worker, cost)
        if self._queue:
            self._dispatch()
        elif self._places.idle:
            self._queue.idle()

    def _dispatch(self) -> None:
        while self._queue and self._places.any_free:
            now = time.monotonic()
            first: Ticket | None = None
            found: Worker | None = None
            for ticket in self._queue.firsts():
                if first is not None and not ticket < first:
                    continue
                worker = self._places.least_busy(ticket)
                if worker is not None and self._is_due(ticket, now):
                    first, found = ticket, worker
            if first is None or found is None:
                return
            self._serve(self._queue.instead_of(first), found)

    def _is_due(self, ticket: Ticket, now: float) -> bool:
        """Whether a ticket may be served now; where it should wait for others, sees to it that it is asked again."""
        lane = ticket.lane
        due = ticket.arrived + lane.max_delay
        if not lane.max_delay or lane.full or now >= due or ticket.rerun:
            return True
        loop = asyncio.get_running_loop()
        if self._timer is None or self._timer.when() > loop.time() + due - now:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_later(due - now, self._look_again)
        return False

    def _look_again(self) -> None:
        self._timer = None
        self._dispatch()

    def _serve(self, first: Ticket, worker: Worker) -> None:
        lane = first.lane
        merge = lane.max_rows > 1 and lane.model is not None and not self._merging.why_not(lane.model)
        tickets = lane.group() if merge else [first]
        self._queue.serve(tickets)
        if len(tickets) == 1:
            self._places.take(worker, first.cost)
            first.turn.set_result(worker)
            return
        shadow = random.randrange(len(tickets)) if random.random() < self._policy.shadow_share else -1
        batch = Merged(tickets, shadow)
        cost = sum(ticket.cost for ticket in tickets)
        self._places.take(worker, cost)
        batch.task = self._do(self._run_batch(batch, worker, cost))
        for ticket, share in zip(tickets, batch.shares, strict=True):
            ticket.turn.set_result(share)

    # Batches.

    async def _run_batch(self, batch: Merged, worker: Worker, cost: float) -> None:
        model = (batch.first.model, batch.first.version)
        with contextlib.ExitStack() as place:
            place.callback(self._release, worker, cost)
            try:
                computed = await batch.run(worker, lambda: bool(self._merging.why_not(model)), place.close)
                if isinstance(computed, WorkerLost):
                    if computed.suspect:
                        self._tally.killed(batch.first.model, "timeout" if computed.overdue else "died")
                elif computed is not None:
                    self._note(batch, computed)
            except asyncio.CancelledError:
                raise
            except Exception:
                logger.exception("a batch for model %r failed inside the server", batch.first.model)
            finally:
                batch.forget()

    def _note(self, batch: Merged, computed: Computed) -> None:
        outcome, first = computed.outcome, batch.first
        for ticket in batch.tickets:
            self._queue.settle(ticket, computed.seconds * ticket.rows / computed.rows)
        if outcome.merged:
            self._costs.observe(batch.tickets[0].kind, computed.rows, computed.seconds)
        self._tally.batch(
            first.model, computed.rows, outcome.merged, len(outcome.members) - outcome.merged - computed.left
        )
        if outcome.splits:
            self._tally.split(first.model, outcome.splits)
        for _ in range(computed.left):
            self._tally.dropped("worker")
        if outcome.refused and self._merging.refuse((first.model, first.version), outcome.refused):
            logger.error("model %r: its requests are not merged any more: %s", first.model, outcome.refused)
