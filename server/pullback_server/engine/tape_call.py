"""The ops of a session that make tensors: calls of models, losses and tensor operations, and leaves of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pullback_server import ops
from pullback_server.engine import anomaly, losses
from pullback_server.engine._dtypes import describe, differentiable
from pullback_server.engine._names import unknown_name
from pullback_server.engine.call import Again
from pullback_server.engine.core import Engine
from pullback_server.engine.guards import rewinding
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.losses import LOSSES
from pullback_server.engine.operations import Applied, apply
from pullback_server.engine.retained import Ledger
from pullback_server.engine.tape_arguments import Named, by_name, model_inputs, model_parameters
from pullback_server.engine.tape_model import Overwritten, Run, as_handles, run_model
from pullback_server.engine.tape_state import PLAIN, Afford, Cause, Handles, Held, Lineage, Made, Operands, merged
from pullback_server.faults import Fault
from pullback_server.job import HealthRecord, LossCall
from pullback_wire import Reason

#: How often a model's call is computed anew with what was learned about it. Each thing is learned once.
_ATTEMPTS = 9


class Caller:
    """Runs the calls of one session."""

    def __init__(self, engine: Engine, handles: Handles, ledger: Ledger) -> None:
        self._engine = engine
        self._handles = handles
        self._ledger = ledger
        #: The models whose memory the ledger knows.
        self._exempt: set[HostedModel] = set()
        #: The model of the latest call of one, and what is said of its health.
        self.label = ("", HealthRecord())

    def close(self) -> None:
        self._exempt.clear()

    def call(self, op: ops.Call, operands: Operands, number: int, afford: Afford) -> Made:
        """Raises Fault, Dependency, and what torch raises when memory runs out."""
        match op.callee:
            case ops.Model() as callee:
                outputs, lineage = self._model(callee, op, operands, number)
            case ops.Loss(loss):
                outputs, lineage = _loss(loss, op, operands)
            case ops.Operation() as callee:
                applied = apply(callee, op, operands, afford)
                if applied.changed is not None:
                    return [(applied.changed.handle, "", self._changed(applied, applied.changed))]
                outputs, lineage = {"output": applied.tensor}, applied.lineage
                del applied
        return self._made(op, outputs, lineage)

    def _made(self, op: ops.Call, outputs: dict[str, torch.Tensor], lineage: Lineage) -> Made:
        names = list(outputs)
        handles = as_handles(names, op.handles)
        own = self._handles.memory(op) if isinstance(op.callee, ops.Model) else {}
        if len(handles) > len(op.handles):
            self._handles.check_free(handles[len(op.handles) :])
        made: Made = []
        for handle, name in zip(handles, names, strict=False):
            tensor = outputs.pop(name)
            # What an op of the session does to it in place must not reach the hosted model.
            if self._ledger.is_exempt(tensor):
                tensor = tensor.clone()
            elif (
                isinstance(op.callee, ops.Model)
                and not tensor.requires_grad
                and tensor.untyped_storage()._cdata not in own
            ):
                tensor = _own(tensor.detach())
            made.append((handle, name, Held(tensor, lineage if tensor.requires_grad else PLAIN)))
        return made

    def _changed(self, applied: Applied, held: Held) -> Held:
        """After an in-place operation: whatever looks at the same memory now has the operation in its graph."""
        if applied.lineage.models or applied.lineage.order:
            key = held.tensor.untyped_storage()._cdata
            for other in self._handles.held.values():
                if other.tensor.untyped_storage()._cdata == key:
                    other.lineage = merged([other.lineage, applied.lineage])
        return held

    def _model(
        self, callee: ops.Model, op: ops.Call, operands: Operands, number: int
    ) -> tuple[dict[str, torch.Tensor], Lineage]:
        for _ in range(_ATTEMPTS):
            hosted = self._hosted(callee.name, callee.version)
            self.label = (callee.name, hosted.health)
            targets = by_name(op.targets, "targets", operands)
            if callee.loss is None and targets:
                raise Fault(Reason.BAD_NAME, f"targets[{next(iter(targets))}] was given without a loss", "targets")
            run = Run(
                inputs=model_inputs(hosted, op.inputs, operands),
                parameters=model_parameters(hosted, op.parameters, operands) if op.parameters else {},
                targets=targets,
                loss=None if callee.loss is None else losses.prepare(callee.loss, _tensors(targets)),
                train=callee.train,
                seed=callee.seed,
                fast=op.max_order is not None and op.max_order <= 1,
                no_grad=op.no_grad,
                notes=callee.detect_anomaly,
            )
            try:
                outputs, lineage = _looked_at(hosted, run) if callee.detect_anomaly else run_model(hosted, run)
            except Again:
                continue
            except Overwritten as over:
                cause = Cause(number, "call", Reason.MODIFIED_IN_PLACE.value, over.message)
                self._handles.spoil(over.helds, cause)
                raise Fault(Reason.MODIFIED_IN_PLACE, over.message) from None
            finally:
                self._handles.plant(hosted, (*run.inputs.values(), *run.parameters.values()), run.hung)
            return outputs, lineage
        raise Fault(Reason.INTERNAL, f"model {callee.name!r}: no attempt of {_ATTEMPTS} came to an end")

    def _hosted(self, name: str, version: str) -> HostedModel:
        hosted = self._engine.find(name, version)
        if hosted not in self._exempt or hosted.writes_buffers:
            self._exempt.add(hosted)
            self._ledger.exempt(hosted.storages())
        return hosted

    def parameters(self, op: ops.Parameters) -> Made:
        """Leaves with the values of hosted parameters, in memory of their own. Raises Fault."""
        hosted = self._hosted(op.model, op.version)
        if len(op.names) != len(op.handles):
            raise Fault(
                Reason.BAD_HANDLE, f"{len(op.names)} names and {len(op.handles)} handles, expected as many", "handles"
            )
        made: Made = []
        for name, handle in zip(op.names, op.handles, strict=True):
            own = hosted.parameters.get(hosted.aliases.get(name, name))
            if own is None:
                raise unknown_name("parameter", name, hosted.parameters, f"names[{name}]", hosted.owner)
            if not differentiable(own.dtype):
                raise Fault(
                    Reason.NOT_DIFFERENTIABLE,
                    f"names[{name}] is {describe(own)}; only floating-point and complex tensors can require grad",
                    f"names[{name}]",
                )
            made.append((handle, name, Held(own.detach().clone().requires_grad_())))
        return made


def _looked_at(hosted: HostedModel, run: Run) -> tuple[dict[str, torch.Tensor], Lineage]:
    """As run_model. Raises also Fault (NON_FINITE)."""
    rewind = rewinding(hosted.device, not hosted.stock)
    outputs, lineage = run_model(hosted, run)
    found = _labelled("outputs", outputs)
    if anomaly.all_finite(found):
        return outputs, lineage
    groups = {"inputs": run.inputs, "parameters": run.parameters, "targets": run.targets}
    given = {f"{what}[{name}]": held.tensor.detach() for what, named in groups.items() for name, held in named.items()}
    raise anomaly.explained(hosted, found, given, lambda: _labelled("outputs", run_model(hosted, run)[0]), rewind)


def _labelled(what: str, named: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [(f"{what}[{name}]", tensor.detach()) for name, tensor in named.items()]


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without a graph whose memory nobody else holds: a model may keep what it returns (a table, a cache)."""
    storage: Any = tensor.untyped_storage()
    count: Any = torch._C._storage_Use_Count
    # One user is the tensor, one is `storage`.
    return tensor.clone() if count(storage._cdata) > 2 else tensor


def _tensors(named: Named) -> dict[str, torch.Tensor]:
    return {name: held.tensor for name, held in named.items()}


def _loss(call: LossCall, op: ops.Call, operands: Operands) -> tuple[dict[str, torch.Tensor], Lineage]:
    """A loss on handles."""
    loss = LOSSES.get(call.name)
    first = "input" if loss is None else loss.tensors[0]
    targets = by_name(op.targets, "targets", operands)
    if len(op.inputs) == 1:
        operand = op.inputs[0]
        known = () if loss is None else (*loss.tensors, *loss.optional)
        name = operand.name if operand.name in known else first
        inputs = {name: operands.take(operand, f"inputs[{operand.name or name}]")}
    else:
        inputs = by_name(op.inputs, "inputs", operands)
    for name in inputs:
        if name in targets:
            raise Fault(Reason.BAD_NAME, f"{name!r} is given as an input and as a target", f"targets[{name}]")
    arguments = inputs | targets
    fed = arguments.pop(first, None)
    prepared = losses.prepare(LossCall(call.name, call.options, {}), _tensors(arguments))
    if fed is None:
        raise Fault(
            Reason.BAD_NAME, f"{call.name} needs inputs[{first}], which the request does not have", f"inputs[{first}]"
        )
    torch._C._set_grad_enabled(not op.no_grad)
    try:
        tensor = prepared.apply({first: fed.tensor}, _tensors(arguments), "the request")
    finally:
        torch._C._set_grad_enabled(True)
    return {"loss": tensor}, merged(held.lineage for held in (fed, *arguments.values()))
