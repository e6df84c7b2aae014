"""Jobs out of torch tensors, and results back into them: what the tests of the engine have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from pullback_server.engine import Engine, EngineResult, WritesInputs
from pullback_server.engine._dtypes import WIRE
from pullback_server.engine.guards import Witness
from pullback_server.faults import Fault
from pullback_server.hosting import Registration
from pullback_server.job import Job, LossCall, TensorRef, Wrt
from pullback_wire import Reason

__all__ = ["WIRE", "Host", "Reply", "Witness", "host_factory", "host_function", "make_job", "refused", "unpack"]

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Reply:
    """A result, with tensors instead of references."""

    raw: EngineResult
    outputs: dict[str, torch.Tensor]
    grads: dict[str, torch.Tensor | None]
    hvps: dict[str, torch.Tensor | None]
    cotangent_derivatives: dict[str, torch.Tensor | None]
    blocks: dict[tuple[str, str], torch.Tensor | None]
    norms: list[float]


def wrt_of(name: str) -> Wrt:
    place, _, bare = name.rpartition(":")
    return Wrt(place or "input", bare, name)  # type: ignore[arg-type]


def make_job(
    kind: str,
    model: str,
    inputs: Tensors,
    *,
    wrt: Sequence[str] = (),
    loss: str | None = None,
    options: Mapping[str, Any] | None = None,
    bindings: Mapping[str, str] | None = None,
    targets: Tensors | None = None,
    parameters: Tensors | None = None,
    cotangents: Tensors | None = None,
    tangents: Tensors | None = None,
    **more: Any,
) -> tuple[Job, list[torch.Tensor]]:
    tensors: list[torch.Tensor] = []

    def refs(named: Tensors | None) -> list[TensorRef]:
        found = []
        for name, tensor in (named or {}).items():
            # As from the wire: plain bytes of their own.
            tensors.append(tensor.detach().clone(memory_format=torch.contiguous_format))
            found.append(TensorRef(name, WIRE[tensor.dtype], tuple(tensor.shape), len(tensors) - 1))
        return found

    fields: dict[str, Any] = {
        "version": "1",
        "train": False,
        "seed": None,
        "batched": False,
        "allow_unused": False,
        "return_outputs": True,
        "return_cotangent_derivatives": True,
        "result_dtype": 0,
        "max_norm": None,
        "max_result_bytes": 1 << 30,
        "max_cotangents": 1024,
    }
    job = Job(
        kind=kind,  # type: ignore[arg-type]
        model=model,
        loss=None if loss is None else LossCall(loss, dict(options or {}), dict(bindings or {})),
        inputs=refs(inputs),
        parameters=refs(parameters),
        targets=refs(targets),
        wrt=[wrt_of(name) for name in wrt],
        cotangents=refs(cotangents),
        tangents=refs(tangents),
        **(fields | more),
    )
    return job, tensors


class Host:
    """An engine, used as a worker uses it."""

    def __init__(self, *registrations: Registration) -> None:
        self.engine = Engine(torch.device("cpu"))
        for registration in registrations:
            self.engine.load(registration)

    def __call__(self, kind: str, model: str, inputs: Tensors, **more: Any) -> Reply:
        job, tensors = make_job(kind, model, inputs, **more)
        pristine = [tensor.clone() for tensor in tensors]
        try:
            result = self.engine.run(job, tensors)
        except WritesInputs:
            job.copy_inputs = True
            result = self.engine.run(job, pristine)
        return unpack(result)


def unpack(result: EngineResult) -> Reply:
    def at(ref: TensorRef | None) -> torch.Tensor | None:
        if ref is None:
            return None
        tensor = result.tensors[ref.payload]
        assert not tensor.requires_grad and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
        assert tuple(tensor.shape) == tuple(ref.shape) and WIRE[tensor.dtype] == ref.dtype
        return tensor.clone()

    outcome = result.outcome
    return Reply(
        result,
        {ref.name: at(ref) for ref in outcome.outputs},  # type: ignore[misc]
        {grad.name: at(grad.value) for grad in outcome.gradients},
        {grad.name: at(grad.value) for grad in outcome.hvps},
        {grad.name: at(grad.value) for grad in outcome.cotangent_derivatives},
        {(block.row, block.column): at(block.value) for block in outcome.blocks},
        list(outcome.norms),
    )


def host_function(function: Callable[..., Any], **more: Any) -> Host:
    return Host(Registration("f", function, kind="function", **more))


def host_factory(factory: Callable[..., Any], **more: Any) -> Host:
    return Host(Registration("f", factory, kind="factory", **more))


@contextlib.contextmanager
def refused(reason: Reason, *parts: str, field: str | None = None) -> Iterator[None]:
    """Expects a Fault of this reason whose message says all these parts."""
    with pytest.raises(Fault) as caught:
        yield
    fault = caught.value
    assert fault.reason is reason, fault
    for part in parts:
        assert part in fault.message, fault.message
    if field is not None:
        assert fault.field == field, fault
