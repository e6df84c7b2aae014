"""A Tesseract (tesseract_api.py): apply and vector_jacobian_product, as its own PyTorch template has them."""

from typing import Any

import torch
import workload
from pydantic import BaseModel
from tesseract_core.runtime import Array, Differentiable, Float32, ShapeDType


# user code
class InputSchema(BaseModel):
    x: Differentiable[Array[(None, None), Float32]]
    # end
    function: str = "mlp"


# user code
class OutputSchema(BaseModel):
    y: Differentiable[Array[(None, None), Float32]]


def apply(inputs: InputSchema) -> OutputSchema:
    with torch.no_grad():
        return OutputSchema(y=workload.forward(inputs.function, torch.from_numpy(inputs.x)).numpy())


def vector_jacobian_product(
    inputs: InputSchema, vjp_inputs: set[str], vjp_outputs: set[str], cotangent_vector: dict[str, Any]
) -> dict[str, Any]:
    v = torch.from_numpy(cotangent_vector["y"])
    _, gradient = workload.vjp(inputs.function, torch.from_numpy(inputs.x), v)
    return {"x": gradient.numpy()}


# end


def abstract_eval(abstract_inputs: Any) -> dict[str, ShapeDType]:
    """What tesseract-jax asks for; the penalty is on a function that keeps shapes."""
    return {"y": ShapeDType(shape=abstract_inputs.x.shape, dtype="float32")}
