"""Shapes and dtypes: of what is given, held against the model's signature; and of what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pullback import errors
from pullback._arrays import Array, is_array
from pullback._info import ModelInfo, TensorInfo
from pullback._loss import Loss
from pullback._model import RemoteModel
from pullback.jax._call import Out, Point
from pullback_wire import numpy_dtype
from pullback_wire.dtypes import dtype_number

Outputs = Any

_X64 = "jax.config.update('jax_enable_x64', True) turns 64 bits on"


def as_jax(value: Any, what: str, spec: TensorInfo | None) -> jax.Array:
    """A JAX array (or tracer) of `value`, without rounding. Numbers take the dtype that the spec declares.

    Raises TypeError for what is no array, and for 64 bits where JAX has them turned off.
    """
    wanted = None if spec is None or spec.dtype is None else numpy_dtype(dtype_number(spec.dtype))
    if isinstance(value, jax.Array):
        # Weakly typed: made of a Python number, whose dtype was left open.
        return _follow(value, wanted) if getattr(value, "weak_type", False) else value
    if not (is_array(value) or isinstance(value, np.generic | bool | int | float | complex | list | tuple)):
        raise TypeError(f"{what} is a {type(value).__name__}, expected an array or a number")
    if isinstance(value, list | tuple):
        value = jnp.asarray(value)
        return _follow(value, wanted)
    if isinstance(value, bool | int | float | complex):
        return _follow(jnp.asarray(value), wanted)
    array = np.asarray(value)
    kept = jax.dtypes.canonicalize_dtype(array.dtype)
    if kept != array.dtype:
        if array.dtype.kind in "iu" and bool((array.astype(kept).astype(array.dtype) == array).all()):
            return jnp.asarray(array.astype(kept))
        raise TypeError(f"{what} is {array.dtype}, and JAX would make it {kept}; {_X64}")
    return jnp.asarray(array)


def _follow(value: jax.Array, wanted: np.dtype[Any] | None) -> jax.Array:
    if wanted is None or value.dtype == wanted or jax.dtypes.canonicalize_dtype(wanted) != wanted:
        return value
    kinds = (jnp.integer, jnp.floating, jnp.complexfloating)
    if jnp.issubdtype(value.dtype, jnp.bool_) or jnp.issubdtype(wanted, jnp.bool_):
        return value
    have, want = (next(i for i, kind in enumerate(kinds) if jnp.issubdtype(d, kind)) for d in (value.dtype, wanted))
    return value.astype(wanted) if have <= want else value


def point(
    place: Literal["input", "param", "target"],
    name: str,
    value: jax.Array,
    spec: TensorInfo | None,
    batched: bool,
    rows: bool,
    axis: int | None,
    extents: dict[str, int],
) -> Point:
    """The point for a value. extents: of the free extents seen so far, by name; grows.

    Raises TypeError for another dtype than is declared, BadTensor for another shape.
    """
    what = f"{place} {name!r}"
    dtype = wire = np.dtype(value.dtype)
    if spec is not None and spec.dtype is not None:
        wire = numpy_dtype(dtype_number(spec.dtype))
        if dtype != wire and not _widens(dtype, wire):
            hint = (
                f"; {_X64}" if jax.dtypes.canonicalize_dtype(wire) != wire else f"; .astype({spec.dtype!r}) makes it so"
            )
            raise TypeError(f"{what} is {dtype}, the model takes {spec.dtype}{hint}")
        wire = wire if dtype != wire else dtype
    if spec is not None and spec.shape is not None:
        declared = list(spec.shape)
        if rows and batched and axis is not None:
            del declared[axis]
        said = (
            f"{what} has the shape {list(value.shape)}, expected {declared}{' (one row)' if rows and batched else ''}"
        )
        if len(declared) != value.ndim:
            raise errors.BadTensor(said)
        for extent, size in zip(declared, value.shape, strict=True):
            expected = extents.setdefault(extent, size) if isinstance(extent, str) else extent
            if size != expected:
                note = f"; {extent!r} is {expected} elsewhere" if isinstance(extent, str) else ""
                raise errors.BadTensor(said + note)
    return Point(place, name, tuple(value.shape), dtype, wire, batched)


def _widens(given: np.dtype[Any], declared: np.dtype[Any]) -> bool:
    """Integers may be given in fewer bits than declared: they have no gradient, and lose nothing."""
    return given.kind in "iu" and declared.kind in "iu" and np.can_cast(given, declared, "safe")


def outs_of(
    model: RemoteModel,
    info: ModelInfo,
    points: Sequence[Point],
    rows: bool,
    loss: Loss | None,
    train: bool,
    outputs: Outputs,
    timeout: float | None,
) -> tuple[Out, ...]:
    """What a call at such points returns.

    outputs: what is known of them; None: asked of the server by evaluating the model once at made-up points.

    Raises TypeError for what is no shape, and for 64 bits where JAX has them turned off; PullbackError.
    """
    known = ["loss"] if loss is not None else [spec.name for spec in info.outputs]
    found = _told(outputs, points) if outputs is not None else _asked(model, info, points, rows, loss, train, timeout)
    if isinstance(found, Mapping):
        named = [(str(name), one) for name, one in found.items()]
    else:
        named = [(known[0] if len(known) == 1 else None, found)]  # type: ignore[list-item]
    # A loss that is not reduced has the rows of the outputs.
    batched = loss is None or loss.options.get("reduction") == "none" or loss.options.get("reduce") is False
    axis = info.batch_axis if rows and batched and outputs is None else None
    made = []
    for name, one in named:
        shape, dtype = tuple(one.shape), np.dtype(one.dtype)
        if axis is not None:
            if len(shape) <= axis or shape[axis] != 1:
                raise errors.UnsupportedByModel(
                    f"model {model.name!r} returns {name or 'an output'!r} of the shape {list(shape)} for one row; "
                    f"rows=True needs the batch axis {axis} in every output"
                )
            shape = shape[:axis] + shape[axis + 1 :]
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise TypeError(f"model {model.name!r} returns {name or 'an output'!r} as {dtype}; {_X64}")
        made.append(Out(name, shape, dtype, batched and info.batch_axis is not None))
    if not made:
        raise errors.UnsupportedByModel(f"model {model.name!r} returns no tensor")
    return tuple(made)


def signed(info: ModelInfo, points: Sequence[Point], extents: Mapping[str, int], rows: bool) -> Outputs:
    """The outputs in eval mode as the signature has them; None: it does not say all of it.

    extents: of the free extents by name, without the batch axis where the points are rows.
    """
    sizes = dict(extents)
    axis = info.batch_axis
    if rows and axis is not None:
        batched = {one.name for one in points if one.place == "input" and one.batched}
        names = {spec.shape[axis] for spec in info.inputs if spec.name in batched and spec.shape is not None}
        if any(sizes.get(str(name), 1) != 1 for name in names):
            return None
        sizes |= {str(name): 1 for name in names}
    found: dict[str, jax.ShapeDtypeStruct] = {}
    for spec in info.outputs:
        shape = [sizes.get(extent) if isinstance(extent, str) else extent for extent in spec.shape or ()]
        if spec.dtype is None or spec.shape is None or None in shape:
            return None
        if rows and axis is not None:
            # One that is not of rows is told as such by the evaluation.
            if len(shape) <= axis or shape[axis] != 1:
                return None
            del shape[axis]
        made: Any = jax.ShapeDtypeStruct
        dtype = numpy_dtype(dtype_number(spec.dtype))
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            return None
        found[spec.name] = made(tuple(shape), dtype)
    return (found if len(found) > 1 else next(iter(found.values()))) if found else None


def _told(outputs: Any, points: Sequence[Point]) -> Any:
    if callable(outputs) and not hasattr(outputs, "shape"):
        struct: Any = jax.ShapeDtypeStruct
        outputs = outputs({p.name: struct(p.shape, p.dtype) for p in points if p.place != "seed"})
    each = list(outputs.values()) if isinstance(outputs, Mapping) else [outputs]
    for one in each:
        if not (hasattr(one, "shape") and hasattr(one, "dtype")):
            raise TypeError(
                f"outputs has {one!r}, expected a jax.ShapeDtypeStruct, a dict of them by name, or a function that "
                "returns that for a dict of inputs"
            )
    return outputs


def _asked(
    model: RemoteModel,
    info: ModelInfo,
    points: Sequence[Point],
    rows: bool,
    loss: Loss | None,
    train: bool,
    timeout: float | None,
) -> Any:
    specs = {spec.name: spec for spec in info.inputs}
    made: dict[str, dict[str, Array]] = {"input": {}, "param": {}, "target": {}, "seed": {}}
    for one in points:
        shape = one.shape
        if rows and one.batched:
            axis = info.batch_axis or 0
            shape = (*shape[:axis], 1, *shape[axis:])
        made[one.place][one.name] = _made_up(one, shape, specs.get(one.name) if one.place == "input" else None)
    try:
        return model.evaluate(
            made["input"],
            parameters=made["param"] or None,
            targets=made["target"] or None,
            loss=loss,
            train=train,
            seed=0 if made["seed"] else None,
            timeout=timeout,
        )
    except (errors.InvalidArgument, errors.ModelError) as error:
        error.add_note(
            "This was an evaluation at made-up points, to learn the shapes of the outputs; "
            "remote_function(..., outputs=jax.ShapeDtypeStruct(shape, dtype)) does without it."
        )
        raise


def _made_up(one: Point, shape: tuple[int, ...], spec: TensorInfo | None) -> Array:
    """Numbers that a model is likely to run with: between 0 and 1, or the lowest that are allowed."""
    low = 0.0 if spec is None or spec.minimum is None else spec.minimum
    high = low + 1.0 if spec is None or spec.maximum is None else spec.maximum
    if one.wire.kind in "iub":
        return np.full(shape, np.ceil(low)).astype(one.wire)
    return (low + (high - low) * np.random.default_rng(0).uniform(size=shape)).astype(one.wire)
