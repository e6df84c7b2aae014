"""Second order of a peer that has none of its own: what wrapping its VJP into an autograd.Function gives."""

from typing import Any

import numpy as np
import torch


class Unavailable(Exception):
    """The peer has nothing that one could ask for a second derivative."""


def through_function(client: Any, x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The gradient of (g * x).sum(), g from create_graph=True through the wrapper that everybody writes."""

    class Remote(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x**3  # the client's forward pass would return the same

        @staticmethod
        def backward(ctx: Any, *cotangents: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            _, gradient = client.vjp(x.detach().numpy(), cotangents[0].detach().numpy(), "cube")
            return torch.from_numpy(np.array(gradient, dtype=np.float32).reshape(tuple(x.shape)))

    leaf = torch.from_numpy(x).requires_grad_()
    (gradient,) = torch.autograd.grad(Remote.apply(leaf), leaf, torch.from_numpy(v), create_graph=True)
    (gradient * leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad.numpy()
