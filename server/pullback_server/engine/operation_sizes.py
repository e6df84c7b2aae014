"""How many bytes the result of a tensor operation has at most, before it is computed.

A handful of bytes can be asked to become terabytes (expand, an outer product, an index by a long index); that should
be refused in words, not tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pullback_server.engine.operation_options import MASKS


def _broadcast(shapes: Sequence[Sequence[int]]) -> int:
    """Elements of what the shapes broadcast to, where they do."""
    count = 1
    for position in range(1, max(map(len, shapes), default=0) + 1):
        extents = [shape[-position] for shape in shapes if len(shape) >= position]
        count *= 0 if 0 in extents else max(extents)
    return count


def _matmul(a: torch.Tensor, b: torch.Tensor) -> int:
    if a.ndim < 2 or b.ndim < 2:
        return max(a.numel(), b.numel(), 1)
    batches = _broadcast([a.shape[:-2], b.shape[:-2]])
    result = a.shape[-2] * b.shape[-1]
    # An operand that is broadcast is copied for each of its places.
    for operand in (a, b):
        if math.prod(operand.shape[:-2]) < batches:
            result += operand.shape[-2] * operand.shape[-1]
    return batches * result


def _index(tensor: torch.Tensor, items: tuple[Any, ...]) -> int:
    chosen = [item for item in items if isinstance(item, torch.Tensor) and item.dtype not in MASKS]
    if not chosen:
        masked = any(isinstance(item, torch.Tensor) for item in items)
        return tensor.numel() if masked else 0
    # What is left of every axis is at most the axis; which of them the indices stand on is not looked at.
    smallest = math.prod(sorted(max(extent, 1) for extent in tensor.shape)[: len(chosen)])
    return _broadcast([item.shape for item in chosen]) * (tensor.numel() // max(smallest, 1))


#: What makes no memory of its own, or no more than a small part of its operand's.
_FREE = {
    *("permute", "transpose", "squeeze", "unsqueeze", "detach", "conj", "real", "imag"),
    *("sum", "mean", "std", "var", "norm", "logsumexp", "amax", "amin", "all", "any", "argmax", "argmin"),
    *("requires_grad_", "zero_", "copy_", "add_", "sub_", "mul_", "div_"),
}
_OF_BOOL = frozenset(
    ("eq", "ne", "lt", "le", "gt", "ge", "isfinite", "isnan", "logical_and", "logical_or", "logical_not")
)


def expanded(first: torch.Tensor, shape: Any) -> int:
    """Bytes that an expanded tensor would have as one of its own; what is done with it takes as much, or as long."""
    extents = [extent for extent in shape if isinstance(extent, int)] if isinstance(shape, list) else []
    kept = max(first.numel(), 1)
    for position, extent in enumerate(reversed(extents), 1):
        if extent > 0:
            own = first.shape[-position] if position <= first.ndim else 1
            kept = kept * extent // max(own, 1)
    return kept * first.itemsize


def bytes_of(name: str, arguments: Sequence[Any], options: dict[str, Any]) -> int:
    """An upper bound of the memory that the result takes."""
    if name in _FREE or name == "expand":
        return 0
    if name in ("cat", "stack"):
        return sum(tensor.numel() * tensor.itemsize for tensor in arguments[0])
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    first = tensors[0]
    if name in ("reshape", "flatten") and first.is_contiguous():
        return 0
    width = 1 if name in _OF_BOOL else max(tensor.itemsize for tensor in tensors)
    if name == "matmul" and len(tensors) == 2:
        return _matmul(first, tensors[1]) * width
    if name == "index":
        return _index(first, arguments[1]) * width
    if name == "to":
        return first.numel() * int(options["dtype"].itemsize)
    if len(tensors) > 1 and any(tensor.shape != first.shape for tensor in tensors):
        return _broadcast([tensor.shape for tensor in tensors]) * width
    return first.numel() * width
