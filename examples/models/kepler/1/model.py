"""Where a planet is on its ellipse: Kepler's equation, solved by iteration, differentiated without it.

Autograd through Newton's iteration would keep every step and differentiate each. The implicit function theorem needs
the solution alone: with F(E, M, e) = E - e sin E - M = 0, dE = (dM + sin E de) / (1 - e cos E).
"""

import math
from typing import Any

import torch

from pullback_server import model

#: More than Newton's method needs for e up to 0.99 and float64. Not until all have converged: how often one orbit is
#: iterated must not hang on the others in its batch.
ITERATIONS = 12


class Solve(torch.autograd.Function):
    """(mean anomaly M, eccentricity e) -> eccentric anomaly E, element by element, in radians."""

    @staticmethod
    def forward(mean: torch.Tensor, eccentricity: torch.Tensor) -> torch.Tensor:
        # E(M + 2 pi) = E(M) + 2 pi: solve where |M| <= pi. There E = +-pi is a start that converges for every e < 1
        # (Charles and Tatum, Celest. Mech. Dyn. Astron. 69, 357 (1998)).
        turns = 2 * math.pi * torch.round(mean / (2 * math.pi))
        reduced = mean - turns
        anomaly = torch.where(reduced < 0, -math.pi, math.pi).to(mean)
        for _ in range(ITERATIONS):
            residual = anomaly - eccentricity * anomaly.sin() - reduced
            anomaly = anomaly - residual / (1 - eccentricity * anomaly.cos())
        return anomaly + turns

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # Saved like this, the output is differentiated again in the backward: second derivatives come out right.
        ctx.save_for_backward(inputs[1], output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        eccentricity, anomaly = ctx.saved_tensors
        by_mean = gradient / (1 - eccentricity * anomaly.cos())
        return by_mean, by_mean * anomaly.sin()


@model("kepler")
def kepler(mean: torch.Tensor, eccentricity: torch.Tensor) -> torch.Tensor:
    """The eccentric anomaly E of each orbit, from its mean anomaly and eccentricity, 0 <= e < 1."""
    return Solve.apply(mean, eccentricity)
