"""Values rounded to a few bits, with the straight-through estimator of Bengio et al. (2013), arXiv:1308.3432.

The derivative of rounding is zero almost everywhere, and nothing could be trained through it. The estimator's backward
is that of clipping: one inside of the range, zero outside.
"""

from typing import Any

import torch
from torch import nn


class Quantize(torch.autograd.Function):
    """x -> the nearest of the levels k * step with |k| <= top; the gradient passes where x is between the outer two."""

    @staticmethod
    def forward(x: torch.Tensor, step: float, top: int) -> torch.Tensor:
        return torch.round(x / step).clamp(-top, top) * step

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, float, int], output: torch.Tensor) -> None:
        x, step, top = inputs
        ctx.save_for_backward(x.abs() <= step * top)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None


class Quantizer(nn.Module):
    """bits: of each value; the levels lie symmetric about zero, up to +-limit."""

    def __init__(self, bits: int, limit: float) -> None:
        super().__init__()
        if bits < 2:
            raise ValueError(f"bits is {bits}, expected 2 or more")
        self.top = 2 ** (bits - 1) - 1
        self.step = limit / self.top

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Quantize.apply(x, self.step, self.top)
