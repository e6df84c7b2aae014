"""What is known of a function at the last few points where somebody asked."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pullback._arrays import Array
from pullback._fork import gate

#: Points that are remembered, and how much memory they may take; the latest is always.
_POINTS, _BYTES = 8, 64 << 20


class Row(NamedTuple):
    """An output that is part of the residuals. name: empty: the only one."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    size: int


class Point:
    """What is known of the function at one x. None: not computed."""

    def __init__(self, x: Array) -> None:
        self.x = x
        self.key = x.tobytes()
        self.value: float | None = None
        self.gradient: Array | None = None
        self.hessian: Array | None = None
        self.residuals: Array | None = None
        self.jacobian: Array | None = None
        self.rows: Sequence[Row] = ()
        #: Whether its gradient was asked for, and whether there were products with its Hessian.
        self.asked = False
        self.products = False

    def nbytes(self) -> int:
        """Memory that it takes, about."""
        known = (self.x, self.gradient, self.hessian, self.residuals, self.jacobian)
        return len(self.key) + sum(array.nbytes for array in known if array is not None)


class Points:
    """The last few. Safe in many threads and in forked children."""

    def __init__(self) -> None:
        self._points: OrderedDict[bytes, Point] = OrderedDict()
        #: The latest three, in the order in which they came up.
        self._latest: list[Point] = []
        # By generation, so that no fork can leave one locked.
        self._locks: dict[int, threading.Lock] = {}

    def at(self, x: Array) -> Point:
        """The point at x, which is the caller's own no more."""
        fresh = Point(x)
        with self._locks.setdefault(gate.generation, threading.Lock()):
            point = self._points.setdefault(fresh.key, fresh)
            self._points.move_to_end(point.key)
            if point is fresh:
                self._latest = [*self._latest[-2:], point]
            held = sum(one.nbytes() for one in self._points.values())
            while len(self._points) > 1 and (len(self._points) > _POINTS or held > _BYTES):
                held -= self._points.popitem(last=False)[1].nbytes()
        return point

    def is_gradient_likely(self, point: Point) -> bool:
        """Whether the gradient will be asked for after the value.

        Most solvers nearly always want both, some the value alone while they search along a line, and some never want
        a gradient: what was wanted at the two points before tells.
        """
        before = self._before(point)
        return point.asked or not before or any(one.asked for one in before)

    def are_products_likely(self, point: Point) -> bool:
        """Whether products with its Hessian will be asked for."""
        return any(one.products for one in self._before(point))

    def _before(self, point: Point) -> list[Point]:
        return [one for one in self._latest if one is not point][-2:]
