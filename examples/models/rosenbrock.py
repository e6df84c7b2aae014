"""Rosenbrock's valley, which optimisers are tried on.

Serve it with: pullback-server serve examples/models/rosenbrock.py
"""

import torch

from pullback_server import model, spec


@model("rosenbrock", inputs={"x": spec("float64", ["n"])})
def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    """The sum of 100 (x[i+1] - x[i]²)² + (1 - x[i])²; it is least, 0, where all x are 1."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
