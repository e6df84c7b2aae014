"""How well an orbit explains measured velocities of a star.

Serve it with: pullback-server serve examples/models/orbit.py
"""

import math
from typing import Any

import torch

from pullback_server import model, spec


class Kepler(torch.autograd.Function):
    """(mean anomaly M, eccentricity e) -> eccentric anomaly E with E - e sin E = M.

    Solved by Newton's iteration, differentiated by the implicit function theorem; `kepler` in the repository says more.
    """

    @staticmethod
    def forward(mean: torch.Tensor, eccentricity: torch.Tensor) -> torch.Tensor:
        turns = 2 * math.pi * torch.round(mean / (2 * math.pi))
        reduced = mean - turns
        anomaly = torch.where(reduced < 0, -math.pi, math.pi).to(mean)
        for _ in range(12):
            residual = anomaly - eccentricity * anomaly.sin() - reduced
            anomaly = anomaly - residual / (1 - eccentricity * anomaly.cos())
        return anomaly + turns

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[1], output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        eccentricity, anomaly = ctx.saved_tensors
        by_mean = gradient / (1 - eccentricity * anomaly.cos())
        return by_mean, by_mean * anomaly.sin()


@model(
    "orbit",
    inputs={
        "eccentricity": spec("float64", ["rows"], low=0.0, high=0.99),
        "others": spec("float64", ["rows", 4]),
        "time": spec("float64", ["rows", "nights"]),
        "velocity": spec("float64", ["rows", "nights"]),
    },
    outputs=["log_likelihood"],
    batch_axis=0,
)
def orbit(eccentricity: torch.Tensor, others: torch.Tensor, time: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
    """Log-likelihood [rows] of radial velocities with independent normal errors of 1, constants left out.

    others: phase, a, b, c. The phase is the share of a period that had gone at time 0 since the star was nearest; the
        velocity is a (cos nu + e) - b sin nu + c, nu being the true anomaly: a and b are the amplitude times cosine and
        sine of the argument of periastron, and c is the whole system's.
    time: in periods. velocity: in units of its error, as a, b and c are.
    """
    e, (phase, a, b, c) = eccentricity[:, None], others[:, :, None].unbind(1)
    mean = 2 * math.pi * (time + phase)
    anomaly = Kepler.apply(mean, e.expand_as(mean))
    distance = 1 - e * anomaly.cos()
    cosine, sine = (anomaly.cos() - e) / distance, (1 - e * e).sqrt() * anomaly.sin() / distance
    return -0.5 * (velocity - a * (cosine + e) + b * sine - c).square().sum(1)
