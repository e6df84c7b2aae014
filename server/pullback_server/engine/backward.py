"""torch.autograd.grad, its failures told in the terms of the contract; one cotangent or many."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pullback_server.engine.call import Call, model_error, out_of_memory
from pullback_server.engine.guards import quiet_vmap
from pullback_server.engine.recomputing import Unrepeatable
from pullback_server.faults import Fault, listed
from pullback_wire import Reason

#: Parts of messages with which torch says that a derivative does not exist.
NO_FORMULA = (
    "derivative for ",
    "the derivative for",
    "is not implemented",
    "not differentiable twice",
    "once_differentiable",
    "double backward",
    "Double backward",
    "double-backward",
    # A backward through numpy that does not detach.
    "Can't call numpy() on Tensor that requires grad",
    "an autograd kernel was not registered",
)
_CUDNN = "cudnn RNN backward can only be called in training mode"


def gradients(
    call: Call,
    outputs: Sequence[torch.Tensor],
    wrt: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    *,
    order: int = 1,
    retain: bool = False,
    create: bool = False,
) -> list[torch.Tensor | None]:
    """torch.autograd.grad, with its exceptions told in the terms of the contract. None: unused.

    order: which derivative of the function this is, for messages.
    """
    try:
        return list(torch.autograd.grad(outputs, wrt, values, retain or create, create, allow_unused=True))
    except BaseException as error:
        if out_of_memory(error):
            raise
        raise explain(call, error, order) from error


def explain(call: Call, error: BaseException, order: int) -> Exception:
    """What an exception out of a backward means."""
    if isinstance(error, Unrepeatable):
        error.learn()
        return call.rerun()
    text = str(error)
    hosted = call.hosted
    if _CUDNN in text and not hosted.without_cudnn:
        hosted.without_cudnn = True
        return call.rerun()
    if isinstance(error, (RuntimeError, Warning)) and any(part in text for part in NO_FORMULA):
        if order == 1:
            return Fault(Reason.NOT_DIFFERENTIABLE, f"{hosted.owner} cannot be differentiated: {text}")
        return Fault(
            Reason.ORDER_UNAVAILABLE,
            f"{hosted.owner} has no derivative of order {order}: {type(error).__name__}: {text}",
        )
    return model_error(hosted.owner, error)


class Rows:
    """Gradients for cotangents with a leading axis: vectorised, or one by one where a backward cannot be."""

    def __init__(
        self, call: Call, outputs: Sequence[torch.Tensor], wrt: Sequence[torch.Tensor], order: int = 1
    ) -> None:
        self._call = call
        self._outputs = outputs
        self._wrt = wrt
        self._order = order
        self._vectorised = True

    def __call__(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """The graph stays. Raises Fault."""
        if self._vectorised:
            if not self._call.hosted.stock:
                # A backward that writes into what it is given must not spoil it for the second attempt.
                kept, values = values, [value.clone() for value in values]
            else:
                kept = values
            try:
                with quiet_vmap():
                    return list(
                        torch.autograd.grad(
                            self._outputs, self._wrt, values, True, allow_unused=True, is_grads_batched=True
                        )
                    )
            # It runs the user's backward on tensors of another kind, which may fail in any way, and takes memory.
            except BaseException as error:
                self._vectorised = False
                values = kept
                if out_of_memory(error) and self._call.device.type == "cuda":
                    torch.cuda.empty_cache()
        rows = [
            gradients(self._call, self._outputs, self._wrt, [v[k] for v in values], order=self._order, retain=True)
            for k in range(values[0].shape[0])
        ]
        return [stacked(column) for column in zip(*rows, strict=True)]


def stacked(column: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """One row after the other as one tensor; None where there is none at all."""
    like = next((gradient for gradient in column if gradient is not None), None)
    if like is None:
        return None
    # A backward may return None for a gradient that is zero.
    dense = [torch.zeros_like(like) if gradient is None else gradient for gradient in column]
    return torch.stack([gradient.to_dense() for gradient in dense])


def check_unused(call: Call, found: Sequence[object | None]) -> None:
    """Raises Fault (UNUSED_INPUT) naming every member of `wrt` without a gradient."""
    if not call.job.allow_unused and any(gradient is None for gradient in found):
        unused = [wrt.label for wrt, gradient in zip(call.job.wrt, found, strict=True) if gradient is None]
        raise Fault(
            Reason.UNUSED_INPUT,
            f"the function does not depend on {listed(unused)}; with allow_unused they come back marked as unused",
            f"wrt[{unused[0]}]",
        )
