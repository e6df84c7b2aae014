"""Who is next: fair across callers, whatever each of them has waiting.

Start-time fair queueing (Goyal, Vin, Cheng 1996). Each ticket gets a start tag S = max(V, F), F being the finish tag
S + cost / weight of the same caller's latest ticket, and V the start tag of what was served last; the smallest S goes
first. A caller with a thousand tickets waiting is so far ahead of the clock that another's first ticket goes before
most of them. Costs are estimates; when a ticket's true cost is known, the difference is charged to its caller.

A caller's urgent tickets go before its others: when one of its tags comes up, the first urgent one is served, and the
tag it had goes to the ticket that would have been. So urgency counts for nothing against other callers.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pullback_server import tracking
from pullback_server.fleet.seam import Buffer, Worker
from pullback_server.job import Job

#: Tickets that do not wait any more and that a heap may hold, whatever else it holds.
_MANY = 64
#: Finish tags that are kept before those are looked for that say nothing any more.
_FEW = 1024


class Origin(NamedTuple):
    """Where a call comes from. caller: whom it is counted for. urgent: it goes before the same caller's others."""

    caller: str = ""
    urgent: bool = False


#: Whose call it is where nobody says.
NOBODY = Origin()


class Ticket:
    """Somebody who waits. turn: done when it is his: see `Scheduler`. kind: what its cost is known by."""

    __slots__ = (
        "arrived", "came", "cost", "deadline", "inside", "job", "kind", "lane", "model", "number", "origin",
        "payloads", "request", "rerun", "rows", "size", "tag", "turn", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        lane: Lane,
        origin: Origin,
        kind: Hashable,
        cost: float,
        arrived: float,
        deadline: float,
        job: Job | None = None,
        payloads: Sequence[Buffer] = (),
        rows: int = 1,
        size: int = 0,
    ) -> None:
        self.lane = lane
        self.origin = origin
        self.kind = kind
        self.cost = cost
        self.arrived = arrived
        self.deadline = deadline
        self.job = job
        #: Under which it was admitted, if it was; whether it still counts.
        self.model = None if job is None else job.model
        self.inside = False
        #: Whether it is a call that was computed in vain before.
        self.rerun = False
        self.payloads = payloads
        #: For which it was made.
        self.request = tracking.current()
        self.rows = rows
        self.size = size
        self.tag = -1.0
        #: Of those with one tag the lower number goes first. `came`: the number it came with.
        self.number = self.came = 0
        self.waiting = False
        self.turn: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    @property
    def stands(self) -> bool:
        """Whether it waits and can be served: whoever was cancelled does not know it before his task runs."""
        return self.waiting and not self.turn.done()

    def __lt__(self, other: Ticket) -> bool:
        return (self.tag, self.number) < (other.tag, other.number)


class _Heap:
    """Tickets by tag. Entries that hold no more stay until they come up, or there are too many of them."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Ticket]] = []
        self._gone = 0

    def push(self, ticket: Ticket) -> None:
        heapq.heappush(self._entries, (ticket.tag, ticket.number, ticket))

    def gone(self) -> None:
        """An entry holds no more: its ticket does not wait, or has another tag."""
        self._gone += 1
        if self._gone > _MANY and self._gone > len(self._entries) // 2:
            self._entries = [entry for entry in self._entries if _holds(entry)]
            heapq.heapify(self._entries)
            self._gone = 0

    @property
    def first(self) -> Ticket | None:
        entries = self._entries
        while entries and not _holds(entries[0]):
            heapq.heappop(entries)
            self._gone = max(0, self._gone - 1)
        return entries[0][2] if entries else None

    def __iter__(self) -> Iterator[Ticket]:
        return (entry[2] for entry in self._entries if _holds(entry))

    def __len__(self) -> int:
        return len(self._entries)


def _holds(entry: tuple[float, int, Ticket]) -> bool:
    tag, number, ticket = entry
    return ticket.stands and ticket.number == number and ticket.tag == tag


class Lane:
    """Tickets that can be served together.

    model: name and version that a worker must hold; worker: the only one that will do. One of them is None.
    max_rows, max_bytes: of tickets that are served together; max_rows 1: they are served one by one.
    max_delay: seconds that the first may wait for others.
    """

    def __init__(
        self,
        key: Hashable,
        model: tuple[str, str] | None,
        worker: Worker | None,
        max_rows: int = 1,
        max_bytes: int = 0,
        max_delay: float = 0.0,
    ) -> None:
        self.key = key
        self.model = model
        self.worker = worker
        self.max_rows = max_rows
        self.max_bytes = max_bytes
        self.max_delay = max_delay
        self.rows = 0
        self.bytes = 0
        self.tickets = _Heap()

    @property
    def place(self) -> Hashable:
        """Equal for lanes whose tickets the same workers can take, at any time."""
        if self.worker is not None:
            return self.worker.name
        return (self.model, self.key) if self.max_delay else self.model

    @property
    def full(self) -> bool:
        """Whether there is as much as can be served together."""
        return self.rows >= self.max_rows or self.bytes >= self.max_bytes

    def group(self) -> list[Ticket]:
        """The first ticket, and those after it that can be served with it. They go on waiting."""
        found: list[Ticket] = []
        rows = size = 0
        for ticket in heapq.nsmallest(self.max_rows, self.tickets):
            rows, size = rows + ticket.rows, size + ticket.size
            if found and (rows > self.max_rows or size > self.max_bytes):
                break
            found.append(ticket)
        return found


class FairQueue:
    """Everybody who waits. weights: shares of the workers' time by caller, 1 where none is given."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._lanes: dict[Hashable, Lane] = {}
        self._places: dict[Hashable, _Heap] = {}
        self._clock = 0.0
        #: Finish tags by caller.
        self._finish: dict[str, float] = {}
        #: Callers of whom tickets wait that have not the tags they came with, or are urgent.
        self._reordered: set[str] = set()
        self._prune_at = _FEW
        self._numbers = itertools.count()
        self._waiting: dict[str, dict[Ticket, None]] = {}
        self._count = 0
        #: Seconds of computing that wait.
        self.cost = 0.0

    def __len__(self) -> int:
        return self._count

    def firsts(self) -> Iterator[Ticket]:
        """Who is first, of those that the same workers can take."""
        for place, heap in list(self._places.items()):
            first = heap.first
            if first is None:
                del self._places[place]
            else:
                yield first

    def ahead_of(self, ticket: Ticket) -> Iterator[tuple[Lane, list[Ticket]]]:
        """Who goes before a ticket that was tagged, lane by lane."""
        for lane in self._lanes.values():
            ahead = [other for other in lane.tickets if other < ticket]
            if ahead:
                yield lane, ahead

    def oldest(self) -> float | None:
        """When the ticket arrived that has waited longest. May be called from any thread."""
        return min((t.arrived for tickets in list(self._waiting.values()) for t in list(tickets)), default=None)

    def tag(self, ticket: Ticket) -> None:
        """Gives a ticket its place in the order; once."""
        caller = ticket.origin.caller
        ticket.tag = max(self._clock, self._finish.get(caller, 0.0))
        ticket.number = ticket.came = next(self._numbers)
        self._charge(caller, ticket.cost)

    def settle(self, ticket: Ticket, seconds: float) -> None:
        """A ticket has cost so much in truth."""
        self._charge(ticket.origin.caller, seconds - ticket.cost)

    def _charge(self, caller: str, cost: float) -> None:
        self._finish[caller] = max(self._clock, self._finish.get(caller, 0.0)) + cost / self._weights.get(caller, 1.0)
        if len(self._finish) > self._prune_at:
            # Who is not ahead of the clock begins where it stands.
            self._finish = {one: tag for one, tag in self._finish.items() if tag > self._clock}
            self._prune_at = max(_FEW, 2 * len(self._finish))

    def push(self, ticket: Ticket) -> None:
        """Somebody waits, who was tagged. Who waits anew (his worker died) keeps his place."""
        lane = ticket.lane = self._lanes.setdefault(ticket.lane.key, ticket.lane)
        ticket.waiting = True
        lane.tickets.push(ticket)
        lane.rows += ticket.rows
        lane.bytes += ticket.size
        self._places.setdefault(lane.place, _Heap()).push(ticket)
        self._waiting.setdefault(ticket.origin.caller, {})[ticket] = None
        if ticket.origin.urgent:
            self._reordered.add(ticket.origin.caller)
        self._count += 1
        self.cost += ticket.cost

    def out(self, ticket: Ticket) -> None:
        """A ticket does not wait any more: it was served, or given up. Does nothing a second time."""
        if not ticket.waiting:
            return
        ticket.waiting = False
        caller, lane = ticket.origin.caller, ticket.lane
        theirs = self._waiting[caller]
        del theirs[ticket]
        if not theirs:
            del self._waiting[caller]
            self._reordered.discard(caller)
        lane.rows -= ticket.rows
        lane.bytes -= ticket.size
        lane.tickets.gone()
        if not lane.rows:
            del self._lanes[lane.key]
        if (heap := self._places.get(lane.place)) is not None:
            heap.gone()
        self._count -= 1
        # Sums of floats drift; an empty queue costs nothing.
        self.cost = self.cost - ticket.cost if self._count else 0.0

    def instead_of(self, first: Ticket) -> Ticket:
        """Whose turn it is when a ticket comes up: that of the same caller which is urgent, or came before.

        They change tags, if it is another one.
        """
        caller = first.origin.caller
        if caller not in self._reordered:
            return first
        place = first.lane.place
        best = min(
            (ticket for ticket in self._waiting[caller] if ticket.lane.place == place and ticket.stands),
            key=lambda ticket: (not ticket.origin.urgent, ticket.came),
        )
        if best is not first:
            first.tag, first.number, best.tag, best.number = best.tag, best.number, first.tag, first.number
            for ticket in (first, best):
                for heap in (ticket.lane.tickets, self._places[place]):
                    heap.gone()
                    heap.push(ticket)
        return best

    def serve(self, tickets: Sequence[Ticket]) -> None:
        """Tickets are served together: the clock is now where the first of them started."""
        self._clock = max(self._clock, tickets[0].tag)
        for ticket in tickets:
            self.out(ticket)

    def idle(self) -> None:
        """Nobody waits and nothing is computed: nobody is ahead of his time."""
        self._finish.clear()

    def latest_call_of(self, caller: str) -> Ticket | None:
        """The call of a caller that came last; ops of sessions are none."""
        theirs = self._waiting.get(caller, {})
        return next((ticket for ticket in reversed(theirs) if ticket.job is not None and not ticket.turn.done()), None)


def computations(lane: Lane, tickets: Sequence[Ticket]) -> int:
    """In how many goes tickets of a lane will be served."""
    return math.ceil(sum(ticket.rows for ticket in tickets) / lane.max_rows) if lane.max_rows > 1 else len(tickets)
