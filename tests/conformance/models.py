"""Models that the zoo has not: unused inputs with specs, a scalar of two inputs, matrices that are not symmetric."""

from __future__ import annotations

from typing import Any

import torch

from pullback_server import model, spec

_F64 = "float64"
_MATRIX = ((0.5, -1.0, 2.0), (0.25, 1.5, -0.5), (1.0, 0.75, -2.0))


@model("spare", inputs={"used": spec(_F64, ["n"]), "spare": spec(_F64, ["n"])})
def spare(used: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """Depends on one of its inputs."""
    return used.exp()


@model("coupled", inputs={"x": spec(_F64, ["n"]), "y": spec(_F64, ["n"])})
def coupled(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A scalar with mixed derivatives."""
    return (x.sin() * y**2).sum() + (x * y).sum() ** 2


@model("turned", inputs={"x": spec(_F64, [3])})
def turned(x: torch.Tensor) -> torch.Tensor:
    """A square Jacobian that is not symmetric."""
    return torch.tensor(_MATRIX, dtype=x.dtype) @ x.sin()


@model("half", inputs={"input": spec("bfloat16", ["batch", 3])})
def half() -> torch.nn.Module:
    """Parameters, inputs and outputs of a dtype that numpy does not know."""
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2).bfloat16()


@model("grainy", inputs={"x": spec(_F64, ["n"])})
def grainy(x: torch.Tensor) -> torch.Tensor:
    """Draws random numbers."""
    return x.sin() + torch.randn_like(x) * x


class Swirl(torch.autograd.Function):
    """A scalar whose backward as written is a field that no scalar has: its derivative is not symmetric."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (torch.tensor(_MATRIX, dtype=x.dtype) @ x.sin())


@model("swirl", inputs={"x": spec(_F64, [3])}, intended={"gradient": "a field of one's own"})
def swirl(x: torch.Tensor) -> torch.Tensor:
    """A backward of one's own whose derivative is not symmetric."""
    return Swirl.apply(x)
