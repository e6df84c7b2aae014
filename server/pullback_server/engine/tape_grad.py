"""torch.autograd.grad on the handles of a session, its failures told in the terms of the contract."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import torch

from pullback_server import ops
from pullback_server.engine._dtypes import describe, differentiable, name_of
from pullback_server.engine.backward import NO_FORMULA
from pullback_server.engine.call import model_error, out_of_memory, text_of
from pullback_server.engine.guards import plain_kernels, quiet_vmap, without_cudnn
from pullback_server.engine.retained import Ledger
from pullback_server.engine.tape_orders import Watch
from pullback_server.engine.tape_state import PLAIN, Afford, Held, Lineage, Operands, merged
from pullback_server.faults import Fault
from pullback_wire import Reason

#: Most rows of batched grad_outputs.
_MOST_ROWS = 65_536

Made = list[tuple[int, str, Held | None]]
Tensors = Sequence[torch.Tensor]


class Backward:
    """One Grad op, checked."""

    def __init__(self, op: ops.Grad, operands: Operands, planted: Lineage) -> None:
        self.op = op
        self.outputs = [operands.handles[handle] for handle in op.outputs]
        self.inputs = [operands.handles[handle] for handle in op.inputs]
        self._check()
        self.rows: int | None = None
        self.given: list[Held | None] = self._grad_outputs(operands)
        self.lineage = merged(
            [held.lineage for group in (self.outputs, self.given) for held in group if held is not None] + [planted]
        )

    def _check(self) -> None:
        op = self.op
        if not op.outputs or not op.inputs:
            what = "inputs" if op.outputs else "outputs"
            raise Fault(Reason.BAD_HANDLE, f"{what} is empty; name what to differentiate, and by what", what)
        if len(op.handles) != len(op.inputs):
            raise Fault(
                Reason.BAD_HANDLE,
                f"{len(op.inputs)} inputs and {len(op.handles)} handles for their gradients, expected as many",
                "handles",
            )
        for held in self.outputs:
            if not held.tensor.requires_grad:
                raise Fault(
                    Reason.NOT_DIFFERENTIABLE,
                    f"the output {held.handle} ({describe(held.tensor)}) needs no grad: it does not depend on a tensor "
                    "that requires grad, or not differentiably",
                    f"outputs[{held.handle}]",
                )
        for held in self.inputs:
            if not held.tensor.requires_grad:
                why = (
                    "does not require grad"
                    if differentiable(held.tensor.dtype)
                    else "is neither floating-point nor complex"
                )
                raise Fault(
                    Reason.NOT_DIFFERENTIABLE,
                    f"the input {held.handle} ({describe(held.tensor)}) {why}",
                    f"inputs[{held.handle}]",
                )

    def _grad_outputs(self, operands: Operands) -> list[Held | None]:
        op = self.op
        if op.grad_outputs and len(op.grad_outputs) != len(op.outputs):
            raise Fault(
                Reason.BAD_COTANGENT,
                f"{len(op.outputs)} outputs and {len(op.grad_outputs)} grad_outputs, expected as many or none",
                "grad_outputs",
            )
        given = op.grad_outputs or [None] * len(op.outputs)
        values: list[Held | None] = []
        for index, (operand, output) in enumerate(zip(given, self.outputs, strict=True)):
            field = f"grad_outputs[{index}]"
            if operand is None:
                self._check_implicit(output, field)
                values.append(None)
                continue
            held = operands.take(operand, field)
            self._check_like(held.tensor, output, field)
            values.append(held)
        if op.batched and self.rows is None:
            raise Fault(
                Reason.BAD_COTANGENT, "is_grads_batched is set, but there are no grad_outputs", "is_grads_batched"
            )
        return values

    def _check_implicit(self, output: Held, field: str) -> None:
        tensor = output.tensor
        if tensor.numel() != 1 or tensor.is_complex():
            raise Fault(
                Reason.MISSING_COTANGENT,
                f"{field} is missing: it may be left out only for a real scalar, but the output {output.handle} is "
                f"{describe(tensor)}",
                field,
            )

    def _check_like(self, tensor: torch.Tensor, output: Held, field: str) -> None:
        like = output.tensor
        shape, expected = list(tensor.shape), list(like.shape)
        if self.op.batched:
            if not shape:
                raise Fault(
                    Reason.BAD_COTANGENT,
                    f"{field} has the shape [], expected a leading axis before {expected}, as is_grads_batched is set",
                    f"{field}.shape",
                )
            if self.rows is not None and self.rows != shape[0]:
                raise Fault(
                    Reason.BAD_COTANGENT,
                    f"{field} has {shape[0]} rows, others have {self.rows}, expected as many",
                    f"{field}.shape",
                )
            self.rows = shape[0]
            if not 1 <= self.rows <= _MOST_ROWS:
                reason = Reason.RESULT_TOO_LARGE if self.rows else Reason.BAD_COTANGENT
                raise Fault(reason, f"{field} has {self.rows} rows, expected 1 to {_MOST_ROWS}", f"{field}.shape")
            expected = [self.rows, *expected]
        if shape != expected:
            raise Fault(
                Reason.BAD_COTANGENT,
                f"{field} has the shape {shape}, expected {expected} as the output {output.handle}"
                f"{' (rows first)' if self.op.batched else ''}",
                f"{field}.shape",
            )
        if not differentiable(tensor.dtype) or (
            tensor.dtype != like.dtype and (tensor.is_complex() or like.is_complex())
        ):
            raise Fault(
                Reason.BAD_COTANGENT,
                f"{field} is {name_of(tensor.dtype)}, expected {name_of(like.dtype)} as the output {output.handle}",
                f"{field}.dtype",
            )

    @property
    def retain(self) -> bool:
        op = self.op
        return op.create_graph if op.retain_graph is None else op.retain_graph

    @property
    def order(self) -> int:
        """Which derivative of the forwards this takes part in, for messages."""
        return 1 + self.lineage.order + max(held.lineage.order for held in self.outputs)

    def run(self) -> list[torch.Tensor | None]:
        """The gradients. Raises Fault, and what torch raises when memory runs out."""
        outputs = [held.tensor for held in self.outputs]
        inputs = [held.tensor for held in self.inputs]
        given = [None if held is None else held.tensor for held in self.given]
        watch = None
        if self.op.create_graph and self.lineage.models:
            watch = Watch(self.lineage, outputs, inputs)
            if watch.foreign and not all(value is not None and value.requires_grad for value in given):
                self._rehearse(watch, outputs, inputs, given)
        armed = watch.armed() if watch is not None else contextlib.nullcontext()
        with self._kernels(), armed:
            if self.op.batched:
                found = self._rows(outputs, inputs, given, watch is not None and bool(watch.foreign))
            else:
                found = self._once(outputs, inputs, given)
        if watch is not None:
            watch.check(found)
        return [
            None if gradient is None else gradient.to_dense() if gradient.layout is not torch.strided else gradient
            for gradient in found
        ]

    def _kernels(self) -> contextlib.AbstractContextManager[object]:
        """The kernels of the forwards, which a backward may run again."""
        models = self.lineage.models
        if not models:
            return contextlib.nullcontext()
        plain = contextlib.nullcontext() if self.lineage.fast else plain_kernels()
        if not any(hosted.without_cudnn for hosted in models):
            return plain
        stack = contextlib.ExitStack()
        stack.enter_context(without_cudnn())
        stack.enter_context(plain)
        return stack

    def _once(
        self, outputs: Tensors, inputs: Tensors, given: Sequence[torch.Tensor | None], retain: bool | None = None
    ) -> list[torch.Tensor | None]:
        try:
            return list(
                torch.autograd.grad(
                    outputs,
                    inputs,
                    given,
                    self.retain if retain is None else retain,
                    self.op.create_graph,
                    allow_unused=True,
                )
            )
        except BaseException as error:
            if out_of_memory(error):
                raise
            raise self._explained(error) from error

    def _rehearse(self, watch: Watch, outputs: Tensors, inputs: Tensors, given: Sequence[torch.Tensor | None]) -> None:
        """A backward whose grad_outputs require grad, so that a Function shows when it drops a part of the graph."""
        values = [
            (torch.ones_like(output) if value is None else value[0] if self.op.batched else value)
            .detach()
            .to(output.dtype)
            .requires_grad_()
            for output, value in zip(outputs, given, strict=True)
        ]
        with self._kernels(), watch.armed():
            watch.check(self._once(outputs, inputs, values, True), rehearsal=True)

    def _rows(
        self, outputs: Tensors, inputs: Tensors, given: Sequence[torch.Tensor | None], watched: bool
    ) -> list[torch.Tensor | None]:
        """Gradients for grad_outputs with a leading axis: vectorised, or one by one where a backward cannot be."""
        rows = self.rows or 0

        def row(index: int) -> list[torch.Tensor | None]:
            return [None if value is None else value[index] for value in given]

        found: list[torch.Tensor | None] = []
        try:
            if watched:
                raise NotImplementedError
            with quiet_vmap():
                found = list(
                    torch.autograd.grad(
                        outputs,
                        inputs,
                        given,
                        # It may have to run again, row by row.
                        True,
                        self.op.create_graph,
                        allow_unused=True,
                        is_grads_batched=True,
                    )
                )
        # It runs backwards on tensors of another kind, which may fail in any way, and takes memory.
        except BaseException as error:
            if not isinstance(error, Exception) and not self.lineage.models:
                raise
            if out_of_memory(error) and outputs[0].is_cuda:
                torch.cuda.empty_cache()
        if found:
            if not self.retain:
                # The one way to have torch free the graph.
                self._once(outputs, inputs, row(0))
            return found
        columns = [self._once(outputs, inputs, row(k), self.retain or k + 1 < rows) for k in range(rows)]
        return [_stacked(column) for column in zip(*columns, strict=True)]

    def _explained(self, error: BaseException) -> Fault:
        """What an exception out of a backward means."""
        text = text_of(error)
        owner = " or ".join(sorted(hosted.owner for hosted in self.lineage.models)) or "the graph"
        if isinstance(error, RuntimeError):
            if "Trying to backward through the graph a second time" in text:
                return Fault(
                    Reason.GRAPH_FREED,
                    f"the graph behind {_handles(self.outputs)} was freed by an earlier backward: say "
                    "retain_graph=True in every backward but the last one, or run the forward again",
                    "outputs",
                )
            if "modified by an inplace operation" in text:
                return Fault(
                    Reason.MODIFIED_IN_PLACE,
                    f"a tensor that the backward of {_handles(self.outputs)} needs was changed in place after the "
                    f"forward: {text}",
                    "outputs",
                )
            if any(part in text for part in NO_FORMULA):
                if self.order == 1 and not self.op.create_graph:
                    return Fault(Reason.NOT_DIFFERENTIABLE, f"{owner} cannot be differentiated: {text}", "outputs")
                return Fault(
                    Reason.ORDER_UNAVAILABLE,
                    f"{owner} has no derivative of this order: {text}; gradients without create_graph, of what is no "
                    "gradient itself, are available",
                    "outputs",
                )
            if "use_reentrant" in text:
                return Fault(
                    Reason.UNSUPPORTED_BY_MODEL,
                    f"{owner} runs under torch.utils.checkpoint with use_reentrant=True, which torch.autograd.grad "
                    "cannot differentiate; its author can say use_reentrant=False",
                )
            if "grad" in text and ("Mismatch in shape" in text or "dtype" in text) and not self.lineage.models:
                return Fault(Reason.BAD_COTANGENT, text, "grad_outputs")
        return model_error(owner, error)


def _handles(helds: Sequence[Held]) -> str:
    return ", ".join(str(held.handle) for held in helds[:8])


def _stacked(column: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    like = next((gradient for gradient in column if gradient is not None), None)
    if like is None:
        return None
    # A backward may return None for a gradient that is zero.
    return torch.stack([torch.zeros_like(like).to_dense() if g is None else g.to_dense() for g in column])


def grad(op: ops.Grad, operands: Operands, ledger: Ledger, afford: Afford) -> Made:
    """Runs a Grad op. Raises Fault, Dependency, and what torch raises when memory runs out."""
    backward = Backward(op, operands, operands.handles.planted)
    # Each gradient is as large as its input, which the session holds already; rows may be many.
    if backward.rows is not None:
        afford(sum(held.tensor.nbytes for held in backward.inputs) * backward.rows)
    try:
        found = backward.run()
    finally:
        for hosted in backward.lineage.models:
            # A backward may have run modules again.
            hosted.restore_state()
        ledger.dropped(len(op.outputs))
    if not op.allow_unused and any(gradient is None for gradient in found):
        unused = [held for held, gradient in zip(backward.inputs, found, strict=True) if gradient is None]
        raise Fault(
            Reason.UNUSED_INPUT,
            f"the outputs {_handles(backward.outputs)} do not depend on the inputs {_handles(unused)}; with "
            "allow_unused they come back marked as unused",
            f"inputs[{unused[0].handle}]",
        )
    lineage = backward.lineage
    lineage = replace(lineage, order=lineage.order + 1) if op.create_graph else PLAIN
    made: Made = []
    own: set[int] = set()
    for handle, gradient in zip(op.handles, found, strict=True):
        if gradient is None:
            made.append((handle, "", None))
            continue
        # The gradient of a sum is the very tensor that was given, for each term. Handles do not share memory for that.
        if ledger.knows(gradient) or gradient.untyped_storage()._cdata in own:
            gradient = gradient.clone()
        own.add(gradient.untyped_storage()._cdata)
        made.append((handle, "", Held(gradient, lineage if gradient.requires_grad else PLAIN)))
    return made
