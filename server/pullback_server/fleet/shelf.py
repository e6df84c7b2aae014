"""What all workers of a fleet hold besides the sources of its start, and where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pullback_server.fleet.seam import LoadFailure, Rehearsed
from pullback_server.hosting.items import Item
from pullback_server.job import Signature, Verdict

#: Deaths of workers while they loaded an item at their start, after which it is left out there.
_DEATHS = 2


@dataclass(frozen=True)
class Shelved:
    """An item that is in service, what its rehearsal found, and the names of the workers that should hold it."""

    item: Item
    rehearsed: Rehearsed
    workers: Sequence[str]


class Shelf:
    """The items in service, for the workers to come."""

    def __init__(self) -> None:
        self._items: dict[tuple[str, str], Shelved] = {}
        self._deaths: dict[tuple[str, str, str], int] = {}

    def put(self, shelved: Shelved) -> None:
        self._items[shelved.item.name, shelved.item.id] = shelved

    def take(self, model: str, id: str) -> Shelved | None:
        """Removes an item."""
        for key in [key for key in self._deaths if key[1:] == (model, id)]:
            del self._deaths[key]
        return self._items.pop((model, id), None)

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._items

    def signature(self, model: str, id: str) -> Signature | None:
        """What an item in service must be on every worker."""
        found = self._items.get((model, id))
        return None if found is None else found.rehearsed.signature

    def died(self, worker: str, model: str, id: str) -> None:
        """A worker died while it loaded an item at its start."""
        key = (worker, model, id)
        self._deaths[key] = self._deaths.get(key, 0) + 1

    def of(self, worker: str) -> list[tuple[Item, Verdict | None]]:
        """What a worker should load at its start."""
        return [
            (shelved.item, shelved.rehearsed.verdict)
            for (model, id), shelved in self._items.items()
            if worker in shelved.workers and self._deaths.get((worker, model, id), 0) < _DEATHS
        ]

    def missing(self, worker: str, held: Iterable[tuple[str, str]]) -> list[Shelved]:
        """What a worker should hold and does not."""
        present = set(held)
        return [
            shelved
            for key, shelved in self._items.items()
            if worker in shelved.workers and key not in present and self._deaths.get((worker, *key), 0) < _DEATHS
        ]


def chosen(item: Item, verdict: Verdict, counts: dict[str, tuple[bool, int]]) -> list[str]:
    """Names of the workers that should hold an item: of those that may, those that are there, with the fewest models.

    counts: whether each worker is away, and how many models it holds, by the workers' names in order.

    Raises LoadFailure where no worker may hold it.
    """
    devices = verdict.devices
    may = [name for name in counts if not devices or any(fnmatchcase(name, pattern) for pattern in devices)]
    if not may:
        raise LoadFailure(f"{item.owner}: devices={devices} matches none of the workers {', '.join(counts)}")
    # Sorting is stable: the first of those that hold equally many.
    return sorted(may, key=lambda name: counts[name])[: verdict.replicas]
