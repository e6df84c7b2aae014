"""RemoteModule: a hosted model inside a local torch network, against the same model run locally."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import zoo
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import pullback as pb
from pullback.torch import RemoteModule, _node
from pullback_server import Server, model, spec

F64 = torch.float64
ROOT = Path(__file__).parents[2]


class MyFunction(torch.autograd.Function):
    """x ** 2, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class SimpleNN(nn.Module):
    """10-5-1."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 5)
        self.fc2 = nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(torch.relu(self.fc1(x)))
        return out


@model("square")
def square(x: torch.Tensor) -> torch.Tensor:
    return x.pow(2)


@model("my_function")
def my_function(x: torch.Tensor) -> torch.Tensor:
    return MyFunction.apply(x)  # type: ignore[no-any-return, no-untyped-call]


@model("sinexp")
def sinexp(x: torch.Tensor) -> torch.Tensor:
    return x.sin() * x.exp()


@model("simple_nn", inputs={"x": spec("float64", ["batch", 10])})
def simple_nn() -> nn.Module:
    return zoo.seeded(SimpleNN).double()


@model("dropout")
def dropout() -> nn.Module:
    return nn.Dropout(0.5)


@model("single", inputs={"input": spec("float32", ["batch", 4])})
def single() -> nn.Module:
    return zoo.seeded(nn.Linear, 4, 4)


@model("norm", inputs={"input": spec("float64", ["batch", 3])})
def norm() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(3), nn.Tanh()).double()


LOCAL = [square, my_function, sinexp, simple_nn, dropout, single, norm]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(zoo, *LOCAL, threads=1) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[pb.Client]:
    with pb.connect(server.target) as client:
        yield client


@pytest.fixture
def remote(client: pb.Client) -> Callable[..., RemoteModule]:
    """RemoteModule of the model of that name, in eval mode as nothing else is said."""

    def make(name: str, *args: Any, **kwargs: Any) -> RemoteModule:
        return RemoteModule(client.model(name), *args, **kwargs).eval()

    return make


def randn(*shape: int, seed: int = 0, grad: bool = True, dtype: torch.dtype = F64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)


def live_handles(server: Server, module: RemoteModule, x: torch.Tensor) -> int:
    """Handles that the server holds, after what was released has been told to it."""
    gc.collect()
    with torch.no_grad():
        module(x)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as answer:
        found = re.search(r"^pullback_session_handles (\S+)", answer.read().decode(), re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


# ---- the snippets


def test_square(remote: Any) -> None:
    square = remote("square")
    x = randn(4)
    square(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=0, atol=0)
    x, v = randn(2, 2), randn(2, 2, seed=1, grad=False)
    square(x).backward(gradient=v)
    torch.testing.assert_close(x.grad, 2 * x.detach() * v, rtol=0, atol=0)
    (g,) = torch.autograd.grad(square(x).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    torch.testing.assert_close(h, torch.full_like(h, 2.0), rtol=0, atol=0)
    y = square(x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="retain_graph"):
        y.backward()
    y = square(x)
    with pytest.raises(RuntimeError, match=r"\[2\].*\[2, 2\]"):
        y.backward(gradient=torch.ones(2, dtype=F64))
    with pytest.raises(RuntimeError, match="does not require grad"):
        square(x.detach()).sum().backward()


def test_a_hosted_function_with_its_own_backward(remote: Any) -> None:
    x = randn(5)
    remote("my_function")(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_simple_nn_learns_as_a_local_one_does(remote: Any) -> None:
    nets = remote("simple_nn", parameters=True), simple_nn()
    assert list(nets[0].state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    x, target = randn(16, 10, grad=False), randn(16, 1, seed=1, grad=False)
    losses: list[list[float]] = []
    for net in nets:
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        losses.append([])
        for _ in range(5):
            optimiser.zero_grad()
            loss = nn.functional.mse_loss(net(x), target)
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0][-1] < losses[0][0]


def test_losses_and_weights_around_it(remote: Any) -> None:
    x, weights = randn(6, 3), torch.linspace(0.1, 1, 6, dtype=F64)
    target = torch.tensor([0, 1, 1, 0, 1, 0])
    found = []
    for net in (remote("small"), zoo.small()):
        per_sample = nn.functional.cross_entropy(net(x), target, reduction="none")
        found.append(torch.autograd.grad(per_sample, x, weights)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


# ---- derivatives of any order

CHECKED: dict[str, Callable[[], torch.Tensor]] = {
    "small": lambda: randn(2, 3),
    "conv": lambda: randn(2, 2, 3, 3),
    "transformer": lambda: randn(1, 3, 4),
    "holomorphic": lambda: randn(3, dtype=torch.complex128),
    "modulus": lambda: randn(3, dtype=torch.complex128),
}


@pytest.mark.parametrize("name", CHECKED)
def test_gradcheck_and_gradgradcheck(remote: Any, name: str) -> None:
    module, x = remote(name), CHECKED[name]()
    assert torch.autograd.gradcheck(module, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(module, x, fast_mode=True)


def test_gradgradcheck_by_parameters(remote: Any) -> None:
    """The parameters go in as tensors, so this is functional_call as well."""
    module = remote("small", parameters=True)
    names, values = zip(*module.named_parameters(), strict=True)

    def run(x: torch.Tensor, *values: torch.Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    inputs = (randn(2, 3), *(value.detach().clone().requires_grad_() for value in values))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_the_third_and_fourth_derivative_in_closed_form(remote: Any) -> None:
    x = randn(5)
    y, found = remote("sinexp")(x), []
    for _ in range(4):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        found.append(y.detach())
    at = x.detach()
    sin, cos, exp = at.sin(), at.cos(), at.exp()
    closed = [exp * (sin + cos), 2 * exp * cos, 2 * exp * (cos - sin), -4 * exp * sin]
    torch.testing.assert_close(found, closed, rtol=1e-12, atol=1e-12)


PENALTY = {
    "small": (3, 3),
    "tied": (3, 3),
    "transformer": (2, 3, 4),
    "conv": (2, 2, 3, 3),
    "custom_right": (4,),
    "lstm": (2, 3, 3),
    "sinexp": (4,),
}


@pytest.mark.parametrize("name", PENALTY)
def test_the_penalty_matches_local_torch(remote: Any, name: str) -> None:
    """(g * x).sum(): where a remote backward on detached data is wrong without an error."""
    twin = globals()[name] if name == "sinexp" else getattr(zoo, name)
    local = twin if name in ("sinexp", "custom_right") else twin().eval()
    if name == "lstm":
        inner = local
        local = lambda x: inner(x)[0]  # noqa: E731
    module = remote(name)
    results = []
    for run in (module, local):
        x = randn(*PENALTY[name])
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            torch.backends.mha.set_fastpath_enabled(False)
            y = run(x)
            torch.backends.mha.set_fastpath_enabled(True)
            y = y["output_0"] if isinstance(y, dict) else y
            (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            ((g * x).sum() + g.square().sum()).backward()
        results.append(x.grad)
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["once", "in_numpy", "hidden"])
def test_an_order_that_is_not_to_be_had_raises(remote: Any, name: str) -> None:
    x = randn(4)
    module = remote(name)
    (g,) = torch.autograd.grad(module(x).sum(), x)
    at = x.detach()
    torch.testing.assert_close(g, (at.exp() if name == "hidden" else 3 * at**2) + at.cos())
    with pytest.raises(pb.errors.OrderUnavailable):
        torch.autograd.grad(module(x).sum(), x, create_graph=True)


def test_first_order_can_be_asked_for_alone(remote: Any) -> None:
    x = randn(1, 3, 4)
    module = remote("transformer", max_order=1)
    y = module(x).square().sum()
    torch.testing.assert_close(y, remote("transformer")(x).square().sum())
    y.backward(retain_graph=True)
    with pytest.raises(pb.errors.OrderUnavailable):
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        g.sum().backward()


def test_all_mixed_terms_by_inputs_parameters_and_cotangents(remote: Any) -> None:
    """A second derivative by everything: what was asked for first, and what was not."""
    results = []
    for net in (remote("small", parameters=True), zoo.small().requires_grad_()):
        x, v = randn(2, 3), randn(2, 2, seed=1)
        parameters = list(net.parameters())
        (g,) = torch.autograd.grad(net(x), x, v, create_graph=True)
        first = torch.autograd.grad(g.square().sum(), [x, v, *parameters], create_graph=True, allow_unused=True)
        total = sum(one.square().sum() for one in first if one is not None)
        second = torch.autograd.grad(total, [x, v, *parameters], allow_unused=True)  # type: ignore[arg-type]
        results.append([*first, *second])
    for ours, theirs in zip(*results, strict=True):
        if theirs is None:
            assert ours is None or not ours.any()
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_batches_of_cotangents(remote: Any) -> None:
    module, local = remote("small"), zoo.small()
    x = randn(2, 3)
    results = []
    for run in (module, local):
        y, v = run(x), randn(5, 2, 2, seed=1)
        (g,) = torch.autograd.grad(y, x, v, is_grads_batched=True, create_graph=True)
        results.append([g, *torch.autograd.grad(g.square().sum(), [x, v])])
        y = run(x)
        (one,) = torch.func.vmap(lambda v, y=y: torch.autograd.grad(y, x, v, retain_graph=True))(v.detach())
        results[-1].append(one)
        results[-1].append(torch.autograd.functional.jacobian(run, x, vectorize=True))
        loss = lambda x, run=run: run(x).square().sum()  # noqa: E731
        results[-1].append(torch.autograd.functional.hessian(loss, x, vectorize=True))
        results[-1].append(torch.autograd.functional.jvp(run, x, torch.ones_like(x))[1])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)
    y = module(x)
    # One cotangent of two has the batch.
    found = []
    for both in (remote("pair")(x[0]), dict(zip(("wide", "narrow"), zoo.pair(x[0]), strict=True))):
        outputs, one = [both["wide"], both["narrow"]], torch.ones(1, dtype=F64)
        pull = lambda v, o=outputs, one=one: torch.autograd.grad(o, x, [v, one], retain_graph=True)[0]  # noqa: E731
        found.append(torch.func.vmap(pull, in_dims=1, out_dims=1)(randn(6, 4, seed=1, grad=False)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)
    twice = torch.func.vmap(torch.func.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0]))
    with pytest.raises(RuntimeError, match="one level"):
        twice(randn(2, 2, 2, 2, grad=False))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_cannot_be_differentiated_through_raises(remote: Any) -> None:
    module, x = remote("small"), randn(2, 3)
    for transform in (torch.func.grad(lambda x: module(x).sum()), torch.func.vmap(module), torch.func.jacrev(module)):
        with pytest.raises(RuntimeError, match=r"torch\.func"):
            transform(x)
    y = module(x)
    for create in (False, True):
        backward = lambda v, c=create: torch.autograd.grad(y, x, v, True, c)[0].sum()  # noqa: E731
        with pytest.raises(RuntimeError, match=r"torch\.func"):
            torch.func.grad(backward)(torch.ones_like(y))
    for mode in (torch.enable_grad, torch.no_grad):
        with forward_ad.dual_level(), mode(), pytest.raises(NotImplementedError, match="forward mode"):
            module(forward_ad.make_dual(x.detach(), torch.ones_like(x)))


# ---- inside a network


def test_a_network_around_it_trains_as_a_local_twin(remote: Any) -> None:
    results = []
    for middle in (remote("small", parameters=True), zoo.small().requires_grad_()):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(4, 3), middle, nn.Tanh(), nn.Linear(2, 1)).double()
        optimiser = torch.optim.Adam(net.parameters(), lr=0.05, weight_decay=0.01)
        x, target = randn(8, 4, grad=False), randn(8, 1, seed=1, grad=False)
        losses = []
        for _ in range(20):
            optimiser.zero_grad()
            loss = nn.functional.mse_loss(net(x), target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            losses.append(loss.item())
        results.append((losses, [one.detach() for one in net.parameters()]))
    assert results[0][0][-1] < results[0][0][0]
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_unused_and_absent_inputs(remote: Any) -> None:
    module = remote("half_used")
    x, y = randn(3), randn(3, seed=1)
    gradients = torch.autograd.grad(module(x, y).sum(), [x, y], allow_unused=True)
    assert gradients[1] is None
    torch.testing.assert_close(gradients[0], x.detach().exp())
    module(x, y=y).sum().backward()
    assert x.grad is not None and y.grad is None
    mixed = remote("mixed")
    assert set(mixed(x, y, scale=None)) == set(mixed(x, y)) == {"product", "parts.0", "parts.1", "count"}


def test_integer_inputs_and_masks(remote: Any) -> None:
    module, local = remote("words", parameters=["embedding.*"]), zoo.words().requires_grad_()
    ids, mask = torch.tensor([[1, 2, 10], [0, 3, 3]]), randn(2, 3)
    module(ids, mask).square().sum().backward()
    ours = [module.embedding.weight.grad, mask.grad]
    mask.grad = None
    local(ids, mask).square().sum().backward()
    torch.testing.assert_close(ours, [local.embedding.weight.grad, mask.grad], rtol=1e-12, atol=1e-14)


def test_several_outputs(remote: Any) -> None:
    x = randn(4)
    outputs = remote("detached")(x)
    assert {name: one.requires_grad for name, one in outputs.items()} == {"kept": True, "cut": False, "rank": False}
    assert outputs["rank"].dtype == torch.int64
    outputs["kept"].sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))
    # One of two, and then both.
    module, results = remote("pair"), []
    for run in (module, lambda x: dict(zip(("wide", "narrow"), zoo.pair(x), strict=True))):
        both = run(x)
        (only,) = torch.autograd.grad(both["narrow"].sum(), x, retain_graph=True)
        (g,) = torch.autograd.grad([both["wide"].square().sum(), both["narrow"].sum()], x, create_graph=True)
        results.append([only, g, torch.autograd.grad(g.square().sum(), x)[0]])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_layouts_dtypes_and_plain_arguments(remote: Any) -> None:
    module, local = remote("small"), zoo.small()
    base = randn(3, 8)
    (g,) = torch.autograd.grad(module(base.t()[::2]).sum(), base)
    torch.testing.assert_close(g, torch.autograd.grad(local(base.t()[::2]).sum(), base)[0])
    # The gradient of sum() is expanded, that of a transposed result is transposed; conj() is a bit.
    z = randn(3, 2, dtype=torch.complex128)
    (g,) = torch.autograd.grad(remote("square")(z.t().conj()).conj().sum().real, z)
    torch.testing.assert_close(g, torch.autograd.grad(z.t().conj().square().conj().sum().real, z)[0])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, F64, torch.complex64, torch.complex128):
        x = randn(3, dtype=torch.float32 if dtype.itemsize == 2 else dtype).detach().to(dtype).requires_grad_()
        y = remote("square")(x)
        assert y.dtype == dtype
        y.backward(torch.ones_like(y))
        torch.testing.assert_close(x.grad, 2 * x.detach().conj())
    assert remote("square")(np.array([3.0])).item() == remote("square")(3.0).item() == 9.0
    for value in ([randn(1)], pb.tensor([1.0]), "x"):
        with pytest.raises(TypeError, match="expected a torch tensor"):
            remote("square")(value)
    with pytest.raises(TypeError, match="takes 1 inputs"):
        remote("square")(1.0, 2.0)


def test_autocast(remote: Any) -> None:
    module = remote("single")
    net = nn.Sequential(nn.Linear(4, 4), module, nn.Linear(4, 1))
    x = randn(2, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    with pytest.raises(pb.errors.BadTensor, match=r"bfloat16.*expected float32"):
        module(x.bfloat16())


# ---- modes and random numbers


def test_the_mask_of_the_forward_is_that_of_every_backward(remote: Any) -> None:
    module = remote("dropout").train()
    x = torch.ones(200, dtype=F64, requires_grad=True)
    torch.manual_seed(5)
    y = module(x)
    (g,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    assert 50 < (y == 0).sum() < 150
    torch.testing.assert_close(g, 3 * y**3)
    torch.testing.assert_close(h, 6 * y**3)
    assert not torch.equal(module(x), y)
    torch.manual_seed(5)
    assert torch.equal(module(x), y)
    assert torch.equal(module.eval()(x), x)


def test_the_statistics_of_the_hosted_model_do_not_move(remote: Any) -> None:
    x = randn(8, 3, grad=False) + 3
    module, local = remote("norm", parameters=True), norm()
    before = module(x)
    for _ in range(3):
        trained = module.train()(x)
    torch.testing.assert_close(trained, local.train()(x))
    assert torch.equal(module.eval()(x), before)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["dropout", "noisy", "conv"])
def test_checkpoint_recomputes_the_same(server: Server, remote: Any, name: str, reentrant: bool) -> None:
    module = remote(name, parameters=name == "conv").train(name != "noisy")
    x = randn(2, 2, 3, 3)
    before = live_handles(server, module, x)
    results = []
    for through in (module, lambda x: checkpoint(module, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        y = through(x * 1)
        if through is not module:
            # The server keeps no graph meanwhile.
            assert live_handles(server, module, x) == before
        y.square().sum().backward()
        results.append([x.grad, *(one.grad for one in module.parameters())])
        x.grad = None
        module.zero_grad()
    torch.testing.assert_close(*results, rtol=0, atol=0)
    del y
    assert live_handles(server, module, x) == before


def test_checkpoint_and_second_order(remote: Any) -> None:
    module, x = remote("sinexp"), randn(3)
    found = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        (g,) = torch.autograd.grad(run(x * 2).sin().sum(), x, create_graph=True)
        found.append(torch.autograd.grad((g * x).sum(), x)[0])
    torch.testing.assert_close(*found)


# ---- how long the server holds a graph


def test_handles_live_as_long_as_torch_keeps_its_side(server: Server, remote: Any) -> None:
    module, x = remote("small"), randn(2, 3)
    before = live_handles(server, module, x)
    y = module(x).square().sum()
    held = live_handles(server, module, x)
    assert held > before
    y.backward(retain_graph=True)
    assert live_handles(server, module, x) == held
    y.backward()
    # Freed by the backward, though y is still here.
    assert live_handles(server, module, x) == before
    assert x.grad is not None
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()
    # Dropped without a backward; and with graphs of three orders.
    y = module(x).square().sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    assert live_handles(server, module, x) > held
    del y, g
    h.sum().backward()
    del h
    assert live_handles(server, module, x) == before
    with torch.no_grad():
        module(x)
    assert not module(x.detach()).requires_grad
    assert live_handles(server, module, x) == before
    with pytest.raises(pb.errors.BadTensor):
        module(randn(2, 4))
    assert live_handles(server, module, x) == before
    assert not _node._graphs


def test_saved_tensor_hooks(remote: Any) -> None:
    module, x = remote("sinexp"), randn(3)
    with torch.autograd.graph.save_on_cpu():
        y = module(x).sum()
    y.backward()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda one: one):
        y = module(x).sum()
    with pytest.raises(RuntimeError, match="hooks on saved tensors"):
        y.backward()


def test_an_input_changed_in_place_is_refused_as_torch_refuses_it(remote: Any) -> None:
    x = randn(3)
    inner = x * 1
    y = remote("sinexp")(inner).sum()
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_lost_session(client: pb.Client, remote: Any) -> None:
    module, x = remote("small", parameters=True), randn(2, 3)
    y = module(x).sum()
    module._pullback_remote.session().close()
    with pytest.raises(pb.errors.SessionLost):
        y.backward()
    y = module(x).sum()
    y.backward()
    with client.session() as session:
        pinned = remote("small", session=session)
        loss = pinned(x).sum()
        around = module(x).sum()
    with pytest.raises(pb.errors.SessionLost):
        loss.backward()
    with pytest.raises(pb.errors.SessionLost):
        around.backward()
    with pytest.raises(pb.errors.SessionLost):
        pinned(x)
    assert module(x).shape == (2, 2)


# ---- parameters


def test_parameters_are_sent_when_they_changed(remote: Any) -> None:
    module, local = remote("small", parameters=True), zoo.small().requires_grad_()
    assert dict(module.named_parameters()).keys() == dict(local.named_parameters()).keys()
    x = randn(2, 3)
    sent = module._pullback_remote.copies._latest
    module(x)
    first = {name: copy.ref.handle for name, copy in sent.items()}
    module(x)
    assert {name: copy.ref.handle for name, copy in sent.items()} == first
    # No version counter moves here.
    for net in (module, local):
        net.get_submodule("0").weight.data[0, 0] = -0.0
        net.get_submodule("2").bias.data.mul_(3)
    y = module(x)
    torch.testing.assert_close(y, local(x), rtol=1e-13, atol=0)
    changed = {name for name, copy in sent.items() if copy.ref.handle != first[name]}
    assert changed == {"0.weight", "2.bias"}
    # A graph goes by the values that it was made with, as a hosted model's would.
    for net in (module, local):
        net.get_submodule("0").weight.data[0, 0] = 0.0
    module(x)
    assert torch.signbit(sent["0.weight"].value[0, 0]).item() is False
    module.load_state_dict(local.state_dict())
    torch.testing.assert_close(module(x), local(x), rtol=1e-13, atol=0)


def test_a_step_between_forward_and_backward_is_refused_as_torch_refuses_it(remote: Any) -> None:
    module, x = remote("small", parameters=True), randn(2, 3)
    y = module(x).sum()
    with torch.no_grad():
        module.get_submodule("0").weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_some_parameters_and_frozen_ones(remote: Any) -> None:
    module, local = remote("simple_nn", parameters=["fc2.*"]), simple_nn().requires_grad_()
    assert list(module.state_dict()) == ["fc2.weight", "fc2.bias"]
    module.fc2.bias.requires_grad_(False)
    x = randn(4, 10)
    for net in (module, local):
        with torch.no_grad():
            net.fc2.bias.add_(1.0)
        net(x).square().sum().backward()
    torch.testing.assert_close(module.fc2.weight.grad, local.fc2.weight.grad, rtol=1e-12, atol=1e-14)
    assert module.fc2.bias.grad is None
    # Thawed and frozen again without being sent again; each time the server knows.
    sent, local.fc2.bias.grad = module._pullback_remote.copies._latest, None
    values = sent["fc2.bias"].value
    for thawed in (True, False, True):
        module.fc2.bias.requires_grad_(thawed)
        module(x).square().sum().backward()
        assert sent["fc2.bias"].value is values and sent["fc2.bias"].requires_grad == thawed
    local(x).square().sum().backward()
    torch.testing.assert_close(module.fc2.bias.grad, 2 * local.fc2.bias.grad, rtol=1e-12, atol=1e-14)
    with pytest.raises(pb.errors.BadName, match=r"fc3.*fc1\.weight"):
        remote("simple_nn", parameters="fc3.*")
    with pb.connect("localhost:1") as elsewhere, pytest.raises(ValueError, match="localhost:1"):
        RemoteModule(elsewhere.model("small"), session=remote("small")._pullback_remote.session())
    with pytest.raises(TypeError, match=r"client\.model"):
        RemoteModule("simple_nn")  # type: ignore[arg-type]
    with pytest.raises(pb.errors.BadTensor, match=r"fc2\.weight.*float32"):
        module.float()(x)


def test_a_meta_step_through_given_parameters(remote: Any) -> None:
    """One inner step of MAML: the outer gradient goes through the inner one."""
    results = []
    for net in (remote("small", parameters=True), zoo.small().requires_grad_()):
        x = randn(4, 3, grad=False)
        inner = net(x).square().sum()
        gradients = torch.autograd.grad(inner, list(net.parameters()), create_graph=True)
        fast = {name: value - 0.1 * g for (name, value), g in zip(net.named_parameters(), gradients, strict=True)}
        torch.func.functional_call(net, fast, (x + 1,)).square().sum().backward()
        results.append([one.grad for one in net.parameters()])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


# ---- copies, threads, processes


def test_copies_and_pickles(remote: Any) -> None:
    module, x = remote("small", parameters=True), randn(2, 3)
    y = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            next(iter(other.parameters())).mul_(2)
        assert not torch.equal(other(x), y)
        other(x).sum().backward()
    # The pickled one came with a client of its own.
    other._pullback_remote.session().close()
    assert torch.equal(module(x), y)
    assert "small" in repr(module)


def test_many_threads(remote: Any) -> None:
    module, local = remote("small", parameters=True), zoo.small()
    barrier = threading.Barrier(6)

    def work(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        barrier.wait(30)
        x = randn(3, 3, seed=seed)
        for _ in range(10):
            (g,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
            (h,) = torch.autograd.grad((g * x).sum(), x)
        (g,) = torch.autograd.grad(local(x).square().sum(), x, create_graph=True)
        (theirs,) = torch.autograd.grad((g * x).sum(), x)
        return h, theirs

    with ThreadPoolExecutor(6) as pool:
        for ours, theirs in pool.map(work, range(6)):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


FORKED = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset
import pullback as pb
from pullback.torch import RemoteModule
from tests import zoo

class Gradients(Dataset):
    def __init__(self, module):
        self.module = module
    def __len__(self):
        return 8
    def __getitem__(self, index):
        x = torch.full((1, 3), float(index), dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(self.module(x).square().sum(), x)[0]

module = RemoteModule(pb.connect(sys.argv[1]).model("small"), parameters=True)
x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
y = module(x).sum()
for _ in range(3):
    loader = DataLoader(Gradients(module), batch_size=2, num_workers=2, multiprocessing_context="fork")
    found = torch.cat(list(loader))
local = Gradients(zoo.small())
torch.testing.assert_close(found, torch.stack([local[index] for index in range(8)]), rtol=1e-12, atol=1e-13)
y.backward()
assert x.grad is not None
print("good")
"""


def test_data_loader_workers(server: Server) -> None:
    """Forked with a session open and a graph alive in the parent, both of which stay as they are.

    In a process of its own: this one has a gRPC server, which no fork survives.
    """
    done = subprocess.run(
        [sys.executable, "-c", FORKED, server.target], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == "good", done.stderr


@pytest.mark.slow
def test_a_compiled_network_leaves_it_out(remote: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 3), remote("small"), nn.Tanh()).double()
    x = randn(2, 3)
    ours, theirs = torch.compile(net, backend="aot_eager")(x), net(x)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(theirs.sum(), x))


@pytest.mark.gpu
def test_cuda_tensors_come_back_where_they_were(remote: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    module, local = remote("small", parameters=True).cuda(), zoo.small().requires_grad_().cuda()
    results = []
    for net in (module, local):
        x = randn(2, 3).detach().cuda().requires_grad_()
        y = net(x)
        assert y.device == x.device
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (g * x).sum().backward()
        assert x.grad is not None
        results.append([x.grad, *(one.grad for one in net.parameters())])
    torch.testing.assert_close(*results)
