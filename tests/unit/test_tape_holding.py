"""What a session holds: handles, failures, values that travel, the budget, and memory that comes back."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from tests.unit.tape_jobs import F64, ZOO, Session, close, factory, function, real, refused
from torch import nn
from torch.utils.checkpoint import checkpoint

from pullback_server import ops
from pullback_server.engine import tape_state
from pullback_server.faults import Fault
from pullback_server.job import TensorRef
from pullback_wire import Reason

Tensor = torch.Tensor


def test_handles_are_assigned_once() -> None:
    s = Session(ZOO["cube"])
    x = s.put(real(2))
    with refused(Reason.BAD_HANDLE, str(x)):
        s.run(ops.Put([s.operand("", real(2), x)]))
    with refused(Reason.BAD_HANDLE, "77"):
        s.get(77)
    for bad in (0, -1):
        with refused(Reason.BAD_HANDLE, "from 1"):
            s.run(ops.Parameters("cube", "", ["w"], [bad]))
    with refused(Reason.BAD_HANDLE, "two"):
        s.run(ops.Put([s.operand("", real(2), 90), s.operand("", real(2), 90)]))
    s.release(x, 12345, 0, 90)
    s.run(ops.Put([s.operand("", real(2), x), s.operand("", real(1), 90)]))
    assert s.tape.live == 2


def test_an_op_on_what_failed_names_the_first_cause() -> None:
    s = Session(ZOO["cube"])
    x = s.leaf(real(2))
    bad = s._next
    with refused(Reason.BAD_NAME):
        s.model("cube", {"wat": x})
    first = s.number
    kept = s._next
    s.new()
    depending = s._next
    with refused(Reason.DEPENDENCY_FAILED, f"op {first} (call) failed: BAD_NAME: "):
        s._call(ops.Operation("add", {}), [bad, x])
    with refused(Reason.DEPENDENCY_FAILED, f"op {first} (call)"):
        s.grad(depending, x)
    with refused(Reason.DEPENDENCY_FAILED, f"op {first} (call)"):
        s.get(s._next - 1)
    # The number is taken until it is released.
    with refused(Reason.BAD_HANDLE, str(bad)):
        s.run(ops.Put([s.operand("", real(2), bad)]))
    s.release(bad)
    with refused(Reason.BAD_HANDLE):
        s.get(bad)
    s.run(ops.Put([s.operand("", real(2), bad)]))
    # What the op brought along is stored all the same.
    with refused(Reason.DEPENDENCY_FAILED):
        s.run(
            ops.Call(
                ops.Operation("add", {}),
                [s.operand("input", depending), s.operand("other", real(2), kept)],
                [],
                [],
                s.new(),
                [],
                0,
                None,
                False,
            )
        )
    assert s.get(kept).shape == (2,)


def test_outputs_without_handles_of_a_failed_call() -> None:
    s = Session(ZOO["pair"])
    with refused(Reason.BAD_NAME):
        s.model("pair", {"wat": real(2)})
    last = s._next - 1
    with refused(Reason.DEPENDENCY_FAILED):
        s.get(last + 1)
    with refused(Reason.BAD_HANDLE):
        s.get(last + 100_000)
    s.run(ops.Put([s.operand("", real(2), last + 1)]))
    s.get(last + 1)
    s.release(last)
    with refused(Reason.BAD_HANDLE):
        s.get(last + 2)


def test_an_op_that_the_front_refused() -> None:
    s = Session()
    s.broken(5)
    with refused(Reason.DEPENDENCY_FAILED, "op 1 (broken) failed: BAD_TENSOR: bytes are missing"):
        s.op("neg", 5)


def test_a_flood_behind_a_failed_op() -> None:
    s = Session()
    s.broken(1)
    s._next = 2
    for handle in range(1, 2000):
        with pytest.raises(Fault) as caught:
            s.op("neg", handle)
        assert caught.value.reason is Reason.DEPENDENCY_FAILED and "op 1 (broken)" in caught.value.message
    s.release(*range(1, 2001))
    assert s.tape.live == 0 and not s.tape._handles._failed and not s.tape._handles._last


def test_too_many_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape_state, "MOST_HANDLES", 5)
    s = Session()
    for _ in range(5):
        s.put(real(1))
    with refused(Reason.SESSION_BUDGET, "5 handles"):
        s.put(real(1))
    s.release(1, 2)
    s.put(real(1))


def _with_fetch(s: Session, x: int, fetch: list[int], below: int, handles: list[int]) -> Any:
    callee = ops.Model("pair", "", None, False, None)
    return s.run(ops.Call(callee, [ops.Operand("x", x)], [], [], handles, fetch, below, None, False))


def test_values_that_come_along() -> None:
    s = Session(ZOO["pair"])
    x = s.leaf(real(4))
    sizes = {record.handle: record.shape for record in (_with_fetch(s, x, [], 0, [10, 11]), s.records)[1]}
    assert len(sizes) == 2
    assert list(_with_fetch(s, x, [21], 0, [20, 21])) == [21]
    assert list(_with_fetch(s, x, [], 1 << 20, [30, 31])) == [30, 31]
    s.limit = 8
    assert _with_fetch(s, x, [], 1 << 20, [40, 41]).keys() <= {40, 41}
    with refused(Reason.RESULT_TOO_LARGE, "8"):
        _with_fetch(s, x, [50, 51], 0, [50, 51])
    with refused(Reason.DEPENDENCY_FAILED, "RESULT_TOO_LARGE"):
        s.get(50)
    with refused(Reason.RESULT_TOO_LARGE, "32"):
        s.get(x)
    s.limit = 1 << 20
    s.get(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layers(x))


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.layers, x, use_reentrant=False)


@pytest.mark.parametrize("model", [Net, Checkpointed])
@pytest.mark.parametrize("train", [False, True])
def test_retained_bytes_come_back(model: Any, train: bool) -> None:
    s = Session(factory(model))
    x = s.leaf(real(32, 4))
    held = s.retained
    assert held == 32 * 4 * 8
    names = [name for name, _ in s.module().named_parameters()]
    for given in (None, dict(zip(names, s.parameters("f", *names), strict=True))):
        base = s.retained
        y = s.op("sum", s.model("f", [x], train=train, parameters=given))
        hidden = s._next - 2
        if model is Net:
            # Two tanh of 32 x 64, of which each is saved once.
            assert 2 * 32 * 64 * 8 <= s.retained - base <= 2 * 32 * 64 * 8 + 4096
        (g,) = s.grads(y, [x])
        assert s.retained <= base + 32 * 4 * 8 + 32 * 8 + 64
        s.release(y, hidden, g)
        assert s.retained == base
    s.release(x, *range(1, s._next))
    assert s.retained == 0 and s.tape.live == 0


def test_a_released_output_frees_its_graph() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def noted(x: Tensor) -> Tensor:
        big = x.exp()
        alive.append(weakref.ref(big))
        return big.sin().sum()

    s = Session(function(noted))
    alive.clear()
    x = s.leaf(real(1000))
    y = s.model("f", [x])
    assert s.retained > 8000 * 2
    s.release(y)
    assert s.retained == 8000
    gc.collect()
    assert all(ref() is None for ref in alive)


def test_higher_order_graphs_come_back() -> None:
    s = Session(function(lambda x: x.sin() * x.exp()))
    x = s.leaf(real(100))
    for _ in range(3):
        g = s.op("sum", s.model("f", [x]))
        first = g
        for _ in range(3):
            g = s.op("sum", s.grad(g, x, create_graph=True))
        assert s.retained > 8000
        s.release(*range(first - 1, g + 1))
        assert s.retained == 800


@pytest.mark.parametrize("code", [lambda x: x.reshape(3, 3), lambda x: _Late.apply(x), lambda x: (x.exp(), x * "a")])
def test_failures_hold_nothing(code: Any) -> None:
    s = Session(function(code), function(lambda x: _Late.apply(x.exp()), "late"))
    x = s.leaf(real(1000))
    for _ in range(3):
        with pytest.raises(Fault):
            y = s.model("f", [x])
            s.grad(y, x, [real(1000)])
        with pytest.raises(Fault):
            s.grad(s.model("late", [x]), x, [real(1000)])
    s.release(*range(x + 1, s._next))
    assert s.retained == 8000


class _Late(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.hidden = x.exp()
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise ValueError("late")


def test_what_a_function_hides_is_counted() -> None:
    s = Session(function(lambda x: _Late.apply(x)))
    x = s.leaf(real(1000))
    # The first call of a model gets copies.
    s.release(s.model("f", [x]))
    y = s.model("f", [x])
    assert s.retained == 3 * 8000
    s.release(y)
    assert s.retained == 8000


def test_the_budget() -> None:
    s = Session(ZOO["cube"], budget=100_000)
    x = s.leaf(real(5000))
    with refused(Reason.SESSION_BUDGET, "40000", "120000", "100000", "release"):
        s.put(real(10000))
    assert s.retained == 40_000
    y = s.op("exp", x)
    with refused(Reason.SESSION_BUDGET, "80000", "100000"):
        s.op("exp", y)
    with refused(Reason.SESSION_BUDGET):
        s.model("cube", [y])
    assert s.retained == 80_000 and s.tape.live == 2
    with refused(Reason.SESSION_BUDGET, "200000"):
        s.grad(y, x, [real(3, 5000)], batched=True)
    # A release works, and comes before the op that needs it.
    s.releasing = [y]
    z = s.op("sin", x)
    assert s.retained == 80_000
    s.release(z, x)
    assert s.retained == 0
    s.put(real(12_000))


def test_a_closed_tape_holds_nothing() -> None:
    s = Session(factory(Net))
    tensors: list[weakref.ref[Tensor]] = []
    x = s.leaf(real(8, 4))
    y = s.model("f", [x], train=True)
    g = s.grad(y, x, [torch.ones(8, 1, dtype=F64)], create_graph=True)
    tensors += [weakref.ref(s.tape._handles[handle].tensor) for handle in (x, y, g)]
    gc.collect()
    gc.disable()
    try:
        s.tape.close()
        assert s.tape.live == 0 and s.tape.retained == 0
        assert all(ref() is None for ref in tensors)
    finally:
        gc.enable()


def test_dropped_tapes_and_graphs_need_no_garbage_collection() -> None:
    s = Session(factory(Net), factory(Checkpointed, "again"), ZOO["custom_right"])
    gc.collect()
    gc.disable()
    try:
        x = s.leaf(real(8, 4))
        line = s.leaf(real(4))
        refs = []
        for name, leaf in (("f", x), ("again", x), ("custom_right", line)):
            y = s.op("sum", s.model(name, [leaf]))
            g = s.grad(y, leaf, create_graph=True)
            refs += [weakref.ref(s.tape._handles[handle].tensor) for handle in (y, g)]
            refs += [weakref.ref(s.tape._handles[handle].tensor) for handle in (y - 1,)]
        s.release(*range(1, s._next))
        assert all(ref() is None for ref in refs)
        assert s.retained == 0
    finally:
        gc.enable()


def test_the_tensors_of_an_op_are_kept_as_they_are() -> None:
    s = Session()
    value = real(3)
    job = ops.SessionJob(1, 1, [], ops.Put([ops.Operand("", 0, TensorRef("", 13, (3,), 0), 1)]), s.budget, s.limit)
    s.tape.run(job, [value])
    assert s.tape._handles[1].tensor.data_ptr() == value.data_ptr()


def test_many_cycles_leave_nothing() -> None:
    s = Session(ZOO["small"])
    x = s.leaf(real(4, 3))
    s._next = 10
    for _ in range(1000):
        y = s.model("small", [x])
        g = s.grad(y, x, [torch.ones(4, 2, dtype=F64)])
        s.releasing = [y, g]
    s.release()
    assert s.tape.live == 1 and s.retained == 4 * 3 * 8
    assert len(s.tape._ledger._bytes) == 1


def test_many_handles_are_counted_right_in_the_end() -> None:
    s = Session()
    handles = [s.put(real(10)) for _ in range(500)]
    assert s.retained == 500 * 80
    s.release(*handles[:250])
    assert s.retained == 250 * 80
    for handle in handles[250:]:
        s.release(handle)
    assert s.retained == 0
    close(s.get(s.put(torch.ones(1))), torch.ones(1))
