"""Pullback's own client, without torch."""

import numpy as np

import pullback as pb

PACKAGES = ["pullback", "grpcio", "torch"]


class Client:
    PENALTY = "pb.autograd.grad(create_graph=True)"

    def __init__(self, address: str) -> None:
        # user code
        self.connection = pb.connect(f"127.0.0.1:{address}")
        self.model = self.connection.model("mlp")
        # end
        self.identity = self.connection.model("identity")

    def vjp(self, x: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # user code
        y, gradient = self.model.vjp(x, v)
        return y, gradient
        # end

    def echo(self, x: np.ndarray) -> np.ndarray:
        return self.identity.evaluate(x)

    def penalty(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        leaf = pb.tensor(x, requires_grad=True)
        y = self.connection.model("cube")(leaf)
        (gradient,) = pb.autograd.grad(y, leaf, v, create_graph=True)
        (gradient * leaf).sum().backward()
        return leaf.grad.numpy()
