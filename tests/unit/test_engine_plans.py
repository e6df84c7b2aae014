"""Compiled plans: what they compute is what the model's own code does, and all else that code computes.

Compiling takes seconds, so most of it is outside the quick suite.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.unit.engine_jobs import Host, refused
from tests.unit.tape_jobs import F64, Session, close, factory, real
from torch import nn

from pullback_server import Gate, spec
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.plan import Plan, Variant
from pullback_server.hosting import Registration
from pullback_server.hosting.options import Compile, Options
from pullback_wire import Reason

Tensor = torch.Tensor
grad = torch.autograd.grad
DECLARED = {"x": spec("float64", ["b", 3])}


def options(*rows: int, **more: Any) -> Options:
    return Options(compile=Compile(rows=rows), **more)


#: For backwards that are not the derivatives of their forwards.
OWN = Gate(intended={"gradient": "its own"})


def host(target: Callable[..., Any], *rows: int, kind: str = "function", **more: Any) -> tuple[Host, HostedModel]:
    fields: dict[str, Any] = {"inputs": DECLARED, "batch_axis": 0, "options": options(*rows)}
    h = Host(Registration("f", target, kind=kind, **(fields | more)))  # type: ignore[arg-type]
    return h, h.engine.find("f", "")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[frozenset[str]]]:
    """What required grad in the compiled code that ran while a model was served."""
    found: list[frozenset[str]] = []
    run = Plan.run

    def noted(plan: Plan, variant: Variant, *more: Any) -> Any:
        found.append(variant.requiring)
        return run(plan, variant, *more)

    monkeypatch.setattr(Plan, "run", noted)
    yield found


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(3, 4, dtype=dtype), nn.Linear(4, 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.two(self.one(x).tanh()))


def test_a_plan_computes_what_it_was_compiled_for_and_nothing_else(ran: list[frozenset[str]]) -> None:
    h, model = host(Net, 2, kind="factory")
    assert model.plan.startswith("compiled for rows 2 in "), model.plan
    assert list(model.parameters) == ["one.weight", "one.bias", "two.weight", "two.bias"]
    assert not model.compiled and h.engine.signatures()[0].orders.reverse == -1
    ran.clear()
    x, v, t, weight = real(2, 3), real(2, 2), real(2, 3), real(4, 3)
    a, net = x.clone().requires_grad_(), Net()
    y = net(a)
    expected = grad(y, [a, net.one.weight], v, create_graph=True)

    reply = h("evaluate", "f", {"x": x})
    close(reply.outputs["output"], y.detach())
    reply = h("vjp", "f", {"x": x}, wrt=["x"], cotangents={"output": v})
    close(reply.outputs["output"], y.detach())
    close(reply.grads["x"], expected[0].detach())
    reply = h("vjp", "f", {"x": x}, wrt=["param:one.weight"], cotangents={"output": v})
    close(reply.grads["param:one.weight"], expected[1].detach())
    reply = h("vjp", "f", {"x": x}, wrt=["x"], loss="mse_loss", targets={"target": v})
    close(reply.grads["x"], grad(((y - v) ** 2).mean(), a, retain_graph=True)[0])
    everything = frozenset({"input:x", *(f"param:{name}" for name in model.parameters)})
    assert ran == [frozenset(), {"input:x"}, everything, {"input:x"}]

    ran.clear()
    reply = h("hvp", "f", {"x": x}, wrt=["x"], cotangents={"output": v}, tangents={"x": t})
    close(reply.hvps["x"], grad(expected[0], a, t)[0])
    reply = h("vjp", "f", {"x": x}, wrt=["x"], cotangents={"output": v}, parameters={"one.weight": weight})
    b = x.clone().requires_grad_()
    close(reply.grads["x"], grad(torch.func.functional_call(Net(), {"one.weight": weight}, (b,)), b, v)[0])
    h("jvp", "f", {"x": x}, wrt=["x"], tangents={"x": t})
    h("vjp", "f", {"x": x}, wrt=["x"], cotangents={"output": v}, train=True)
    h("vjp", "f", {"x": x}, wrt=["x"], cotangents={"output": torch.stack([v, v])}, batched=True)
    three = real(3, 3)
    close(h("evaluate", "f", {"x": three}).outputs["output"], net(three).detach())
    assert not ran
    # And nothing of that has changed what the plan sees.
    close(h("vjp", "f", {"x": x}, wrt=["x"], cotangents={"output": v}).grads["x"], expected[0].detach())
    assert ran == [{"input:x"}] and model.plan.startswith("compiled")


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise RuntimeError("no backward today")


def failing(x: Tensor) -> Tensor:
    raise RuntimeError("no forward today")


def planned(model: HostedModel, code: Callable[..., Any], *outputs: str) -> None:
    """Gives a model a plan that was never held against anything."""
    model.plans = Plan(graphs=False)
    x = frozenset({("x", torch.Size([2, 3]), F64)})
    every = frozenset(outputs or ("output",))
    model.plans.add(x, Variant(code, frozenset({"input:x"}), {"": every, "input:x": every}))


class Penalised(torch.autograd.Function):
    """Its backward makes something of a cotangent of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.as_tensor(g + 0.1 * ctx.saved_tensors[0])


def penalised(x: Tensor) -> Any:
    return {"y": x.sin(), "aux": Penalised.apply(x).sum(1)}


def check_penalised(h: Host, ran: list[frozenset[str]]) -> None:
    """Calls that pull both outputs may be computed by a plan, and no others."""
    x, v, u = real(2, 3), real(2, 3), real(2)
    a = x.clone().requires_grad_()
    outputs = penalised(a)
    y, aux = outputs["y"], outputs["aux"]
    ran.clear()
    reply = h("vjp", "f", {"x": x}, wrt=["x"], cotangents={"y": v})
    close(reply.grads["x"], grad(y, a, v, retain_graph=True)[0])
    reply = h("vjp", "f", {"x": x}, wrt=["x"], loss="mse_loss", bindings={"input": "y"}, targets={"target": v})
    close(reply.grads["x"], grad(((y - v) ** 2).mean(), a, retain_graph=True)[0])
    assert not ran
    reply = h("vjp", "f", {"x": x}, wrt=["x"], cotangents={"y": v, "aux": u})
    close(reply.grads["x"], grad([y, aux], a, [v, u])[0])
    assert len(ran) == 1


def test_a_plan_is_for_gradients_of_all_that_it_returns(ran: list[frozenset[str]]) -> None:
    h, model = host(penalised, options=Options(), gate=OWN)
    # As compiled code does: what is not pulled is pulled by zero.
    planned(model, lambda x: {key: out + 0 for key, out in penalised(x).items()}, "y", "aux")
    check_penalised(h, ran)


def whose(x: Tensor, y: Tensor) -> Tensor:
    return x.sin() * (2.0 if y.requires_grad else 1.0) + y


class Whose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * (2.0 if x.requires_grad else 1.0) + x


@pytest.mark.parametrize(("code", "kind"), [(whose, "function"), (Whose, "factory")])
def test_a_plan_of_code_that_looks_at_what_requires_grad(code: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pullback_server.engine.warming.compiled", lambda code, graphs: code)
    names = ["x", "y"] if code is whose else ["x"]
    _, model = host(code, 2, kind=kind, inputs=dict.fromkeys(names, DECLARED["x"]))
    assert model.plan.startswith("refused: what it computes depends on what requires grad: output"), model.plan


def test_plans_of_several_inputs_of_which_outputs_depend_on_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pullback_server.engine.warming.compiled", lambda code, graphs: code)
    _, model = host(heads, 2, inputs={"x": DECLARED["x"], "z": DECLARED["x"]})
    assert model.plans is not None, model.plan


@pytest.mark.parametrize("code", [failing, Raises.apply], ids=["forward", "backward"])
def test_a_plan_that_raises_is_dropped(code: Any, caplog: pytest.LogCaptureFixture) -> None:
    h, model = host(lambda x: x.sin(), options=Options())
    planned(model, code)
    x, v = real(2, 3), real(2, 3)
    with caplog.at_level(logging.WARNING):
        close(h("vjp", "f", {"x": x}, wrt=["x"], cotangents={"output": v}).grads["x"], v * x.cos())
    assert model.plans is None and "today" in model.plan
    assert "its compiled plan is dropped" in caplog.text


def test_a_plan_is_not_dropped_for_what_the_model_raises_itself() -> None:
    h, model = host(failing, options=Options())
    planned(model, failing)
    for _ in range(2):
        with refused(Reason.MODEL_ERROR, "no forward today"):
            h("vjp", "f", {"x": real(2, 3)}, wrt=["x"], cotangents={"output": real(2, 3)})
    assert model.plans is not None and not model.plans.suspect


def test_what_a_cuda_graph_returns_outlives_its_next_run() -> None:
    h, model = host(lambda x: x.sin(), options=Options())
    memory, found = torch.empty(2, 3, dtype=F64), torch.empty(2, 3, dtype=F64)

    class Static(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return memory.copy_(x.sin()).view_as(memory)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return found.copy_(g * x.cos())

    planned(model, Static.apply)
    assert model.plans is not None
    model.plans.graphs = True
    from tests.unit.engine_jobs import make_job

    x, v = real(2, 3), real(2, 3)
    job, tensors = make_job("vjp", "f", {"x": x}, wrt=["x"], cotangents={"output": v})
    result = h.engine.run(job, tensors)
    memory.zero_()
    found.zero_()
    assert len(result.tensors) == 2 and all(tensor.count_nonzero() == 6 for tensor in result.tensors)


def draws(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


def overwrites(x: Tensor) -> Tensor:
    return x.mul_(2)


def hooks(x: Tensor) -> Tensor:
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda g: 2 * g)
    return y


def branches(x: Tensor) -> Tensor:
    # Each row by itself, but the compiler cannot know.
    if (x.abs() >= 0).any():
        return x.sin()
    return x.cos()


@pytest.mark.parametrize(
    ("code", "more", "why"),
    [
        (draws, {}, "random numbers"),
        (overwrites, {}, "writes into its inputs"),
        (hooks, {}, "hooks"),
        (branches, {}, "Data-dependent branching"),
        (branches, {"inputs": {}}, "not every input declares its shape"),
        (draws, {"batch_axis": None}, "no batch_axis"),
        (draws, {"inputs": {"x": spec("float64", [7, 3])}}, "an extent of 7, not of 2"),
    ],
)
def test_a_model_without_a_plan_is_served(code: Any, more: Any, why: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        h, model = host(code, 2, **({"gate": OWN} | more))
    assert model.plans is None and model.plan.startswith("refused: ") and why in model.plan, model.plan
    assert "its compiled plan is refused" in caplog.text
    name = next(iter(model.binding.names))
    h("vjp", "f", {name: real(7, 3)}, wrt=[name], cotangents={"output": real(7, 3)})


def test_not_asked_for() -> None:
    assert host(branches, options=Options())[1].plan == ""


def test_without_a_compiler_a_model_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    with inductor.patch({"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}):
        h, model = host(lambda x: x.tan(), 2)
    assert "no-such-compiler" in model.plan and model.plan.startswith("refused: ")
    x = real(2, 3)
    close(h("evaluate", "f", {"x": x}).outputs["output"], x.tan())


def test_a_plan_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(code: Callable[..., Any], graphs: bool) -> Callable[..., Any]:
        return lambda x: x.sin() + (x - x.detach()) * 0.25

    monkeypatch.setattr("pullback_server.engine.warming.compiled", wrong)
    _, model = host(lambda x: x.sin(), 2)
    assert model.plan.startswith("refused: gradient of 'input:x' differs by 0."), model.plan
    assert model.plan.endswith("from eager's")


# Slow: real compilations of what compilers have got wrong.


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -0.5 * g


class Rounds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def heads(x: Tensor, z: Tensor) -> Any:
    return {"a": x.sin() * 2, "b": (z * 2).exp(), "c": x.argmax(1)}


@pytest.mark.slow
@pytest.mark.parametrize("function", [Reversed, Rounds])
def test_a_backward_of_ones_own_is_right_or_the_plan_is_refused(function: Any, ran: list[frozenset[str]]) -> None:
    def code(x: Tensor) -> Any:
        return function.apply(x.sin() * 2).exp()

    h, model = host(code, 2, gate=OWN)
    ran.clear()
    x, v = real(2, 3), real(2, 3)
    a = x.clone().requires_grad_()
    found = h("vjp", "f", {"x": x}, wrt=["x"], cotangents={"output": v}).grads["x"]
    close(found, grad(code(a), a, v)[0])
    assert bool(ran) == (model.plans is not None)


@pytest.mark.slow
def test_what_does_not_depend_on_an_input_is_told_from_what_is_zero(ran: list[frozenset[str]]) -> None:
    h, model = host(heads, 2, inputs={"x": DECLARED["x"], "z": DECLARED["x"]})
    assert model.plans is not None, model.plan
    ran.clear()
    inputs, v = {"x": real(2, 3), "z": real(2, 3)}, real(2, 3)
    with refused(Reason.UNUSED_INPUT):
        h("vjp", "f", inputs, wrt=["x"], cotangents={"b": v})
    assert not ran
    close(h("vjp", "f", inputs, wrt=["x"], cotangents={"a": v, "b": v}).grads["x"], 2 * v * inputs["x"].cos())
    assert len(ran) == 1


@pytest.mark.slow
def test_an_output_that_is_not_pulled_is_not_pulled_by_zero(ran: list[frozenset[str]]) -> None:
    h, model = host(penalised, 2, gate=OWN)
    assert model.plans is not None, model.plan
    check_penalised(h, ran)


@pytest.mark.slow
def test_a_plan_with_the_other_options(ran: list[frozenset[str]]) -> None:
    chosen = options(2, autocast="bfloat16", checkpoint=("one",))
    declared = {"x": spec("float32", ["b", 3])}
    h, model = host(lambda: Net(torch.float32), 2, kind="factory", inputs=declared, options=chosen)
    assert model.plans is not None, model.plan
    ran.clear()
    x, net = torch.randn(2, 3), Net(torch.float32)
    reply = h("vjp", "f", {"x": x}, wrt=["x"], cotangents={"output": torch.ones(2, 2, dtype=torch.bfloat16)})
    assert len(ran) == 1
    a = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(a)
    close(reply.grads["x"], grad(y, a, torch.ones_like(y))[0], 2e-2)


@pytest.mark.slow
def test_sessions_beside_a_plan(ran: list[frozenset[str]]) -> None:
    s = Session(factory(Net, inputs=DECLARED, batch_axis=0, options=options(2)))
    assert s.engine.find("f", "").plans is not None
    ran.clear()
    value = real(2, 3)
    x = s.leaf(value)
    g = s.grad(s.op("sum", s.op("square", s.model("f", [x]))), x, create_graph=True)
    second = s.get(s.grad(s.op("sum", g), x))
    a = value.clone().requires_grad_()
    (e,) = grad(Net()(a).square().sum(), a, create_graph=True)
    close(second, grad(e.sum(), a)[0])
    assert not ran


@pytest.mark.slow
def test_integers_and_extents_that_are_free() -> None:
    def embedding() -> nn.Module:
        return nn.Embedding(10, 4, dtype=F64)

    declared = {"input": spec("int64", ["b", "length"], low=0, high=9)}
    h, model = host(embedding, 2, kind="factory", inputs=declared)
    assert model.plan.startswith("compiled for rows 2 (length = 2) in "), model.plan
    reply = h(
        "vjp",
        "f",
        {"input": torch.tensor([[1, 2], [2, 3]])},
        wrt=["param:weight"],
        loss=None,
        cotangents={"output": torch.ones(2, 2, 4, dtype=F64)},
    )
    close(reply.grads["param:weight"].sum(), torch.tensor(16.0, dtype=F64))  # type: ignore[union-attr]
