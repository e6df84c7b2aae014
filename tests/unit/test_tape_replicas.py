"""Graphs that run modules again, with parameters or modes other than the hosted ones; and whose proof counts."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from tests.unit.tape_jobs import F64, Session, close, factory, function, real, refused
from torch import nn
from torch.utils.checkpoint import checkpoint

from pullback_server import spec
from pullback_wire import Reason

Tensor = torch.Tensor
grad = torch.autograd.grad


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 3, dtype=F64)


def through(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight, linear().bias.detach()).sin()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = linear()

    def forward(self, x: Tensor) -> Any:
        return checkpoint(lambda x: self.lin(x).sin(), x, use_reentrant=False)


def test_the_original_and_replicas_in_one_graph() -> None:
    s = Session(factory(Checkpointed))
    value, given, hosted = real(2, 3), real(3, 3), linear().weight.detach()
    x = s.leaf(value)
    mine = s.op("mul", s.model("f", [x]), s.model("f", [x], parameters={"lin.weight": given}))
    g = s.grad(s.op("sum", s.op("add", mine, s.model("f", [x], train=True))), x, create_graph=True)
    a = value.clone().requires_grad_()
    total = (through(a, hosted) * through(a, given) + through(a, hosted)).sum()
    (e,) = grad(total, a, create_graph=True)
    close(s.get(g), e.detach())
    close(s.get(s.grad(s.op("sum", s.op("square", g)), x)), grad(e.square().sum(), a)[0])


class ReachesBack(torch.autograd.Function):
    known: ClassVar[dict[str, nn.Linear]] = {}

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g @ ReachesBack.known["lin"].weight


class OnlyInItsBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = ReachesBack.known["lin"] = linear()

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(ReachesBack.apply(x) + self.lin(x))


def test_a_backward_that_reaches_the_original() -> None:
    s = Session(factory(OnlyInItsBackward))
    x = s.leaf(real(2, 3))
    s.grad(s.op("sum", s.model("f", [x])), x)
    y = s.model("f", [x], parameters={"lin.weight": real(3, 3)})
    with refused(Reason.UNSUPPORTED_BY_MODEL, "global name"):
        s.grad(s.op("sum", y), x)
    s.grad(s.op("sum", s.model("f", [x])), x)
    assert type(s.module().lin) is nn.Linear


class ByClosure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = linear()
        self.act = lambda x: self.lin(x).sin()

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.act(x))


def test_a_closure_sees_what_is_given() -> None:
    s = Session(factory(ByClosure))
    value, weight = real(2, 3), real(3, 3)
    x, w = s.leaf(value), s.leaf(weight)
    y = s.model("f", [x], parameters={"lin.weight": w})
    a, b = value.clone().requires_grad_(), weight.clone().requires_grad_()
    for handle, expected in zip(s.grads(s.op("sum", y), [x, w]), grad(through(a, b).sum(), [a, b]), strict=True):
        close(s.get(handle), expected)


class Buries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = linear()
        weight = self.lin.weight
        self.act = lambda x: F.linear(x, weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.act(x))


def test_a_parameter_that_a_closure_holds_cannot_be_given() -> None:
    s = Session(factory(Buries))
    x = s.leaf(real(2, 3))
    s.model("f", [x], train=True)
    with refused(Reason.UNSUPPORTED_BY_MODEL, "lin.weight", "act"):
        s.model("f", [x], parameters={"lin.weight": real(3, 3)})


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g


def penalty(s: Session, y: int, x: int) -> Tensor:
    g = s.grad(s.op("sum", y), x, create_graph=True)
    return s.get(s.grad(s.op("sum", s.op("mul", g, x)), x))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_what_is_proven_in_double_is_proven_in_the_models_own_precision(dtype: str) -> None:
    s = Session(function(lambda x: Cube.apply(x), inputs={"x": spec(dtype, ["n"])}))
    x = s.leaf(torch.ones(3, dtype=getattr(torch, dtype)))
    close(penalty(s, s.model("f", [x]), x).double(), torch.full((3,), 9.0, dtype=F64), 1e-2)


def test_two_proven_models_one_of_which_runs_its_function_again() -> None:
    declared = {"x": spec("float64", ["n"])}

    def again(x: Tensor) -> Any:
        return checkpoint(lambda x: Cube.apply(x).sin(), x, use_reentrant=False)

    s = Session(function(again, "a", inputs=declared), function(lambda x: Square.apply(x), "b", inputs=declared))
    value = real(3)
    x = s.leaf(value)
    found = penalty(s, s.model("b", [s.model("a", [x])]), x)
    a = value.clone().requires_grad_()
    (e,) = grad((a**3).sin().square().sum(), a, create_graph=True)
    close(found, grad((e * a).sum(), a)[0])
