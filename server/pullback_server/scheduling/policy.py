"""How jobs are scheduled, and what of that is worth counting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pullback_server.scheduling.admission import Limits


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
    """What happens that is worth counting. This one counts nothing."""

    def batch(self, model: str, rows: int, computed: int, alone: int) -> None:
        """A batch was computed: how many of its members at once, and how many alone after all."""

    def split(self, model: str, times: int) -> None:
        """Rows had to be split because memory ran out."""

    def dropped(self, where: str) -> None:
        """A call's time passed, or its caller left, before it was computed: in the "queue" or at the "worker"."""

    def killed(self, model: str, why: str) -> None:
        """A call cost its worker: "died" under it, or "timeout"."""
