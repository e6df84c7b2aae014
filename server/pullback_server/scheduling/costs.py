"""What computing takes, learned from what was computed."""

from __future__ import annotations

from collections.abc import Hashable

#: Seconds that a job takes of which nothing is known.
UNKNOWN = 1e-3
#: Share of the newest observation in an estimate.
_NEWEST = 0.3


class Costs:
    """Seconds of computing per row (of a job whose rows are not counted: per job), by what is computed."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, float] = {}

    def estimate(self, what: Hashable, rows: int) -> float:
        """Seconds that `rows` rows will take."""
        return self._seconds.get(what, UNKNOWN) * rows

    def observe(self, what: Hashable, rows: int, seconds: float) -> None:
        """`rows` rows took so long."""
        found = seconds / rows
        known = self._seconds.get(what)
        # A first call is often slower than all that follow (libraries choose kernels, caches fill), and a slow estimate
        # would have calls refused: so estimates fall at once, and rise slowly.
        self._seconds[what] = found if known is None or found < known / 2 else known + _NEWEST * (found - known)
