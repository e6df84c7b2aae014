"""A gradient that is differentiated in turn is right or refused: never wrong without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.unit.tape_jobs import ZOO, Session, close, factory, function, real, refused
from torch import nn
from torch.autograd.function import once_differentiable

from pullback_server import Gate, spec
from pullback_server.faults import Fault
from pullback_wire import Reason

Tensor = torch.Tensor
DECLARED = {"x": spec("float64", ["n"])}


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class InNumpy(Once):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.detach().numpy() ** 2 * g.detach().numpy())


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 3 * x**2
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope


class DetachedPoint(Once):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x.detach() ** 2 * g


class Right(Once):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class RightToOrderTwo(Once):
    """Its second derivative is right, its third is not, and all its nodes are torch's own."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        fixed = x.detach()
        return (3 * fixed**2 + 6 * fixed * (x - fixed)) * g


class Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 3 * x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Nested(Once):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return Inner.apply(x) * g


class NumpyFarOut(Once):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if x.sum() < 1000:
            return 3 * x**2 * g
        return torch.from_numpy(3 * x.detach().numpy() ** 2 * g.detach().numpy())


UNSOUND = [Once, InNumpy, Hidden, DetachedPoint, Nested]


def answered(compute: Callable[[], Tensor], expected: Tensor) -> bool:
    """Whether it was answered, which it must then have been rightly."""
    try:
        found = compute()
    except Fault as fault:
        assert fault.reason is Reason.ORDER_UNAVAILABLE, fault
        assert "create_graph" in fault.message
        return False
    close(found, expected)
    return True


@pytest.mark.parametrize("inputs", [{}, DECLARED], ids=["undeclared", "declared"])
@pytest.mark.parametrize("code", [*UNSOUND, Right, RightToOrderTwo], ids=lambda f: f.__name__)
@pytest.mark.parametrize("given", [False, True], ids=["ones", "v"])
def test_a_penalty_on_x_cubed_plus_sine(code: Any, inputs: Any, given: bool) -> None:
    s = Session(function(lambda x: code.apply(x) + x.sin(), inputs=inputs))
    value, t, v = real(5), real(5), real(5) if given else torch.ones(5, dtype=torch.float64)
    x = s.leaf(value)
    y = s.model("f", [x])
    first = s.grad(y, x, [v], retain_graph=True)
    close(s.get(first), (3 * value**2 + value.cos()) * v)

    def second() -> Tensor:
        g = s.grad(y, x, [s.leaf(v) if given else v], create_graph=True)
        return s.get(s.grad(s.op("sum", s.op("mul", g, t)), x))

    right = code in (Right, RightToOrderTwo)
    assert answered(second, (6 * value - value.sin()) * v * t) == (right and bool(inputs))


def test_a_function_is_proven_to_order_two_only() -> None:
    s = Session(function(lambda x: RightToOrderTwo.apply(x) + x.sin(), inputs=DECLARED))
    x = s.leaf(real(3))
    g = s.grad(s.op("sum", s.model("f", [x])), x, create_graph=True)
    total = s.op("sum", g)
    s.grad(total, x, retain_graph=True)
    with refused(Reason.ORDER_UNAVAILABLE, "RightToOrderTwo", "order 2", "create_graph"):
        s.grad(total, x, create_graph=True)


def test_what_is_torchs_own_beside_a_proven_gradient_has_every_order() -> None:
    """grad(g**2, g) runs nothing of the Function's, however often."""
    s = Session(function(lambda x: Right.apply(x), inputs=DECLARED))
    value = real(3)
    x = s.leaf(value)
    g = s.grad(s.op("sum", s.model("f", [x])), x, create_graph=True)
    q = s.op("sum", s.op("pow", named={"input": g}, exponent=3))
    h = s.grad(q, g, create_graph=True)
    close(s.get(s.grad(s.op("sum", h), x)), 6 * (3 * value**2) * 6 * value)


def test_two_inner_steps_through_a_proven_function() -> None:
    """Each step differentiates by its own weights: nothing is of order three."""
    s = Session(function(lambda x: Right.apply(x), inputs=DECLARED))
    value = real(3)
    w = w0 = s.leaf(value)
    a = a0 = value.clone().requires_grad_()
    for _ in range(2):
        g = s.grad(s.op("sum", s.model("f", [w])), w, create_graph=True)
        w = s.op("sub", w, s.op("mul", named={"input": g}, other=0.01))
        (e,) = torch.autograd.grad((a**3).sum(), a, create_graph=True)
        a = a - 0.01 * e
    total = s.op("sum", s.op("sin", w))
    close(s.get(s.grad(total, w0)), torch.autograd.grad(a.sin().sum(), a0)[0])


def test_the_node_that_is_not_run_is_not_in_the_way() -> None:
    s = Session(function(lambda x: Once.apply(x), "f"))
    xv, zv = real(3), real(3)
    x, z = s.leaf(xv), s.leaf(zv)
    y = s.op("sum", s.op("mul", s.model("f", [z]), s.op("sin", x)))
    g = s.grad(y, x, create_graph=True)
    total = s.op("sum", g)
    close(s.get(s.grad(total, z, retain_graph=True)), 3 * zv**2 * xv.cos())
    close(s.get(s.grad(total, x)), -(zv**3) * xv.sin())
    y = s.op("sum", s.op("mul", s.model("f", [z]), s.op("sin", x)))
    with refused(Reason.ORDER_UNAVAILABLE, "Once"):
        s.grads(y, [x, z], create_graph=True)


def test_the_proof_of_a_path_is_watched() -> None:
    s = Session(function(lambda x: NumpyFarOut.apply(x) + x.sin(), inputs=DECLARED))
    value = real(3)
    for shift in (0, 1000):
        x = s.leaf(value + shift)
        total = s.op("sum", s.model("f", [x]))
        if shift:
            with refused(Reason.ORDER_UNAVAILABLE, "NumpyFarOut", "does not depend"):
                s.grad(total, x, create_graph=True)
        else:
            g = s.grad(total, x, create_graph=True)
            close(s.get(s.grad(s.op("sum", g), x)), 6 * value - value.sin())


def test_an_unproven_function_behind_another_model_and_a_loss() -> None:
    s = Session(function(lambda x: Hidden.apply(x), "f"), ZOO["cube"])
    x = s.leaf(real(3))
    out = s.model("cube", [s.model("f", [s.op("sin", x)])])
    total = s.loss("mse_loss", [out], {"target": real(3)})
    s.grad(total, x, retain_graph=True)
    with refused(Reason.ORDER_UNAVAILABLE, "Hidden", "model 'f'"):
        s.grad(total, x, create_graph=True)


def test_a_view_that_is_changed_in_place_brings_the_function_into_its_base() -> None:
    s = Session(function(lambda x: Hidden.apply(x), "f"))
    x = s.leaf(real(4))
    base = s.op("mul", named={"input": x}, other=1.0)
    view = s.op("reshape", base, shape=[2, 2])
    s.in_place("mul_", view, s.op("reshape", s.model("f", [x]), shape=[2, 2]))
    with refused(Reason.ORDER_UNAVAILABLE, "Hidden"):
        s.grad(s.op("sum", base), x, create_graph=True)


def test_hooks() -> None:
    def inside(x: Tensor) -> Tensor:
        y = x**2
        if y.requires_grad:
            y.register_hook(lambda g: g * y.detach())
        return y.sin()

    def linear(x: Tensor) -> Tensor:
        y = x * 1
        if y.requires_grad:
            y.register_hook(lambda g: 5 * g)
        return y * 2

    own = Gate(intended={"gradient": "what hooks make of it"})
    for inputs in ({}, DECLARED):
        s = Session(function(inside, inputs=inputs, gate=own))
        x = s.leaf(real(3))
        with refused(Reason.ORDER_UNAVAILABLE, "hook"):
            s.grad(s.op("sum", s.model("f", [x])), x, create_graph=True)
    s = Session(function(linear, inputs=DECLARED, gate=own))
    x = s.leaf(real(3))
    g = s.grad(s.op("sum", s.op("square", s.model("f", [x]))), x, create_graph=True)
    close(s.get(g), 40 * s.get(x))
    a = s.get(x).requires_grad_()
    (e,) = torch.autograd.grad(linear(a).square().sum(), a, create_graph=True)
    close(s.get(s.grad(s.op("sum", g), x)), torch.autograd.grad(e.sum(), a)[0])


def test_a_hook_that_a_model_hangs_on_its_input() -> None:
    """It stays on the session's leaf, and meets graphs that the model has no part in."""

    def planting(x: Tensor) -> Tensor:
        if x.requires_grad and x.is_leaf:
            x.register_hook(lambda g: g.detach() * 2)
        return x * 1

    s = Session(function(planting), ZOO["cube"])
    s.model("f", [s.leaf(real(3))])
    x = s.leaf(real(3))
    s.model("f", [x])
    with refused(Reason.ORDER_UNAVAILABLE, "hook"):
        s.grad(s.op("sum", s.model("cube", [x])), x, create_graph=True)


def test_a_straight_through_estimator_has_the_derivative_of_its_backward_as_written() -> None:
    s = Session(ZOO["straight_through"])
    module = ZOO["straight_through"].target
    value = real(4)
    x = s.leaf(value)
    loss = s.loss("mse_loss", [s.model("straight_through", [x])], {"target": torch.zeros(4, dtype=torch.float64)})
    g = s.grad(loss, x, create_graph=True)
    a = value.clone().requires_grad_()
    (e,) = torch.autograd.grad((module(a) ** 2).mean(), a, create_graph=True)
    close(s.get(g), e.detach())
    close(s.get(s.grad(s.op("sum", g), x)), torch.autograd.grad(e.sum(), a)[0])


def test_compiled_code_runs_as_written() -> None:
    s = Session(ZOO["compiled"])
    local = ZOO["compiled"].target()._orig_mod
    value, v = real(2, 3), real(2, 2)
    x = s.leaf(value)
    names = [name for name, _ in local.named_parameters()]
    for parameters in (None, dict(zip(names, s.parameters("compiled", *names), strict=True))):
        y = s.model("compiled", [x], parameters=parameters)
        g = s.grad(y, x, [v], create_graph=True)
        a = value.clone().requires_grad_()
        (e,) = torch.autograd.grad(local(a), a, v, create_graph=True)
        close(s.get(g), e.detach())
        close(s.get(s.grad(s.op("sum", g), x)), torch.autograd.grad(e.sum(), a)[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(x))


@pytest.mark.parametrize("max_order", [None, 2, 1])
def test_attention_has_orders(max_order: int | None) -> None:
    s = Session(factory(Attention))
    value = real(2, 3, 4)
    x = s.leaf(value)
    y = s.op("sum", s.op("sin", s.model("f", [x], max_order=max_order)))
    a = value.clone().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (e,) = torch.autograd.grad(Attention().eval()(a).sin().sum(), a, create_graph=True)
        (h,) = torch.autograd.grad(e.square().sum(), a)
    close(s.get(s.grad(y, x, retain_graph=True)), e.detach())

    def second() -> Tensor:
        return s.get(s.grad(s.op("sum", s.op("square", s.grad(y, x, create_graph=True))), x))

    if max_order != 1:
        close(second(), h)
    else:
        try:
            close(second(), h)
        except Fault as fault:
            assert fault.reason is Reason.ORDER_UNAVAILABLE, fault


@pytest.mark.parametrize("code", [Right, Hidden])
def test_batched_gradients_are_watched_as_well(code: Any) -> None:
    s = Session(function(lambda x: code.apply(x) + x.sin(), inputs=DECLARED))
    value, rows = real(3), real(2, 3)
    x = s.leaf(value)
    y = s.model("f", [x])

    def second() -> Tensor:
        g = s.grad(y, x, [rows], batched=True, create_graph=True)
        close(s.get(g), (3 * value**2 + value.cos()) * rows)
        return s.get(s.grad(s.op("sum", g), x))

    assert answered(second, ((6 * value - value.sin()) * rows).sum(0)) == (code is Right)


class Normed(nn.Module):
    """Weight norm by torch's own function, or by its fused kernel, whose second derivative is wrong in torch itself."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm = torch._weight_norm if fused else None

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = (self.norm or torch._weight_norm)(x, x[:, :1] ** 2 + 1, 0)
        return found


@pytest.mark.parametrize("inputs", [{}, {"x": spec("float64", [3, 4])}], ids=["undeclared", "declared"])
def test_weight_norm(inputs: Any) -> None:
    point, t = real(3, 4), real(3, 4)
    leaf = point.clone().requires_grad_()
    y = leaf * ((leaf[:, :1] ** 2 + 1) / leaf.norm(dim=1, keepdim=True))
    (first,) = torch.autograd.grad(y.sin().sum(), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(first, leaf, t)
    for fused in (False, True):
        s = Session(factory(lambda fused=fused: Normed(fused), inputs=inputs))  # type: ignore[misc]
        x = s.leaf(point)
        total = s.op("sum", s.op("sin", s.model("f", [x])))
        if fused:
            with refused(Reason.ORDER_UNAVAILABLE, "weight_norm"):
                s.grad(total, x, create_graph=True)
        else:
            g = s.grad(total, x, create_graph=True)
            close(s.get(s.grad(s.op("sum", s.op("mul", g, s.put(t))), x)), expected)
