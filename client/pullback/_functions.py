"""Functions of several tensors, as torch has them at its top: cat, stack, where, matmul."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pullback._operations import FUNCTIONS, joined
from pullback._tensor import Tensor


def cat(tensors: Sequence[Any], dim: int = 0) -> Tensor:
    """Joins tensors along an axis that they have: torch.cat."""
    return joined("cat", tensors, dim)


def stack(tensors: Sequence[Any], dim: int = 0) -> Tensor:
    """Joins tensors of one shape along a new axis: torch.stack."""
    return joined("stack", tensors, dim)


def where(condition: Any, input: Any, other: Any) -> Tensor:
    """Elements of `input` where `condition` holds, else of `other`: torch.where."""
    return FUNCTIONS["where"](condition, input, other)  # type: ignore[no-any-return]


def matmul(input: Any, other: Any) -> Tensor:
    """The matrix product: torch.matmul."""
    return FUNCTIONS["matmul"](input, other)  # type: ignore[no-any-return]
