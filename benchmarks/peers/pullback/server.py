"""Pullback: what the machine with the model registers."""

import torch
import workload

# user code
from pullback_server import model, spec


@model("mlp", inputs={"input": spec("float32", ["batch", 784])}, batch_axis=0)
def mlp() -> torch.nn.Module:
    return workload.mlp()


# end


@model("identity", inputs={"x": spec("float32", ["rows", "n"])})
def identity(x: torch.Tensor) -> torch.Tensor:
    """Its input."""
    return x


@model("cube", inputs={"x": spec("float32", ["rows", "n"])})
def cube(x: torch.Tensor) -> torch.Tensor:
    """Cubes."""
    return x**3
