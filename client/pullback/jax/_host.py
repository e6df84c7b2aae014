"""What runs outside of JAX: a primitive's numpy operands go to the server, in as few calls as can be.

Nothing here touches JAX's arrays: inside a callback that can wait for ever on a device that waits for the callback.
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pullback import errors
from pullback._arrays import Array
from pullback._info import ModelInfo
from pullback.jax._call import Call, Masks, Shape, batched_inputs, is_symmetric
from pullback.jax._wire import Once, dense_hvp, dense_jvp, once


@dataclass(frozen=True)
class Ask:
    """What a primitive wants, known when JAX traces. Its operands: the points, c by `pulled`, u by `moved`.

    evaluate: all outputs. value_and_grad: the output, and the gradient by `wrt`. vjp: the gradients by `wrt`.
    jvp: the tangents of the outputs `wrt`. hvp: the derivatives of <VJP, u> by `wrt`.
    symmetric: the result is right only where second derivatives are symmetric.
    """

    kind: Literal["evaluate", "value_and_grad", "vjp", "jvp", "hvp"]
    wrt: tuple[int, ...] = ()
    pulled: tuple[int, ...] = ()
    moved: tuple[int, ...] = ()
    symmetric: bool = False

    def like(self, call: Call) -> list[tuple[Shape, np.dtype[np.generic]]]:
        """Shapes and dtypes of the results, without mapped axes."""
        points = [(call.points[i].shape, call.points[i].dtype) for i in self.wrt] if self.kind != "jvp" else []
        every = range(len(call.outs)) if self.kind in ("evaluate", "value_and_grad") else ()
        outs = [(call.outs[i].shape, call.outs[i].dtype) for i in (self.wrt if self.kind == "jvp" else every)]
        return outs + points

    def bases(self, call: Call) -> list[Shape]:
        """Shapes of the operands, without mapped axes."""
        return [
            *(point.shape for point in call.points),
            *(call.outs[i].shape for i in self.pulled),
            *(call.points[i].shape for i in self.moved),
        ]


def execute(call: Call, ask: Ask, sizes: Shape, masks: Masks, operands: Sequence[Array]) -> list[Array]:
    """The results, each with all mapped axes in front.

    Raises PullbackError, TypeError for an answer of another shape or dtype than was announced.
    """
    like = ask.like(call)
    if 0 in sizes:
        return [np.zeros((*sizes, *shape), dtype) for shape, dtype in like]
    for _ in range(3):
        info = call.model.info
        if ask.symmetric and not is_symmetric(info):
            raise errors.OrderUnavailable(
                f"model {info.name!r} was replaced by one with a backward of its own, for which this function was not "
                "traced; call jax.clear_caches()"
            )
        if (info.version, info.revision) != call.version:
            _check_axis(call, info)
        results = _Plan(call, ask, info, sizes, masks).run(operands)
        now = call.model.info
        if (now.version, now.revision) == (info.version, info.revision):
            return results
    raise errors.Aborted(f"model {call.model.name!r} is being replaced again and again")


class _Plan:
    """Which of the mapped axes are gone through one by one, which are folded into rows, and which are cotangents."""

    def __init__(self, call: Call, ask: Ask, info: ModelInfo, sizes: Shape, masks: Masks) -> None:
        self.call, self.ask, self.info = call, ask, info
        self.sizes, self.masks = sizes, masks
        every = range(len(sizes))
        points = len(call.points)
        # An axis that no point has maps vectors alone.
        vectors = [axis for axis in every if not any(mask[axis] for mask in masks[:points])]
        self.cotangents = vectors if ask.kind == "vjp" else []
        rest = [axis for axis in every if axis not in self.cotangents]
        shared = [not batched for batched in self._batched()]
        foldable = _rows_are_independent(call, info) and not (ask.kind != "jvp" and any(shared[i] for i in ask.wrt))
        self.folded = [
            axis
            for axis in rest
            if foldable and not any(mask[axis] and alone for mask, alone in zip(masks, shared, strict=True))
        ]
        self.looped = [axis for axis in rest if axis not in self.folded]
        #: Of those gone through one by one, the ones that a dense derivative would do at once.
        self.dense = [axis for axis in self.looped if axis in vectors] if ask.kind in ("jvp", "hvp") else []

    def _batched(self) -> list[bool]:
        call, ask = self.call, self.ask
        return [
            *(point.batched for point in call.points),
            *(call.outs[i].batched for i in ask.pulled),
            *(call.points[i].batched for i in ask.moved),
        ]

    def _size(self, axes: Sequence[int]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def run(self, operands: Sequence[Array]) -> list[Array]:
        """All results. Raises PullbackError, TypeError."""
        bases = self.ask.bases(self.call)
        # Every mapped axis in each operand, of extent 1 where it is not mapped.
        wide = [
            operand.reshape((*(n if on else 1 for n, on in zip(self.sizes, mask, strict=True)), *base))
            for operand, mask, base in zip(operands, self.masks, bases, strict=True)
        ]
        if self._size(self.dense) > 1:
            found = self._densely(wide, bases)
            if found is not None:
                return found
        return self._gather(self.looped, [*self.cotangents, *self.folded], lambda at: self._once(wide, bases, at))

    def _gather(
        self, looped: list[int], inner: list[int], compute: Callable[[dict[int, int]], list[Array]]
    ) -> list[Array]:
        """What `compute` gives for each place on the looped axes, whose results have the inner ones in front."""
        places = list(_places(looped, self.sizes))
        parts = _at_once(compute, places, self.call.concurrency)
        order = [*looped, *inner]
        back = [order.index(axis) for axis in range(len(order))]
        results = []
        for each, (shape, dtype) in zip(zip(*parts, strict=True), self.ask.like(self.call), strict=True):
            if len(each) == 1:
                (whole,) = each
            else:
                whole = np.empty((len(each), *(self.sizes[axis] for axis in inner), *shape), dtype)
                for place, part in enumerate(each):
                    whole[place] = part.reshape(whole.shape[1:])
            whole = whole.reshape((*(self.sizes[axis] for axis in order), *shape))
            results.append(np.asarray(whole.transpose((*back, *range(len(order), whole.ndim))), order="C"))
        return results

    def _once(self, wide: list[Array], bases: list[Shape], at: dict[int, int]) -> list[Array]:
        """One call: at a place on the looped axes, the folded ones as rows, the cotangents' as batched cotangents."""
        call, ask = self.call, self.ask
        rows = self._size(self.folded) if self.folded or call.rows else None
        count = self._size(self.cotangents) if self.cotangents else None
        pulled = range(len(call.points), len(call.points) + len(ask.pulled))
        batched = self._batched()
        taken = []
        for index, (operand, base) in enumerate(zip(wide, bases, strict=True)):
            axes = [*(self.cotangents if index in pulled else ()), *(self.folded if batched[index] else ())]
            part = _take(operand, at, axes, self.sizes, len(base))
            lead = ([count] if count is not None and index in pulled else []) + (
                [rows] if rows is not None and batched[index] else []
            )
            taken.append(part.reshape((*lead, *base)))
        return once(Once(call, ask.kind, ask.wrt, ask.pulled, ask.moved, rows, count), taken)

    def _densely(self, wide: list[Array], bases: list[Shape]) -> list[Array] | None:
        """By one dense derivative for all vectors at a point; None: that is not possible, or not worth it."""
        call, ask = self.call, self.ask
        if call.rows or self.folded:
            return None
        outer = [axis for axis in self.looped if axis not in self.dense]
        count = self._size(self.dense)
        first = len(call.points)

        def compute(at: dict[int, int]) -> list[Array]:
            taken = []
            for index, (operand, base) in enumerate(zip(wide, bases, strict=True)):
                axes = self.dense if index >= first else []
                part = _take(operand, at, axes, self.sizes, len(base))
                taken.append(part.reshape((*([count] if index >= first else []), *base)))
            task = Once(call, ask.kind, ask.wrt, ask.pulled, ask.moved, None, count)
            return dense(task, taken)

        dense = dense_jvp if ask.kind == "jvp" else dense_hvp
        if not Once(call, ask.kind, ask.wrt, ask.pulled, ask.moved, None, count).dense_pays(self.info):
            return None
        try:
            return self._gather(outer, self.dense, compute)
        except errors.ResultTooLarge:
            return None


def _check_axis(call: Call, info: ModelInfo) -> None:
    """Raises Aborted where another version has its rows elsewhere than the one that the call was made for."""
    batched = {point.name for point in call.points if point.place == "input" and point.batched}
    given = {point.name for point in call.points if point.place == "input"}
    if info.batch_axis != call.axis or batched != batched_inputs(info) & given:
        raise errors.Aborted(
            f"model {info.name!r} was replaced by one with another batch axis, for which this function was not traced; "
            "call jax.clear_caches()"
        )


def _rows_are_independent(call: Call, info: ModelInfo) -> bool:
    """Whether rows of several points may go through the model together, as the server has proven and as it does."""
    axis = info.batch_axis
    if axis is None or info.max_batch_rows == 0 or call.train or call.seeded:
        return False
    if call.loss is not None or any(point.place == "input" and not point.batched for point in call.points):
        return False
    if call.rows:
        return True
    extents = {point.shape[axis] for point in call.points if point.batched}
    return len(extents) == 1 and all(len(out.shape) > axis and out.shape[axis] in extents for out in call.outs)


def _places(axes: Sequence[int], sizes: Shape) -> Iterator[dict[int, int]]:
    for place in np.ndindex(*(sizes[axis] for axis in axes)):
        yield dict(zip(axes, place, strict=True))


def _take(operand: Array, at: dict[int, int], axes: Sequence[int], sizes: Shape, rank: int) -> Array:
    """Its part at a place, with `axes` in front, in this order and in full."""
    mapped = operand.ndim - rank
    index = tuple(
        slice(None) if axis in axes else (at.get(axis, 0) if operand.shape[axis] > 1 else 0) for axis in range(mapped)
    )
    part = operand[index]
    left = sorted(axes)
    part = part.transpose((*(left.index(axis) for axis in axes), *range(len(axes), part.ndim)))
    return np.broadcast_to(part, (*(sizes[axis] for axis in axes), *part.shape[len(axes) :]))


def _at_once(
    compute: Callable[[dict[int, int]], list[Array]], places: list[dict[int, int]], limit: int
) -> list[list[Array]]:
    """At several places at once, by threads. The first failure is raised when those that run have ended."""
    if len(places) == 1 or limit == 1:
        return [compute(place) for place in places]
    with ThreadPoolExecutor(min(limit, len(places)), thread_name_prefix="pullback-jax") as pool:
        futures = [pool.submit(contextvars.copy_context().run, compute, place) for place in places]
        try:
            # Whichever fails first, those that have not begun are in vain.
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future for future in done if future.exception() is not None]
            return [future.result() for future in (failed or futures)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
