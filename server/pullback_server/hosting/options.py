"""How a model is run: what an operator may choose besides what the model is. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

AUTOCAST = ("bfloat16", "float16")


def _positive(what: str, value: object, kinds: type | tuple[type, ...] = (int, float)) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{what} is {value!r}, expected a positive number")


@dataclass(frozen=True)
class Batching:
    """How requests of several callers are merged along the batch axis.

    enabled: False: never, although the rows are independent.
    max_rows: rows that one merged computation has at most; None: found at load, by timing growing batches.
    max_bytes: bytes of input tensors that one merged computation has at most.
    max_delay: seconds that a request may wait for others while a worker is free; 0: it never waits.
    pad_to: numbers of rows that a merged computation is padded to (the next larger one), for models whose code is
        compiled for a shape; empty: it is never padded.

    Raises ValueError for values that cannot be.
    """

    enabled: bool = True
    max_rows: int | None = None
    max_bytes: int = 64 << 20
    max_delay: float = 0.0
    pad_to: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_rows is not None:
            _positive("batching.max_rows", self.max_rows, int)
        _positive("batching.max_bytes", self.max_bytes, int)
        if isinstance(self.max_delay, bool) or not 0 <= self.max_delay < math.inf:
            raise ValueError(f"batching.max_delay is {self.max_delay!r}, expected seconds, 0 or more")
        for rows in self.pad_to:
            _positive("batching.pad_to", rows, int)
        object.__setattr__(self, "pad_to", tuple(sorted(set(self.pad_to))))


@dataclass(frozen=True)
class Compile:
    """A compiled plan for calls of first order; everything else runs as it is written.

    What comes of values that are not finite (NaN, infinities) may differ from what the model's own code makes of them.

    rows: extents of the batch axis to compile for, before the model is ready. Other extents run as written, unless
        `Batching.pad_to` brings them to one of these. Empty: the model has no batch axis and one shape.
    cuda_graphs: record CUDA graphs (torch.compile's mode "reduce-overhead"); does nothing on other devices.

    Raises ValueError for values that cannot be.
    """

    rows: tuple[int, ...] = ()
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        for rows in self.rows:
            _positive("compile.rows", rows, int)
        object.__setattr__(self, "rows", tuple(sorted(set(self.rows))))


@dataclass(frozen=True)
class GradientHealth:
    """What is counted of the health of a model's gradients.

    enabled: False: nothing; True: norms, zeros, NaN and infinities, unless the server was told to look at no model.
    vanishing_below, exploding_above: norms of a call's gradients, all of them together, that are counted as too small
        or too large. They depend on the cotangents that callers send. None: no norm is.

    Raises ValueError for values that cannot be.
    """

    enabled: bool = True
    vanishing_below: float | None = None
    exploding_above: float | None = None

    def __post_init__(self) -> None:
        for name in ("vanishing_below", "exploding_above"):
            if getattr(self, name) is not None:
                _positive(f"gradient_health.{name}", getattr(self, name))
        low, high = self.vanishing_below, self.exploding_above
        if low is not None and high is not None and low > high:
            raise ValueError(
                f"gradient_health.vanishing_below is {low}, expected at most exploding_above, which is {high}"
            )


@dataclass(frozen=True)
class Options:
    """How a model is run.

    batching: see `Batching`; it needs the model's batch_axis.
    compile: see `Compile`; None: no compiled plan.
    autocast: "bfloat16" or "float16": the forward runs under torch.autocast; None: in the model's own precision. Its
        outputs are of the types that the model then returns. Backwards run outside of it, and so does a loss, which is
        computed in the types of the outputs.
    checkpoint: globs of module names ("layers.*") whose activations are not kept for the backward but computed again
        there (torch.utils.checkpoint); of modules within one another, the outermost that match.
    micro_batch: rows that one forward and backward has at most; more are computed piece by piece, which takes less
        memory. Needs the model's batch_axis. None: never.
    hard_timeout: seconds of computing after which a call costs its worker; None: the server's own limit.
    devices: globs of workers ("cuda-0", "cpu-*") that may hold the model; empty: all of them.
    replicas: how many workers hold it; None: all that may.
    gradient_health: see `GradientHealth`.

    Raises ValueError for values that cannot be.
    """

    batching: Batching = field(default_factory=Batching)
    compile: Compile | None = None
    autocast: Literal["bfloat16", "float16"] | None = None
    checkpoint: tuple[str, ...] = ()
    micro_batch: int | None = None
    hard_timeout: float | None = None
    devices: tuple[str, ...] = ()
    replicas: int | None = None
    gradient_health: GradientHealth = field(default_factory=GradientHealth)

    def __post_init__(self) -> None:
        if self.autocast is not None and self.autocast not in AUTOCAST:
            raise ValueError(f"autocast is {self.autocast!r}, expected one of {', '.join(AUTOCAST)}")
        for name in ("checkpoint", "devices"):
            value: Sequence[str] = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(pattern, str) and pattern for pattern in value):
                raise ValueError(f"{name} is {value!r}, expected a list of globs")
            object.__setattr__(self, name, tuple(value))
        for name in ("micro_batch", "replicas"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name), int)
        if self.hard_timeout is not None:
            _positive("hard_timeout", self.hard_timeout)
