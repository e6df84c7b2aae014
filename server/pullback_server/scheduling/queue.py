"""Who is next: fair across callers, whatever each of them has waiting.

Start-time fair queueing (Goyal, Vin, Cheng 1996). Each ticket gets a start tag S = max(V, F), F being the finish tag
S + cost / weight of the same flow's latest ticket, and V the start tag of what was served last; the smallest S goes
first. A flow with a thousand tickets waiting is so far ahead of the clock that another's first ticket goes before most
of them.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pullback_server.fleet.seam import Buffer, Worker
from pullback_server.job import Job

#: How much more of the workers' time the urgent calls of a caller get than its other ones.
URGENT_WEIGHT = 8.0
#: Given-up tickets that a lane may hold whatever else it holds.
_MANY = 64


class Origin(NamedTuple):
    """Where a call comes from. caller: whom it is counted for. urgent: it goes before the same caller's others."""

    caller: str = ""
    urgent: bool = False


#: Whose call it is where nobody says.
NOBODY = Origin()


class Ticket:
    """Somebody who waits. turn: done when it is his: see `Scheduler`."""

    __slots__ = (
        "arrived", "cost", "deadline", "job", "lane", "number", "origin", "payloads", "rows", "size", "tag", "turn",
    )  # fmt: skip

    def __init__(
        self,
        lane: Lane,
        origin: Origin,
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
        self.cost = cost
        self.arrived = arrived
        self.deadline = deadline
        self.job = job
        self.payloads = payloads
        self.rows = rows
        self.size = size
        self.tag = -1.0
        self.number = 0
        self.turn: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def __lt__(self, other: Ticket) -> bool:
        return (self.tag, self.number) < (other.tag, other.number)


class Lane:
    """Tickets that any of the same workers can take: in the order in which they are served.

    model: name and version that a worker must hold; worker: the only one that will do. One of them is None.
    max_rows, max_bytes: of tickets that are served together; max_rows 1: one by one.
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
        self._heap: list[Ticket] = []
        self._gone = 0

    def push(self, ticket: Ticket) -> None:
        heapq.heappush(self._heap, ticket)
        self.rows += ticket.rows

    def drop(self, ticket: Ticket) -> None:
        """A ticket was given up. It stays in the heap until it comes up, or until there are too many of its kind."""
        ticket.job, ticket.payloads = None, ()
        self._gone += 1
        if self._gone > _MANY and self._gone > len(self._heap) // 2:
            self._heap = [waiting for waiting in self._heap if not waiting.turn.done()]
            heapq.heapify(self._heap)
            self._gone = 0

    @property
    def head(self) -> Ticket | None:
        """The first that still waits."""
        heap = self._heap
        while heap and heap[0].turn.done():
            heapq.heappop(heap)
        return heap[0] if heap else None

    def pop(self) -> Ticket:
        """Takes the head out. Raises IndexError where nobody waits."""
        if self.head is None:
            raise IndexError("nobody waits")
        return heapq.heappop(self._heap)

    def group(self) -> list[Ticket]:
        """Takes out the head, and those after it that can be served with it."""
        first = self.pop()
        found, rows, size = [first], first.rows, first.size
        while (ticket := self.head) is not None:
            rows, size = rows + ticket.rows, size + ticket.size
            if rows > self.max_rows or size > self.max_bytes:
                break
            found.append(self.pop())
        return found


class FairQueue:
    """Everybody who waits. weights: shares of the workers' time by caller, 1 where none is given."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._lanes: dict[Hashable, Lane] = {}
        self._clock = 0.0
        self._finish: dict[Origin, float] = {}
        self._numbers = itertools.count()
        self._waiting: dict[str, dict[Ticket, None]] = {}
        self._count = 0
        #: Seconds of computing that wait.
        self.cost = 0.0

    def __len__(self) -> int:
        return self._count

    def lanes(self) -> Iterator[tuple[Lane, Ticket]]:
        """Every lane where somebody waits, and who is first there."""
        for lane in list(self._lanes.values()):
            head = lane.head
            if head is None:
                del self._lanes[lane.key]
            else:
                yield lane, head

    def oldest(self) -> float | None:
        """When the ticket arrived that has waited longest."""
        return min((t.arrived for tickets in self._waiting.values() for t in tickets), default=None)

    def push(self, ticket: Ticket) -> None:
        """Somebody waits. Who waits anew (his worker died) keeps his place."""
        if ticket.tag < 0:
            origin = ticket.origin
            weight = self._weights.get(origin.caller, 1.0) * (URGENT_WEIGHT if origin.urgent else 1.0)
            ticket.tag = max(self._clock, self._finish.get(origin, 0.0))
            self._finish[origin] = ticket.tag + ticket.cost / weight
            ticket.number = next(self._numbers)
        lane = self._lanes.setdefault(ticket.lane.key, ticket.lane)
        ticket.lane = lane
        lane.push(ticket)
        self._waiting.setdefault(ticket.origin.caller, {})[ticket] = None
        self._count += 1
        self.cost += ticket.cost

    def out(self, ticket: Ticket) -> None:
        """A ticket does not wait any more: it was served, or given up. Does nothing a second time."""
        theirs = self._waiting.get(ticket.origin.caller)
        if theirs is None or ticket not in theirs:
            return
        del theirs[ticket]
        if not theirs:
            del self._waiting[ticket.origin.caller]
        ticket.lane.rows -= ticket.rows
        self._count -= 1
        self.cost -= ticket.cost
        if not self._count:
            # Sums of floats drift; and where nobody waits, nobody is ahead of his time.
            self.cost = 0.0
            self._finish.clear()

    def served(self, ticket: Ticket) -> None:
        """A ticket was served: the clock is now where it started."""
        self.out(ticket)
        self._clock = max(self._clock, ticket.tag)

    def newest_of(self, caller: str) -> Ticket | None:
        """The ticket of a caller that came last."""
        theirs = self._waiting.get(caller)
        return next(reversed(theirs)) if theirs else None

    def forget(self, caller: str) -> None:
        """A caller has nothing here any more."""
        for urgent in (False, True):
            self._finish.pop(Origin(caller, urgent), None)
