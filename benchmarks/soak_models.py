"""Models that take a while, for overload and fairness."""

import torch
from torch import nn

from pullback_server import model, spec


@model("work", kind="function", inputs={"x": spec("float64", ["n"])})
def work(x: torch.Tensor) -> torch.Tensor:
    """Its input, after some 15 ms of matrix products on one core."""
    weights = torch.full((384, 384), 1 / 384, dtype=torch.float64)
    for _ in range(7):
        weights = weights @ weights
    return x * weights.sum() / 384


@model("wide", inputs={"input": spec("float32", ["n", 1024])}, batch_axis=0)
def wide() -> nn.Module:
    """An MLP of three wide layers: a few milliseconds, most of them for reading its weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 16))
