"""What each worker has to do at present, and which has a place for more."""

from __future__ import annotations

from collections import Counter, defaultdict

from pullback_server.fleet.seam import Fleet, Worker, WorkerState
from pullback_server.scheduling.queue import Ticket

#: Jobs a worker holds at most: one that computes and one whose bytes are already there when it ends.
STAGED = 2
#: A worker that will be busy for so many seconds gets no second job yet, since who is next may change until then;
#: unless the job brings so many bytes that writing them meanwhile is worth it.
_LONG, _LARGE = 0.005, 1 << 20


class Places:
    """Promises places on workers, and counts them."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        # Places promised to jobs that may not have reached their worker yet. A worker's own count has these only from
        # then on, but it also has the abandoned ones.
        self._reserved: Counter[str] = Counter()
        #: Seconds of computing that are with each worker, as far as can be told.
        self._cost: defaultdict[str, float] = defaultdict(float)

    @property
    def idle(self) -> bool:
        """Whether no place is taken."""
        return not any(self._reserved.values())

    @property
    def any_free(self) -> bool:
        """Whether any worker may have a place for anything."""
        return any(self.has_room(worker) for worker in self._fleet.workers)

    def load(self, worker: Worker) -> int:
        """Jobs that a worker has, or was promised."""
        return max(worker.outstanding, self._reserved[worker.name])

    def has_room(self, worker: Worker) -> bool:
        """Whether a worker has a place for what can go nowhere else.

        A dead one too: what is sent there fails at once, and says why.
        """
        return worker.state is not WorkerState.READY or (self.load(worker) < STAGED and not worker.busy_changing)

    def take(self, worker: Worker, cost: float) -> None:
        """A place is promised to something that computes for so many seconds."""
        self._reserved[worker.name] += 1
        self._cost[worker.name] += cost

    def give_back(self, worker: Worker, cost: float) -> None:
        """What `take` took."""
        self._reserved[worker.name] -= 1
        # Sums of floats drift; a worker without work costs nothing.
        self._cost[worker.name] = self._cost[worker.name] - cost if self._reserved[worker.name] else 0.0

    def holders(self, model: tuple[str, str] | None) -> list[Worker]:
        """The workers that are ready and hold a model."""
        name, version = model or ("", "")
        return [one for one in self._fleet.workers if one.state is WorkerState.READY and one.holds(name, version)]

    def least_busy(self, ticket: Ticket) -> Worker | None:
        """The worker with a place for a ticket that has the least to do."""
        lane = ticket.lane
        if lane.worker is not None:
            return lane.worker if self.has_room(lane.worker) else None
        best: Worker | None = None
        least = (1, float("inf"), STAGED)
        for worker in self.holders(lane.model):
            if worker.busy_changing:
                continue
            load, cost = self.load(worker), self._cost[worker.name]
            # Of what it still computes for somebody who has gone, nothing is known.
            abandoned = worker.outstanding > self._reserved[worker.name]
            if (
                load >= STAGED
                or worker.busy_changing
                or (load and (cost > _LONG or abandoned) and ticket.size < _LARGE)
            ):
                continue
            if (busy := (int(abandoned), cost, load)) < least:
                best, least = worker, busy
        return best
