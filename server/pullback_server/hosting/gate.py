"""What must be shown of a model before it is served. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: gradient: the VJP is the derivative (finite differences in double precision). second: so is the HVP that of the VJP,
#: where second order is promised. rows: those of the declared batch axis do not depend on each other. determinism: the
#: same call with the same seed gives the same. purity: in eval mode a call leaves no trace in what comes after it.
CHECKS = ("gradient", "second", "rows", "determinism", "purity")


@dataclass(frozen=True)
class Gate:
    """Which checks a model must pass to be loaded.

    enabled: None: where the source is Python and every input that must be given declares its shape. False: no check
        but that of rows, which merging rests on.
    intended: checks that the model fails on purpose, each with the reason: {"gradient": "straight-through: rounds
        forward, passes the gradient on unchanged"}. Of a model made of torch's own modules alone, "gradient" or
        "second" is refused where it passes all the same; of others it is kept, for samples cannot show that it is
        never true. "gradient" covers second derivatives as well.
    points: random inputs at which derivatives are compared.
    seconds: what may be spent on all of it but rows; what was not reached by then is reported as skipped.

    Raises ValueError for values that cannot be.
    """

    enabled: bool | None = None
    intended: Mapping[str, str] = field(default_factory=dict)
    points: int = 2
    seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, reason in self.intended.items():
            if name not in CHECKS:
                raise ValueError(f"intended names {name!r}, expected one of {', '.join(CHECKS)}")
            if not isinstance(reason, str) or not reason.strip():
                raise ValueError(f"intended[{name!r}] is {reason!r}, expected the reason in words")
        if isinstance(self.points, bool) or not isinstance(self.points, int) or self.points < 1:
            raise ValueError(f"points is {self.points!r}, expected 1 or more")
        if isinstance(self.seconds, bool) or not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds!r}, expected more than 0")
        object.__setattr__(self, "intended", dict(self.intended))
