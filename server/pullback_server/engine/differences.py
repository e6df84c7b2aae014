"""A derivative held against central differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

#: How well differences on both sides must agree with each other, and those of two steps, to say that something else is
#: wrong: relative to themselves, and to how far they are from it.
_CLEAR = 0.05
#: What is not told from zero. (Outputs and steps are made to be of the order of one.)
_NOTHING = 1e-10


@dataclass(frozen=True)
class Precision:
    """What differences can tell.

    steps: those of the differences, in order of trust. tolerance: how far a right derivative may be from a difference,
    relative to both. rounding: how far in units of the terms' sizes, for a step of 1. noisy: how far it may be where
    differences do not agree with each other any better.
    """

    steps: tuple[float, ...]
    tolerance: float
    rounding: float
    noisy: float


#: By the bytes of a real number. A kink within one step is not within a smaller one; a wrong derivative always differs.
DOUBLE = Precision((1e-5, 1e-6, 1e-4, 1e-7, 1e-3), 1e-6, 1e-14, 1e-3)
SINGLE = Precision((1e-2, 3e-2, 3e-3, 1e-1), 5e-3, 5e-6, 5e-3)


@dataclass(frozen=True)
class Slope:
    """What differences make of a derivative along a direction.

    right: True: it is the slope at some step. False: it is not, at two steps that agree with each
    other, on both sides of the point (which those around a kink, or in noise, do not). None: neither can be told;
    near: but it is about right.
    """

    right: bool | None
    step: float
    difference: float
    near: bool = False


def slope(expected: float, here: float, size: float, value: Callable[[float], float], precision: Precision) -> Slope:
    """Holds a derivative against differences of a function.

    expected: the derivative of `value` at 0, where it is `here`. size: of the terms that value adds up. value: may be
    NaN where nothing can be computed.
    """
    clear: list[tuple[float, float, float]] = []
    rough = Slope(None, math.nan, math.nan)
    for step in precision.steps:
        above, below = value(step), value(-step)
        central = (above - below) / (2 * step)
        if not math.isfinite(central):
            continue
        gap, noise = abs(central - expected), precision.rounding / step * size + _NOTHING
        if gap <= precision.tolerance * (abs(central) + abs(expected)) + noise:
            return Slope(True, step, central)
        if gap <= precision.noisy * (abs(central) + abs(expected) + precision.noisy * size):
            rough = Slope(None, step, central, near=True)
        # What comes to little next to a large gap may be noise all the same.
        close = min(_CLEAR * gap, _CLEAR * abs(central) + noise)
        if abs(above - 2 * here + below) / step <= close:
            clear.append((step, central, close))
    for step, central, close in clear:
        if any(abs(central - other) <= close for at, other, _ in clear if at != step):
            return Slope(False, step, central)
    return rough
