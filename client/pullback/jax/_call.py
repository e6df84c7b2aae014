"""What a call is, known when JAX traces: which tensors go in, what comes out, and in which slots of a form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import jax.numpy as jnp
import numpy as np

from pullback._info import ModelInfo
from pullback._loss import Loss
from pullback._model import RemoteModel

Shape = tuple[int, ...]
#: For each operand, which of the mapped axes it has.
Masks = tuple[tuple[bool, ...], ...]
Slot = Literal["c", "u", "w"]


@dataclass(frozen=True)
class Point:
    """A tensor that a function is evaluated at.

    place: where it goes. shape, dtype: JAX's. wire: the dtype that is sent (integers may be widened on the way).
    batched: whether it has the model's batch axis, as it is sent.
    """

    place: Literal["input", "param", "target", "seed"]
    name: str
    shape: Shape
    dtype: np.dtype[np.generic]
    wire: np.dtype[np.generic]
    batched: bool = False

    @property
    def label(self) -> str:
        """Its name in wrt and tangents."""
        return f"{self.place}:{self.name}"


@dataclass(frozen=True)
class Out:
    """An output.

    name: None: it is the only one, and the server has not told what it is called.
    batched: whether it has the model's batch axis, as it comes.
    """

    name: str | None
    shape: Shape
    dtype: np.dtype[np.generic]
    batched: bool = False


@dataclass(frozen=True, eq=False)
class Call:
    """A function at points of known shapes. Compared by identity: JAX's caches have it in their keys.

    rows: the points are one row each, and so are the outputs: the batch axis is added on the way.
    axis: the model's batch axis; None: it has none.
    version: and revision of the model, whose signature this was made of.
    fixed_seed: that each call is sent where no point is a seed; None: the model draws nothing.
    cut: by what is asked, the outputs that were found not to depend on what is differentiated by; grows.
    """

    model: RemoteModel
    points: tuple[Point, ...]
    outs: tuple[Out, ...]
    loss: Loss | None
    train: bool
    rows: bool
    axis: int | None
    timeout: float | None
    concurrency: int
    version: tuple[str, int] = ("", 0)
    fixed_seed: int | None = None
    cut: dict[object, frozenset[int]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<{self.model.name}>"

    @property
    def seeded(self) -> bool:
        """Whether the last point is a seed."""
        return bool(self.points) and self.points[-1].place == "seed"

    @property
    def floating(self) -> tuple[int, ...]:
        """The outputs that can have tangents."""
        return tuple(index for index, out in enumerate(self.outs) if is_inexact(out.dtype))

    @property
    def scalar(self) -> bool:
        """Whether it is one real number, so that value and gradient are one call."""
        return (
            len(self.outs) == 1 and self.outs[0].shape == () and bool(jnp.issubdtype(self.outs[0].dtype, jnp.floating))
        )

    def of_slot(self, slot: Slot, indices: Sequence[int]) -> list[Out | Point]:
        """What vectors in a slot are shaped like."""
        return [self.outs[i] for i in indices] if slot == "c" else [self.points[i] for i in indices]


def is_inexact(dtype: np.dtype[np.generic]) -> bool:
    """Whether it is a floating or complex one."""
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def is_complex(dtype: np.dtype[np.generic]) -> bool:
    """Whether it is a complex one."""
    return bool(jnp.issubdtype(dtype, jnp.complexfloating))


@dataclass(frozen=True)
class Form:
    """A derivative as a multilinear form with one slot left open, which is the result.

    With the real pairing <a, b> = Re(sum a b), which is JAX's (no conjugate):
        first order    A(x)[c, u] = <c, J(x) u>
        second order   B(x)[c, u, w] = d/dh <c, J(x + h w) u> at h = 0
    An open slot holds the gradient of the form by that slot. So A with u open is the VJP of the cotangent c, with c
    open the JVP of the tangent u. B with w open is the HVP (the derivative of <VJP, u>), with u open the derivative of
    the VJP along w, with c open that of the JVP along w.

    c, u, w: indices of the outputs or points that the slots' vectors belong to; w None: first order.
    """

    c: tuple[int, ...]
    u: tuple[int, ...]
    w: tuple[int, ...] | None
    open: Slot

    def indices(self, slot: Slot) -> tuple[int, ...]:
        """What the vectors of a slot belong to."""
        return {"c": self.c, "u": self.u, "w": self.w or ()}[slot]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All of them, in order."""
        return ("c", "u") if self.w is None else ("c", "u", "w")

    @property
    def closed(self) -> tuple[Slot, ...]:
        """Those that operands fill, in the operands' order."""
        return tuple(slot for slot in self.slots if slot != self.open)

    def changed(self, indices: Mapping[Slot, tuple[int, ...]], open: Slot | None = None) -> Form:
        """With other indices of some slots, or another slot open."""
        return Form(indices.get("c", self.c), indices.get("u", self.u), indices.get("w", self.w), open or self.open)


def is_symmetric(info: ModelInfo) -> bool:
    """Whether B(x)[c, u, w] = B(x)[c, w, u] wherever the server computes it.

    Where torch's own operations alone make the graph, J is a true derivative, and the order of differentiation does not
    matter. A backward of the model's own need not be the derivative of anything. Those are proven at load and promise
    order 2, or are refused with each call. A model that was not probed promises order 1, and its second derivatives
    are computed where the graph of the call is torch's alone.
    """
    return info.max_order in (None, 1)


def second_order_refused(info: ModelInfo) -> str:
    """Why there is surely no second derivative; empty: the server decides with each call."""
    looked_at = any(check.name == "second" and check.outcome != "skipped" for check in info.checks)
    if info.max_order != 1 or not looked_at:
        return ""
    return f"model {info.name!r} promises first derivatives alone, and a second one is asked for; {info.order_evidence}"


def batched_inputs(info: ModelInfo) -> frozenset[str]:
    """The inputs that have the batch axis, by the rule that the server goes by when it proves that rows are apart."""
    axis = info.batch_axis
    if axis is None:
        return frozenset()
    shapes = {spec.name: spec.shape for spec in info.inputs}
    if all(shape is None for shape in shapes.values()):
        return frozenset(shapes)
    extents = [shape[axis] for shape in shapes.values() if shape is not None and len(shape) > axis]
    symbol = next((extent for extent in extents if isinstance(extent, str)), None)
    return frozenset(
        name
        for name, shape in shapes.items()
        if symbol is not None and shape is not None and shape.count(symbol) == 1 and shape.index(symbol) == axis
    )


def draws_nothing(info: ModelInfo) -> bool:
    """Whether it is known that the model gives the same twice, in eval mode and without a seed."""
    same = any(check.name == "determinism" and check.outcome in ("passed", "noted") for check in info.checks)
    # Rows that were proven independent were the same in every company.
    return same or info.max_batch_rows > 0


def size_of(shape: Shape) -> int:
    """How many elements."""
    return math.prod(shape)
