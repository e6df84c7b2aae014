"""Models in a session: their parameters, modes and state, and graphs that run them again much later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.unit.tape_jobs import F64, ZOO, Session, close, factory, function, real, refused
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from pullback_server import spec
from pullback_wire import Reason

Tensor = torch.Tensor
grad = torch.autograd.grad


def weights(s: Session, name: str = "f") -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in s.module(name).state_dict().items()}


class Net(nn.Module):
    """A user's own class; `again`: its block runs again in the backward."""

    def __init__(self, again: bool = False, dropout: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.block = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(dropout)).double()
        self.head = nn.Linear(8, 2).double()
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        hidden: Any = checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x)
        return torch.as_tensor(self.head(hidden))


@pytest.mark.parametrize("again", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("given", [False, True], ids=["hosted", "given"])
def test_a_held_graph_sees_what_its_forward_saw(again: bool, train: bool, given: bool) -> None:
    s = Session(factory(lambda: Net(again)))
    before = weights(s)
    value, v = real(4, 3), real(4, 2)
    local = Net().train(train)
    names = [name for name, _ in local.named_parameters()]
    given_values = {name: torch.randn_like(p) for name, p in local.named_parameters()} if given else {}
    x = s.leaf(value)
    handles = {name: s.leaf(tensor) for name, tensor in given_values.items()}
    y = s.model("f", [x], parameters=handles, train=train, seed=7)
    # Other traffic, in other modes and with other weights.
    for other in range(3):
        z = s.leaf(real(4, 3))
        own = {name: s.leaf(torch.randn_like(local.get_parameter(name))) for name in names} if other else None
        s.grad(s.model("f", [z], parameters=own, train=bool(other % 2), seed=other), z, [v])
    wanted = [x, *handles.values()]
    found = s.grads(y, wanted, [v], create_graph=True)
    a = value.clone().requires_grad_()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given_values.items()}
    torch.manual_seed(7)
    out = functional_call(local, leaves, (a,))
    expected = grad(out, [a, *leaves.values()], v, create_graph=True)
    close(s.get(y), out.detach())
    for handle, tensor in zip(found, expected, strict=True):
        close(s.get(handle), tensor.detach())
    if expected[0].requires_grad:
        penalty = s.op("sum", s.op("square", found[0]))
        close(s.get(s.grad(penalty, x)), grad(expected[0].square().sum(), a)[0])
    after = weights(s)
    assert all(torch.equal(before[name], after[name]) for name in before)


class Calls(torch.autograd.Function):
    """Keeps the module and runs it anew in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return torch.as_tensor(module(x))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (found,) = grad(ctx.module(leaf), leaf, g)
        return found, None


class Recomputing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(Calls.apply(x, self.inner))


def test_a_function_that_runs_a_module_in_its_backward() -> None:
    s = Session(factory(Recomputing))
    value, v = real(2, 3), real(2, 3)
    x = s.leaf(value)
    names = ["inner.0.weight", "inner.0.bias"]
    sets = [{"inner.0.weight": real(3, 3), "inner.0.bias": real(3)} for _ in range(3)]
    ys = [s.model("f", [x], parameters={name: s.put(own[name]) for name in names}) for own in sets]
    ys.append(s.model("f", [x]))
    for y, own in zip(ys, [*sets, {}], strict=True):
        a = value.clone().requires_grad_()
        module = Recomputing()
        module.load_state_dict(own, strict=False)
        expected = grad(module(a), a, v)[0]
        close(s.get(s.grad(y, x, [v])), expected)


def test_fast_weights_twice_through_one_module() -> None:
    s = Session(ZOO["small"])
    local = ZOO["small"].target()
    names = [name for name, _ in local.named_parameters()]
    value, target = real(5, 3), real(5, 2)
    first = s.parameters("small", *names)
    held = list(first)
    mine = first_mine = [p.detach().clone().requires_grad_() for p in local.parameters()]
    x = s.put(value)
    for _ in range(2):
        y = s.model("small", [x], parameters=dict(zip(names, held, strict=True)))
        loss = s.loss("mse_loss", [y], {"target": target})
        steps = s.grads(loss, held, create_graph=True)
        held = [s.op("sub", w, s.op("mul", named={"input": g}, other=0.1)) for w, g in zip(held, steps, strict=True)]
        out = functional_call(local, dict(zip(names, mine, strict=True)), (value,))
        derived = grad(((out - target) ** 2).mean(), mine, create_graph=True)
        mine = [w - 0.1 * g for w, g in zip(mine, derived, strict=True)]
    y = s.model("small", [x], parameters=dict(zip(names, held, strict=True)))
    found = s.grads(s.loss("mse_loss", [y], {"target": target}), first)
    out = functional_call(local, dict(zip(names, mine, strict=True)), (value,))
    for handle, expected in zip(found, grad(((out - target) ** 2).mean(), first_mine), strict=True):
        close(s.get(handle), expected)


def test_training_by_in_place_steps_lets_the_loss_fall_and_the_hosted_weights_be() -> None:
    s = Session(ZOO["small"])
    before = weights(s, "small")
    names = list(before)
    value, target = real(8, 3), real(8, 2)
    held = s.parameters("small", *names)
    losses = []
    for _ in range(20):
        y = s.model("small", [value], parameters=dict(zip(names, held, strict=True)), train=True)
        loss = s.loss("mse_loss", [y], {"target": target})
        losses.append(float(s.get(loss)))
        steps = s.grads(loss, held)
        for w, g in zip(held, steps, strict=True):
            s.in_place("sub_", w, s.op("mul", named={"input": g}, other=0.1), no_grad=True)
        s.release(y, loss, *steps)
    assert losses[-1] < 0.8 * losses[0]
    after = weights(s, "small")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_output_that_is_a_hosted_parameter_is_not_the_hosted_parameter() -> None:
    class Shows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, dtype=F64))
            self.register_buffer("mean", torch.ones(3, dtype=F64))

        def forward(self, x: Tensor) -> Any:
            return x + self.weight, self.weight, self.get_buffer("mean")[1:]

    s = Session(factory(Shows))
    _, weight, mean = s.model("f", [real(3)], outputs=3)
    for handle in (weight, mean):
        s.in_place("zero_", handle)
    assert all(bool((value == 1).all()) for value in weights(s).values())


def test_tied_parameters() -> None:
    s = Session(ZOO["tied"])
    hosted = s.engine.find("tied", "")
    assert hosted.aliases
    (name,) = set(hosted.aliases.values())
    alias = next(iter(hosted.aliases))
    value = real(2, 3)
    with refused(Reason.BAD_NAME, name):
        s.model("tied", [value], parameters={alias: hosted.parameters[name].detach()})
    w = s.leaf(torch.randn_like(hosted.parameters[name]))
    y = s.model("tied", [value], parameters={name: w})
    leaf = s.get(w).requires_grad_()
    out = functional_call(ZOO["tied"].target(), {name: leaf}, (value,))
    v = torch.randn_like(out)
    close(s.get(s.grad(y, w, [v])), grad(out, leaf, v)[0])


class Shaped(nn.Module):
    def __init__(self, again: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = parametrizations.orthogonal(nn.Linear(3, 3, bias=False)).double()
        self.rnn = nn.GRU(3, 4, batch_first=True).double()
        self.again = again

    def run(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.rnn(self.layer(x))[0])

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x, use_reentrant=False) if self.again else self.run(x)  # type: ignore[return-value]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_parametrizations_and_recurrent_weights(again: bool, train: bool) -> None:
    s = Session(factory(lambda: Shaped(again)))
    local = Shaped(False).train(train)
    own = {name: torch.randn_like(p) for name, p in local.named_parameters()}
    value, v = real(2, 5, 3), real(2, 5, 4)
    x = s.leaf(value)
    handles = {name: s.leaf(tensor) for name, tensor in own.items()}
    y = s.model("f", [x], parameters=handles, train=train)
    s.model("f", [x], parameters={name: torch.zeros_like(tensor) for name, tensor in own.items()})
    found = s.grads(y, [x, *handles.values()], [v])
    a = value.clone().requires_grad_()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in own.items()}
    expected = grad(functional_call(local, leaves, (a,)), [a, *leaves.values()], v)
    for handle, tensor in zip(found, expected, strict=True):
        close(s.get(handle), tensor)


def test_a_module_reached_through_a_closure() -> None:
    class Captures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = nn.Linear(3, 3).double()
            self.inner = inner
            self.code = lambda x: inner(x)

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.code, x, use_reentrant=False)

    s = Session(factory(Captures))
    x = s.leaf(real(2, 3))
    w = s.leaf(real(3, 3))
    y = s.model("f", [x])
    weight = s.module().inner.weight.detach()
    close(s.get(s.grad(y, x, [torch.ones(2, 3, dtype=F64)])), torch.ones(2, 3, dtype=F64) @ weight)
    with refused(Reason.UNSUPPORTED_BY_MODEL, "closure"):
        s.model("f", [x], parameters={"inner.weight": w})


def test_a_module_that_cannot_be_copied() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3).double()
            self.source = (number for number in range(3))

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.layer, x, use_reentrant=False)

    s = Session(factory(Stubborn))
    x = s.leaf(real(2, 3))
    s.model("f", [x])
    with refused(Reason.UNSUPPORTED_BY_MODEL, "copied", "generator"):
        s.model("f", [x], train=True)


def test_a_model_that_writes_into_its_input() -> None:
    s = Session(ZOO["in_place"], factory(lambda: nn.Sequential(nn.ReLU(inplace=True)).double(), "relu"))
    for name in ("in_place", "relu"):
        value = real(4)
        for grads in (False, True):
            x = s.put(value, grads)
            y = s.model(name, [x])
            close(s.get(x), value)
            if grads:
                s.grad(y, x, [real(4)])


def test_a_model_that_writes_into_its_input_only_now_and_then() -> None:
    s = Session(function(lambda x: x.mul_(2) if x.sum() > 0 else x + 1))
    s.model("f", [torch.full((2,), -1.0)])
    x = s.put(torch.ones(2))
    view = s.op("reshape", x, shape=[2, 1])
    with refused(Reason.MODIFIED_IN_PLACE, "'x'", "copies"):
        s.model("f", [x])
    for lost in (x, view):
        with refused(Reason.DEPENDENCY_FAILED, "MODIFIED_IN_PLACE"):
            s.get(lost)
    x = s.put(torch.ones(2))
    close(s.get(s.model("f", [x])), torch.full((2,), 2.0))
    close(s.get(x), torch.ones(2))


def test_a_model_that_asks_its_input_to_require_grad() -> None:
    s = Session(ZOO["force"])
    x = s.put(real(4, 3))
    s.model("force", [x], outputs=2)
    s.run_get = s.get(x)  # type: ignore[attr-defined]
    assert not s.records[0].requires_grad


def test_a_model_that_differentiates_by_its_own_parameters() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return grad(self.layer(x).tanh().sum(), self.layer.weight, create_graph=True)[0] + x.sum()

    s = Session(factory(Inside))
    value = real(2, 3)
    x = s.leaf(value)
    y = s.model("f", [x])
    a = value.clone().requires_grad_()
    out = Inside()(a)
    v = torch.randn_like(out)
    close(s.get(s.grad(y, x, [v])), grad(out, a, v)[0])
    assert not any(p.requires_grad for p in s.module().parameters())


def test_buffers_written_in_eval() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            self.get_buffer("count").add_(1)
            return x * self.get_buffer("count")

    s = Session(factory(Counts))
    x = s.leaf(torch.ones(2, dtype=F64))
    ys = [s.model("f", [x]) for _ in range(3)]
    for y in ys:
        close(s.get(s.grad(y, x, [torch.ones(2, dtype=F64)])), torch.ones(2, dtype=F64))
    assert float(s.module().count) == 0


def test_the_hooks_of_a_parameter_belong_to_its_gradient() -> None:
    def make() -> nn.Module:
        module = nn.Linear(2, 2, bias=False).double()
        module.weight.register_hook(lambda g: 3 * g)
        return module

    s = Session(factory(make))
    value, v = real(3, 2), real(3, 2)
    (w,) = s.parameters("f", "weight")
    other = s.leaf(real(2, 2))
    for handle in (w, other):
        y = s.model("f", [value], parameters={"weight": handle})
        close(s.get(s.grad(y, handle, [v])), 3 * v.T @ value)


def test_arguments_are_checked() -> None:
    s = Session(
        ZOO["small"], ZOO["mixed"], function(lambda i: i * 1, "ids", inputs={"i": spec("int64", ["n"], low=0, high=3)})
    )
    x = s.put(real(2, 3))
    with refused(Reason.MODEL_NOT_FOUND, "smal"):
        s.model("smal", [x])
    with refused(Reason.BAD_NAME, "y"):
        s.model("small", {"y": x})
    with refused(Reason.BAD_NAME, "input"):
        s.model("small", {})
    with refused(Reason.BAD_TENSOR, "float32", "float64"):
        s.model("small", [torch.zeros(2, 3)])
    with refused(Reason.BAD_TENSOR, "[2, 4]", "[batch, 3]"):
        s.model("small", [real(2, 4)])
    with refused(Reason.BAD_TENSOR, "[3]"):
        s.model("small", [real(3)])
    with refused(Reason.BAD_TENSOR, "n is 2 in 'x'"):
        s.model("mixed", {"x": real(2), "y": real(3)})
    with refused(Reason.BAD_NAME, "wat"):
        s.model("small", [x], parameters={"wat": real(2)})
    name = next(iter(s.engine.find("small", "").parameters))
    with refused(Reason.BAD_TENSOR, name):
        s.model("small", [x], parameters={name: real(1)})
    with refused(Reason.VALUE_OUT_OF_RANGE):
        s.model("ids", [torch.tensor([4])])
    with refused(Reason.BAD_NAME, "targets"):
        s.model("small", [x], targets={"target": x})
    with refused(Reason.BAD_NAME):
        s.parameters("small", "wat")


def test_a_model_with_a_loss_and_a_loss_on_handles() -> None:
    s = Session(ZOO["small"])
    value, target, weight = real(4, 3), real(4, 2), real(4)
    x, t = s.leaf(value), s.leaf(target)
    a, b = value.clone().requires_grad_(), target.clone().requires_grad_()
    out = ZOO["small"].target()(a)
    expected = grad(((out - b) ** 2).mean(), (a, b))
    whole = s.model("small", [x], loss="mse_loss", targets={"target": t})
    apart = s.loss("mse_loss", {"input": s.model("small", [x])}, {"target": t})
    both = s.loss("mse_loss", {"input": s.model("small", [x]), "target": t})
    for loss in (whole, apart, both):
        for handle, tensor in zip(s.grads(loss, [x, t]), expected, strict=True):
            close(s.get(handle), tensor)
    rows = s.loss("mse_loss", [s.model("small", [x])], {"target": t}, reduction="none")
    total = s.op("sum", s.op("mul", s.op("mean", rows, dim=1), weight))
    a = value.clone().requires_grad_()
    out = ZOO["small"].target()(a)
    close(s.get(s.grad(total, x)), grad((((out - target) ** 2).mean(1) * weight).sum(), a)[0])
    with refused(Reason.LOSS_NOT_FOUND, "mse_loss"):
        s.loss("mse_los", [x], {"target": t})
    with refused(Reason.BAD_NAME, "target"):
        s.loss("mse_loss", [x])
    with refused(Reason.BAD_TENSOR):
        s.loss("mse_loss", [x], {"target": t})


def test_what_models_raise() -> None:
    s = Session(ZOO["raises"], ZOO["leaves"], ZOO["a_number"], function(lambda x: _Raises.apply(x), "late"))
    x = s.leaf(real(2))
    for name in ("raises", "leaves", "a_number"):
        with refused(Reason.MODEL_ERROR, name):
            s.model(name, [x])
    y = s.model("late", [x])
    with refused(Reason.MODEL_ERROR, "late", "too late"):
        s.grad(y, x, [real(2)])
    close(s.get(s.op("neg", x)), -s.get(x))


class _Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise KeyError("too late")


def test_seeds_and_process_state() -> None:
    def noisy(x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        return x * torch.rand(3)

    s = Session(function(lambda x: x * torch.rand(3, dtype=F64), "noise"), function(noisy, "rude"))
    x = s.leaf(torch.ones(3, dtype=F64))
    one, two, three = (s.get(s.model("noise", [x], seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three)
    close(s.get(s.grad(s.model("noise", [x], seed=1), x, [torch.ones(3, dtype=F64)])), one)
    s.model("rude", [x])
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    s.grad(s.op("sum", x), x)


def test_a_reentrant_checkpoint_is_refused_with_what_to_do() -> None:
    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.layer, x, use_reentrant=True)

    s = Session(factory(Old))
    x = s.leaf(real(2, 3))
    y = s.model("f", [x])
    with refused(Reason.UNSUPPORTED_BY_MODEL, "use_reentrant=False"):
        s.grad(y, x, [real(2, 3)])


def test_given_parameters_and_modes_in_any_order_leave_no_trace_in_the_module() -> None:
    s = Session(factory(lambda: Net(True)))
    module = s.module()
    state = weights(s)
    x = s.leaf(real(4, 3))
    for train in (True, False, True):
        for given in (None, {"head.weight": s.leaf(real(2, 8))}):
            s.model("f", [x], train=train, parameters=given, seed=1)
            with refused(Reason.MODEL_ERROR):
                s.model("f", [s.op("reshape", x, shape=[3, 4])], train=train, parameters=given)
    assert not any(child.training for child in module.modules())
    assert all(type(p) is nn.Parameter and not p.requires_grad for p in module.parameters())
    assert all(torch.equal(state[name], value) for name, value in weights(s).items())
    assert not nn.modules.module._global_forward_pre_hooks


def test_weight_norm_by_hooks() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 2).double()), nn.Tanh())

    s = Session(factory(make))
    value, v = real(4, 3), real(4, 2)
    x = s.leaf(value)
    own = {name: torch.randn_like(p) for name, p in make().named_parameters()}
    handles = {name: s.leaf(tensor) for name, tensor in own.items()}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in own.items()}
    expected = grad(functional_call(make(), leaves, (value,)), list(leaves.values()), v)
    for _ in range(2):
        y = s.model("f", [x], parameters=handles)
        for handle, tensor in zip(s.grads(y, list(handles.values()), [v]), expected, strict=True):
            close(s.get(handle), tensor)
    close(s.get(s.model("f", [x])), make()(value).detach())
