"""Models that the tests of pullback.jax make JAX functions of. Importing this registers nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from pullback_server import model, spec

F64, C128 = "float64", "complex128"
#: Of the sampling tests: a correlated Gaussian, and a regression with known noise and a normal prior.
MEAN = np.array([1.0, -2.0])
COVARIANCE = np.array([[1.0, 0.8], [0.8, 2.0]])
_DATA = np.random.default_rng(20240607)
FEATURES = _DATA.normal(size=(40, 3))
NOISE, PRIOR = 0.5, 2.0
OBSERVED = FEATURES @ np.array([0.5, -1.0, 2.0]) + NOISE * _DATA.normal(size=40)
#: Not symmetric, so that a derivative and its transpose differ.
SKEW = np.array([[1.0, 2.0, 0.0], [-1.0, 3.0, 0.5], [0.25, 0.0, 2.0]])


@model("energy", inputs={"x": spec(F64, ["n"]), "y": spec(F64, ["n"])})
def energy(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Two inputs, one real number."""
    return (torch.sin(x) * y**2).sum() + x[0] * y.sum() ** 2


@model("wide", inputs={"x": spec(F64, [3])})
def wide(x: torch.Tensor) -> torch.Tensor:
    """3 to 5, and no symmetry in it."""
    return torch.cat([torch.sin(x) * x[0], (x[:2] ** 2 * x[2])])


@model("named", inputs={"x": spec(F64, ["n"]), "steps": spec("int64", [])})
def named(x: torch.Tensor, steps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Several outputs, one of them an integer; an integer input."""
    return {"power": x ** (steps + 1), "norm": (x * x).sum(), "count": steps * x.shape[0]}


@model("density", inputs={"x": spec(F64, ["batch", 2])}, batch_axis=0)
class Density(nn.Module):
    """The log-density of a correlated Gaussian, for rows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN))
        self.register_buffer("precision", torch.tensor(np.linalg.inv(COVARIANCE)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        d = x - self.mean
        found: torch.Tensor = -0.5 * ((d @ self.precision) * d).sum(-1)
        return found


@model("regression", inputs={"w": spec(F64, [3])})
class Regression(nn.Module):
    """The log-posterior of a linear regression, but for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("features", torch.tensor(FEATURES))
        self.register_buffer("observed", torch.tensor(OBSERVED))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        errors = self.observed - self.features @ w
        found: torch.Tensor = -0.5 * (errors**2).sum() / NOISE**2 - 0.5 * (w**2).sum() / PRIOR**2
        return found


@model("network", inputs={"input": spec(F64, ["batch", 3])}, batch_axis=0)
def network() -> nn.Module:
    """3 to 2, smooth."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@model("dropout", inputs={"input": spec(F64, ["batch", 3])}, batch_axis=0)
def dropout() -> nn.Module:
    """Random in train mode."""
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()


@model("turned", inputs={"x": spec(F64, [3, "batch"])}, batch_axis=1)
def turned(x: torch.Tensor) -> torch.Tensor:
    """Rows are columns."""
    return torch.stack([x[0] * x[1].sin(), x[2] ** 3 * x[0]])


@model("analytic", inputs={"z": spec(C128, ["n"])})
def analytic(z: torch.Tensor) -> torch.Tensor:
    """Holomorphic."""
    return z**2 * z[0] + torch.exp(0.5j * z)


@model("tangled", inputs={"z": spec(C128, ["n"]), "x": spec(F64, ["n"])})
def tangled(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Complex and real to complex, not holomorphic."""
    return z.conj() * z[0] * x + z.real.sin() * x**2


@model("squared", inputs={"z": spec(C128, ["n"])})
def squared(z: torch.Tensor) -> torch.Tensor:
    """Complex to one real number."""
    return (z * z.conj()).real.sum() * z[0].imag + z.real.sin().sum()


@model("wave", inputs={"x": spec(F64, ["n"])})
def wave(x: torch.Tensor) -> torch.Tensor:
    """Real to complex."""
    return torch.exp(1j * x) * x.sum()


@model("half", inputs={"x": spec("bfloat16", ["n"])})
def half(x: torch.Tensor) -> torch.Tensor:
    """In bfloat16."""
    return (x * x).sum()


@model("single", inputs={"x": spec("float32", ["n"]), "scale": spec("float32", [])})
def single(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """In float32."""
    return torch.sin(x) * scale


@model("plain", gate=False)
def plain(x: torch.Tensor) -> torch.Tensor:
    """Declares nothing."""
    return x**3


@model("apart", inputs={"x": spec(F64, ["n"]), "y": spec(F64, ["n"])})
def apart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Does not depend on y."""
    return (x**3).sum() + 0 * y.shape[0]


@model("raises", inputs={"x": spec(F64, ["n"])})
def raises(x: torch.Tensor) -> torch.Tensor:
    """Raises where its input is negative."""
    if bool((x < 0).any()):
        raise ValueError("no good")
    return x.sum()


class Skewed(torch.autograd.Function):
    """Half the squared norm, with a gradient field that is the gradient of nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return 0.5 * (x * x).sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (torch.tensor(SKEW) @ x.sin())


@model("skewed", inputs={"x": spec(F64, [3])}, intended={"gradient": "a field with curl"})
def skewed(x: torch.Tensor) -> torch.Tensor:
    """Its second derivative is proven, and is not symmetric."""
    found: torch.Tensor = Skewed.apply(x)
    return found


class Crooked(torch.autograd.Function):
    """Rows of 3 to rows of 2, with a matrix for its Jacobian that is the derivative of nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.stack([x[..., 0] * x[..., 1], x[..., 2].sin()], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        rows = torch.stack([x.cos() @ torch.tensor(SKEW), x * x.roll(1, -1) ** 2], -2)
        return (gradient[..., None] * rows).sum(-2)


@model("crooked", inputs={"x": spec(F64, ["batch", 3])}, batch_axis=0, intended={"gradient": "a matrix of no function"})
def crooked(x: torch.Tensor) -> torch.Tensor:
    """Its second derivative is proven, and is not symmetric; rows are independent."""
    found: torch.Tensor = Crooked.apply(x)
    return found
