"""The client's tensors against a real server, held against local torch in float64."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pullback as pb
from pullback import errors
from pullback_server import Server, model, spec

# The models that the server of this file hosts.


class MyFunction(torch.autograd.Function):
    """x ** 2 with its own backward."""

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
        result: torch.Tensor = self.fc2(torch.relu(self.fc1(x)))
        return result


def built(kind: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return kind().double()


@model("mine", inputs={"x": spec("float64", ["n"])})
def mine(x: torch.Tensor) -> torch.Tensor:
    """A custom backward."""
    return MyFunction.apply(x)


@model("simple")
def simple() -> nn.Module:
    """A small network."""
    return built(SimpleNN)


@model("classes")
def classes() -> nn.Module:
    """Logits."""
    return built(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))


@model("dropping")
def dropping() -> nn.Module:
    """Dropout."""
    return built(lambda: nn.Sequential(nn.Dropout(0.5)))


@model("same")
def same(x: torch.Tensor) -> torch.Tensor:
    """Its input itself."""
    return x


@model("wide")
def wide(x: torch.Tensor) -> torch.Tensor:
    """A small input, a large output."""
    return x.expand(9, *x.shape)


@model("two", outputs=["sine", "twice"])
def two(x: torch.Tensor, y: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Two outputs, an optional input."""
    return x.sin(), 2 * x if y is None else y * x


@model("slow")
def slow(x: torch.Tensor) -> torch.Tensor:
    """Takes a while."""
    time.sleep(1.5)
    return x * 2


@model("dies")
def dies(x: torch.Tensor) -> torch.Tensor:
    """Kills its worker."""
    os._exit(1)


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with Server(Path(__file__), threads=1, max_message_bytes=64 << 20) as server:
        yield server


@pytest.fixture
def client(server: Any) -> Iterator[pb.Client]:
    with pb.connect(server.target) as client:
        yield client


X = np.array([[0.3, -1.2], [2.0, 0.7]])
V = np.array([[1.0, 2.0], [-0.5, 3.0]])


def leaf(value: Any, client: pb.Client) -> pb.Tensor:
    return client.tensor(value, requires_grad=True)


def local(value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def equal(found: Any, expected: torch.Tensor | None) -> None:
    assert expected is not None
    assert found is not None
    value = found.numpy()
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-12, atol=1e-12)


# The snippets of the mission.


def test_sum_of_squares(client: pb.Client) -> None:
    x = leaf(X, client)
    y = x.pow(2).sum()
    y.backward()
    np.testing.assert_array_equal(x.grad.numpy(), 2 * X)
    assert x.is_leaf and x.requires_grad and not y.is_leaf
    assert y.shape == () and y.dtype == np.float64 and y.item() == pytest.approx((X**2).sum())


@pytest.mark.parametrize("give", [lambda v: v, pb.tensor, lambda v: v.tolist(), torch.tensor])
def test_a_vector(client: pb.Client, give: Any) -> None:
    x = leaf(X, client)
    x.pow(2).backward(gradient=give(V))
    np.testing.assert_array_equal(x.grad.numpy(), 2 * X * V)


def test_pb_tensor_finds_the_only_client(client: pb.Client) -> None:
    x = pb.tensor(X, requires_grad=True)
    (x * x).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), 2 * X)


def test_grad_of_grad(client: pb.Client) -> None:
    x = leaf(3.0, client)
    (g,) = pb.autograd.grad(x**2, x, create_graph=True)
    assert g.item() == 6 and g.requires_grad
    (h,) = pb.autograd.grad(g, x)
    assert h.item() == 2 and not h.requires_grad


def test_a_second_backward_needs_retain_graph(client: pb.Client) -> None:
    x = leaf(X, client)
    y = x.pow(2).sum()
    y.backward(retain_graph=True)
    y.backward()
    np.testing.assert_array_equal(x.grad.numpy(), 4 * X)
    with pytest.raises(errors.GraphFreed, match="retain_graph"):
        y.backward()
    with pytest.raises(RuntimeError):
        y.backward()
    np.testing.assert_array_equal(x.grad.numpy(), 4 * X)


@pytest.mark.parametrize("pipelined", [False, True])
def test_gradients_of_other_shapes(client: pb.Client, pipelined: bool) -> None:
    with client.session(pipelined=pipelined):
        x = pb.tensor(X, requires_grad=True)
        with pytest.raises(errors.BadCotangent, match=r"\[2\].*\[\]|\[\].*\[2\]"):
            x.sum().backward(gradient=np.ones(2))
        with pytest.raises(errors.BadCotangent, match=r"\[4\].*\[2, 2\]|\[2, 2\].*\[4\]"):
            x.pow(2).backward(gradient=pb.tensor(np.ones(4)))
        with pytest.raises(errors.MissingCotangent):
            x.pow(2).backward()
        assert x.grad is None


def test_a_hosted_function_of_its_own(client: pb.Client) -> None:
    x = leaf(X[0], client)
    client.model("mine")(x).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), 2 * X[0])


@pytest.mark.parametrize("pipelined", [False, True])
def test_training_a_network(client: pb.Client, pipelined: bool) -> None:
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(8, 10)), rng.normal(size=(8, 1))
    reference = built(SimpleNN)
    remote = client.model("simple")
    with client.session(pipelined=pipelined):
        parameters = dict(remote.named_parameters())
        assert set(parameters) == set(dict(reference.named_parameters()))
        losses = []
        for _ in range(4):
            loss = pb.functional.mse_loss(remote(inputs), targets)
            loss.backward()
            expected = nn.functional.mse_loss(reference(torch.tensor(inputs)), torch.tensor(targets))
            reference.zero_grad()
            expected.backward()
            equal(loss, expected)
            for name, parameter in reference.named_parameters():
                equal(parameters[name].grad, parameter.grad)
            with pb.no_grad():
                for p in parameters.values():
                    p -= 0.1 * p.grad
            remote.zero_grad()
            assert all(p.grad is None for p in remote.parameters())
            with torch.no_grad():
                for q in reference.parameters():
                    q -= 0.1 * q.grad
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True)
        for name, parameter in reference.named_parameters():
            equal(parameters[name], parameter)
    # The hosted model is what it was.
    with client.session():
        fresh = dict(remote.named_parameters())
        equal(fresh["fc1.weight"], built(SimpleNN).fc1.weight)


def test_cross_entropy_falls(client: pb.Client) -> None:
    rng = np.random.default_rng(1)
    inputs, target = rng.normal(size=(12, 6)), rng.integers(0, 4, 12)
    remote = client.model("classes")
    losses = []
    for _ in range(5):
        parameters = list(remote.parameters())
        loss = pb.functional.cross_entropy(remote(inputs), target, label_smoothing=0.1)
        loss.backward()
        losses.append(loss.item())
        with pb.no_grad():
            for p in parameters:
                p -= 0.5 * p.grad
                p.grad = None
    expected = nn.functional.cross_entropy(
        classes_local()(torch.tensor(inputs)), torch.tensor(target), label_smoothing=0.1
    )
    assert losses[0] == pytest.approx(expected.item(), rel=1e-12)
    assert losses == sorted(losses, reverse=True)


def classes_local() -> nn.Module:
    return built(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))


def test_a_loss_of_each_sample_with_weights(client: pb.Client) -> None:
    rng = np.random.default_rng(2)
    inputs, target, weights = rng.normal(size=(5, 6)), rng.integers(0, 4, 5), rng.normal(size=5)
    x = leaf(inputs, client)
    losses = pb.functional.cross_entropy(client.model("classes")(x), target, reduction="none")
    assert losses.shape == (5,)
    losses.backward(gradient=weights)
    t = local(inputs)
    expected = nn.functional.cross_entropy(classes_local()(t), torch.tensor(target), reduction="none")
    expected.backward(torch.tensor(weights))
    equal(losses, expected)
    equal(x.grad, t.grad)


def test_a_frozen_input(client: pb.Client) -> None:
    x = client.tensor(X)
    y = x.pow(2).sum()
    assert not y.requires_grad and y.is_leaf
    with pytest.raises(errors.NotDifferentiable, match="does not require grad"):
        y.backward()
    with pytest.raises(errors.NotDifferentiable):
        pb.autograd.grad(leaf(X, client).sum(), x)
    with pytest.raises(errors.NotDifferentiable):
        client.model("simple")(np.ones((1, 10))).sum().backward()


def test_third_derivative(client: pb.Client) -> None:
    x = leaf(np.float64(0.7), client)
    found = x.sin() * x.exp()
    t = local(0.7)
    expected = t.sin() * t.exp()
    for _ in range(3):
        (found,) = pb.autograd.grad(found, x, create_graph=True)
        (expected,) = torch.autograd.grad(expected, t, create_graph=True)
        equal(found, expected)


def test_a_penalty_on_the_gradient(client: pb.Client) -> None:
    remote, reference = client.model("classes"), classes_local()
    inputs = np.random.default_rng(3).normal(size=(3, 6))
    x, t = leaf(inputs, client), local(inputs)
    (g,) = pb.autograd.grad(remote(x).exp().sum(), x, create_graph=True)
    penalty = (g * x).sum()
    (h,) = torch.autograd.grad(reference(t).exp().sum(), t, create_graph=True)
    expected = (h * t).sum()
    penalty.backward()
    expected.backward()
    equal(penalty, expected)
    equal(x.grad, t.grad)


# torch's semantics.


def test_grad_accumulates_and_backward_with_create_graph(client: pb.Client) -> None:
    x, t = leaf(X, client), local(X)
    for y, u in ((x, x), (t, t)):
        (y**3).sum().backward(create_graph=True)
        (y * u).sum().backward()
    equal(x.grad, t.grad)
    assert x.grad.requires_grad
    x.grad.sum().backward()
    t.grad.sum().backward()
    equal(x.grad, t.grad)


def test_backward_inputs_and_retain_grad(client: pb.Client) -> None:
    x, w = leaf(X, client), leaf(V, client)
    y = x * w
    z = y.sin()
    y.retain_grad()
    z.sum().backward(retain_graph=True, inputs=[w])
    assert x.grad is None and y.grad is None
    np.testing.assert_allclose(w.grad.numpy(), X * np.cos(X * V))
    z.sum().backward()
    np.testing.assert_allclose(y.grad.numpy(), np.cos(X * V))
    np.testing.assert_allclose(w.grad.numpy(), 2 * X * np.cos(X * V))
    assert z.grad is None


def test_unused(client: pb.Client) -> None:
    x, w = leaf(X, client), leaf(V, client)
    y = (x**2).sum()
    with pytest.raises(errors.UnusedInput):
        pb.autograd.grad(y, [x, w], retain_graph=True)
    g, none = pb.autograd.grad(y, [x, w], retain_graph=True, allow_unused=True)
    assert none is None
    g, zeros = pb.autograd.grad(y, [x, w], materialize_grads=True)
    np.testing.assert_array_equal(g.numpy(), 2 * X)
    np.testing.assert_array_equal(zeros.numpy(), np.zeros_like(V))


def test_several_outputs_and_batched_cotangents(client: pb.Client) -> None:
    x = leaf(X[0], client)
    found = client.model("two")(x, y=V[0])
    assert set(found) == {"sine", "twice"}
    (g,) = pb.autograd.grad(list(found.values()), x, [V[0], V[1]], retain_graph=True)
    np.testing.assert_allclose(g.numpy(), np.cos(X[0]) * V[0] + V[0] * V[1])
    (g,) = pb.autograd.grad(found["sine"], x, np.eye(2), is_grads_batched=True)
    np.testing.assert_allclose(g.numpy(), np.diag(np.cos(X[0])))
    pb.autograd.backward([x.sum(), (x**2).sum()])
    np.testing.assert_allclose(x.grad.numpy(), 1 + 2 * X[0])


def test_detach_and_no_grad(client: pb.Client) -> None:
    x = leaf(X, client)
    (x.detach() * x).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), X)
    assert not (x * 2).detach().requires_grad

    @pb.no_grad()
    def inside() -> pb.Tensor:
        assert not pb.is_grad_enabled()
        with pb.enable_grad():
            assert (x * 2).requires_grad
        return x * 2

    assert not inside().requires_grad
    assert pb.is_grad_enabled()
    with pb.no_grad():
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(pb.is_grad_enabled()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_in_place(client: pb.Client) -> None:
    x, b = leaf(X, client), client.tensor(np.zeros((2, 2)))
    row = b[0]
    assert row.numpy().tolist() == [0, 0]
    b[1] = x[0] * 3
    b[0] += 1
    assert b.requires_grad and not b.is_leaf
    np.testing.assert_allclose(b.numpy(), [[1, 1], 3 * X[0]])
    (b**2).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), [18 * X[0], [0, 0]])
    with pytest.raises((errors.BadOperand, errors.NotDifferentiable, errors.ModifiedInPlace)):
        x += 1
    np.testing.assert_array_equal(x.numpy(), X)
    y = x.exp()
    y.mul_(2)
    with pytest.raises(errors.ModifiedInPlace):
        y.sum().backward()


def test_values_are_never_stale(client: pb.Client) -> None:
    x = client.tensor(X)
    same = client.model("same")(x)
    alias = x.detach()
    flat = x.reshape(4)
    assert flat.numpy().tolist() == X.reshape(4).tolist()
    alias.add_(1)
    del same
    np.testing.assert_array_equal(flat.numpy(), x.numpy().reshape(4))
    np.testing.assert_array_equal(x.numpy(), alias.numpy())


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "complex128", "int64"])
def test_dtypes_stay(client: pb.Client, dtype: str) -> None:
    x = client.tensor([1, 2, 3], dtype=dtype)
    y = x * 2
    assert str(y.dtype) == dtype == str(x.dtype)
    assert y.to("float32").dtype == np.float32
    assert client.tensor([1.5]).dtype == np.float32 and client.tensor(X).double().dtype == np.float64


OPERATIONS: list[Callable[[Any, Any], Any]] = [
    lambda x, np_: x + 1,
    lambda x, np_: 1 - x,
    lambda x, np_: x / 2,
    lambda x, np_: 2 / x,
    lambda x, np_: 2.0**x,
    lambda x, np_: x**3,
    lambda x, np_: -x @ x.T,
    lambda x, np_: x.abs().sqrt().log(),
    lambda x, np_: x.sum(0),
    lambda x, np_: x.sum(dim=1, keepdim=True),
    lambda x, np_: x.mean((0, 1)),
    lambda x, np_: x.max(),
    lambda x, np_: x.amax(1),
    lambda x, np_: x.std(),
    lambda x, np_: x.var(0),
    lambda x, np_: x.norm(),
    lambda x, np_: x.reshape(-1),
    lambda x, np_: x.view(1, 4).transpose(0, 1).squeeze(1),
    lambda x, np_: x.permute(1, 0).flatten(),
    lambda x, np_: x.unsqueeze(0).expand(3, 2, 2),
    lambda x, np_: x[0],
    lambda x, np_: x[:, 1:],
    lambda x, np_: x[..., None, 0],
    lambda x, np_: x[[1, 0, 1]],
    lambda x, np_: x.clamp(-1, 1),
    lambda x, np_: x.clamp(min=0.5),
    lambda x, np_: x.softmax(-1),
    lambda x, np_: x.log_softmax(1),
    lambda x, np_: x.logsumexp(0),
    lambda x, np_: x.cumsum(0),
    lambda x, np_: x.relu() + x.tanh() * x.sigmoid(),
    lambda x, np_: x.double().clone(),
    lambda x, np_: x.maximum(x.T),
    lambda x, np_: x * np_,
    lambda x, np_: np_ - x,
    lambda x, np_: np_ @ x,
]


@pytest.mark.parametrize("index", range(len(OPERATIONS)))
def test_operations(client: pb.Client, index: int) -> None:
    operation = OPERATIONS[index]
    x, t = leaf(X, client), local(X)
    y, u = operation(x, V), operation(t, torch.tensor(V))
    assert y.shape == tuple(u.shape)
    equal(y, u)
    y.sum().backward()
    u.sum().backward()
    equal(x.grad, t.grad)


def test_functions_and_comparisons(client: pb.Client) -> None:
    x = leaf(X, client)
    y = pb.where(x > 0, x, 0.0)
    np.testing.assert_array_equal(y.numpy(), np.where(X > 0, X, 0))
    pb.cat([x, y], dim=1).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), 1 + (X > 0))
    assert pb.stack([x, y]).shape == (2, 2, 2)
    assert (x == X).all().item() is True
    assert x[X > 0].shape == (3,)
    assert x.argmax().item() == 2
    assert bool(x[1, 0] > 1) and float(x[1, 0]) == 2 and int(x[1, 0]) == 2 and f"{x[1, 0]:.1f}" == "2.0"
    assert len(x) == 2 and [row.shape for row in x] == [(2,), (2,)]
    assert x.tolist() == X.tolist() and np.asarray(x).tolist() == X.tolist()
    with pytest.raises(TypeError):
        np.sin(x)


def test_dropout_mask_is_the_same_in_backward(client: pb.Client) -> None:
    x = leaf(np.ones(64), client)
    y = client.model("dropping")(x, train=True, seed=3)
    y.sum().backward()
    np.testing.assert_array_equal(y.numpy(), x.grad.numpy())
    assert set(y.numpy()) == {0.0, 2.0}


def test_one_model_feeds_another(client: pb.Client) -> None:
    x = leaf(X[0], client)
    y = client.model("mine")(client.model("same")(x)).sum()
    y.backward()
    np.testing.assert_array_equal(x.grad.numpy(), 2 * X[0])


def test_given_parameters(client: pb.Client) -> None:
    w = leaf(np.ones((5, 10)), client)
    remote = client.model("simple")
    inputs = np.random.default_rng(4).normal(size=(2, 10))
    remote(inputs, parameters={"fc1.weight": w}).sum().backward()
    reference = built(SimpleNN)
    t = local(np.ones((5, 10)))
    torch.func.functional_call(reference, {"fc1.weight": t}, (torch.tensor(inputs),)).sum().backward()
    equal(w.grad, t.grad)


def test_repr_never_raises(client: pb.Client) -> None:
    x = leaf(X, client)
    assert "requires_grad=True" in repr(x) and "0.3" in repr(x)
    large = x.expand(50000, 2, 2)
    assert "shape=[50000, 2, 2]" in repr(large)
    with client.session() as session:
        y = session.tensor(X) * np.ones((2, 2))
        z = y.expand(9, 2, 2) * 1
        z.changed()
    assert "SessionLost" in repr(z)


# Sessions.


def test_pipelining(client: pb.Client) -> None:
    with client.session(pipelined=True) as session:
        x = session.tensor(X, requires_grad=True)
        y = x
        for _ in range(600):
            y = y * 1.001
        y.sum().backward()
        np.testing.assert_allclose(x.grad.numpy(), np.full((2, 2), 1.001**600))


def test_pipelined_failures_name_their_op(client: pb.Client) -> None:
    with client.session(pipelined=True) as session:
        x = session.tensor(X, requires_grad=True)
        bad = x @ np.ones(3)
        worse = bad + 1
        with pytest.raises(errors.PullbackError, match="matmul"):
            worse.numpy()
        assert (x + 1).shape == (2, 2)
    with pytest.raises(errors.PullbackError, match="matmul"), client.session(pipelined=True) as session:
        session.tensor(X) @ np.ones(3)


def test_a_failed_op_leaves_the_session_alive(client: pb.Client) -> None:
    x = leaf(X, client)
    with pytest.raises(errors.BadOperand):
        x @ np.ones(3)
    with pytest.raises(errors.ModelNotFound):
        client.model("nobody")(x)
    (x * 2).sum().backward()
    assert x.grad.numpy().tolist() == [[2, 2], [2, 2]]


def test_two_sessions_do_not_mix(client: pb.Client) -> None:
    with client.session() as first, client.session() as second:
        x = first.tensor(X, requires_grad=True)
        with pytest.raises(errors.BadHandle):
            (second.tensor(X).sin().exp() @ np.ones((2, 70000))) + (first.tensor(X).sin() @ np.ones((2, 70000)))
        # A leaf is put where it is needed, and its gradients meet.
        y = x * second.tensor(V)
        y.sum().backward()
        np.testing.assert_array_equal(x.grad.numpy(), V)


def test_a_closed_session(client: pb.Client) -> None:
    with client.session() as session:
        x = session.tensor(X, requires_grad=True)
        y = x.pow(2).sum()
    assert not session.usable
    with pytest.raises(errors.SessionLost):
        y.backward()
    session.close()
    # The leaf still has its data.
    x.pow(2).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), 2 * X)


def test_a_dead_worker(server: Any) -> None:
    with pb.connect(server.target, timeout=90) as client:
        x = leaf(X, client)
        y = x * 2
        began = time.monotonic()
        with pytest.raises(errors.SessionLost):
            client.model("dies")(x)
        assert time.monotonic() - began < 30
        with pytest.raises(errors.SessionLost):
            y.sum()
        deadline = time.monotonic() + 90
        while True:
            try:
                assert (x * 3).sum().item() == pytest.approx(3 * X.sum())
                break
            except errors.Unavailable:
                assert time.monotonic() < deadline
                time.sleep(0.2)


def test_an_op_that_takes_too_long(server: Any) -> None:
    with pb.connect(server.target) as client, client.session(timeout=0.5) as session:
        x = session.tensor(X)
        with pytest.raises(errors.DeadlineExceeded):
            client.model("slow")(x)
        with pytest.raises(errors.SessionLost):
            x * np.ones((2, 2))


def test_threads_share_a_session(client: pb.Client) -> None:
    x = leaf(X, client)
    x * 1
    wrong: list[Any] = []

    def work(scale: float) -> None:
        try:
            for _ in range(30):
                (g,) = pb.autograd.grad((x * scale).sum(), x)
                assert (g.numpy() == scale).all()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(float(scale),)) for scale in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_handles_are_released(client: pb.Client, server: Any) -> None:
    with client.session() as session:
        x = session.tensor(X, requires_grad=True)
        for _ in range(50):
            (x * 2).sum().backward()
            x.grad = None
        gc.collect()
        for _ in range(2):
            x * 1
        assert not session._stream.released or len(session._stream.released) < 4


def test_large_tensors_go_in_chunks(client: pb.Client) -> None:
    big = np.random.default_rng(5).normal(size=(9, 1 << 20))
    with client.session() as session:
        x = session.tensor(big, requires_grad=True)
        y = x * 2
        np.testing.assert_array_equal(y.numpy(), 2 * big)
        y.backward(gradient=big)
        np.testing.assert_array_equal(x.grad.numpy(), 2 * big)


def test_large_stateless_calls_use_a_session(client: pb.Client) -> None:
    big = np.random.default_rng(6).normal(size=(12, 1 << 20))
    outputs, grads = client.model("same").vjp(big, big)
    np.testing.assert_array_equal(outputs, big)
    np.testing.assert_array_equal(grads, big)
    outputs[0] = 0
    with pytest.raises(errors.BadCotangent):
        client.model("same").vjp(big, big[:3])
    assert client.model("same").evaluate(big).shape == big.shape


def test_large_answers_of_small_requests_use_a_session(client: pb.Client) -> None:
    wide = client.model("wide").evaluate(np.ones(1 << 20))
    assert wide.shape == (9, 1 << 20) and (wide == 1).all()


FORKING = """
import os, sys
import numpy as np
import pullback as pb

client = pb.connect(sys.argv[1])
X = np.array([[1.0, 2.0], [3.0, 4.0]])
x = client.tensor(X, requires_grad=True)
y = x * 2
child = os.fork()
if child == 0:
    status = 1
    try:
        y.sum()
    except pb.errors.SessionLost:
        z = client.tensor(X, requires_grad=True)
        (z * z).sum().backward()
        assert (z.grad.numpy() == 2 * X).all()
        (x * 3).numpy()
        status = 0
    finally:
        os._exit(status)
assert os.waitpid(child, 0)[1] == 0
y.sum().backward()
assert (x.grad.numpy() == 2).all()
"""


def test_a_forked_child(server: Server) -> None:
    # In a process of its own: this one holds a server, whose gRPC does not survive a fork.
    done = subprocess.run([sys.executable, "-c", FORKING, server.target], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_torch_tensors_with_a_graph_are_refused(client: pb.Client) -> None:
    with pytest.raises(TypeError, match="graph"):
        leaf(X, client) * torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    assert (client.tensor(X) * torch.ones(2, 2, dtype=torch.float64)).shape == (2, 2)


def test_lost_parameters_are_not_replaced_by_hosted_ones() -> None:
    """Another function than the one that was trained must not answer in its place without a word."""
    with Server(built_net, dies, threads=1) as server, pb.connect(server.target) as client:
        net = client.model("lost_net")
        with pb.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
        assert not net(np.ones((2, 3))).numpy().any()
        with pytest.raises((errors.SessionLost, errors.WorkerLost)):
            client.model("dies")(np.ones(1))
        for _ in range(2):
            with pytest.raises(errors.SessionLost, match="taken from it"):
                net(np.ones((2, 3)))
        list(net.parameters())
        assert net(np.ones((2, 3))).numpy().any()


@model("lost_net")
def built_net() -> nn.Module:
    """A layer whose parameters are taken, and lost."""
    return built(lambda: nn.Linear(3, 2))


def test_torch_tensors_that_require_grad_do_not_lose_it_silently() -> None:
    with pytest.raises(TypeError, match="detach"):
        pb.tensor(torch.ones(2, requires_grad=True))
