"""Eight small networks that fit curves, side by side.

Serve it with: pullback-server serve examples/models/regressors.py
"""

import torch
from torch import nn

from pullback_server import model, spec

NETWORKS, HIDDEN = 8, 40
#: Weights and biases of one network, one after the other.
SHAPES = [(1, HIDDEN), (1, HIDDEN), (HIDDEN, HIDDEN), (1, HIDDEN), (HIDDEN, 1), (1, 1)]


@model("regressors", inputs={"x": spec("float64", [NETWORKS, "points", 1])}, outputs=["y"], batch_axis=1)
class Regressors(nn.Module):
    """y [8, points, 1] at x [8, points, 1]: each network has points and weights of its own, and two layers of 40 tanh.

    All weights are one parameter [8, 1761], so that callers who give their own do arithmetic on one tensor. In float64,
    as derivatives of second order are what it is for.
    """

    def __init__(self) -> None:
        super().__init__()
        parts = []
        for rows, columns in SHAPES:
            bound = (HIDDEN if parts[2:] else 1) ** -0.5
            parts.append(torch.empty(NETWORKS, rows * columns, dtype=torch.float64).uniform_(-bound, bound))
        self.weights = nn.Parameter(torch.cat(parts, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.weights.split([rows * columns for rows, columns in SHAPES], 1)
        w1, b1, w2, b2, w3, b3 = (part.unflatten(1, shape) for part, shape in zip(flat, SHAPES, strict=True))
        x = torch.baddbmm(b1, x, w1).tanh()
        x = torch.baddbmm(b2, x, w2).tanh()
        return torch.baddbmm(b3, x, w3)
