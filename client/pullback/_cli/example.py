"""A command that calls a model, to be copied."""

from __future__ import annotations

import json
import shlex

import numpy as np

from pullback._arrays import Array, tensor_dtype
from pullback._cli.given import ONES
from pullback._info import ModelInfo, TensorInfo
from pullback_wire.dtypes import COMPLEX, FLOATING, wire_dtype

#: Elements that are written out; larger tensors come from files.
_WRITTEN = 12
#: What a free extent is, in an example.
_FREE = 2


def example(info: ModelInfo) -> str:
    """`pullback grad ...` with inputs that the signature allows, written out where they are small."""
    words = ["pullback", "grad", info.name]
    for one in info.inputs:
        if not one.optional:
            words += ["--input", f"{one.name}={_value(one)}"]
    only = info.outputs[0] if len(info.outputs) == 1 else None
    # Of a real scalar the gradient needs no cotangent; of which shape others are, few signatures say.
    if only is None or only.shape != () or only.dtype in ("complex64", "complex128"):
        words += ["--grad-output", ONES]
    return shlex.join(words)


def _value(one: TensorInfo) -> str:
    """JSON, or a file to be brought."""
    if one.dtype is None or one.shape is None:
        return f"@{one.name}.npy"
    dtype = tensor_dtype(one.dtype)
    shape = tuple(extent if isinstance(extent, int) else _FREE for extent in one.shape)
    if int(np.prod(shape)) > _WRITTEN:
        return f"@{one.name}.npy"
    if wire_dtype(dtype) not in FLOATING | COMPLEX:
        return _text(np.full(shape, int(one.minimum or 0)).astype(dtype))
    low = 0.0 if one.minimum is None else one.minimum
    high = low + 1.0 if one.maximum is None else one.maximum
    # All different: atoms in one place, say, have no energy.
    size = int(np.prod(shape))
    numbers = [float(f"{low + (high - low) * (at + 1) / (size + 1):.3g}") for at in range(size)]
    array = np.array(numbers).reshape(shape)
    return _text(np.stack([array, 0 * array], -1) if wire_dtype(dtype) in COMPLEX else array)


def _text(array: Array) -> str:
    return json.dumps(array.tolist(), separators=(",", ":"))
