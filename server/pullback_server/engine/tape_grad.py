"""torch.autograd.grad on the handles of a session, its failures told in the terms of the contract."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import torch

from pullback_server import ops
from pullback_server.engine._dtypes import describe, differentiable
from pullback_server.engine.anomaly import all_finite, fault_of, looking
from pullback_server.engine.backward import stacked
from pullback_server.engine.call import out_of_memory
from pullback_server.engine.guards import Randomness, plain_kernels, quiet_vmap, without_cudnn
from pullback_server.engine.origins import Tracer
from pullback_server.engine.replica import guarded
from pullback_server.engine.retained import Ledger
from pullback_server.engine.tape_cotangents import grad_outputs
from pullback_server.engine.tape_faults import explained
from pullback_server.engine.tape_orders import Watch
from pullback_server.engine.tape_state import PLAIN, Afford, Held, Lineage, Made, Operands, merged
from pullback_server.faults import Fault
from pullback_wire import Reason

Tensors = Sequence[torch.Tensor]


class Backward:
    """One Grad op, checked."""

    def __init__(self, op: ops.Grad, operands: Operands, planted: Lineage) -> None:
        self.op = op
        self.outputs = [operands.handles[handle] for handle in op.outputs]
        self.inputs = [operands.handles[handle] for handle in op.inputs]
        self._check()
        self.given, self.rows = grad_outputs(op, self.outputs, operands)
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
        for index, held in enumerate(self.outputs):
            if not held.tensor.requires_grad:
                raise Fault(
                    Reason.NOT_DIFFERENTIABLE,
                    f"outputs[{index}] ({describe(held.tensor)}) needs no grad: it does not depend on a tensor that "
                    "requires grad, or not differentiably",
                    f"outputs[{index}]",
                )
        for index, held in enumerate(self.inputs):
            if not held.tensor.requires_grad:
                why = (
                    "does not require grad"
                    if differentiable(held.tensor.dtype)
                    else "is neither floating-point nor complex"
                )
                raise Fault(
                    Reason.NOT_DIFFERENTIABLE,
                    f"inputs[{index}] ({describe(held.tensor)}) {why}",
                    f"inputs[{index}]",
                )

    @property
    def retain(self) -> bool:
        op = self.op
        return op.create_graph if op.retain_graph is None else op.retain_graph

    @property
    def first(self) -> bool:
        """Whether no gradient is differentiated here, nor will be."""
        return not self.op.create_graph and not self.lineage.order

    def fields(self) -> dict[str, torch.Tensor]:
        """What goes into it, by field."""
        groups: dict[str, Sequence[Held | None]] = {
            "grad_outputs": self.given,
            "outputs": self.outputs,
            "inputs": self.inputs,
        }
        return {
            f"{what}[{index}]": held.tensor.detach()
            for what, helds in groups.items()
            for index, held in enumerate(helds)
            if held is not None
        }

    def run(self) -> list[torch.Tensor | None]:
        """The gradients. Raises Fault, and what torch raises when memory runs out."""
        outputs = [held.tensor for held in self.outputs]
        inputs = [held.tensor for held in self.inputs]
        given = self._copies([None if held is None else held.tensor for held in self.given])
        watch = None
        if self.op.create_graph and self.lineage.models:
            watch = Watch(self.lineage, outputs, inputs, given)
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

    def _copies(self, given: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """Cotangents that a Function's backward may write into, where there may be one."""
        if not self.lineage.models:
            return given
        return [None if value is None else value.clone() for value in given]

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
            raise explained(error, self.lineage, self.first) from error

    def _rehearse(self, watch: Watch, outputs: Tensors, inputs: Tensors, given: Sequence[torch.Tensor | None]) -> None:
        """A backward whose grad_outputs require grad, so that a Function shows when it drops a part of the graph."""
        values = [
            (torch.ones_like(output) if value is None else value[0] if self.op.batched else value)
            .detach()
            .to(output.dtype)
            .requires_grad_()
            for output, value in zip(outputs, given, strict=True)
        ]
        # What a Function counts or keeps on its ctx must be as if there had been no rehearsal.
        kept = [(node, dict(vars(node))) for node in watch.foreign if hasattr(node, "__dict__")]
        with self._kernels(), watch.armed():
            watch.check(self._once(outputs, inputs, values, True), rehearsal=True)
        for node, state in kept:
            vars(node).clear()
            vars(node).update(state)

    def _rows(
        self, outputs: Tensors, inputs: Tensors, given: Sequence[torch.Tensor | None], watched: bool
    ) -> list[torch.Tensor | None]:
        """Gradients for grad_outputs with a leading axis: vectorised, or one by one where a backward cannot be.

        watched: whether nodes are watched, which only those of plain tensors can be.
        """
        rows = self.rows or 0

        def row(index: int) -> list[torch.Tensor | None]:
            return [None if value is None else value[index] for value in given]

        found = [] if watched else self._vectorised(outputs, inputs, self._copies(given))
        if found:
            if not self.retain:
                # The one way to have torch free the graph.
                self._once(outputs, inputs, row(0))
            return found
        columns = [self._once(outputs, inputs, row(k), self.retain or k + 1 < rows) for k in range(rows)]
        return [stacked(column) for column in zip(*columns, strict=True)]

    def _vectorised(
        self, outputs: Tensors, inputs: Tensors, given: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """All rows at once; the graph stays. Nothing where that cannot be."""
        create = self.op.create_graph
        try:
            with quiet_vmap():
                return list(
                    torch.autograd.grad(outputs, inputs, given, True, create, allow_unused=True, is_grads_batched=True)
                )
        # It runs backwards on tensors of another kind, which may fail in any way, and takes memory.
        except BaseException as error:
            if not isinstance(error, Exception) and not self.lineage.models:
                raise
            if out_of_memory(error) and outputs[0].is_cuda:
                torch.cuda.empty_cache()
        return []


def _check_finite(tracer: Tracer, found: Sequence[torch.Tensor | None]) -> None:
    """Raises Fault (NON_FINITE)."""
    named = [(f"gradients[{index}]", one.detach()) for index, one in enumerate(found) if one is not None]
    if not all_finite(named):
        raise fault_of(tracer, named)


def grad(op: ops.Grad, operands: Operands, ledger: Ledger, afford: Afford) -> Made:
    """Runs a Grad op. Raises Fault, Dependency, and what torch raises when memory runs out."""
    backward = Backward(op, operands, operands.handles.planted)
    # Each gradient is as large as its input, which the session holds already; rows may be many.
    if backward.rows is not None:
        afford(sum(held.tensor.nbytes for held in backward.inputs) * backward.rows)
    # A backward that seeds the generators does not decide about the calls after it.
    randomness = Randomness(None, backward.outputs[0].tensor.device) if backward.lineage.models else None
    if randomness is not None:
        randomness.begin()
    try:
        with guarded(backward.lineage), looking(backward.fields(), op.detect_anomaly) as tracer:
            found = backward.run()
        if tracer is not None:
            _check_finite(tracer, found)
    finally:
        if randomness is not None:
            randomness.end()
        for hosted in backward.lineage.models:
            # A backward may have run modules again.
            hosted.restore_state()
        ledger.dropped(len(op.outputs))
    if not op.allow_unused and any(gradient is None for gradient in found):
        unused = [f"inputs[{index}]" for index, gradient in enumerate(found) if gradient is None]
        raise Fault(
            Reason.UNUSED_INPUT,
            f"the outputs do not depend on {', '.join(unused[:8])}; with allow_unused they come back marked as unused",
            unused[0],
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
        known = ledger.knows(gradient) or ledger.is_exempt(gradient)
        if known or gradient.untyped_storage()._cdata in own:
            gradient = gradient.clone()
        own.add(gradient.untyped_storage()._cdata)
        made.append((handle, "", Held(gradient, lineage if gradient.requires_grad else PLAIN)))
    return made
