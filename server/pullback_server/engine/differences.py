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
    #: Steps at which what seems wrong is looked at once more: it may go up and down within the others.
    finer: tuple[float, ...] = ()


#: By the bytes of a real number. A kink within one step is not within a smaller one; a wrong derivative always differs.
DOUBLE = Precision((1e-5, 1e-6, 1e-4, 1e-7, 1e-3), 1e-6, 1e-14, 1e-3, (1e-8, 1e-9))
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


#: What is off by so many tolerances at most is not called wrong.
_LITTLE = 30
#: A step of fewer units of the last place of what it moves is none.
_UNITS = 20
#: Next to a derivative by this much, differences are flat where single precision cannot show it.
_STAIR = 2.0**-22


def slope(
    expected: float,
    here: float,
    size: float,
    value: Callable[[float], float],
    precision: Precision,
    blur: float = 0.0,
    grain: float = 0.0,
) -> Slope:
    """Holds a derivative against differences of a function.

    expected: the derivative of `value` at 0, where it is `here`. size: of the terms that value adds up. value: may be
    NaN where nothing can be computed. blur: how far differences may be off since what is moved is rounded, for a step
    of 1. grain: the step that is one unit of the last place of what is moved.
    """
    clear: list[tuple[float, float, float]] = []
    rough = Slope(None, math.nan, math.nan)
    smallest_move = math.inf
    for step in precision.steps:
        if step < _UNITS * grain:
            continue
        above, below = value(step), value(-step)
        central = (above - below) / (2 * step)
        if not math.isfinite(central):
            continue
        if above != below or above != here:
            smallest_move = min(smallest_move, step)
        gap, noise = abs(central - expected), precision.rounding / step * size + _NOTHING
        if gap <= precision.tolerance * (abs(central) + abs(expected)) + noise + blur / step:
            return Slope(True, step, central)
        if gap <= precision.noisy * (abs(central) + abs(expected) + precision.noisy * size):
            rough = Slope(None, step, central, near=True)
        # What comes to little next to a large gap may be noise all the same.
        # Code that computes in single precision, where nobody sees it, is a staircase of steps as wide as these.
        if above == below and abs(expected) * step <= _STAIR * size:
            continue
        # So little may come of a solver that stops where it is near enough.
        if gap <= _LITTLE * precision.tolerance * (abs(central) + abs(expected)):
            continue
        close = min(_CLEAR * gap, _CLEAR * abs(central) + noise)
        if abs(above - 2 * here + below) / step <= close:
            clear.append((step, central, close))
    # What is flat for small steps alone is a staircase as well.
    if smallest_move <= precision.steps[:3][-1]:
        clear = [(step, central, close) for step, central, close in clear if central]
    for step, central, close in clear:
        if any(abs(central - other) <= close for at, other, _ in clear if at != step):
            waves = [_central(value, finer) for finer in precision.finer if finer >= _UNITS * grain]
            near = any(abs(one - expected) <= _CLEAR * abs(one - central) for one in waves)
            return rough if near else Slope(False, step, central)
    return rough


def _central(value: Callable[[float], float], step: float) -> float:
    return (value(step) - value(-step)) / (2 * step)
