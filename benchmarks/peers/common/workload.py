"""The functions that every peer hosts: the model of benchmarks/models.py, an identity, and a cube for second order."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

torch.set_num_threads(1)


def mlp() -> nn.Module:
    """An MLP 784-256-10 with the weights of benchmarks/models.py, whose gradients every peer is checked against."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    return module.requires_grad_(False)  # so that no peer computes gradients of weights, which nobody asked for


class Cube(nn.Module):
    """Cubes: the least function with second derivatives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x**3


FUNCTIONS: dict[str, Callable[..., Any]] = {"mlp": mlp(), "cube": Cube(), "identity": nn.Identity()}


def vjp(name: str, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs and the gradient with respect to the input."""
    x = x.detach().requires_grad_()
    y = FUNCTIONS[name](x)
    (gradient,) = torch.autograd.grad(y, x, v)
    return y.detach(), gradient


def forward(name: str, x: torch.Tensor) -> torch.Tensor:
    """The outputs alone."""
    return FUNCTIONS[name](x)  # type: ignore[no-any-return]
