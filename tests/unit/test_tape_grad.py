"""torch.autograd.grad on a session's handles: what torch does locally, or a refusal that says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.unit.tape_jobs import F64, ZOO, Session, close, factory, function, real, refused
from torch import nn

from pullback_server import ops
from pullback_wire import Reason

grad = torch.autograd.grad


def cubes() -> Session:
    return Session(function(lambda x: x**3, "cube"), function(lambda x, y: x * y.sin(), "mix"), ZOO["small"])


def test_square_and_its_second_derivative() -> None:
    s = Session()
    value = real(2, 2)
    x = s.leaf(value)
    y = s.op("sum", s.op("pow", named={"input": x}, exponent=2))
    g = s.grad(y, x, create_graph=True)
    close(s.get(g), 2 * value)
    h = s.grad(s.op("sum", g), x)
    close(s.get(h), torch.full((2, 2), 2.0, dtype=F64))


def test_third_derivative_of_sine_times_exponential() -> None:
    s = Session(function(lambda x: x.sin() * x.exp(), "f"))
    value = real(5)
    x = s.leaf(value)
    g = s.op("sum", s.model("f", [x]))
    for _ in range(2):
        g = s.op("sum", s.grad(g, x, create_graph=True))
    close(s.get(s.grad(g, x)), 2 * value.exp() * (value.cos() - value.sin()))


def test_outputs_of_one_model_fed_to_another() -> None:
    s = cubes()
    xv, yv = real(4), real(4)
    x, y = s.leaf(xv), s.leaf(yv)
    out = s.model("mix", {"x": s.model("cube", [x]), "y": s.model("cube", [y])})
    v = real(4)
    gx, gy = s.grads(out, [x, y], [v])
    a, b = xv.requires_grad_(), yv.requires_grad_()
    ex, ey = grad(a**3 * (b**3).sin(), (a, b), v)
    close(s.get(gx), ex)
    close(s.get(gy), ey)


def test_several_outputs_and_a_missing_grad_output() -> None:
    s = Session(function(lambda x: (x.sin(), x.prod()), "two"))
    value, v = real(3), real(3)
    x = s.leaf(value)
    first, second = s.model("two", [x], outputs=2)
    g = s.grad([first, second], x, [v, None])
    a = value.requires_grad_()
    close(s.get(g), grad((a.sin(), a.prod()), a, (v, None))[0])


def test_more_outputs_than_handles_get_the_numbers_that_follow() -> None:
    s = Session(function(lambda x: {"a": x + 1, "b": x + 2, "c": x + 3}))
    x = s.put(real(1))
    s.run(ops.Call(ops.Model("f", "", None, False, None), [ops.Operand("x", x)], [], [], [70], [], 0, None, False))
    assert [(record.handle, record.name) for record in s.records] == [(70, "a"), (71, "b"), (72, "c")]
    s.run(
        ops.Call(ops.Model("f", "", None, False, None), [ops.Operand("x", x)], [], [], [80, 90, 95, 99], [], 0, None, 0)
    )
    assert [record.handle for record in s.records] == [80, 90, 95]
    with refused(Reason.BAD_HANDLE, "99"):
        s.get(99)
    with refused(Reason.BAD_HANDLE, "71"):
        s.run(
            ops.Call(ops.Model("f", "", None, False, None), [ops.Operand("x", x)], [], [], [60, 71], [], 0, None, False)
        )


def test_retain_graph() -> None:
    s = cubes()
    value = real(3)
    x = s.leaf(value)
    y = s.op("sum", s.model("cube", [x]))
    for _ in range(2):
        close(s.get(s.grad(y, x, retain_graph=True)), 3 * value**2)
    s.grad(y, x)
    with refused(Reason.GRAPH_FREED, "retain_graph=True"):
        s.grad(y, x)
    y = s.op("sum", s.model("cube", [x]))
    # Absent: the value of create_graph.
    s.grad(y, x, create_graph=True)
    s.grad(y, x, create_graph=True, retain_graph=False)
    with refused(Reason.GRAPH_FREED):
        s.grad(y, x, retain_graph=True)


def test_unused_inputs() -> None:
    s = cubes()
    x, z = s.leaf(real(2)), s.leaf(real(2))
    y = s.op("sum", s.model("cube", [x]))
    with refused(Reason.UNUSED_INPUT, "inputs[1]", "allow_unused"):
        s.grads(y, [x, z], retain_graph=True)
    _, unused = s.grads(y, [x, z], allow_unused=True)
    assert [record.unused for record in s.records] == [False, True]
    with refused(Reason.BAD_HANDLE):
        s.get(unused)


def test_what_cannot_be_differentiated() -> None:
    s = cubes()
    x, plain, whole = s.leaf(real(2)), s.put(real(2)), s.put(torch.arange(2))
    y = s.model("cube", [plain])
    with refused(Reason.NOT_DIFFERENTIABLE, "outputs[0]"):
        s.grad(y, x, [real(2)])
    y = s.model("mix", {"x": x, "y": plain})
    with refused(Reason.NOT_DIFFERENTIABLE, "inputs[0]"):
        s.grad(y, plain, [real(2)])
    with refused(Reason.NOT_DIFFERENTIABLE, "inputs[0]", "int64"):
        s.grad(y, whole, [real(2)])
    with refused(Reason.NOT_DIFFERENTIABLE, "int64"):
        s.leaf(torch.arange(2))
    z = s.op("detach", y)
    with refused(Reason.NOT_DIFFERENTIABLE, "outputs[0]"):
        s.grad(z, x, [real(2)])
    with refused(Reason.NOT_DIFFERENTIABLE):
        s.grad(s._call(ops.Model("cube", "", None, False, None), [x], no_grad=True), x, [real(2)])


def test_grad_outputs_that_do_not_fit() -> None:
    s = cubes()
    x = s.leaf(real(2, 2))
    y = s.model("cube", [x])
    total = s.op("sum", y)
    with refused(Reason.MISSING_COTANGENT, "[2, 2]"):
        s.grad(y, x)
    with refused(Reason.BAD_COTANGENT, "[2]", "[]"):
        s.grad(total, x, [real(2)])
    with refused(Reason.BAD_COTANGENT, "[4]", "[2, 2]"):
        s.grad(y, x, [real(4)])
    with refused(Reason.BAD_COTANGENT, "complex128", "float64"):
        s.grad(y, x, [real(2, 2).to(torch.complex128)])
    with refused(Reason.BAD_COTANGENT, "int64"):
        s.grad(y, x, [torch.ones(2, 2, dtype=torch.int64)])
    with refused(Reason.BAD_COTANGENT, "2 grad_outputs"):
        s.grad(y, x, [real(2, 2), real(2, 2)])
    for bad in (real(), real(3, 4), real(0, 2, 2)):
        with refused(Reason.BAD_COTANGENT):
            s.grad(y, x, [bad], batched=True)
    with refused(Reason.BAD_COTANGENT, "batched"):
        s.grad(total, x, batched=True)
    with refused(Reason.RESULT_TOO_LARGE):
        s.grad(s.model("cube", [s.leaf(real(0))]), x, [real(70000, 0)], batched=True)
    # torch takes another real dtype and casts it.
    close(s.get(s.grad(y, x, [torch.ones(2, 2)], retain_graph=True)), 3 * s.get(x) ** 2)


def test_complex_outputs() -> None:
    s = Session(function(lambda z: z**2, "f"))
    value, v = torch.randn(3, dtype=torch.complex128), torch.randn(3, dtype=torch.complex128)
    z = s.leaf(value)
    y = s.model("f", [z])
    with refused(Reason.BAD_COTANGENT):
        s.grad(y, z, [real(3)])
    with refused(Reason.MISSING_COTANGENT, "complex128"):
        s.grad(s.op("sum", y), z)
    a = value.requires_grad_()
    close(s.get(s.grad(y, z, [v])), grad(a**2, a, v)[0])


@pytest.mark.parametrize("create", [False, True])
def test_batched_grad_outputs(create: bool) -> None:
    s = cubes()
    value, rows = real(3), real(4, 3)
    x = s.leaf(value)
    y = s.model("cube", [x])
    g = s.grad(y, x, [rows], batched=True, create_graph=create)
    close(s.get(g), 3 * value**2 * rows)
    if create:
        close(s.get(s.grad(s.op("sum", g), x)), (6 * value * rows).sum(0))
    else:
        with refused(Reason.GRAPH_FREED):
            s.grad(y, x, [real(3)])


class _NotVectorised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        assert float(g.sum()) != 12345.0
        return 3 * x**2 * g


@pytest.mark.parametrize("retain", [False, True])
def test_batched_where_a_backward_cannot_be_vectorised(retain: bool) -> None:
    s = Session(function(lambda x: _NotVectorised.apply(x)))
    value, rows = real(3), real(4, 3)
    x = s.leaf(value)
    y = s.model("f", [x])
    close(s.get(s.grad(y, x, [rows], batched=True, retain_graph=retain)), 3 * value**2 * rows)
    if retain:
        s.grad(y, x, [real(3)])
    with refused(Reason.GRAPH_FREED):
        s.grad(y, x, [real(3)])


def test_a_changed_saved_value_is_refused() -> None:
    s = Session()
    x = s.leaf(real(3))
    y = s.op("exp", x)
    z = s.op("sum", y)
    s.in_place("add_", y, real(3))
    with refused(Reason.MODIFIED_IN_PLACE):
        s.grad(z, x)


def test_in_place_on_a_leaf() -> None:
    s = Session()
    value = real(3)
    x = s.leaf(value)
    with refused(Reason.BAD_OPERAND, "leaf"):
        s.in_place("add_", x, real(3))
    step = real(3)
    s.in_place("sub_", x, step, no_grad=True)
    close(s.get(x), value - step)
    y = s.op("sum", s.op("square", x))
    s.in_place("zero_", x, no_grad=True)
    with refused(Reason.MODIFIED_IN_PLACE):
        s.grad(y, x)


def test_in_place_goes_into_the_graph() -> None:
    s = Session()
    av, bv = real(3), real(3)
    a, b = s.leaf(av), s.leaf(bv)
    y = s.op("mul", a, s.put(torch.ones(3, dtype=F64)))
    s.in_place("mul_", y, b)
    ga, gb = s.grads(s.op("sum", y), [a, b])
    close(s.get(ga), bv)
    close(s.get(gb), av)
    z = s.put(real(3))
    s.in_place("requires_grad_", z)
    assert s.records[0].requires_grad and s.records[0].handle == z
    s.in_place("requires_grad_", z, requires_grad=False)
    assert not s.records[0].requires_grad


def test_sparse_gradients_come_back_dense() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 2, sparse=True, dtype=F64)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.table(ids))

    s = Session(factory(Table))
    (w,) = s.parameters("f", "table.weight")
    ids, v = torch.tensor([1, 1, 3]), real(3, 2)
    g = s.grad(s.model("f", [ids], parameters={"table.weight": w}), w, [v])
    expected = torch.zeros(5, 2, dtype=F64).index_add(0, ids, v)
    close(s.get(g), expected)


def test_gradients_do_not_share_memory_with_other_handles() -> None:
    s = Session()
    a, b, v = s.leaf(real(3)), s.leaf(real(3)), s.put(real(3))
    before = s.get(v)
    ga, gb = s.grads(s.op("add", a, b), [a, b], [v])
    s.in_place("zero_", ga)
    close(s.get(gb), before)
    close(s.get(v), before)


@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_penalty_matches_torch(seed: int) -> None:
    torch.manual_seed(seed)
    s = Session(ZOO["small"])
    module = ZOO["small"].target().double()
    names = [name for name, _ in module.named_parameters()]
    value = real(4, 3)
    x = s.leaf(value)
    parameters = s.parameters("small", *names)
    y = s.model("small", [x], parameters=dict(zip(names, parameters, strict=True)))
    g = s.grad(y, x, [torch.ones_like(s.get(y))], create_graph=True)
    penalty = s.op("sum", s.op("mul", g, x))
    found = s.grads(penalty, [x, *parameters], allow_unused=True)
    a = value.requires_grad_()
    out = module(a)
    (eg,) = grad(out, a, torch.ones_like(out), create_graph=True)
    expected = grad((eg * a).sum(), [a, *module.parameters()], allow_unused=True)
    unused = [record.unused for record in s.records]
    for handle, none, value in zip(found, unused, expected, strict=True):
        assert none == (value is None)
        if value is not None:
            close(s.get(handle), value)
