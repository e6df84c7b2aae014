"""A derivative of higher order is right or refused: never wrong without a word."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from pullback_server import Gate, spec
from pullback_server.faults import Fault
from pullback_server.hosting.loading import load_source
from pullback_wire import Reason

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("engine_jobs", HERE / "engine_jobs.py")
assert _spec is not None and _spec.loader is not None
jobs = sys.modules.setdefault("engine_jobs", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(jobs)

torch.set_num_threads(1)
Tensor = torch.Tensor
ZOO = {registration.name: registration for registration in load_source(str(HERE.parent / "zoo.py"))}
DECLARED = {"x": spec("float64", ["n"])}


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def orders(host: Any) -> Any:
    return host.engine.signatures()[0].orders


def hvp(host: Any, x: Tensor, v: Tensor, t: Tensor, name: str = "f") -> Tensor:
    return host("hvp", name, {"x": x}, wrt=["x"], cotangents={"output": v}, tangents={"x": t}).hvps["x"]


def jvp(host: Any, x: Tensor, t: Tensor, name: str = "f") -> Tensor:
    return host("jvp", name, {"x": x}, wrt=["x"], tangents={"x": t}).grads["output"]


def right_or_refused(compute: Any, expected: Tensor) -> bool:
    """Whether it was answered, which it must then have been rightly."""
    try:
        found = compute()
    except Fault as fault:
        assert fault.reason is Reason.ORDER_UNAVAILABLE, fault
        return False
    close(found, expected)
    return True


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


class NumpyThatRaises(Once):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.detach().numpy() ** 2 * g.numpy())


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 3 * x**2
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope


class PartlyDetached(Once):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x**2 * g + 2 * x**2 * g.detach()


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


class Inner(torch.autograd.Function):
    """The slope of Nested, whose own backward is wrong in a way that leaves no trace."""

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


class InnerOnce(Inner):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class NestedOnce(Once):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return InnerOnce.apply(x) * g


UNSOUND = [Once, InNumpy, NumpyThatRaises, Hidden, PartlyDetached, DetachedPoint, Nested, NestedOnce]


@pytest.mark.parametrize("inputs", [{}, DECLARED], ids=["undeclared", "declared"])
@pytest.mark.parametrize("function", [*UNSOUND, Right], ids=lambda f: f.__name__)
def test_x_cubed_plus_sine(function: Any, inputs: Any) -> None:
    """Every one of these has the right first derivative; beside sin(x) the missing part of a second does not show."""
    host = jobs.host_function(lambda x: function.apply(x) + x.sin(), inputs=inputs)
    x, v, t = real(5), real(5), real(5)
    close(host("vjp", "f", {"x": x}, wrt=["x"], cotangents={"output": v}).grads["x"], (3 * x**2 + x.cos()) * v)
    answered = right_or_refused(lambda: hvp(host, x, v, t), (6 * x - x.sin()) * v * t)
    assert answered == (function is Right and bool(inputs))
    assert orders(host).reverse == (2 if answered else 1)
    answered = right_or_refused(lambda: jvp(host, x, t), (3 * x**2 + x.cos()) * t)
    assert answered == (function in (Right, Hidden, DetachedPoint, Nested, NestedOnce))
    target = real(5)

    def hessian() -> Any:
        reply = host("hessian", "f", {"x": x}, wrt=["x"], loss="mse_loss", targets={"target": target})
        return reply.blocks["x", "x"]

    leaf = x.clone().requires_grad_()
    expected = torch.autograd.functional.hessian(lambda a: ((a**3 + a.sin() - target) ** 2).mean(), leaf)
    right_or_refused(hessian, expected)


@pytest.mark.parametrize("function", UNSOUND, ids=lambda f: f.__name__)
def test_an_unsound_function_deep_inside(function: Any) -> None:
    def deep(x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return (function.apply(y) * x).sum() + (x.sin() ** 2).sum()

    for inputs in ({}, DECLARED):
        host = jobs.host_function(deep, inputs=inputs)
        x, t = real(4), real(4)
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad((leaf.tanh() ** 3 * leaf).sum() + (leaf.sin() ** 2).sum(), leaf, create_graph=True)
        (expected,) = torch.autograd.grad(g @ t, leaf)
        one = torch.ones((), dtype=torch.float64)
        assert not right_or_refused(lambda: hvp(host, x, one, t), expected)  # noqa: B023


def test_what_stands_in_the_way_is_named() -> None:
    host = jobs.host_function(lambda x: Once.apply(x) + x, inputs=DECLARED)
    with jobs.refused(Reason.ORDER_UNAVAILABLE, "Once", "once_differentiable", "model 'f'"):
        hvp(host, real(2), real(2), real(2))
    host = jobs.host_function(lambda x: Right.apply(x) + x)
    with jobs.refused(Reason.ORDER_UNAVAILABLE, "Right", "declare"):
        hvp(host, real(2), real(2), real(2))


def test_the_proof_holds_for_the_kinds_that_were_probed() -> None:
    """A branch that the probe did not take."""
    host = jobs.host_function(lambda x: Right.apply(x) if x.sum() < 1000 else Hidden.apply(x), inputs=DECLARED)
    x, t = real(3), real(3)
    close(hvp(host, x, torch.ones_like(x), t), 6 * x * t)
    with jobs.refused(Reason.ORDER_UNAVAILABLE, "Hidden"):
        hvp(host, x + 1000, torch.ones_like(x), t)


class NumpyFarOut(Once):
    """The kind that was proven, on a path of its backward that was not."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if x.sum() < 1000:
            return 3 * x**2 * g
        return torch.from_numpy(3 * x.detach().numpy() ** 2 * g.detach().numpy())


def test_the_tripwire_watches_what_was_proven_as_well() -> None:
    host = jobs.host_function(lambda x: NumpyFarOut.apply(x) + x.sin(), inputs=DECLARED)
    x, v, t = real(3), real(3), real(3)
    close(hvp(host, x, v, t), (6 * x - x.sin()) * v * t)
    with jobs.refused(Reason.ORDER_UNAVAILABLE, "NumpyFarOut", "does not depend"):
        hvp(host, x + 1000, v, t)


class Sign(torch.autograd.Function):
    """Its gradient is a zero that depends on nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.zeros_like(g.detach())


def test_a_gradient_that_is_always_zero_is_no_reason_to_refuse() -> None:
    host = jobs.host_function(lambda x: Sign.apply(x) + x.sin(), inputs=DECLARED)
    x, v, t = real(3), real(3), real(3)
    close(hvp(host, x, v, t), -x.sin() * v * t)


def test_a_straight_through_estimator_has_the_second_derivative_of_its_backward_and_none_through_a_loss() -> None:
    host = jobs.Host(ZOO["straight_through"])
    x, v, t = real(4), real(4), real(4)
    close(hvp(host, x, v, t, "straight_through"), -x.sin() * v * t)
    close(jvp(host, x, t, "straight_through"), (1 + x.cos()) * t)
    with jobs.refused(Reason.ORDER_UNAVAILABLE, "StraightThrough", "loss"):
        host("hessian", "straight_through", {"x": x}, wrt=["x"], loss="mse_loss", targets={"target": x})


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.1, 0.1)


def test_no_jvp_where_a_backward_is_not_linear() -> None:
    host = jobs.host_function(lambda x: Clipped.apply(x) + x)
    with jobs.refused(Reason.ORDER_UNAVAILABLE, "linear"):
        jvp(host, real(4), real(4))


class WithJvp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_forward(x)
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * t


class WrongJvp(WithJvp):
    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return 7 * t


def test_a_jvp_of_ones_own() -> None:
    x, t = real(4), real(4)
    close(jvp(jobs.host_function(lambda x: WithJvp.apply(x) + x), x, t), (3 * x**2 + 1) * t)
    # Where it was probed, the J of all calls is one and the same.
    host = jobs.host_function(lambda x: WrongJvp.apply(x) + x, inputs=DECLARED)
    close(jvp(host, x, t), (3 * x**2 + 1) * t)


def no_grad_weight(x: Tensor) -> Tensor:
    with torch.no_grad():
        weight = x.exp()
    return weight * x


def inner_gradient(x: Tensor) -> Tensor:
    leaf = x if x.requires_grad else x.requires_grad_()
    (g,) = torch.autograd.grad((leaf**3).sum(), leaf, retain_graph=True)
    return g * x


def hooked(x: Tensor) -> Tensor:
    y = x * 1
    if y.requires_grad:
        y.register_hook(lambda g: 5 * g)
    return y * 2


@pytest.mark.parametrize(
    ("function", "slope"),
    [(no_grad_weight, lambda x: x.exp()), (inner_gradient, lambda x: 3 * x**2), (hooked, lambda x: 10 + 0 * x)],
    ids=["no_grad", "inner_gradient", "hook"],
)
def test_j_is_the_same_in_a_jvp_as_in_a_vjp(function: Any, slope: Any) -> None:
    """Forward mode goes through all of these as if they were not there."""
    host = jobs.host_function(function)
    x, u = real(4), real(4)
    close(host("vjp", "f", {"x": x}, wrt=["x"], cotangents={"output": u}).grads["x"], slope(x) * u)
    close(jvp(host, x, u), slope(x) * u)


def test_hooks_are_unproven_code_too() -> None:
    x, v, t = real(4), real(4), real(4)
    own = Gate(intended={"gradient": "what hooks make of it"})

    def function(x: Tensor) -> Tensor:
        y = x**2
        if y.requires_grad:
            y.register_hook(lambda g: g * y.detach())
        return y.sin()

    for inputs in ({}, DECLARED):
        host = jobs.host_function(function, inputs=inputs, gate=own)
        with jobs.refused(Reason.ORDER_UNAVAILABLE, "hook"):
            hvp(host, x, v, t)
    host = jobs.host_function(hooked, inputs=DECLARED, gate=own)
    close(hvp(host, x, v, t), torch.zeros(4, dtype=torch.float64))


def test_a_hook_on_a_hosted_parameter_belongs_to_its_gradient() -> None:
    def factory() -> nn.Module:
        module = nn.Linear(2, 2, bias=False).double()
        module.weight.register_hook(lambda g: g * torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double())
        return module

    host = jobs.host_factory(factory)
    x, v = real(3, 2), real(3, 2)
    expected = (v.T @ x) * torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double()
    keywords: dict[str, Any] = {"wrt": ["param:weight"], "cotangents": {"output": v}}
    close(host("vjp", "f", {"input": x}, **keywords).grads["param:weight"], expected)
    given = host("vjp", "f", {"input": x}, **keywords, parameters={"weight": real(2, 2)})
    close(given.grads["param:weight"], expected)
    t = real(2, 2)
    reply = host("jvp", "f", {"input": x}, wrt=["param:weight"], tangents={"param:weight": t})
    close(reply.grads["output"], x @ (t * torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double()).T)
    with jobs.refused(Reason.ORDER_UNAVAILABLE, "hook"):
        host("hvp", "f", {"input": x}, **keywords, tangents={"param:weight": t})


def test_a_custom_operator_drops_no_tangent() -> None:
    """torch.library's operators lose tangents silently in forward mode."""

    @torch.library.custom_op("pullback_tests::cubed", mutates_args=())
    def cubed(x: Tensor) -> Tensor:
        return x**3

    cubed.register_autograd(
        lambda ctx, g: g * 3 * ctx.saved_tensors[0] ** 2,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    )
    x, v, t = real(4), real(4), real(4)
    host = jobs.host_function(lambda x: cubed(x) + x)
    close(jvp(host, x, t), (3 * x**2 + 1) * t)
    assert not right_or_refused(lambda: hvp(host, x, v, t), 6 * x * v * t)
    host = jobs.host_function(lambda x: cubed(x) + x, inputs=DECLARED)
    assert right_or_refused(lambda: hvp(host, x, v, t), 6 * x * v * t)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_inside_drops_no_tangent() -> None:
    scripted = torch.jit.script(_scripted)
    host = jobs.host_function(lambda x: scripted(x) + x)
    x, v, t = real(4), real(4), real(4)
    for _ in range(4):
        close(jvp(host, x, t), (2 * x * x.cos() - x**2 * x.sin() + 1) * t)
        slope = 2 * x.cos() - 4 * x * x.sin() - x**2 * x.cos()
        right_or_refused(lambda: hvp(host, x, v, t), slope * v * t)


def _scripted(x: Tensor) -> Tensor:
    return x * x * torch.cos(x)


def test_compiled_in_the_factory() -> None:
    host = jobs.Host(ZOO["compiled"])
    local = ZOO["compiled"].target()._orig_mod
    x, v, t = real(2, 3), real(2, 2), real(2, 3)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(local(leaf), leaf, v, create_graph=True)
    (h,) = torch.autograd.grad((g * t).sum(), leaf)
    for _ in range(2):
        first = host("vjp", "compiled", {"input": x}, wrt=["input"], cotangents={"output": v})
        close(first.grads["input"], g.detach())
        reply = host("hvp", "compiled", {"input": x}, wrt=["input"], cotangents={"output": v}, tangents={"input": t})
        close(reply.hvps["input"], h)
        pushed = host("jvp", "compiled", {"input": x}, wrt=["input"], tangents={"input": t}).grads["output"]
        close(pushed, torch.func.jvp(local, (x,), (t,))[1].detach())
        rows = host(
            "vjp", "compiled", {"input": x}, wrt=["input"], cotangents={"output": torch.stack([v, 2 * v])}, batched=True
        )
        close(rows.grads["input"], torch.stack([g, 2 * g]).detach())
    given = {name: torch.randn_like(p) for name, p in local.named_parameters()}
    reply = host(
        "vjp", "compiled", {"input": x}, wrt=["input", "param:0.weight"], cotangents={"output": v}, parameters=given
    )
    leaves = [leaf, given["0.weight"].clone().requires_grad_()]
    expected = torch.autograd.grad(
        torch.func.functional_call(local, given | {"0.weight": leaves[1]}, (leaf,)), leaves, v
    )
    close(reply.grads["input"], expected[0])
    close(reply.grads["param:0.weight"], expected[1])


def test_compiling_goes_on_after_a_call_that_must_not_compile() -> None:
    host = jobs.Host(ZOO["compiled"])
    x, v = {"input": real(2, 3)}, {"output": real(2, 2)}
    given = {name: p.detach() for name, p in ZOO["compiled"].target()._orig_mod.named_parameters()}
    host("hvp", "compiled", x, wrt=["input"], cotangents=v, parameters=given, train=True)
    host("vjp", "compiled", x, wrt=["input"], cotangents=v, parameters=given)
    y = torch.compile(lambda x: x.sin() * x, backend="aot_eager")(real(3).requires_grad_())
    assert "CompiledFunction" in type(y.grad_fn).__name__


def test_a_compiled_backward_is_never_differentiated() -> None:
    """Compiled code that does not obey the stance still meets the tripwire."""
    from pullback_server.engine import tripwire

    inner = torch.compile(lambda x: x.sin() * x, backend="aot_eager")
    x = real(3).requires_grad_()
    y = inner(x)
    assert any(tripwire._COMPILED in type(node).__name__ for node in tripwire.nodes([y]))
    hosted = jobs.host_function(lambda x: x).engine.find("f", "")
    with jobs.refused(Reason.ORDER_UNAVAILABLE, "compile"):
        tripwire.Tripwire(hosted, [y], jobs.Witness(), hooked=False, proof=False, composed=False)


class Rematerialised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return found


@pytest.mark.parametrize("train", [False, True])
def test_recomputation_sees_the_given_parameters_and_the_same_mask(train: bool) -> None:
    """checkpoint runs the forward again within the backward."""
    host = jobs.host_factory(lambda: Rematerialised().double())
    given = {"inner.0.weight": real(3, 3), "inner.0.bias": real(3)}
    x, v, t = real(4, 3), real(4, 3), real(4, 3)
    common: dict[str, Any] = {"parameters": given, "cotangents": {"output": v}, "train": train, "seed": 7}
    reply = host("vjp", "f", {"x": x}, wrt=["x", "param:inner.0.weight"], **common)
    leaf, weight = x.clone().requires_grad_(), given["inner.0.weight"].clone().requires_grad_()
    plain = torch.tanh(leaf @ weight.T + given["inner.0.bias"])
    mask = reply.outputs["output"] / plain.detach()
    assert set(mask.round(decimals=6).unique().tolist()) <= ({0.0, 2.0} if train else {1.0})
    expected = torch.autograd.grad(plain * mask, [leaf, weight], v, create_graph=True)
    close(reply.grads["x"], expected[0].detach())
    close(reply.grads["param:inner.0.weight"], expected[1].detach())
    del common["cotangents"]
    pushed = host("jvp", "f", {"x": x}, wrt=["x"], tangents={"x": t}, **common).grads["output"]
    close((pushed * v).sum(), (reply.grads["x"] * t).sum())
    common["cotangents"] = {"output": v}
    second = host("hvp", "f", {"x": x}, wrt=["x"], tangents={"x": t}, **common)
    close(second.hvps["x"], torch.autograd.grad((expected[0] * t).sum(), leaf)[0])


def test_dropout_masks_match_between_first_and_second_order() -> None:
    host = jobs.Host(ZOO["conv"])
    image, v, t = real(2, 2, 4, 4), real(2, 4), real(2, 2, 4, 4)
    common: dict[str, Any] = {"wrt": ["image"], "train": True, "seed": 11}
    first = host("vjp", "conv", {"image": image}, cotangents={"output": v}, **common)
    second = host("hvp", "conv", {"image": image}, cotangents={"output": v}, tangents={"image": t}, **common)
    close(first.grads["image"], second.grads["image"])
    pushed = host("jvp", "conv", {"image": image}, tangents={"image": t}, **common)
    close(pushed.grads["output"], second.cotangent_derivatives["output"])
    step = 1e-5
    above, below = (
        host("vjp", "conv", {"image": image + sign * step * t}, cotangents={"output": v}, **common).grads["image"]
        for sign in (1, -1)
    )
    u = real(2, 2, 4, 4)
    close(
        ((above - below) / (2 * step) * u).sum(),
        (second.hvps["image"] * u).sum() * 0
        + (
            host("hvp", "conv", {"image": image}, cotangents={"output": v}, tangents={"image": u}, **common).hvps[
                "image"
            ]
            * t
        ).sum(),
        1e-5,
    )


@pytest.mark.parametrize("name", ["transformer", "lstm", "gru", "conv", "small", "words"])
def test_stock_models_promise_every_order(name: str) -> None:
    found = orders(jobs.Host(ZOO[name]))
    assert (found.reverse, found.forward) == (-1, True)


def test_stock_modules_need_no_specs() -> None:
    host = jobs.host_factory(lambda: nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.LayerNorm(2)))
    assert orders(host).reverse == -1
    host = jobs.host_factory(lambda: Rematerialised())
    assert orders(host).reverse == 1


class TwoInputs(nn.Module):
    """Hides a tensor only where the second input is given."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return Right.apply(x) if y is None else Right.apply(x) * Hidden.apply(y)


def test_optional_inputs_are_probed_too() -> None:
    host = jobs.host_factory(TwoInputs, inputs={"x": spec("float64", ["n"]), "y": spec("float64", ["n"])})
    assert orders(host).reverse == 1


class Frozen(nn.Module):
    """A hidden tensor on the way to a parameter only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.small = nn.Parameter(torch.full((3,), 1e-4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + Hidden.apply(self.small) * x


def test_a_part_that_is_small_does_not_hide_behind_a_large_one() -> None:
    host = jobs.host_factory(Frozen, inputs={"x": spec("float64", [3])})
    assert orders(host).reverse == 1


def test_higher_order_of_an_operation_that_has_none_is_refused() -> None:
    """torch itself raises here; the caller hears ORDER_UNAVAILABLE and not a fault of the model."""

    def flash(x: Tensor) -> Tensor:
        q = x.reshape(1, 1, 4, 4)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0]  # type: ignore[no-any-return]

    host = jobs.host_function(flash)
    x = real(16)
    v = host("evaluate", "f", {"x": x}).outputs["output"]
    with jobs.refused(Reason.ORDER_UNAVAILABLE, "flash"):
        hvp(host, x, v, x)


class Normed(nn.Module):
    """Weight norm, whose fused kernel has a wrong second derivative in torch itself."""

    def __init__(self, how: str, dim: int | None) -> None:
        super().__init__()
        norm = nn.utils.weight_norm if how == "old" else nn.utils.parametrizations.weight_norm
        self.inner = norm(nn.Linear(4, 3), dim=dim)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x).sin()
        return found


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("how", ["old", "new"])
def test_weight_norm(how: str, dim: int | None, dtype: torch.dtype) -> None:
    host = jobs.host_factory(
        lambda: Normed(how, dim).to(dtype), inputs={"x": spec(str(dtype).removeprefix("torch."), ["n", 4])}
    )
    assert orders(host).reverse == -1
    own = host.engine.find("f", "").parameters
    bias, g, v = (
        next(own[name].detach() for name in own if name.endswith(ends))
        for ends in (("bias",), ("_g", "original0"), ("_v", "original1"))
    )
    names = [next(name for name in own if own[name].shape == t.shape and own[name].equal(t)) for t in (bias, g, v)]
    leaves = [t.clone().double().requires_grad_() for t in (bias, g, v)]
    x, c = torch.randn(2, 4, dtype=dtype), torch.randn(2, 3, dtype=dtype)
    t = [torch.randn_like(leaf, dtype=dtype) for leaf in leaves]
    norm = leaves[2].norm() if dim is None else leaves[2].norm(dim=1 - dim, keepdim=True)
    y = (c.double() * (x.double() @ (leaves[2] * (leaves[1] / norm)).T + leaves[0]).sin()).sum()
    first = torch.autograd.grad(y, leaves, create_graph=True)
    expected = torch.autograd.grad(sum((a * b.double()).sum() for a, b in zip(first, t, strict=True)), leaves)
    reply = host(
        "hvp",
        "f",
        {"x": x},
        wrt=[f"param:{name}" for name in names],
        cotangents={"output": c},
        tangents={f"param:{name}": one for name, one in zip(names, t, strict=True)},
    )
    for name, right in zip(names, expected, strict=True):
        close(reply.hvps[f"param:{name}"].double(), right, 1e-9 if dtype == torch.float64 else 1e-4)


def test_a_node_with_a_wrong_second_derivative_is_refused() -> None:
    """Where the fused kernel is called by another name nothing can take its place."""
    fused = torch._weight_norm
    for inputs in ({}, {"x": spec("float64", [3, 4])}):
        host = jobs.host_function(lambda x: fused(x, x[:, :1] ** 2 + 1, 0), inputs=inputs)
        assert orders(host).reverse == 1
        with jobs.refused(Reason.ORDER_UNAVAILABLE, "weight_norm", "norm_except_dim"):
            hvp(host, real(3, 4), real(3, 4), real(3, 4))
        jvp(host, real(3, 4), real(3, 4))


SKEWED = {
    "padding": lambda x: torch.nn.functional.embedding(torch.tensor([[0, 1]]), x, padding_idx=0),
    "fmax": lambda x: torch.fmax(x, x.flip(1)),
    "fmin": lambda x: torch.fmin(x, x.flip(1)),
    "maximum": lambda x: torch.maximum(x, x.flip(1)),
    "often": lambda x: torch.nn.functional.embedding(torch.tensor([[0, 0]]), x, scale_grad_by_freq=True),
}


@pytest.mark.parametrize("name", SKEWED)
def test_a_jvp_is_the_adjoint_of_the_vjp_of_torchs_own_operations(name: str) -> None:
    function = SKEWED[name]
    host = jobs.host_function(lambda x: function(x))
    x = torch.tensor([[1.0, 2.0, 2.0, 1.0], [0.0, 3.0, 3.0, 5.0]], dtype=torch.float64)
    t, v = real(2, 4), real(*function(x).shape)
    pulled = host("vjp", "f", {"x": x}, wrt=["x"], cotangents={"output": v}).grads["x"]
    if name == "often":
        with jobs.refused(Reason.ORDER_UNAVAILABLE, "has no JVP"):
            jvp(host, x, t)
        with jobs.refused(Reason.ORDER_UNAVAILABLE, "scale_grad_by_freq"):
            hvp(host, x, v, t)
        return
    close((pulled * t).sum(), (jvp(host, x, t) * v).sum())
