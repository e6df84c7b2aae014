"""A session's ops out of torch tensors: what the tests of the tape have in common."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pullback_server import ops
from pullback_server.engine import Engine
from pullback_server.engine._dtypes import WIRE
from pullback_server.engine.tape import Tape
from pullback_server.faults import Fault
from pullback_server.hosting import Registration
from pullback_server.hosting.loading import load_source
from pullback_server.job import FaultRecord, LossCall, TensorRef
from pullback_wire import Reason

torch.set_num_threads(1)
Tensor = torch.Tensor
F64 = torch.float64
ZOO = {registration.name: registration for registration in load_source(str(Path(__file__).parent.parent / "zoo.py"))}
BIG = 1 << 30

#: An argument: a handle, or a tensor that goes with the op.
Argument = int | Tensor


def real(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=F64).requires_grad_(grad)


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class Session:
    """A tape, driven as a worker drives it."""

    def __init__(self, *registrations: Registration, budget: int = BIG, limit: int = BIG) -> None:
        self.engine = Engine(torch.device("cpu"))
        for registration in registrations:
            self.engine.load(registration)
        self.budget, self.limit = budget, limit
        self.tape = Tape(self.engine, 1, budget)
        self.number = 0
        self._next = 1
        self._payloads: list[Tensor] = []
        self.releasing: list[int] = []
        self.records: list[ops.HandleRecord] = []

    # Ops

    def new(self, count: int = 1) -> list[int]:
        self._next += count
        return list(range(self._next - count, self._next))

    def ref(self, tensor: Tensor) -> TensorRef:
        self._payloads.append(tensor.detach().clone(memory_format=torch.contiguous_format))
        return TensorRef("", WIRE[tensor.dtype], tuple(tensor.shape), len(self._payloads) - 1)

    def operand(self, name: str, value: Argument, keep: int = 0, grad: bool = False) -> ops.Operand:
        if isinstance(value, int):
            return ops.Operand(name, value)
        return ops.Operand(name, 0, self.ref(value), keep, grad)

    def operands(self, named: Mapping[str, Argument] | Sequence[Argument] | None) -> list[ops.Operand]:
        pairs = named.items() if isinstance(named, Mapping) else [("", value) for value in named or ()]
        return [self.operand(name, value) for name, value in pairs]

    def run(self, op: ops.Op, **more: Any) -> Any:
        """Runs an op; its result's values by handle."""
        self.number += 1
        job = ops.SessionJob(1, self.number, self.releasing, op, more.get("budget", self.budget), self.limit)
        payloads, self._payloads, self.releasing = self._payloads, [], []
        result = self.tape.run(job, payloads)
        self.records = result.outcome.handles
        assert result.outcome.live == self.tape.live and result.outcome.retained == self.tape.retained
        return {
            record.handle: result.tensors[record.value.payload].clone()
            for record in result.outcome.handles
            if record.value is not None
        }

    def put(self, tensor: Tensor, grad: bool = False) -> int:
        (handle,) = self.new()
        self.run(ops.Put([self.operand("", tensor, handle, grad)]))
        return handle

    def leaf(self, tensor: Tensor) -> int:
        return self.put(tensor, True)

    def model(
        self,
        name: str,
        inputs: Any,
        *,
        outputs: int = 1,
        parameters: Any = None,
        train: bool = False,
        seed: int | None = None,
        loss: str | None = None,
        options: Any = None,
        bindings: Any = None,
        targets: Any = None,
        **more: Any,
    ) -> Any:
        loss_call = None if loss is None else LossCall(loss, dict(options or {}), dict(bindings or {}))
        return self._call(ops.Model(name, "", loss_call, train, seed), inputs, targets, parameters, outputs, **more)

    def _call(
        self,
        callee: Any,
        inputs: Any,
        targets: Any = None,
        parameters: Any = None,
        outputs: int = 1,
        max_order: int | None = None,
        no_grad: bool = False,
        fetch: Sequence[int] = (),
        fetch_below: int = 0,
    ) -> Any:
        handles = self.new(outputs)
        self.run(
            ops.Call(
                callee,
                self.operands(inputs),
                self.operands(targets),
                self.operands(parameters),
                handles,
                list(fetch),
                fetch_below,
                max_order,
                no_grad,
            )
        )
        return handles[0] if outputs == 1 else handles

    def loss(self, name: str, inputs: Any, targets: Any = None, **options: Any) -> int:
        return int(self._call(ops.Loss(LossCall(name, options, {})), inputs, targets))

    def op(self, name: str, *inputs: Argument, named: Any = None, no_grad: bool = False, **options: Any) -> int:
        return int(self._call(ops.Operation(name, options), named or inputs, no_grad=no_grad))

    def in_place(self, name: str, *inputs: Argument, no_grad: bool = False, **options: Any) -> None:
        self.run(ops.Call(ops.Operation(name, options), self.operands(inputs), [], [], [], [], 0, None, no_grad))

    def grads(
        self,
        outputs: Sequence[int] | int,
        inputs: Sequence[int] | int,
        grad_outputs: Sequence[Argument | None] | None = None,
        *,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        allow_unused: bool = False,
        batched: bool = False,
    ) -> list[int]:
        outputs = [outputs] if isinstance(outputs, int) else list(outputs)
        inputs = [inputs] if isinstance(inputs, int) else list(inputs)
        given = [None if value is None else self.operand("", value) for value in grad_outputs or ()]
        handles = self.new(len(inputs))
        self.run(ops.Grad(outputs, given, inputs, handles, retain_graph, create_graph, allow_unused, batched, [], 0))
        return handles

    def grad(self, outputs: Any, inputs: int, *more: Any, **options: Any) -> int:
        return self.grads(outputs, inputs, *more, **options)[0]

    def parameters(self, model: str, *names: str) -> list[int]:
        handles = self.new(len(names))
        self.run(ops.Parameters(model, "", list(names), handles))
        return handles

    def get(self, handle: int) -> Tensor:
        value = self.run(ops.Get([handle]))[handle]
        assert isinstance(value, Tensor)
        return value

    def release(self, *handles: int) -> None:
        self.releasing += handles
        self.run(ops.Release())

    def broken(self, handle: int, reason: Reason = Reason.BAD_TENSOR, message: str = "bytes are missing") -> None:
        with refused(reason, message):
            self.run(ops.Broken([handle], FaultRecord(reason.value, message)))

    @property
    def retained(self) -> int:
        return self.tape.retained

    def module(self, name: str = "f") -> Any:
        return self.engine.find(name, "").module


def function(code: Callable[..., Any], name: str = "f", **more: Any) -> Registration:
    return Registration(name, code, kind="function", **more)


def factory(code: Callable[[], nn.Module], name: str = "f", **more: Any) -> Registration:
    return Registration(name, code, kind="factory", **more)


@contextmanager
def refused(reason: Reason, *parts: str) -> Iterator[None]:
    """Expects a Fault of this reason whose message says all these parts."""
    with pytest.raises(Fault) as caught:
        yield
    fault = caught.value
    assert fault.reason is reason, fault
    for part in parts:
        assert part in fault.message, fault.message
    del fault, caught
    gc.collect(0)
