"""How close two computations of one thing must come."""

from __future__ import annotations

import torch

from pullback_server.engine._dtypes import differentiable, name_of
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.results import EngineResult

#: How far a result computed with others may be from the same computed alone, relative to its norm, by the bytes of a
#: real number. The sums in it may have been taken in another order.
_TOLERANCE = {1: 0.5, 2: 5e-2, 4: 1e-3, 8: 1e-9}


def differing(merged: EngineResult, alone: EngineResult, hosted: HostedModel, share: float) -> str:
    """How two results of one job differ by more than a share of the tolerance; empty: they do not."""
    names = [_named(merged), _named(alone)]
    if names[0] != names[1]:
        return f"it has {', '.join(names[0])}, and alone {', '.join(names[1])}"
    for name, a, b in zip(names[0], merged.tensors, alone.tensors, strict=True):
        limit = share * tolerance(b.dtype, hosted)
        gap = distance(a, b)
        if not gap <= limit:
            return f"{name} differs by {gap:.3g} of its norm, more than {limit:g}"
    return ""


def _named(result: EngineResult) -> list[str]:
    """The tensors of a result in words, in the order of its payloads."""
    outcome = result.outcome
    found = {ref.payload: f"output {ref.name!r} {list(ref.shape)}" for ref in outcome.outputs}
    for what, grads in (
        ("gradient", outcome.gradients),
        ("HVP", outcome.hvps),
        ("cotangent derivative", outcome.cotangent_derivatives),
    ):
        found |= {
            grad.value.payload: f"{what} {grad.name!r} {list(grad.value.shape)}"
            for grad in grads
            if grad.value is not None
        }
    return [f"{found[index]} {name_of(tensor.dtype)}" for index, tensor in enumerate(result.tensors)]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far apart two tensors of one shape are, relative to the norm of the second unless that is 0.

    NaN is equal to itself.
    """
    equal = (a == b) | ((a != a) & (b != b))
    if bool(equal.all()):
        return 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return float("inf")
    wide = torch.complex128 if a.is_complex() else torch.float64
    zero = torch.zeros((), dtype=wide, device=a.device)
    b = torch.where(b == b, b.to(wide), zero)
    finite = torch.where(b.abs() < float("inf"), b, zero)
    gap = torch.where(equal, zero, a.to(wide) - b)
    size = float(torch.linalg.vector_norm(finite))
    found = float(torch.linalg.vector_norm(gap))
    return found / size if size else found


def tolerance(dtype: torch.dtype, hosted: HostedModel) -> float:
    """The distance that two computations of one thing may have."""
    if dtype.is_complex:
        dtype = dtype.to_real()
    if not dtype.is_floating_point:
        return 0.0
    width = dtype.itemsize
    rough = hosted.registration.options.autocast is not None or torch.get_float32_matmul_precision() != "highest"
    return _TOLERANCE[min(width, 2) if rough and width <= 4 else width]


def nudged(tensor: torch.Tensor, steps: int = 4) -> torch.Tensor:
    """A tensor moved by some steps of rounding, up and down."""
    if not differentiable(tensor.dtype) or tensor.itemsize < 2:
        return tensor
    sign = torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape) % 2 * 2 - 1
    return tensor * (1 + steps * torch.finfo(tensor.dtype).eps * sign).to(tensor.dtype)
