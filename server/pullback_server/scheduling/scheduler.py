"""The way of one job to a worker and back: admission, the queue, merging, retries."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pullback_server.faults import Fault
from pullback_server.fleet.seam import Buffer, Fleet, Reply, Seat, Worker, WorkerLost, WorkerState
from pullback_server.job import Job, Signature
from pullback_server.scheduling.admission import Admission, Limits
from pullback_server.scheduling.batches import ComputeAlone, Computed, MemberReply, Merged, Share
from pullback_server.scheduling.costs import UNKNOWN, Costs
from pullback_server.scheduling.merging import mergeable
from pullback_server.scheduling.quarantine import VICTIMS, Quarantine
from pullback_server.scheduling.queue import NOBODY, FairQueue, Lane, Origin, Ticket
from pullback_wire import Reason

logger = logging.getLogger(__name__)

#: Jobs a worker holds at most: one that computes and one whose bytes are already there when it ends.
STAGED = 2
#: A worker that will be busy for so many seconds gets no second job yet, since who is next may change until then; unless
#: the job brings so many bytes that writing them meanwhile is worth it.
_LONG, _LARGE = 0.02, 1 << 20
#: Seconds between looks for a worker that is ready.
_LOOK_AGAIN = 0.05


@dataclass
class Scheduled:
    """A computed job and how long it had waited, in seconds."""

    reply: Reply | MemberReply
    queued: float


@dataclass(frozen=True)
class Policy:
    """How jobs are scheduled.

    weights: shares of the workers' time by caller; 1 for those not named.
    merge: whether jobs are merged at all.
    shadow_share: share of merged computations of which one member is computed alone as well, and compared.
    quarantine_seconds: for how long a call that has killed workers is refused.
    """

    limits: Limits = field(default_factory=Limits)
    weights: Mapping[str, float] = field(default_factory=dict)
    merge: bool = True
    shadow_share: float = 0.0
    quarantine_seconds: float = 300.0


class Tally:
    """What happens here that is worth counting. This one counts nothing."""

    def batch(self, model: str, rows: int, computed: int, alone: int) -> None:
        """A batch was computed: how many of its members at once, and how many alone after all."""

    def split(self, model: str, times: int) -> None:
        """Rows had to be split because memory ran out."""

    def dropped(self, where: str) -> None:
        """A call's time passed, or its caller left, before it was computed: in the "queue" or at the "worker"."""

    def killed(self, model: str, why: str) -> None:
        """A call cost its worker: "died" under it, or "timeout"."""


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
        self._quarantine = Quarantine(policy.quarantine_seconds)
        # Places promised to jobs that may not have reached their worker yet. A worker's own count has these only from
        # then on, but it also has the abandoned ones.
        self._reserved: Counter[str] = Counter()
        #: Seconds of computing that are with each worker, as far as can be told.
        self._load_cost: defaultdict[str, float] = defaultdict(float)
        #: Models whose requests turned out not to be mergeable, whatever was declared and probed.
        self._unmergeable: dict[tuple[str, str], str] = {}
        self._batches: set[asyncio.Task[None]] = set()
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

    def unmerged(self, signature: Signature) -> str:
        """Why requests for a model are not merged, whatever its signature says; empty: nothing stands against it."""
        if not self._policy.merge:
            return "the server was started without batching"
        return self._unmergeable.get((signature.name, signature.version), "")

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
        size = sum(len(payload) for payload in payloads)
        self._admit(origin.caller, job.model, size)
        try:
            self._quarantine.check(job, payloads)
            async with asyncio.timeout_at(deadline):
                found = await self._attempts(job, payloads, size, deadline, origin)
            self._admission.rate.answered()
            return found
        except TimeoutError:
            raise Fault(Reason.DEADLINE_EXCEEDED, "the deadline passed before the call was computed") from None
        finally:
            if self._admission.leave(origin.caller, job.model, size):
                self._queue.forget(origin.caller)

    def _admit(self, caller: str, model: str, size: int) -> None:
        """Raises Fault (OVERLOADED)."""
        admission = self._admission
        victim = self._crowding(caller) if admission.full else None
        admission.check(caller, model, size, one_more=victim is not None)
        if victim is not None:
            victim.turn.set_exception(
                admission.overloaded(
                    f"{admission.calls} calls are in flight, {admission.by_caller[victim.origin.caller]} of them of "
                    "this caller, and others want in",
                    (admission.calls + 1) // 2,
                )
            )
            self._queue.out(victim)
            victim.lane.drop(victim)
        admission.enter(caller, model, size)

    def _crowding(self, caller: str) -> Ticket | None:
        """The latest call of the caller with the most, if that has more than this one would have.

        A house that one caller fills is not closed to the others.
        """
        counts = self._admission.by_caller
        biggest, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
        return self._queue.newest_of(biggest) if count > counts.get(caller, 0) + 1 else None

    async def sit(self, deadline: float, models: Sequence[tuple[str, str]] = ()) -> tuple[Worker, Seat]:
        """A session's place: on the worker that has the fewest, of those that hold the models.

        Raises Fault (NOT_READY; NOT_ON_SESSION_WORKER where no one worker holds them all).
        """
        while True:
            holding = [worker for worker in self._fleet.workers if all(worker.holds(*model) for model in models)]
            ready = [worker for worker in holding if worker.state is WorkerState.READY]
            if ready:
                worker = min(ready, key=lambda one: (len(one.seats), self._load(one)))
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

    def has_place_on(self, worker: Worker) -> bool:
        """Whether `place_on` would return at once."""
        return not self._queue and (worker.state is not WorkerState.READY or self._load(worker) < STAGED)

    async def place_on(self, worker: Worker, deadline: float, origin: Origin = NOBODY) -> None:
        """Waits for a place on one worker, which `release` gives back. Raises Fault (DEADLINE_EXCEEDED)."""
        if self.has_place_on(worker):
            self._reserve(worker, 0.0)
            return
        lane = Lane(("worker", worker.name), None, worker)
        ticket = Ticket(lane, origin, UNKNOWN, time.monotonic(), deadline)
        try:
            async with asyncio.timeout_at(deadline):
                await self._turn(ticket)
        except TimeoutError:
            raise Fault(Reason.DEADLINE_EXCEEDED, "the op's time passed before a worker could take it") from None

    def admit_upload(self, size: int) -> None:
        """Counts bytes that come in by chunks. Raises Fault (OVERLOADED)."""
        self._admission.check_bytes(size)
        self._admission.bytes += size

    def forget_upload(self, size: int) -> None:
        """They are with a worker, or were given up."""
        self._admission.bytes -= size

    # One job.

    def _lane(self, job: Job, signature: Signature | None) -> tuple[Lane, int]:
        """Where a job waits, and the rows it counts for."""
        model = (job.model, job.version)
        if signature is not None and self._policy.merge and model not in self._unmergeable:
            found = mergeable(job, signature)
            if found is not None:
                batch = signature.batch
                return Lane(found.key, model, None, batch.max_rows, batch.max_bytes, batch.max_delay), found.rows
        return Lane(("alone", model), model, None), 1

    async def _attempts(
        self, job: Job, payloads: Sequence[Buffer], size: int, deadline: float, origin: Origin
    ) -> Scheduled:
        victims = 0
        arrived = time.monotonic()
        queued = 0.0
        lane, rows = self._lane(job, self._fleet.signatures.get(job.model, {}).get(job.version))
        kind = (job.model, job.version, job.kind)
        cost = self._costs.estimate(kind, rows)
        ticket = Ticket(lane, origin, cost, arrived, deadline, job, payloads, rows, size)
        while True:
            since = time.monotonic()
            turn = self._free_worker(ticket) or await self._queued(ticket)
            queued += time.monotonic() - since
            try:
                if isinstance(turn, Share):
                    return Scheduled(await turn.reply(), queued)
                try:
                    reply = await turn.run(job, payloads, deadline)
                finally:
                    self._release(turn, cost)
                self._costs.observe(kind, rows, reply.timings["compute"])
                if splits := getattr(reply.outcome, "splits", 0):
                    self._tally.split(job.model, splits)
                return Scheduled(reply, queued)
            except ComputeAlone:
                pass
            except WorkerLost as lost:
                alone = not isinstance(turn, Share)
                if lost.overdue or lost.suspect:
                    victims += 1
                    if alone:
                        self._tally.killed(job.model, "timeout" if lost.overdue else "died")
                        self._quarantine.victim(job, payloads)
                if lost.overdue and alone:
                    raise Fault(Reason.HARD_TIMEOUT, f"model {job.model!r}: {lost}") from lost
                if victims >= VICTIMS:
                    if alone:
                        # Also where the first one died of a batch.
                        self._quarantine.victim(job, payloads, VICTIMS)
                    raise Fault(
                        Reason.WORKER_LOST,
                        f"the worker died while it computed this call, and so did the one that retried it: {lost}",
                    ) from lost
                # The loop must get the chance to learn of the death before the next attempt picks a worker.
                await asyncio.sleep(0)
            tag, number = ticket.tag, ticket.number
            lane, rows = self._lane(job, None)
            ticket = Ticket(lane, origin, cost, arrived, deadline, job, payloads, rows, size)
            ticket.tag, ticket.number = tag, number

    async def _queued(self, ticket: Ticket) -> Worker | Share:
        """Waits for a turn. Raises Fault (OVERLOADED) when that takes, or will take, too long."""
        limit = self._policy.limits.queue_seconds
        now = time.monotonic()
        allowed = ticket.deadline - now
        if limit is not None:
            allowed = min(allowed, limit - (now - ticket.arrived))
        workers = sum(worker.state is WorkerState.READY for worker in self._fleet.workers)
        expected = self._queue.cost / workers if workers else 0.0
        if expected > allowed:
            raise self._admission.overloaded(
                f"{len(self._queue)} calls wait, which will take about {expected:.2f} s; this one has {allowed:.2f} s",
                len(self._queue),
            )
        try:
            if limit is None or ticket.arrived + limit >= ticket.deadline:
                return await self._turn(ticket)
            try:
                async with asyncio.timeout_at(ticket.arrived + limit):
                    return await self._turn(ticket)
            except TimeoutError:
                raise self._admission.overloaded(
                    f"no worker was free for {limit:g} s, as long as a call may wait", len(self._queue)
                ) from None
        except asyncio.CancelledError:
            # The caller went away, or its deadline passed.
            self._tally.dropped("queue")
            raise

    # Places and turns.

    def _free_worker(self, ticket: Ticket) -> Worker | None:
        """Reserves a place on the least busy worker, if nobody waits for one and there is one."""
        if self._queue or (ticket.lane.max_delay and ticket.lane.max_rows > ticket.rows):
            return None
        worker = self._least_busy(ticket.lane, ticket)
        if worker is not None:
            self._reserve(worker, ticket.cost)
        return worker

    def _least_busy(self, lane: Lane, head: Ticket) -> Worker | None:
        """A worker with a place for the first that waits in a lane."""
        if lane.worker is not None:
            # A dead one too: what is sent there fails at once, and says why.
            worker = lane.worker
            return worker if worker.state is not WorkerState.READY or self._load(worker) < STAGED else None
        best: Worker | None = None
        least = (float("inf"), STAGED)
        for worker in self._fleet.workers:
            if worker.state is WorkerState.READY and worker.holds(*(lane.model or ("", ""))):
                load, cost = self._load(worker), self._load_cost[worker.name]
                if load and cost > _LONG and head.size < _LARGE:
                    continue
                if load < STAGED and (cost, load) < least:
                    best, least = worker, (cost, load)
        return best

    def _reserve(self, worker: Worker, cost: float) -> None:
        self._reserved[worker.name] += 1
        self._load_cost[worker.name] += cost

    def _load(self, worker: Worker) -> int:
        return max(worker.outstanding, self._reserved[worker.name])

    async def _turn(self, ticket: Ticket) -> Worker | Share:
        self._queue.push(ticket)
        # Those before it may wait for other workers.
        self._dispatch()
        try:
            turn: Worker | Share = await ticket.turn
            return turn
        except asyncio.CancelledError:
            # A turn may have come in the very turn of the loop in which the caller went away.
            if ticket.turn.cancelled() or ticket.turn.exception() is not None:
                self._queue.out(ticket)
                ticket.lane.drop(ticket)
            elif isinstance(turn := ticket.turn.result(), Share):
                turn.answer.cancel()
                turn.batch.left(turn.index)
            else:
                self._release(turn, ticket.cost if ticket.job is not None else 0.0)
            raise

    def release(self, worker: Worker) -> None:
        """Gives a place back."""
        self._release(worker, 0.0)

    def _release(self, worker: Worker, cost: float) -> None:
        self._reserved[worker.name] -= 1
        # Sums of floats drift; a worker without work costs nothing.
        self._load_cost[worker.name] = self._load_cost[worker.name] - cost if self._reserved[worker.name] else 0.0
        self._dispatch()

    def _dispatch(self) -> None:
        while self._queue:
            now = time.monotonic()
            first: Ticket | None = None
            best: tuple[Lane, Worker] | None = None
            for lane, head in self._queue.lanes():
                if first is not None and not head < first:
                    continue
                worker = self._least_busy(lane, head)
                if worker is not None and self._is_due(lane, head, now):
                    first, best = head, (lane, worker)
            if best is None:
                return
            self._serve(*best)

    def _is_due(self, lane: Lane, head: Ticket, now: float) -> bool:
        """Whether the head of a lane may be served now; where it should wait for others, sees to it that it is asked
        again."""
        due = head.arrived + lane.max_delay
        if not lane.max_delay or lane.rows >= lane.max_rows or now >= due:
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

    def _serve(self, lane: Lane, worker: Worker) -> None:
        tickets = lane.group() if lane.max_rows > 1 else [lane.pop()]
        for ticket in tickets:
            self._queue.served(ticket)
        if len(tickets) == 1:
            self._reserve(worker, tickets[0].cost if tickets[0].job is not None else 0.0)
            tickets[0].turn.set_result(worker)
            return
        shadow = random.randrange(len(tickets)) if random.random() < self._policy.shadow_share else -1
        batch = Merged(tickets, shadow)
        cost = sum(ticket.cost for ticket in tickets)
        self._reserve(worker, cost)
        first = tickets[0].job
        assert first is not None
        batch.task = asyncio.create_task(self._run_batch(batch, worker, first, cost))
        self._batches.add(batch.task)
        batch.task.add_done_callback(self._batches.discard)
        for ticket, share in zip(tickets, batch.shares, strict=True):
            ticket.turn.set_result(share)

    async def _run_batch(self, batch: Merged, worker: Worker, first: Job, cost: float) -> None:
        try:
            computed = await batch.run(worker)
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("a batch for model %r failed inside the server", first.model)
            return
        finally:
            self._release(worker, cost)
        if computed is not None:
            self._note(first, computed)

    def _note(self, first: Job, computed: Computed) -> None:
        outcome = computed.outcome
        self._costs.observe((first.model, first.version, first.kind), computed.rows, computed.seconds)
        self._tally.batch(
            first.model, computed.rows, outcome.merged, len(outcome.members) - outcome.merged - computed.left
        )
        if outcome.splits:
            self._tally.split(first.model, outcome.splits)
        for _ in range(computed.left):
            self._tally.dropped("worker")
        if outcome.refused and (first.model, first.version) not in self._unmergeable:
            self._unmergeable[first.model, first.version] = outcome.refused
            logger.error("model %r: its requests are not merged any more: %s", first.model, outcome.refused)
