"""How many bytes the result of a tensor operation has at most, before it is computed.

A handful of bytes can be asked to become terabytes (expand, an outer product, an index by a long index); that should
be refused in words, not tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


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
    return _broadcast([a.shape[:-2], b.shape[:-2]]) * a.shape[-2] * b.shape[-1]


def _index(tensor: torch.Tensor, items: tuple[Any, ...]) -> int:
    chosen = [item for item in items if isinstance(item, torch.Tensor) and item.dtype != torch.bool]
    if not chosen:
        return tensor.numel()
    # What is left of every axis is at most the axis; which of them the indices stand on is not looked at.
    smallest = math.prod(sorted(max(extent, 1) for extent in tensor.shape)[: len(chosen)])
    return _broadcast([item.shape for item in chosen]) * (tensor.numel() // max(smallest, 1))


def bytes_of(name: str, arguments: Sequence[Any], options: dict[str, Any]) -> int:
    """An upper bound; for a view, what it would have as a tensor of its own."""
    if name in ("cat", "stack"):
        return sum(tensor.numel() * tensor.itemsize for tensor in arguments[0])
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    width = max(tensor.itemsize for tensor in tensors)
    first = tensors[0]
    if name == "matmul" and len(tensors) == 2:
        return _matmul(first, tensors[1]) * width
    if name == "index":
        return _index(first, arguments[1]) * width
    if name == "to":
        return first.numel() * max(width, int(options["dtype"].itemsize))
    if name == "expand":
        shape = options["shape"]
        extents = [extent for extent in shape if isinstance(extent, int)] if isinstance(shape, list) else []
        return abs(math.prod(extent for extent in extents if extent not in (-1, 0))) * first.numel() * width
    if len(tensors) > 1 and any(tensor.shape != first.shape for tensor in tensors):
        return _broadcast([tensor.shape for tensor in tensors]) * width
    return first.numel() * width
