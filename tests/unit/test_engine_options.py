"""Models that run under autocast, or compute activations again: everything is what torch gives locally."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.unit.engine_jobs import Host
from tests.unit.tape_jobs import F64, Session, close, factory, function, real, refused
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pullback_server import Gate, spec
from pullback_server.hosting import Registration
from pullback_server.hosting.loading import LoadError
from pullback_server.hosting.options import Options
from pullback_wire import Reason

Tensor = torch.Tensor
grad = torch.autograd.grad
AUTOCAST = Options(autocast="bfloat16")
AGAIN = Options(checkpoint=("block*",))


def narrow() -> Any:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


class Net(nn.Module):
    """Two blocks; with dropout, batch norm and spectral norm, whose forwards must not happen twice."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block0 = nn.Sequential(nn.Linear(3, 4, dtype=dtype), nn.BatchNorm1d(4, dtype=dtype), nn.Tanh())
        self.drop = nn.Dropout(0.5)
        self.block1 = nn.Sequential(
            parametrizations.spectral_norm(nn.Linear(4, 4, dtype=dtype)), nn.Dropout(0.5), nn.Sigmoid()
        )
        self.last = nn.Linear(4, 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.last(self.block1(self.drop(self.block0(x)))))


class Plain(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block0, self.block1 = nn.Linear(3, 4, dtype=dtype), nn.Linear(4, 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.block1(self.block0(x).tanh()).float().exp())


def host(target: Callable[..., Any], options: Options, **more: Any) -> Host:
    return Host(Registration("f", target, options=options, **more))


# Autocast.


def locally(x: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    model, x = Plain(), x.clone().requires_grad_()
    with narrow():
        y = model(x)
    found = grad(y, [x, model.block0.weight], v, create_graph=True)
    return y, list(found), grad(found[0], x, t)[0]


def test_autocast_of_first_and_second_order() -> None:
    h = host(Plain, AUTOCAST, inputs={"x": spec("float32", ["b", 3])})
    x, t = torch.randn(5, 3), torch.randn(5, 3)
    v = torch.randn(5, 2)
    y, gradients, second = locally(x, v, t)
    assert y.dtype == torch.float32
    assert h.engine.signatures()[0].orders.reverse == -1
    reply = h("vjp", "f", {"x": x}, wrt=["x", "param:block0.weight"], cotangents={"output": v})
    assert torch.equal(reply.outputs["output"], y)
    for found, expected in zip(reply.grads.values(), gradients, strict=True):
        assert found is not None and torch.equal(found, expected)
    reply = h("hvp", "f", {"x": x}, wrt=["x"], cotangents={"output": v}, tangents={"x": t})
    assert reply.hvps["x"] is not None and torch.equal(reply.hvps["x"], second)
    reply = h("jvp", "f", {"x": x}, wrt=["x"], tangents={"x": t})
    pushed = reply.grads["output"]
    assert pushed is not None
    close((pushed * v).sum(), (gradients[0] * t).sum(), 5e-2)
    # Nothing is left behind.
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_with_given_parameters_and_rows_of_cotangents() -> None:
    h = host(Plain, AUTOCAST)
    x, weight, v = torch.randn(5, 3), torch.randn(4, 3), torch.randn(2, 5, 2)
    reply = h(
        "vjp",
        "f",
        {"x": x},
        wrt=["param:block0.weight"],
        parameters={"block0.weight": weight},
        cotangents={"output": v},
        batched=True,
    )
    w = weight.clone().requires_grad_()
    with narrow():
        y = torch.func.functional_call(Plain(), {"block0.weight": w}, (x,))
    for row in range(2):
        close(reply.grads["param:block0.weight"][row], grad(y, w, v[row], retain_graph=True)[0], 1e-2)  # type: ignore[index]


def test_a_loss_comes_after_autocast() -> None:
    h = host(lambda x, w: x @ w, AUTOCAST)
    x, w, target = torch.randn(4, 3), torch.randn(3, 2), torch.randn(4, 2)
    reply = h("vjp", "f", {"x": x, "w": w}, wrt=["x"], loss="mse_loss", targets={"target": target})
    a = x.clone().requires_grad_()
    with narrow():
        y = a @ w
    assert y.dtype == torch.bfloat16
    loss = F.mse_loss(y, target)
    assert torch.equal(reply.outputs["loss"], loss)
    assert reply.grads["x"] is not None and torch.equal(reply.grads["x"], grad(loss, a)[0])


def test_autocast_leaves_double_precision_as_torch_does() -> None:
    h = host(lambda x, w: x @ w, AUTOCAST)
    x, w = real(4, 3), real(3, 2)
    assert torch.equal(h("evaluate", "f", {"x": x, "w": w}).outputs["output"], x @ w)


def test_autocast_in_a_session() -> None:
    s = Session(factory(Plain, options=AUTOCAST))
    value, v, t = torch.randn(5, 3), torch.randn(5, 2), torch.randn(5, 3)
    y, gradients, second = locally(value, v, t)
    x = s.leaf(value)
    out = s.model("f", [x])
    g = s.grad(out, x, [v], create_graph=True)
    assert torch.equal(s.get(out), y) and torch.equal(s.get(g), gradients[0])
    assert torch.equal(s.get(s.grad(g, x, [t])), second)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g


def test_a_function_of_ones_own_is_probed_without_autocast() -> None:
    def code(x: Tensor) -> Any:
        return Doubled.apply(x @ torch.ones(3, 3, dtype=x.dtype))

    h = host(code, AUTOCAST, inputs={"x": spec("float32", ["b", 3])})
    assert h.engine.signatures()[0].orders.reverse == 2, h.engine.signatures()[0].orders
    x, v = torch.randn(2, 3), torch.randn(2, 3).bfloat16()
    reply = h("vjp", "f", {"x": x}, wrt=["x"], cotangents={"output": v})
    a = x.clone().requires_grad_()
    with narrow():
        y = code(a)
    assert reply.grads["x"] is not None and torch.equal(reply.grads["x"], grad(y, a, v)[0])


# Checkpoints.


@pytest.mark.parametrize("train", [False, True])
def test_a_checkpointed_model_computes_what_it_would_otherwise(train: bool) -> None:
    declared = {"x": spec("float64", ["b", 3])}
    plain, again = host(Net, Options(), inputs=declared), host(Net, AGAIN, inputs=declared)
    assert again.engine.signatures()[0].orders == plain.engine.signatures()[0].orders
    assert again.engine.signatures()[0].parameters == plain.engine.signatures()[0].parameters
    x, v, t = real(5, 3), real(5, 2), real(5, 3)
    mode = {"train": train, "seed": 7}
    wrt = ["x", "param:block0.0.weight", "param:block1.0.parametrizations.weight.original"]
    given = {"block0.0.weight": real(4, 3)}
    for parameters in ({}, given):
        for kind, more in (
            ("vjp", {"cotangents": {"output": v}}),
            ("hvp", {"cotangents": {"output": v}, "tangents": {"x": t}}),
        ):
            one, two = (
                h(kind, "f", {"x": x}, wrt=wrt, parameters=parameters, allow_unused=True, **mode, **more)
                for h in (plain, again)
            )
            close(two.outputs, one.outputs)
            close(two.grads, one.grads)
            close(two.hvps, one.hvps)
    one, two = (h("jvp", "f", {"x": x}, wrt=["x"], tangents={"x": t}, **mode) for h in (plain, again))
    close(two.grads, one.grads)
    one, two = (
        h("vjp", "f", {"x": x}, wrt=["x"], cotangents={"output": torch.stack([v, v.sin()])}, batched=True, **mode)
        for h in (plain, again)
    )
    close(two.grads, one.grads)


def test_a_checkpointed_module_of_torchs_own_has_every_order() -> None:
    def stock() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4, dtype=F64), nn.Tanh(), nn.Linear(4, 2, dtype=F64))

    h = host(stock, Options(checkpoint=("0", "1")), inputs={"input": spec("float64", ["b", 3])})
    assert h.engine.signatures()[0].orders.reverse == -1
    assert not h.engine.find("f", "").stock
    x, v, t = real(5, 3), real(5, 2), real(5, 3)
    reply = h("hvp", "f", {"input": x}, wrt=["input"], cotangents={"output": v}, tangents={"input": t})
    a = x.clone().requires_grad_()
    (g,) = grad(stock()(a), a, v, create_graph=True)
    close(reply.hvps["input"], grad(g, a, t)[0])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_checkpoints_in_a_session(train: bool, given: bool) -> None:
    value, weight = real(5, 3), real(4, 3)
    found = []
    for options in (Options(), AGAIN):
        s = Session(factory(Net, options=options))
        x, w = s.leaf(value), s.leaf(weight)
        parameters = {"block0.0.weight": w} if given else None
        y = s.model("f", [x], parameters=parameters, train=train, seed=3)
        # Another call in between: what the graph computes again must not be that one.
        s.model("f", [real(4, 3)], parameters={"block0.0.weight": real(4, 3)}, train=not train, seed=4)
        total = s.op("sum", s.op("square", y))
        leaves = [x, w] if given else [x]
        first = s.grads(total, leaves, create_graph=True)
        penalty = s.op("sum", s.op("square", first[0]))
        found.append([s.get(y), *map(s.get, first), *map(s.get, s.grads(penalty, leaves))])
    for one, two in zip(*found, strict=True):
        close(two, one)


def test_checkpoints_under_autocast_in_a_session() -> None:
    value, v = torch.randn(5, 3), torch.randn(5, 2)
    _, gradients, _ = locally(value, v, value)
    s = Session(factory(Plain, options=Options(autocast="bfloat16", checkpoint=("block0",))))
    x = s.leaf(value)
    assert torch.equal(s.get(s.grad(s.model("f", [x]), x, [v])), gradients[0])


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 64, dtype=F64), nn.Tanh(), nn.Linear(64, 64, dtype=F64), nn.Sigmoid())
            for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Alive(TorchDispatchMode):
    """What is made while it is on, and how much of that is still there."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, code: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = code(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self._made[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        return found

    @property
    def size(self) -> int:
        return sum(size for reference, size in self._made.values() if not reference.expired())


def test_fewer_activations_are_kept() -> None:
    kept = []
    for options in (Options(), Options(checkpoint=("layers.*",))):
        s = Session(factory(Deep, options=options))
        x = s.leaf(real(512, 64))
        for _ in range(2):  # The first call is watched, with copies.
            with Alive() as alive:
                y = s.model("f", [x])
            size = alive.size
            s.grad(s.op("sum", y), x)
        kept.append(size)
    one = 512 * 64 * 8
    # The input and what each layer returns; without checkpoints, what each has in between as well.
    assert kept[1] <= 5 * one < 9 * one <= kept[0], [size / one for size in kept]


class Counts(nn.Module):
    """Writes into a buffer in eval mode as well, and depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.ones((), dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return (x * self.count).sin()


def test_a_buffer_that_is_written_is_computed_with_as_it_was() -> None:
    def counting() -> nn.Module:
        return nn.Sequential(Counts())

    options = Options(checkpoint=("0",))
    value = real(3)
    expected = 2 * (2 * value).cos()
    h = host(counting, options)
    close(h("vjp", "f", {"input": value}, wrt=["input"], cotangents={"output": value * 0 + 1}).grads["input"], expected)
    s = Session(factory(counting, options=options))
    x = s.leaf(value)
    close(s.get(s.grad(s.op("sum", s.model("f", [x])), x)), expected)


class Part(nn.Module):
    """Given its tensors in various ways; may write into them, or draw numbers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.inner = nn.Linear(3, 3, dtype=F64)

    def forward(self, h: Any = None, *, keyword: Any = None) -> Tensor:
        if isinstance(h, tuple):
            h = h[0]
        h = keyword if h is None else h
        if self.kind == "own":
            h = h.mul_(2)
        factor = 1.0
        if self.training:
            factor += random.random() if self.kind == "python" else float(np.random.rand())
        return (self.inner(h) * factor).sin().exp()


class Whole(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.block0, self.block1 = Part(kind), Part(kind)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.block0, self.block1):
            h = x * 2
            y = block(keyword=h) if self.kind == "keyword" else block((h, x)) if self.kind == "tuple" else block(h)
            if self.kind in ("keyword", "tuple", "argument"):
                # No backward needs it any more, but the block's forward would.
                h.add_(1)
            x = y + h
        return x


@pytest.mark.parametrize("kind", ["keyword", "tuple", "argument", "own"])
def test_a_checkpointed_module_whose_arguments_change(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    x, v, t = real(2, 3), real(2, 3), real(2, 3)
    model, a = Whole(kind).eval().requires_grad_(False), x.clone().requires_grad_()
    (g,) = grad(model(a), a, v, create_graph=True)
    h = host(lambda: Whole(kind), AGAIN, kind="factory")
    with caplog.at_level(logging.WARNING):
        reply = h("vjp", "f", {"x": x}, wrt=["x"], cotangents={"output": v})
    assert [record.message.partition(" is not")[0] for record in caplog.records] == [
        f"model 'f': its module 'block{index}'" for index in range(2)
    ]
    close(reply.grads["x"], g.detach())
    reply = h("hvp", "f", {"x": x}, wrt=["x"], cotangents={"output": v}, tangents={"x": t})
    close(reply.hvps["x"], grad(g, a, t)[0])
    s = Session(factory(lambda: Whole(kind), options=AGAIN))
    leaf = s.leaf(x)
    close(s.get(s.grad(s.model("f", [leaf]), leaf, [v])), g.detach())


def test_checkpointed_modules_that_work_in_place() -> None:
    def activations() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(3, 3, dtype=F64), nn.ELU(inplace=True)) for _ in range(7)]
        return nn.Sequential(*(layer for pair in layers for layer in pair))

    x, v = real(2, 3), real(2, 3)
    a = x.clone().requires_grad_()
    (expected,) = grad(activations()(a), a, v)
    # More of them than a call has attempts.
    options = Options(checkpoint=("*",))
    h = host(activations, options, inputs={"input": spec("float64", ["b", 3])})
    assert h.engine.signatures()[0].orders.reverse == -1
    close(h("vjp", "f", {"input": x}, wrt=["input"], cotangents={"output": v}).grads["input"], expected)
    s = Session(factory(activations, options=options))
    leaf = s.leaf(x)
    close(s.get(s.grad(s.model("f", [leaf]), leaf, [v])), expected)


@pytest.mark.parametrize("kind", ["python", "numpy"])
def test_a_checkpointed_module_draws_the_same_numbers_again(kind: str) -> None:
    x, v = real(2, 3), real(2, 3)
    found = []
    for options in (Options(), AGAIN):
        h = host(lambda: Whole(kind), options, kind="factory")
        reply = h(
            "vjp", "f", {"x": x}, wrt=["x", "param:block0.inner.weight"], cotangents={"output": v}, train=True, seed=5
        )
        s = Session(factory(lambda: Whole(kind), options=options))
        leaf = s.leaf(x)
        y = s.model("f", [leaf], train=True, seed=5)
        first = s.get(s.grad(y, leaf, [v], retain_graph=True))
        found.append([reply.outputs["output"], *reply.grads.values(), first, s.get(s.grad(y, leaf, [v]))])
    close(found[1], found[0])


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Scale()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return torch.as_tensor(self.block(x, scale=scale))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=F64))

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return (x * self.weight).sin() * scale.sin()


@pytest.mark.parametrize("what", ["scale", "weight"])
def test_what_a_caller_changes_behind_a_checkpoint(what: str) -> None:
    s = Session(factory(Scaled, options=AGAIN))
    value, factor, v = real(2, 3), real(2, 3), real(2, 3)
    # The first call gets copies. What a caller does has no consequences for others.
    for changed in (False, True, False):
        x, scale, weight = s.leaf(value), s.put(factor), s.put(torch.ones(3, dtype=F64))
        s.grad(s.model("f", [x, scale], parameters={"block.weight": weight}), x, [v])
        y = s.model("f", [x, scale], parameters={"block.weight": weight})
        if changed:
            s.in_place("add_", scale if what == "scale" else weight, torch.ones((), dtype=F64))
            with refused(Reason.MODIFIED_IN_PLACE, "changed in place after the forward"):
                s.grad(y, x, [v])
        else:
            close(s.get(s.grad(y, x, [v])), v * value.cos() * factor.sin())


class Rescaled(Scaled):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x * 2, scale * 2)


def test_what_a_checkpoint_keeps_is_counted() -> None:
    s = Session(factory(Rescaled, options=AGAIN))
    one = 500 * 3 * 8
    # The first call gets copies.
    for _ in range(2):
        x, scale = s.leaf(real(500, 3)), s.put(real(500, 3))
        held = s.retained
        y = s.model("f", [x, scale])
        kept = s.retained - held
        s.release(s.grad(y, x, [real(500, 3)]))
    # The output, and what the block was given, by position and as a keyword; and the state of a generator.
    assert 3 * one <= kept <= 3 * one + 8000, kept
    assert s.retained == held + one


# Copies of what an operator has built.


def test_hooks_on_the_parameters_of_a_module_that_was_built_already() -> None:
    model = nn.Linear(3, 2, dtype=F64)
    model.weight.register_hook(lambda g: g * 3)
    model.bias.requires_grad_(False)
    x, v, t = real(4, 3), real(4, 2), real(4, 3)
    gate = Gate(intended={"gradient": "a hook on its weight"})
    h = host(model, Options(), inputs={"input": spec("float64", ["b", 3])}, gate=gate)
    reply = h("vjp", "f", {"input": x}, wrt=["param:weight", "input"], cotangents={"output": v})
    close(reply.grads["param:weight"], 3 * v.T @ x)
    close(reply.grads["input"], v @ model.weight.detach())
    hosted = h.engine.find("f", "")
    assert hosted.hooked and hosted.natural == {"weight": True, "bias": False}
    (hook,) = (hosted.widened().parameters["weight"]._backward_hooks or {}).values()
    close(hook(t), 3 * t)


@pytest.mark.parametrize(
    ("glob", "said"),
    [
        ("blocks.*", "matches no module; it has 'block0', 'block1'"),
        ("nothing", "matches no module"),
    ],
)
def test_a_glob_that_matches_nothing(glob: str, said: str) -> None:
    with pytest.raises(LoadError, match=said):
        host(Plain, Options(checkpoint=(glob,)))


def test_what_cannot_be_checkpointed() -> None:
    with pytest.raises(LoadError, match=r"only a list of others; for those say 'layers\.\*'"):
        host(Deep, Options(checkpoint=("layers",)))
    with pytest.raises(LoadError, match="a function has none"):
        Session(function(lambda x: x, options=AGAIN))
