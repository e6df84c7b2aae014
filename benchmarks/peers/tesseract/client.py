"""Tesseract's own client. Its VJP returns no outputs, so there are two calls."""

import os

import numpy as np
from tesseract_core import Tesseract

PACKAGES = ["tesseract-core", "tesseract-jax", "jax", "torch"]


class Client:
    PENALTY = "jax.grad of a function of jax.vjp, through tesseract-jax"

    def __init__(self, address: str) -> None:
        # user code
        self.tesseract = Tesseract.from_url(f"http://127.0.0.1:{address}")
        # end

    def vjp(self, x: np.ndarray, v: np.ndarray, function: str = "mlp") -> tuple[np.ndarray, np.ndarray]:
        inputs = {"x": x, "function": function}
        # user code
        y = self.tesseract.apply(inputs)["y"]
        gradient = self.tesseract.vector_jacobian_product(inputs, ["x"], ["y"], {"y": v})["x"]
        return y, gradient
        # end

    def echo(self, x: np.ndarray) -> np.ndarray:
        return self.tesseract.apply({"x": x, "function": "identity"})["y"]

    def penalty(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import jax
        from tesseract_jax import apply_tesseract

        def cube(x: jax.Array) -> jax.Array:
            return apply_tesseract(self.tesseract, {"x": x, "function": "cube"})["y"]

        def penalty(x: jax.Array) -> jax.Array:
            _, pull = jax.vjp(cube, x)
            return (pull(jax.numpy.asarray(v))[0] * x).sum()

        return np.asarray(jax.grad(penalty)(jax.numpy.asarray(x)))
