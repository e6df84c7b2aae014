"""What computing takes, learned from what was computed."""

from __future__ import annotations

from collections.abc import Hashable

#: Seconds that a job takes of which nothing is known.
UNKNOWN = 1e-3
#: Share of the newest observation in an estimate.
_NEWEST = 0.3
#: Callers of sessions whose ops' costs are remembered.
_SESSIONS = 1024


class Costs:
    """Seconds of computing per row and per computation, by what is computed."""

    def __init__(self) -> None:
        self._per_row: dict[Hashable, float] = {}
        self._per_computation: dict[Hashable, float] = {}

    def estimate(self, what: Hashable, rows: int) -> float:
        """Seconds that `rows` rows will take."""
        return self._per_row.get(what, UNKNOWN) * rows

    def computation(self, what: Hashable) -> float:
        """Seconds that one computation takes, of as many rows as it usually has."""
        return self._per_computation.get(what, UNKNOWN)

    def observe(self, what: Hashable, rows: int, seconds: float) -> None:
        """`rows` rows, computed at once, took so long."""
        _learn(self._per_row, what, seconds / max(rows, 1))
        _learn(self._per_computation, what, seconds)

    def forget(self, model: tuple[str, str]) -> None:
        """Forgets what a model's jobs took, which are known by tuples that begin with its name and id."""
        for known in (self._per_row, self._per_computation):
            for what in [what for what in known if isinstance(what, tuple) and what[:2] == model]:
                del known[what]


def _learn(known: dict[Hashable, float], what: Hashable, found: float) -> None:
    # A first call is often slower than all that follow (libraries choose kernels, caches fill), and a slow estimate
    # would have calls refused: so estimates fall at once, and rise slowly.
    before = known.get(what)
    known[what] = found if before is None or found < before / 2 else before + _NEWEST * (found - before)


class OpCosts:
    """Seconds that ops of sessions compute, by caller and worker. Sessions come and go: the latest stay."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, float] = {}

    def estimate(self, whose: Hashable) -> float:
        """Of the next op."""
        return self._seconds.get(whose, UNKNOWN)

    def observe(self, whose: Hashable, seconds: float) -> None:
        """An op took so long."""
        self._seconds[whose] = (self._seconds.pop(whose, seconds) + seconds) / 2
        if len(self._seconds) > _SESSIONS:
            del self._seconds[next(iter(self._seconds))]
