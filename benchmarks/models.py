"""Models that the benchmarks host."""

import torch
from torch import nn

from pullback_server import model, spec


@model("mlp", inputs={"input": spec("float32", ["batch", 784])}, batch_axis=0)
def mlp() -> nn.Module:
    """An MLP 784-256-10."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


@model("identity", inputs={"input": spec("float32", ["n"])})
def identity(input: torch.Tensor) -> torch.Tensor:
    """Its input: nothing but transport."""
    return input


@model("cube", inputs={"x": spec("float64", ["n"])})
def cube(x: torch.Tensor) -> torch.Tensor:
    """Cubes."""
    return x**3
