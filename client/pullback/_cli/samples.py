"""Random tensors that a model's signature allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pullback._arrays import Array, tensor_dtype
from pullback._info import ModelInfo, TensorInfo
from pullback_wire.dtypes import COMPLEX, FLOATING, wire_dtype


def inputs(
    info: ModelInfo,
    given: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, ...]],
    rows: int | None,
    dtype: np.dtype[Any] | None,
    random: np.random.Generator,
) -> dict[str, Array]:
    """One array for each input that is given, has a shape given, or is not optional.

    shapes: by name; an extent that is free in the signature and known of one input holds for all that name it so.
    rows: the extent of the batch axis. Other free extents are 1.
    dtype: of inputs whose signature says none.

    Raises ValueError for an input of which too little is known, and for shapes that the signature forbids.
    """
    named = {one.name: one for one in info.inputs}
    for name in {*shapes, *given} - set(named):
        raise ValueError(f"{info.name} has no input {name!r}; it has {', '.join(named) or 'none that are known'}")
    free = _free(info, named, {**shapes, **{name: array.shape for name, array in given.items()}}, rows)
    found = dict(given)
    for name, one in named.items():
        if name in found or (one.optional and name not in shapes):
            continue
        kind = tensor_dtype(one.dtype) if one.dtype else dtype
        if kind is None:
            raise ValueError(f"input {name!r}: the signature says no dtype; give --dtype, or --input {name}=@FILE")
        shape = shapes.get(name)
        if shape is None:
            if one.shape is None:
                raise ValueError(f"input {name!r}: the signature says no shape; give --shape {name}=..., or --input")
            shape = tuple(extent if isinstance(extent, int) else free.get(extent or "", 1) for extent in one.shape)
        try:
            found[name] = _array(shape, kind, one, random)
        except (ValueError, MemoryError) as error:
            raise ValueError(f"input {name!r}: of the shape {list(shape)} none can be made: {error}") from None
    return found


def _free(
    info: ModelInfo, named: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]], rows: int | None
) -> dict[str, int]:
    """Free extents by name."""
    free: dict[str, int] = {}
    for name, shape in shapes.items():
        declared = named[name].shape
        if declared is None:
            continue
        if len(declared) != len(shape) or any(
            isinstance(wanted, int) and wanted != came for wanted, came in zip(declared, shape, strict=False)
        ):
            raise ValueError(f"input {named[name]}: its shape cannot be {list(shape)}")
        free |= {wanted: came for wanted, came in zip(declared, shape, strict=True) if isinstance(wanted, str)}
    if rows is not None:
        if info.batch_axis is None:
            raise ValueError(f"{info.name} declares no batch axis, so that --rows means nothing; use --shape NAME=...")
        axes = {
            one.shape[info.batch_axis]
            for one in named.values()
            if one.shape is not None and len(one.shape) > info.batch_axis
        }
        symbols = {axis for axis in axes if isinstance(axis, str)}
        if not symbols:
            raise ValueError(
                f"{info.name}: no input has a free batch axis, which --rows would set; use --shape NAME=..."
            )
        for symbol in symbols:
            if free.setdefault(symbol, rows) != rows:
                raise ValueError(f"--rows {rows}: the inputs given have {free[symbol]} rows")
    return free


def _array(shape: tuple[int, ...], dtype: np.dtype[Any], one: TensorInfo, random: np.random.Generator) -> Array:
    """Within the declared bounds; without any normal, or of integers 0 and 1, which are indices of almost anything."""
    low, high = one.minimum, one.maximum
    array: Array
    if wire_dtype(dtype) in COMPLEX:
        return normal(shape, dtype, random)
    if wire_dtype(dtype) in FLOATING:
        array = random.normal(size=shape)
        if low is not None and high is not None:
            array = random.uniform(low, high, shape)
        elif low is not None:
            array = low + np.abs(array)
        elif high is not None:
            array = high - np.abs(array)
        return array.astype(dtype)
    start = int(np.ceil(low)) if low is not None else min(0, int(np.floor(high))) if high is not None else 0
    end = int(np.floor(high)) if high is not None else start + 1
    array = random.integers(start, end, shape, endpoint=True)
    return array.astype(dtype)


def normal(shape: tuple[int, ...], dtype: np.dtype[Any], random: np.random.Generator) -> Array:
    """Normal numbers of a floating-point or complex dtype."""
    array: Array = random.normal(size=shape)
    if wire_dtype(dtype) in COMPLEX:
        array = array + 1j * random.normal(size=shape)
    return array.astype(dtype)
