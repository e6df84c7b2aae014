"""How a tensor shows itself: like torch's, and without ever raising."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pullback._tensor import Tensor

#: Values of at most so many bytes are fetched to be shown.
_FETCHED_BYTES = 64 << 10


def shown(tensor: Tensor, ask: bool = True) -> str:
    """tensor([1., 2.], dtype=float64, requires_grad=True); without values where they are large or lost.

    ask: whether the server may be asked for what is not here.
    """
    if not ask:
        tensor.learn()
        if tensor.known_dtype is None:
            return "tensor(<not here yet>)"
    try:
        shape, dtype = tensor.shape, tensor.dtype
    except Exception as error:
        return f"tensor(<{type(error).__name__}>)"
    parts = []
    try:
        if tensor.is_here or (ask and tensor.nbytes <= _FETCHED_BYTES):
            parts.append(np.array2string(tensor._value(), separator=", ", prefix="tensor(", threshold=1000))
    except Exception as error:
        parts.append(f"<{type(error).__name__}>")
    if not parts or parts[0].startswith("<"):
        parts.append(f"shape={list(shape)}")
    if dtype != np.float32 or len(parts) > 1 or parts[0].startswith("shape"):
        parts.append(f"dtype={dtype}")
    if tensor.may_require_grad:
        parts.append("requires_grad=True")
    return f"tensor({', '.join(parts)})"
