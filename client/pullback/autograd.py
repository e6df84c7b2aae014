"""torch.autograd's functions, for tensors whose graph a server holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pullback import _backward
from pullback._anomaly import detect_anomaly, is_anomaly_enabled
from pullback._grad_mode import enable_grad, is_grad_enabled, no_grad
from pullback._tensor import Tensor

__all__ = [
    "backward",
    "detect_anomaly",
    "enable_grad",
    "grad",
    "is_anomaly_enabled",
    "is_grad_enabled",
    "no_grad",
]


def grad(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Tensor | None, ...]:
    """The gradients of outputs with respect to inputs, one for each input: torch.autograd.grad.

        (g,) = pb.autograd.grad(y, x, create_graph=True)
        (h,) = pb.autograd.grad(g.sum(), x)

    outputs, inputs: a Tensor or a sequence of them. Nothing is accumulated into `.grad`.
    grad_outputs: one cotangent for each output, of its shape: Tensors, arrays or lists; None: 1, for outputs of one
        element.
    retain_graph: keep the graph for another backward; None: as create_graph.
    create_graph: make the gradients differentiable, to any order that the models on the way promise.
    allow_unused: give None for an input that the outputs do not depend on, instead of raising UnusedInput.
    is_grads_batched: each grad_output has one more, leading axis of independent cotangents, and so has each gradient.
    materialize_grads: give zeros instead of None.

    Raises NotDifferentiable, MissingCotangent, BadCotangent, UnusedInput, GraphFreed, OrderUnavailable,
    ModifiedInPlace, ...; TypeError and ValueError for what makes no call.
    """
    return _backward.grad(
        outputs,
        inputs,
        grad_outputs,
        retain_graph,
        create_graph,
        allow_unused,
        is_grads_batched,
        materialize_grads,
    )


def backward(
    tensors: Tensor | Sequence[Tensor],
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Tensor | Sequence[Tensor] | None = None,
) -> None:
    """Accumulates the gradients of several tensors into `.grad` of leaves: torch.autograd.backward.

    grad_tensors: a cotangent for each of `tensors`; for the rest see `Tensor.backward`.
    """
    _backward.backward(*_backward.paired(tensors, grad_tensors), retain_graph, create_graph, inputs)
