"""UM-Bridge: evaluate, gradient and apply_hessian of flat lists of numbers."""

import functools
import sys

import torch
import umbridge
import workload

ROWS = {"mlp": (32, 784, 10), "cube": (4, 6, 6), "identity": (1, 4 << 20, 4 << 20)}


# user code
class Model(umbridge.Model):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.rows, self.inputs, self.outputs = ROWS[name]

    def get_input_sizes(self, config: dict) -> list[int]:
        return [self.rows * self.inputs]

    def get_output_sizes(self, config: dict) -> list[int]:
        return [self.rows * self.outputs]

    def supports_evaluate(self) -> bool:
        return True

    def supports_gradient(self) -> bool:
        return True

    def matrix(self, values: list[float], columns: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32).reshape(self.rows, columns)

    def __call__(self, parameters: list[list[float]], config: dict) -> list[list[float]]:
        with torch.no_grad():
            y = workload.forward(self.name, self.matrix(parameters[0], self.inputs))
        return [y.flatten().tolist()]

    def gradient(
        self, out_wrt: int, in_wrt: int, parameters: list[list[float]], sens: list[float], config: dict
    ) -> list[float]:
        x, v = self.matrix(parameters[0], self.inputs), self.matrix(sens, self.outputs)
        return workload.vjp(self.name, x, v)[1].flatten().tolist()

    def supports_apply_hessian(self) -> bool:
        return True

    def apply_hessian(
        self,
        out_wrt: int,
        in_wrt1: int,
        in_wrt2: int,
        parameters: list[list[float]],
        sens: list[float],
        vec: list[float],
        config: dict,
    ) -> list[float]:
        x, v = self.matrix(parameters[0], self.inputs).requires_grad_(), self.matrix(sens, self.outputs)
        (gradient,) = torch.autograd.grad(workload.forward(self.name, x), x, v, create_graph=True)
        (product,) = torch.autograd.grad(gradient, x, self.matrix(vec, self.inputs))
        return product.flatten().tolist()

    # end


if __name__ == "__main__":
    # It would listen on all interfaces.
    umbridge.um.web.run_app = functools.partial(umbridge.um.web.run_app, host="127.0.0.1")
    umbridge.serve_models([Model(name) for name in ROWS], int(sys.argv[1]))
