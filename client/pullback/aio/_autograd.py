"""torch.autograd's functions for tensors of asyncio sessions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from pullback import _backward, autograd
from pullback._tensor import Tensor as SyncTensor
from pullback.aio._held import in_turn
from pullback.aio._tensor import Tensor, accumulate


async def grad(
    outputs: SyncTensor | Sequence[SyncTensor],
    inputs: SyncTensor | Sequence[SyncTensor],
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Tensor | None, ...]:
    """The gradients of outputs with respect to inputs, one for each input; see `pullback.autograd.grad`.

    (g,) = await pb.aio.grad(y, x, create_graph=True)
    """
    outputs = outputs if isinstance(outputs, SyncTensor) else list(outputs)
    found = await in_turn(
        [outputs] if isinstance(outputs, SyncTensor) else outputs,
        autograd.grad,
        outputs,
        inputs,
        grad_outputs,
        retain_graph,
        create_graph,
        allow_unused,
        is_grads_batched,
        materialize_grads,
    )
    return cast("tuple[Tensor | None, ...]", found)


async def backward(
    tensors: SyncTensor | Sequence[SyncTensor],
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: SyncTensor | Sequence[SyncTensor] | None = None,
) -> None:
    """Accumulates the gradients of several tensors into `.grad` of leaves; see `pullback.autograd.backward`."""
    await accumulate(*_backward.paired(tensors, grad_tensors), retain_graph, create_graph, inputs)
