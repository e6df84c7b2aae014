"""detect_anomaly in a session: calls, and backwards through what several calls have made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.unit.tape_jobs import F64, Session, factory, function, refused
from torch import nn

from pullback_server import ops
from pullback_server.job import LossCall
from pullback_wire import Reason

Tensor = torch.Tensor
ONES = torch.ones(3, 4, dtype=F64)
ZEROS = ONES.clone()
ZEROS[0, 1] = ZEROS[2, 2] = 0


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


class Net(nn.Module):
    """sqrt in "head.norm"; as many numbers from the generator as asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, dtype=F64))
        self.head = nn.Sequential(nn.Dropout(0.5))
        self.head.add_module("norm", Root())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.scale) * 2.0


@pytest.fixture
def session() -> Session:
    return Session(
        factory(Net),
        function(lambda x: x.log(), "log"),
        factory(lambda: nn.Sequential(Root(), nn.Dropout(0.5)), "calm"),
    )


def call(
    session: Session, inputs: Any, model: str = "f", detect: bool = True, loss: str | None = None, **more: Any
) -> int:
    loss_call = None if loss is None else LossCall(loss, {}, {})
    callee = ops.Model(model, "", loss_call, more.pop("train", False), more.pop("seed", None), detect)
    named = inputs if isinstance(inputs, dict) else {"x": inputs[0]}
    return int(session._call(callee, named, **more))


def backward(session: Session, output: int, leaf: int, detect: bool = True, **more: Any) -> Tensor:
    (handle,) = session.new()
    given = more.pop("given", None)
    session.run(
        ops.Grad(
            [output],
            [None if given is None else session.operand("", given)],
            [leaf],
            [handle],
            more.get("retain"),
            more.get("create", False),
            False,
            more.get("batched", False),
            [],
            0,
            detect,
        )
    )
    return session.get(handle)


MADE = "made inf of finite numbers (gradient 0, shape (3, 4), 2 of 12 elements)"


def test_a_backward_knows_the_modules_of_calls_that_were_looked_at(session: Session) -> None:
    x = session.leaf(ZEROS)
    total = session.op("sum", call(session, [x]))
    with refused(
        Reason.NON_FINITE,
        f"model 'f' version 1: the backward of SqrtBackward0 in module 'head.norm' {MADE}; gradients[0] has it",
    ):
        backward(session, total, x)


def test_without_that_it_knows_the_node_alone(session: Session) -> None:
    x = session.leaf(ZEROS)
    total = session.op("sum", call(session, [x], detect=False))
    with refused(Reason.NON_FINITE, f"the backward of SqrtBackward0 {MADE}"):
        backward(session, total, x)
    # And nothing is said where nobody asked.
    total = session.op("sum", call(session, [x], detect=False))
    assert backward(session, total, x, detect=False).isinf().sum() == 2


def test_of_two_models_the_one_that_made_it(session: Session) -> None:
    x = session.leaf(ZEROS)
    y = call(session, [call(session, [session.op("add", x, session.put(ONES))], "log")])
    with refused(Reason.NON_FINITE, "model 'f' version 1: the backward of SqrtBackward0 in module 'head.norm'"):
        backward(session, session.op("sum", y), x)


def test_a_forward(session: Session) -> None:
    x = session.leaf(-ONES)
    with refused(Reason.NON_FINITE, "model 'f' version 1: the operation aten::sqrt in module 'head.norm' made nan"):
        call(session, [x])
    with refused(Reason.NON_FINITE, "inputs[x] holds nan already"):
        call(session, [session.leaf(ONES * torch.nan)])
    with refused(Reason.NON_FINITE, "the operation aten::log in its own code made inf"):
        call(session, [session.leaf(ZEROS)], "log")
    # The session goes on.
    assert session.get(call(session, [session.leaf(ONES)])).isfinite().all()


def test_a_forward_in_train_mode_draws_the_same_numbers_again(session: Session) -> None:
    # Dropout leaves no NaN of a negative number that it drops.
    x = session.leaf(-ONES)
    for seed in (None, 5):
        with refused(Reason.NON_FINITE, "aten::sqrt in module 'head.norm' made nan of finite numbers"):
            for _ in range(8):
                call(session, [x], train=True, seed=seed)


def test_a_loss_in_the_call_and_in_its_backward(session: Session) -> None:
    x = session.leaf(ZEROS)
    loss = call(session, [x], loss="mse_loss", targets={"target": ONES})
    with refused(Reason.NON_FINITE, f"the backward of SqrtBackward0 in module 'head.norm' {MADE}"):
        backward(session, loss, x)


def test_what_comes_with_a_backward(session: Session) -> None:
    x = session.leaf(ONES)
    y = call(session, [x])
    with refused(Reason.NON_FINITE, "grad_outputs[0] holds nan already"):
        backward(session, y, x, given=ONES * torch.nan)


def test_gradients_of_gradients(session: Session) -> None:
    # d sqrt is finite at 1e-220, and its own derivative is not.
    x = session.leaf(ONES * 1e-220)
    y = session.op("sum", call(session, [x]))
    (first,) = session.grads(y, x, create_graph=True)
    total = session.op("sum", first)
    with refused(Reason.NON_FINITE, "the backward of", "made"):
        backward(session, total, x)
    y = session.op("sum", call(session, [x]))
    (handle,) = session.new()
    session.run(ops.Grad([y], [None], [x], [handle], None, True, False, False, [], 0, True))
    with refused(Reason.NON_FINITE, "model 'f' version 1: the backward of", "in module 'head.norm' made"):
        backward(session, session.op("sum", handle), x)


def test_what_is_well_is_the_same_to_the_bit(session: Session) -> None:
    rows = torch.randn(3, 3, 4, dtype=F64)
    found = []
    for detect in (False, True):
        x = session.leaf(ONES * 0.7)
        y = call(session, {"input": x}, "calm", detect, train=True, seed=9)
        total = call(session, [session.op("add", y, session.put(ONES))], "log", detect=detect)
        many = backward(session, total, x, detect, given=rows, batched=True, retain=True)
        one = backward(session, total, x, detect, given=rows[0], retain=True)
        created = backward(session, total, x, detect, given=rows[0], create=True)
        found.append((session.get(y), session.get(total), many, one, created))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_of_it_stays(session: Session) -> None:
    before = nn.Module.__call__, torch.autograd._engine_run_backward  # type: ignore[attr-defined]
    held = session.retained
    x = session.leaf(ZEROS)
    total = session.op("sum", call(session, [x]))
    for _ in range(2):
        with refused(Reason.NON_FINITE, "SqrtBackward0"):
            backward(session, total, x, retain=True)
    assert before == (nn.Module.__call__, torch.autograd._engine_run_backward)  # type: ignore[attr-defined]
    session.release(*list(session.tape._handles.held))
    session.tape._handles.clear()
    session.release()
    assert session.retained == held


def test_zeros_without_memory_are_looked_at() -> None:
    """A second derivative makes them; a backward that is well must not fail because somebody looks."""
    session = Session(
        function(lambda x: x.abs().pow(3)),
        function(lambda x: torch.func.jvp(lambda y: y.abs().pow(3), (x,), (x,))[1], "moved"),
    )
    for model in ("f", "moved"):
        found = []
        for detect in (False, True):
            x = session.leaf(torch.linspace(-1, 1, 12, dtype=F64).reshape(3, 4))
            total = session.op("sum", call(session, [x], model, detect))
            (handle,) = session.new()
            session.run(ops.Grad([total], [None], [x], [handle], None, True, False, False, [], 0, detect))
            found.append((session.get(handle), backward(session, session.op("sum", handle), x, detect)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
