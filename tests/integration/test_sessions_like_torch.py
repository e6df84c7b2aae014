"""Sessions held against local torch in float64, case by case: what issue 3 promises of the thin client, models of every
kind, what other traffic must not change, threads, forks, deaths, and what is left behind.

Tests marked as expected failures are bugs that were found and are not mended yet; strict, so that the mark goes with
the bug. Random programs are in test_sessions_random.py.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from tests import session_models
from torch import nn

import pullback as pb
from pullback import errors
from pullback_server import Server

MODELS = Path(session_models.__file__)
X = np.array([[0.3, -1.2], [2.0, 0.7]])
V = np.array([[1.0, 2.0], [-0.5, 3.0]])
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    torch.set_num_threads(1)
    with Server(MODELS, devices="cpu", threads=1, max_message_bytes=64 * MIB) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[pb.Client]:
    with pb.connect(server.target, timeout=60) as client:
        yield client


def normal(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape)


def local(value: Any, requires_grad: bool = True) -> torch.Tensor:
    return torch.tensor(value, requires_grad=requires_grad)


def equal(found: Any, expected: Any, tolerance: float = 1e-11) -> None:
    """Values and dtype."""
    assert found is not None and expected is not None
    value = expected.detach().resolve_conj().numpy() if isinstance(expected, torch.Tensor) else np.asarray(expected)
    own = found.numpy() if isinstance(found, pb.Tensor) else found
    assert own.dtype == value.dtype
    np.testing.assert_allclose(own, value, rtol=tolerance, atol=tolerance)


def metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as page:
        for line in page.read().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
    raise AssertionError(name)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(params=[False, True], ids=["waiting", "pipelined"])
def session(client: pb.Client, request: Any) -> Iterator[pb.Session]:
    with client.session(pipelined=request.param) as session:
        yield session


# The acceptance list of issue 3, in its words.


def test_y_is_the_sum_of_squares(session: pb.Session) -> None:
    x = pb.tensor(X, requires_grad=True)
    y = x.pow(2).sum()
    y.backward()
    equal(x.grad, 2 * X)


def test_y_is_the_squares_and_a_vector(session: pb.Session) -> None:
    x, v = pb.tensor(X, requires_grad=True), pb.tensor(V)
    y = x.pow(2)
    y.backward(gradient=v)
    equal(x.grad, 2 * X * V)


def test_grad_twice_is_two(session: pb.Session) -> None:
    x = pb.tensor(3.0, requires_grad=True, dtype="float64")
    (g,) = pb.autograd.grad(x.pow(2), x, create_graph=True)
    (h,) = pb.autograd.grad(g, x)
    assert (g.item(), h.item()) == (6, 2)


def test_a_second_backward_is_refused_naming_retain_graph(session: pb.Session) -> None:
    x = pb.tensor(X, requires_grad=True)
    y = x.pow(2).sum()
    y.backward()
    with pytest.raises(errors.GraphFreed, match="retain_graph"):
        y.backward()
    equal(x.grad, 2 * X)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_gradients_of_other_shapes_are_refused_with_both(session: pb.Session, as_tensor: bool) -> None:
    give: Any = pb.tensor if as_tensor else np.asarray
    x = pb.tensor(X, requires_grad=True)
    with pytest.raises(errors.BadCotangent) as caught:
        x.pow(2).sum().backward(gradient=give(np.ones(2)))
    assert "[2]" in str(caught.value) and "[]" in str(caught.value)
    with pytest.raises(errors.BadCotangent) as caught:
        x.pow(2).backward(gradient=give(np.ones(4)))
    assert "[4]" in str(caught.value) and "[2, 2]" in str(caught.value)
    assert x.grad is None


def test_a_function_with_its_own_backward(client: pb.Client, session: pb.Session) -> None:
    x = pb.tensor(X[0], requires_grad=True)
    client.model("square")(x).backward(gradient=V[0])
    equal(x.grad, 2 * X[0] * V[0])


def train(client: pb.Client, name: str, inputs: Any, loss_of: Callable[[Any, Any], Any], steps: int = 4) -> None:
    """Gradients and parameters are torch's in each step, and the loss falls."""
    remote, reference = client.model(name), session_models.local(name)
    optimiser = torch.optim.SGD(reference.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        loss = loss_of(pb, remote(inputs)) if losses else None
        parameters = dict(remote.named_parameters())
        if loss is None:
            loss = loss_of(pb, remote(inputs))
        loss.backward()
        expected = loss_of(torch, reference(torch.tensor(inputs)))
        optimiser.zero_grad()
        expected.backward()
        equal(loss, expected)
        for key, parameter in reference.named_parameters():
            equal(parameters[key].grad, parameter.grad)
        with pb.no_grad():
            for p in parameters.values():
                p -= 0.1 * p.grad
        remote.zero_grad()
        optimiser.step()
        for key, parameter in reference.named_parameters():
            equal(parameters[key], parameter)
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def functional(side: Any) -> Any:
    return pb.functional if side is pb else nn.functional


def constant(side: Any, value: Any) -> Any:
    return value if side is pb else torch.tensor(value)


def test_simple_nn_learns_by_mse(client: pb.Client, session: pb.Session) -> None:
    target = normal(8, 1, seed=1)
    train(client, "simple", normal(8, 10), lambda side, y: functional(side).mse_loss(y, constant(side, target)))


def test_a_classifier_learns_by_cross_entropy(client: pb.Client, session: pb.Session) -> None:
    target = np.random.default_rng(2).integers(0, 4, 9)
    train(client, "classifier", normal(9, 6), lambda side, y: functional(side).cross_entropy(y, constant(side, target)))


def test_a_loss_of_each_sample_with_a_weighting_vector(client: pb.Client, session: pb.Session) -> None:
    target, weights = np.array([0, 3, 1]), np.array([1.0, -2.0, 0.0])
    x, t = pb.tensor(normal(3, 6), requires_grad=True), local(normal(3, 6))
    losses = pb.functional.cross_entropy(client.model("classifier")(x), target, reduction="none")
    expected = nn.functional.cross_entropy(
        session_models.local("classifier")(t), torch.tensor(target), reduction="none"
    )
    losses.backward(gradient=weights)
    expected.backward(torch.tensor(weights))
    equal(losses, expected)
    equal(x.grad, t.grad)


def test_backward_through_a_frozen_input(client: pb.Client, session: pb.Session) -> None:
    frozen, x = pb.tensor(X), pb.tensor(X, requires_grad=True)
    with pytest.raises(errors.NotDifferentiable):
        frozen.pow(2).sum().backward()
    with pytest.raises(errors.NotDifferentiable):
        pb.autograd.grad((x * frozen).sum(), frozen)
    with pytest.raises(errors.NotDifferentiable):
        pb.autograd.grad((x * frozen).sum(), [x, frozen])
    assert frozen.grad is None


def test_third_derivatives_are_the_closed_form(session: pb.Session) -> None:
    at = normal(5)
    x = pb.tensor(at, requires_grad=True)
    y = x.sin() * x.exp()
    closed = [
        np.exp(at) * (np.sin(at) + np.cos(at)),
        2 * np.exp(at) * np.cos(at),
        2 * np.exp(at) * (np.cos(at) - np.sin(at)),
    ]
    for expected in closed:
        (y,) = pb.autograd.grad(y.sum(), x, create_graph=True)
        equal(y, expected)


@pytest.mark.parametrize("name", ["classifier", "attention", "encoder", "smooth", "square", "tied", "picture", "lstm"])
def test_a_penalty_on_the_gradient(client: pb.Client, session: pb.Session, name: str) -> None:
    shape = {"classifier": (3, 6), "tied": (2, 3), "picture": (2, 2, 4, 4), "lstm": (2, 3, 3), "square": (4,)}
    at = normal(*shape.get(name, (2, 3, 4)))
    x, t = pb.tensor(at, requires_grad=True), local(at)
    remote, reference = client.model(name), session_models.local(name)
    if isinstance(reference, nn.Module):
        reference.eval()
    found, expected = remote(x), reference(t)
    if name == "lstm":
        found, expected = found["output_0"], expected[0]
    (g,) = pb.autograd.grad(found.exp().sum(), x, create_graph=True)
    penalty = (g * x).sum() + (g * g).sum()
    penalty.backward()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        again = reference(t)
        (h,) = torch.autograd.grad((again[0] if name == "lstm" else again).exp().sum(), t, create_graph=True)
        ((h * t).sum() + (h * h).sum()).backward()
    equal(found, expected)
    equal(g, h)
    equal(x.grad, t.grad)


# Held graphs: the mask, the statistics, recomputation.


def test_a_held_graph_has_the_mask_of_its_forward(client: pb.Client, session: pb.Session) -> None:
    remote = client.model("noisy")
    at = normal(16, 4)
    before = client.model("noisy").evaluate(at)
    x = pb.tensor(at, requires_grad=True)
    parameters = dict(remote.named_parameters())
    y = remote(x, train=True)
    # Other random numbers are drawn, here and elsewhere.
    for _ in range(3):
        remote(at, train=True)
        client.model("noisy").evaluate(at, train=True)
    value = y.numpy()
    mask = torch.tensor(value != 0)
    assert 0.2 < mask.double().mean() < 0.8
    (y * y).sum().backward()
    reference, t = session_models.local("noisy"), local(at)
    expected = torch.where(mask, 2 * torch.tanh(reference.norm(reference.fc(t))), torch.zeros((), dtype=torch.float64))
    expected.square().sum().backward()
    equal(y, expected)
    equal(x.grad, t.grad)
    for key, parameter in reference.named_parameters():
        equal(parameters[key].grad, parameter.grad, 1e-10)
    # The hosted statistics, by which the eval mode norms, are where they were.
    np.testing.assert_array_equal(client.model("noisy").evaluate(at), before)
    equal(remote(x), torch.tensor(before))


@pytest.mark.parametrize("name", ["checkpointed", "checkpointed_reentrant"])
def test_what_a_checkpoint_recomputes_is_what_was_computed(client: pb.Client, session: pb.Session, name: str) -> None:
    """With a weight that was given with the call and with the hosted ones, and other traffic before the backward."""
    at, weight = normal(4, 3), normal(5, 3, seed=3)
    remote = client.model(name)
    x, w = pb.tensor(at, requires_grad=True), pb.tensor(weight, requires_grad=True)
    y = remote(x, parameters={"fc1.weight": w}, train=True)
    try:
        value = y.numpy()
    except errors.PullbackError as error:
        # Refusing is right where reentrant checkpointing cannot be honest; a wrong gradient is not.
        assert name == "checkpointed_reentrant", error
        return
    for _ in range(3):
        remote(at, train=True)
        client.model(name).evaluate(at, train=True)
    mask = torch.tensor(value != 0).double() * 2
    try:
        (y * y).sum().backward()
    except errors.PullbackError as error:
        assert name == "checkpointed_reentrant", error
        return
    reference = session_models.local(name)
    t, u = local(at), local(weight)
    middle = reference.fc2(torch.tanh(nn.functional.linear(t, u, reference.fc1.bias)))
    expected = (mask * middle).sin()
    expected.square().sum().backward()
    equal(y, expected)
    equal(x.grad, t.grad)
    equal(w.grad, u.grad)


# Backwards of one's own.


@pytest.mark.parametrize("name", ["square_once", "square_numpy", "exp_hidden", "square_detached", "hooked"])
def test_second_derivatives_that_would_be_wrong_are_refused(client: pb.Client, session: pb.Session, name: str) -> None:
    """torch gives a wrong number for each of these, or none. The first order is right."""
    x, t = pb.tensor(X[0], requires_grad=True), local(X[0])
    y = client.model(name)(x)
    (g,) = pb.autograd.grad(y.sum(), x, retain_graph=True)
    (h,) = torch.autograd.grad(session_models.local(name)(t).sum(), t)
    equal(g, h)
    with pytest.raises(errors.OrderUnavailable):
        pb.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(errors.OrderUnavailable):
        # Hidden between things that have every order.
        z = client.model("smooth")(client.model(name)(client.model("smooth")(x)).sin())
        (g,) = pb.autograd.grad(z.sum(), x, create_graph=True)
        (g * x).sum().backward()
    assert x.grad is None


def test_derivatives_as_they_are_written(client: pb.Client, session: pb.Session) -> None:
    """A straight-through estimator and a differentiable hook: torch's numbers, to the second order, or a refusal."""
    for name in ("rounded", "hooked_smooth"):
        x, t = pb.tensor(X[0] * 3, requires_grad=True), local(X[0] * 3)
        y, u = client.model(name)(x), session_models.local(name)(t)
        (h,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        (g,) = pb.autograd.grad(y.sum(), x, retain_graph=True)
        equal(g, h)
        try:
            (g,) = pb.autograd.grad(y.sum(), x, create_graph=True)
            (g * x).sum().backward()
        except errors.OrderUnavailable:
            continue
        (h * t).sum().backward()
        equal(x.grad, t.grad)


def test_third_orders_through_a_custom_backward_are_right_or_refused(client: pb.Client, session: pb.Session) -> None:
    """The probe proves the second order; a third is the third derivative of x * x * x, or is refused."""
    x = pb.tensor(X[0], requires_grad=True)
    y = client.model("square")(x) * x
    (g,) = pb.autograd.grad(y.sum(), x, create_graph=True)
    equal(g, 3 * X[0] ** 2)
    try:
        (h,) = pb.autograd.grad(g.sum(), x, create_graph=True)
        equal(h, 6 * X[0])
        (third,) = pb.autograd.grad(h.sum(), x)
        equal(third, np.full(2, 6.0))
    except errors.OrderUnavailable:
        pass


# Models of other kinds.


@pytest.mark.parametrize("name", ["rnn", "lstm"])
def test_recurrent_networks_twice(client: pb.Client, session: pb.Session, name: str) -> None:
    at = normal(2, 3, 3)
    x, t = pb.tensor(at, requires_grad=True), local(at)
    found = client.model(name)(x)
    wide, hidden = session_models.local(name)(t)
    hidden = hidden if name == "rnn" else hidden[0]
    names = list(found)
    equal(found[names[0]], wide)
    equal(found[names[1]], hidden)
    (g,) = pb.autograd.grad([found[names[0]].sum(), (found[names[1]] ** 2).sum()], x, create_graph=True)
    (h,) = torch.autograd.grad([wide.sum(), (hidden**2).sum()], t, create_graph=True)
    (g**2).sum().backward()
    (h**2).sum().backward()
    equal(x.grad, t.grad)


def test_a_transformer_layer_with_parameters(client: pb.Client, session: pb.Session) -> None:
    remote, reference = client.model("encoder"), session_models.local("encoder").eval()
    at = normal(2, 3, 4)
    parameters = dict(remote.named_parameters())
    remote(at).square().sum().backward()
    reference(torch.tensor(at)).square().sum().backward()
    for key, parameter in reference.named_parameters():
        equal(parameters[key].grad, parameter.grad, 1e-10)


def test_integers_in_gradients_of_the_embedding_out(client: pb.Client, session: pb.Session) -> None:
    remote, reference = client.model("words"), session_models.local("words")
    ids = np.array([[1, 1, 5], [0, 10, 1]])
    parameters = dict(remote.named_parameters())
    remote(pb.tensor(ids)).exp().sum().backward()
    reference(torch.tensor(ids)).exp().sum().backward()
    equal(parameters["embedding.weight"].grad, reference.embedding.weight.grad)
    with pytest.raises(errors.ValueOutOfRange):
        remote(pb.tensor(ids + 5)).numpy()
    with pytest.raises(errors.NotDifferentiable):
        pb.tensor(ids, requires_grad=True)


def test_tied_weights_are_one_parameter(client: pb.Client, session: pb.Session) -> None:
    remote, reference = client.model("tied"), session_models.local("tied")
    parameters = dict(remote.named_parameters())
    assert set(parameters) == set(dict(reference.named_parameters()))
    remote(X.repeat(2)[:6].reshape(2, 3)).exp().sum().backward()
    reference(torch.tensor(X.repeat(2)[:6].reshape(2, 3))).exp().sum().backward()
    for key, parameter in reference.named_parameters():
        equal(parameters[key].grad, parameter.grad)


@pytest.mark.parametrize("name", ["modulus", "holomorphic"])
def test_complex_numbers_twice(client: pb.Client, session: pb.Session, name: str) -> None:
    at = normal(3) + 1j * normal(3, seed=1)
    z, t = pb.tensor(at, requires_grad=True), local(at)
    y, u = client.model(name)(z), session_models.local(name)(t)
    (g,) = pb.autograd.grad(y, z, None if name == "modulus" else at * 1j, create_graph=True)
    (h,) = torch.autograd.grad(u, t, None if name == "modulus" else torch.tensor(at * 1j), create_graph=True)
    equal(g, h)
    (g * g.conj() * z).abs().sum().backward()
    (h * h.conj() * t).abs().sum().backward()
    equal(z.grad, t.grad)


def test_outputs_of_many_kinds(client: pb.Client, session: pb.Session) -> None:
    x, t = pb.tensor(X, requires_grad=True), local(X)
    found = client.model("glimpses")(x)
    assert list(found) == ["first", "again", "turned", "both.0", "both.1"]
    (found["first"] * found["again"] + found["both.1"][0]).sum().backward(retain_graph=True)
    (found["turned"] @ found["both.0"]).sum().backward()
    expected = session_models.local("glimpses")(t)
    (expected["first"] * expected["again"] + expected["both"][1][0]).sum().backward()
    (expected["turned"] @ expected["both"][0]).sum().backward()
    equal(x.grad, t.grad)
    found = client.model("partly_cut")(x)
    assert [found[key].requires_grad for key in ("kept", "cut", "rank")] == [True, False, False]
    assert found["rank"].dtype == np.int64
    with pytest.raises(errors.NotDifferentiable):
        found["cut"].sum().backward()


def test_models_fed_to_each_other(client: pb.Client, session: pb.Session) -> None:
    """The same one twice, one with two paths, and parameters of one that another one's output stands for."""
    x, t = pb.tensor(X[0], requires_grad=True), local(X[0])
    square, smooth, fork = (client.model(name) for name in ("square_any", "smooth", "fork_two"))
    y = fork(square(smooth(x)), smooth(square(x)))
    total = y["sine"].sum() + (y["product"] * x).sum()
    total.backward()
    first = torch.tanh(t) * t
    second = torch.tanh(t**2) * t**2
    ((first**2).sin().sum() + (first**2 * second * t).sum()).backward()
    equal(x.grad, t.grad)
    # Fast weights: a step of gradient descent that is differentiated itself.
    remote, reference = client.model("linear"), session_models.local("linear")
    at = normal(2, 3)
    names = [name for name, _ in reference.named_parameters()]
    start = {name: p.detach().numpy() for name, p in reference.named_parameters()}
    mine = {name: pb.tensor(start[name], requires_grad=True) for name in names}
    theirs = {name: local(start[name]) for name in names}
    g = pb.autograd.grad(remote(at, parameters=mine).square().sum(), list(mine.values()), create_graph=True)
    inner = torch.func.functional_call(reference, theirs, (torch.tensor(at),)).square().sum()
    h = torch.autograd.grad(inner, list(theirs.values()), create_graph=True)
    stepped = {name: p - 0.1 * step for (name, p), step in zip(mine.items(), g, strict=True)}
    expected = {name: p - 0.1 * step for (name, p), step in zip(theirs.items(), h, strict=True)}
    remote(at, parameters=stepped).exp().sum().backward()
    torch.func.functional_call(reference, expected, (torch.tensor(at),)).exp().sum().backward()
    for name in names:
        equal(mine[name].grad, theirs[name].grad)


def test_models_that_write_into_what_they_are_given(client: pb.Client) -> None:
    """What the session holds stays, or its loss is said: never another value without a word."""
    at = normal(2, 3)
    for requires_grad in (False, True, False):
        x = client.tensor(at, requires_grad=requires_grad)
        seen = x.numpy()
        y = client.model("writes_into_its_input")(x)
        equal(y, np.sin(2 * at) * 2 * at)
        np.testing.assert_array_equal(x.numpy(), seen)
        np.testing.assert_array_equal((x * 1).numpy(), seen)
        if requires_grad:
            y.sum().backward()
            equal(x.grad, 2 * (np.cos(2 * at) * 2 * at + np.sin(2 * at)))
    # Its own buffers and parameters: the hosted ones stay, so every call says the same.
    remote = client.model("writes_into_itself")
    for _ in range(3):
        with client.session():
            x = pb.tensor(at, requires_grad=True)
            y = remote(x)
            np.testing.assert_array_equal(remote.evaluate(at), 2 * at)
            equal(y, 2 * at)
            y.sum().backward()
            equal(x.grad, np.full((2, 3), 2.0))
    # The session's own parameters are written to, in torch. Here that is either refused or done on copies.
    with client.session():
        (weight,) = remote.parameters()
        try:
            y = remote(at)
        except errors.ModifiedInPlace:
            with pytest.raises(errors.PullbackError):
                weight.numpy()
    with client.session():
        (weight,) = remote.parameters()
        y = remote(at)
        y.sum().backward()
        equal(y, 2 * at)
        np.testing.assert_array_equal(weight.numpy(), np.ones(3))


# Memory on the server.


@pytest.mark.parametrize("kib", [1, 63, 65, 1024, 5 * 1024])
def test_a_held_graph_does_not_feel_other_traffic(client: pb.Client, kib: int) -> None:
    """On both sides of what travels inline, in slots and in chunks: saved tensors must not lie where others write."""
    at = normal(kib * KIB // 8)
    with client.session() as session:
        x, c = session.tensor(at, requires_grad=True), session.tensor(at)
        y = client.model("smooth")(x) * x.exp()
        z = c * x
        noise = np.full_like(at, 9.0)
        for round in range(6):
            client.model("smooth").evaluate(noise + round)
            client.model("smooth").vjp(noise, noise)
            other = session.tensor(noise + round, requires_grad=True)
            (other * other).backward(gradient=noise)
            del other
        with client.session() as second:
            (second.tensor(noise, requires_grad=True) * noise).backward(gradient=noise)
        y.backward(gradient=at, retain_graph=True)
        z.backward(gradient=at)
        t = local(at)
        (torch.tanh(t) * t * t.exp()).backward(torch.tensor(at))
        equal(x.grad, t.grad + torch.tensor(at) ** 2)
        np.testing.assert_array_equal(c.numpy(), at)


def test_a_saved_value_that_was_changed_is_noticed(client: pb.Client, session: pb.Session) -> None:
    def programs() -> Iterator[Callable[[pb.Tensor], tuple[pb.Tensor, pb.Tensor]]]:
        yield lambda x: ((y := x.exp()), y)
        yield lambda x: ((y := x * 1), y.square())
        yield lambda x: ((y := x * 1)[0], y.square())
        yield lambda x: ((y := x * 1).detach(), y.square())
        yield lambda x: ((y := x * 1).reshape(4), y.tanh() * y)
        yield lambda x: ((y := x * 1), client.model("smooth")(y))
        yield lambda x: ((y := x * 1), client.model("square_any")(y))

    for program in programs():
        x = pb.tensor(X, requires_grad=True)
        written, result = program(x)
        with pb.no_grad():
            pass
        written.mul_(2)
        with pytest.raises(errors.ModifiedInPlace):
            result.sum().backward()
        assert x.grad is None


def test_values_read_before_are_not_stale(client: pb.Client, session: pb.Session) -> None:
    base = pb.tensor(X.copy())
    ways: list[Callable[[pb.Tensor], pb.Tensor]] = [
        lambda x: x[0], lambda x: x.T, lambda x: x.reshape(-1), lambda x: x.detach(), lambda x: x.unsqueeze(0),
        lambda x: x.expand(3, 2, 2), lambda x: x.double(), lambda x: x.squeeze(), lambda x: x.permute(1, 0),
        lambda x: x.flatten(), lambda x: x[..., None], lambda x: x.conj(), lambda x: x[:, 1:],
    ]  # fmt: skip
    views = [way(base) for way in ways]
    expected = X.copy()
    for view, way in zip(views, ways, strict=True):
        for one in (base, *views):
            one.numpy()
        if view.shape != (3, 2, 2):  # an expanded one cannot be written to
            view.mul_(1.5)
            same = torch.tensor(expected)
            way_of = way(same)  # type: ignore[arg-type]
            way_of.mul_(1.5)
            expected = same.numpy()
        for one, its_way in zip(views, ways, strict=True):
            np.testing.assert_array_equal(one.numpy(), its_way(torch.tensor(expected)).numpy())  # type: ignore
        np.testing.assert_array_equal(base.numpy(), expected)


# dtypes and layouts.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "complex64", "complex128"])
def test_dtypes_stay_through_a_backward(client: pb.Client, session: pb.Session, dtype: str) -> None:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    at = normal(4).astype(kind)
    x = pb.tensor(at, requires_grad=True)
    t = torch.tensor(at.astype(np.complex128 if "complex" in dtype else np.float64)).to(getattr(torch, dtype))
    t.requires_grad_()
    y, u = client.model("smooth")(x) * x, torch.tanh(t) * t * t
    y.backward(gradient=at)
    u.backward(t.detach())
    for found, expected in ((y, u), (x.grad, t.grad)):
        assert str(found.dtype) == dtype and found.numpy().dtype == kind
        wide = expected.detach().to(torch.complex128 if "complex" in dtype else torch.float64).numpy()
        np.testing.assert_allclose(found.numpy().astype(wide.dtype), wide, rtol=1e-6)


def test_layouts(client: pb.Client, session: pb.Session) -> None:
    wide = normal(6, 4, 2)
    arrays = [
        wide.T, wide[::2, ::-1], wide.transpose(1, 0, 2)[1:], wide.astype(">f8"), wide.astype(">f8").T, wide[0, 0, 0],
        np.array(2.5), np.zeros((0, 3)), np.zeros((2, 0, 3)), np.asfortranarray(wide),
        np.broadcast_to(wide[:1], (3, 4, 2)), wide[:, 1, :1], np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324]),
    ]  # fmt: skip
    for array in arrays:
        x = pb.tensor(array, requires_grad=True)
        plain = np.ascontiguousarray(array).astype("f8").reshape(np.shape(array))
        assert x.shape == plain.shape and x.dtype == np.float64
        (x * array).backward(gradient=array)
        found, same = x.grad, x.numpy()
        assert found is not None
        np.testing.assert_array_equal(same, plain)
        np.testing.assert_array_equal(np.signbit(same), np.signbit(plain))
        np.testing.assert_array_equal(found.numpy(), plain * plain)
        assert found.numpy().flags.owndata or found.numpy().flags.writeable


@pytest.mark.parametrize("rows", [620, 2500])
def test_large_tensors_that_are_not_contiguous(client: pb.Client, session: pb.Session, rows: int) -> None:
    """5 and 20 MiB, as chunks both ways."""
    at = normal(1024, rows).T
    x = pb.tensor(at, requires_grad=True)
    y = (x * 2).T
    y.backward(gradient=at.T)
    np.testing.assert_array_equal(y.numpy(), 2 * at.T)
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), 2 * at)
    np.testing.assert_array_equal(x[3:, ::100].numpy(), at[3:, ::100])


# Many at once.


def in_threads(*jobs: Callable[[], None]) -> None:
    wrong: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if wrong:
        raise wrong[0]


def test_threads_sessions_and_stateless_calls_do_not_mix(client: pb.Client) -> None:
    shared = client.session()

    def in_a_session(number: int, session: pb.Session | None) -> None:
        rng = np.random.default_rng(number)
        for round in range(12):
            at = rng.normal(size=(int(rng.integers(1, 3000)), 3))
            own = session or client.session(pipelined=bool(round % 2))
            x = own.tensor(at, requires_grad=True)
            y = client.model("smooth")(x)
            (g,) = pb.autograd.grad((y * x).sum(), x, create_graph=round % 3 == 0)
            t = local(at)
            (h,) = torch.autograd.grad((torch.tanh(t) * t * t).sum(), t)
            equal(g, h)
            # Half of it goes to the collector in the middle of things.
            del y, x, g
            if session is None:
                own.close()

    def stateless(number: int) -> None:
        rng = np.random.default_rng(number)
        for _ in range(12):
            at = rng.normal(size=(int(rng.integers(1, 3000)), 3))
            outputs, gradient = client.model("smooth").vjp(at, at)
            t = local(at)
            u = torch.tanh(t) * t
            u.backward(torch.tensor(at))
            equal(outputs, u)
            equal(gradient, t.grad)

    in_threads(
        *(lambda n=n: in_a_session(n, shared) for n in range(3)),
        *(lambda n=n: in_a_session(n, None) for n in range(3, 5)),
        *(lambda n=n: stateless(n) for n in range(5, 7)),
    )
    shared.close()


def test_threads_accumulate_into_one_leaf(client: pb.Client) -> None:
    """As in torch, whose AccumulateGrad takes a lock."""
    x = client.tensor(np.zeros(3), requires_grad=True)

    def work() -> None:
        for _ in range(20):
            (x * 1).sum().backward()

    in_threads(*[work] * 4)
    assert x.grad is not None
    equal(x.grad, np.full(3, 80.0))


def test_collected_tensors_leave_nothing_and_keep_what_others_need(client: pb.Client, server: Server) -> None:
    before = metric(server, "pullback_session_handles"), metric(server, "pullback_sessions")
    session = client.session()
    x = session.tensor(normal(1000), requires_grad=True)
    total = session.tensor(0.0, dtype="float64")
    for _ in range(30):
        total = total + client.model("smooth")(x * 2).sum()
        gc.collect(0)
    total.backward()
    t = local(normal(1000))
    (30 * (torch.tanh(2 * t) * 2 * t).sum()).backward()
    equal(x.grad, t.grad, 1e-10)
    held = metric(server, "pullback_session_handles") - before[0]
    assert held < 12
    del total, x
    gc.collect()
    session.tensor(1.0).sin().numpy()
    session.tensor(1.0).sin().numpy()
    until(lambda: metric(server, "pullback_session_handles") - before[0] <= 4)
    session.close()
    # Fewer: what earlier tests left to the garbage collector may have gone as well.
    until(lambda: metric(server, "pullback_sessions") <= before[1])
    until(lambda: metric(server, "pullback_session_handles") <= before[0])


def test_metrics_return_to_zero() -> None:
    with Server(MODELS, devices="cpu", threads=1) as server, pb.connect(server.target) as client:
        for pipelined in (False, True):
            session = client.session(pipelined=pipelined)
            x = session.tensor(normal(300_000), requires_grad=True)
            y = client.model("smooth")(x)
            y.sum().backward()
            assert x.grad is not None
            x.grad.numpy()
            assert metric(server, "pullback_sessions") == 1
            assert metric(server, "pullback_session_retained_bytes") >= 2 * 8 * 300_000
            del x, y
            gc.collect()
            # Nothing is sent from __del__; the next op takes the releases along.
            session.tensor(1.0).sin().numpy()
            until(lambda: metric(server, "pullback_session_retained_bytes") < 1000)
            # A session that is collected ends, however its tensors go.
            z = session.tensor(normal(1000)) * 2
            del session
            z.numpy()
            del z
            gc.collect()
            until(lambda: metric(server, "pullback_sessions") == 0)
            until(lambda: metric(server, "pullback_session_retained_bytes") == 0)
            until(lambda: metric(server, "pullback_session_handles") == 0)
            until(lambda: metric(server, "pullback_bytes_in_flight") == 0)


# Ends.


def test_tensors_outlive_their_session_with_a_clear_error(client: pb.Client) -> None:
    session = client.session()
    x = session.tensor(X, requires_grad=True)
    y = x.pow(2)
    big = session.tensor(normal(300_000)) * 2
    total = y.sum()
    shape = y.shape
    session.close()
    assert (y.shape, y.dtype, y.requires_grad) == (shape, np.float64, True)
    attempts: list[Callable[[], Any]] = [
        total.backward, lambda: y + 1, lambda: 1 + y, big.numpy, lambda: big[0], lambda: pb.autograd.grad(total, x),
        lambda: y.add_(1), lambda: client.model("smooth")(y),
        lambda: pb.functional.mse_loss(y, X), lambda: client.model("smooth")(X, parameters={"w": y}),
    ]  # fmt: skip
    for attempt in attempts:
        began = time.monotonic()
        with pytest.raises(errors.SessionLost):
            attempt()
        assert time.monotonic() - began < 2
    assert x.grad is None and f"{y!r} {big!r}".count("tensor(") == 2
    # What is known here is still good, here and in another session.
    x.pow(2).sum().backward()
    equal(x.grad, 2 * X)


def test_pipelined_failures_and_what_comes_after(client: pb.Client) -> None:
    with client.session(pipelined=True) as session:
        x = session.tensor(X, requires_grad=True)
        good = x.sin()
        bad = x @ session.tensor(np.ones((3, 3)))
        chain = bad
        for _ in range(50):
            chain = chain * 1.5 + good
        other = (good * 2).sum()
        with pytest.raises(errors.PullbackError, match="matmul"):
            chain.sum().backward()
        other.backward()
        equal(x.grad, 2 * np.cos(X))
        with pytest.raises(errors.PullbackError, match="matmul"):
            chain.numpy()


def test_a_refused_in_place_operation_leaves_a_leaf_a_leaf(client: pb.Client) -> None:
    with client.session(pipelined=True) as session:
        x, w = (session.tensor(X, requires_grad=True) for _ in range(2))
        with pytest.raises(errors.BadOperand, match="leaf"):
            x.mul_(w).numpy()
        (x * w).sum().backward()
        assert x.is_leaf
        equal(w.grad, X)
        equal(x.grad, X)


FORKING = """
import gc, os, signal, sys
import numpy as np
import pullback as pb
from pullback import errors

X = np.array([[0.3, -1.2], [2.0, 0.7]])
client = pb.connect(sys.argv[1], timeout=30)
session = client.session(pipelined=True)
x = session.tensor(X, requires_grad=True)
y = x.pow(2).sum()
for _ in range(12):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        status = 1
        try:
            for attempt in (y.backward, y.numpy, lambda: y * 2, lambda: session.tensor(X)):
                try:
                    attempt()
                    os._exit(2)
                except errors.SessionLost:
                    pass
            with client.session():
                z = pb.tensor(X, requires_grad=True)
                client.model("smooth")(z).sum().backward()
                z.grad.numpy()
            gc.collect()
            status = 0
        finally:
            # A child that hangs is ended by the alarm.
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
y.backward()
np.testing.assert_allclose(x.grad.numpy(), 2 * X)
session.close()
"""


def test_forks_while_a_session_is_open(server: Server) -> None:
    # In a process of its own: this one holds a server, whose gRPC does not survive a fork.
    done = subprocess.run([sys.executable, "-c", FORKING, server.target], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_pickling(client: pb.Client) -> None:
    session = client.session()
    x = session.tensor(X, requires_grad=True)
    y = x * 2
    for thing in (x, y, session):
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(thing)
    again = pickle.loads(pickle.dumps(client.model("smooth")))
    assert np.isfinite(again(X).numpy()).all()
    session.close()


def test_a_worker_that_is_killed_in_the_middle() -> None:
    with Server(MODELS, devices="cpu", threads=1) as server, pb.connect(server.target, timeout=30) as client:
        # Of this very server; others of this process have workers too.
        assert server._app is not None
        victim = server._app._fleet.workers[0].pid
        assert victim is not None
        piped, idle = client.session(pipelined=True), client.session()
        held, other = idle.tensor(X, requires_grad=True) * 2, piped.tensor(X, requires_grad=True)
        total = held.sum()
        killer = threading.Timer(0.2, os.kill, (victim, signal.SIGKILL))
        killer.start()
        began = time.monotonic()
        with pytest.raises(errors.SessionLost, match="lost"):
            client.model("takes_a_moment")(other)
        attempts: list[Callable[[], Any]] = [total.backward, lambda: held[0], lambda: client.model("smooth")(held)]
        for attempt in attempts:
            with pytest.raises(errors.SessionLost, match="lost"):
                attempt()
        assert time.monotonic() - began < 5
        x = client.tensor(X, requires_grad=True)
        until_works(lambda: client.model("smooth")(x).sum().backward())
        t = local(X)
        (torch.tanh(t) * t).sum().backward()
        equal(x.grad, t.grad)
        until(lambda: metric(server, "pullback_sessions") == 1)


def until_works(attempt: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            attempt()
            return
        except (errors.Unavailable, errors.SessionLost):
            assert time.monotonic() < end
            time.sleep(0.2)


# Found by test_sessions_random.py.


COPIES: list[Callable[[Any], Any]] = [
    lambda x: x[[0, 1]],
    lambda x: x[X > -9].reshape(2, 2),
    lambda x: x.to("float32" if isinstance(x, pb.Tensor) else torch.float32),
    lambda x: x.expand(2, 2, 2).reshape(8)[:4].reshape(2, 2),
    lambda x: x.T.reshape(4),
]


@pytest.mark.parametrize("index", range(len(COPIES)))
def test_copies_are_no_views(session: pb.Session, index: int) -> None:
    """SILENT: x.grad stays None for good, though everything depends on x."""

    def program(x: Any, w: Any) -> Any:
        batch = COPIES[index](x)
        batch *= w
        return batch.sum() + (x * x).sum()

    x, w = pb.tensor(X, requires_grad=True), pb.tensor(3.0, requires_grad=True, dtype="float64")
    t, u = local(X), local(np.float64(3.0))
    for _ in range(2):
        program(x, w).backward()
        program(t, u).backward()
    (x * 2 * w).sum().backward()
    (t * 2 * u).sum().backward()
    assert x.is_leaf
    equal(w.grad, u.grad, 1e-6)
    equal(x.grad, t.grad, 1e-6)


def test_copies_do_not_make_their_source_require_grad(session: pb.Session) -> None:
    x, w = pb.tensor(X), pb.tensor(X, requires_grad=True)
    batch = x[[0, 1]]
    batch *= w
    assert batch.requires_grad
    assert not x.requires_grad and x.is_leaf


@pytest.mark.parametrize("key", [0, slice(0, 1), (slice(None), 1), ...])
def test_items_are_set_under_no_grad(session: pb.Session, key: Any) -> None:
    """w[0] = 0 under no_grad is how weights are pruned. INTERNAL, after it has been done."""
    x, t = pb.tensor(X, requires_grad=True), local(X)
    with pb.no_grad(), torch.no_grad():
        x[key] = 5.0
        t[key] = 5.0
        x[key] += 1
        t[key] += 1
    equal(x, t)
    (x * x).sum().backward()
    equal(x.grad, 2 * t.detach())


def test_views_by_models_of_what_needs_no_grad(client: pb.Client) -> None:
    """Values follow what is written to the base, and so do gradients."""
    for _ in range(2):
        base, w = client.tensor(np.zeros((2, 2))), client.tensor(X, requires_grad=True)
        view = client.model("same")(base)
        base.copy_(w * 3)
        other = client.tensor(V, requires_grad=True)
        (view * other).sum().backward()
    b, t = torch.zeros(2, 2, dtype=torch.float64), local(X)
    v = session_models.local("same")(b)
    b.copy_(t * 3)
    (v * torch.tensor(V)).sum().backward()
    equal(view, 3 * X)
    equal(other.grad, 3 * X)
    equal(w.grad, t.grad)


def test_views_of_inputs_from_the_first_call_on() -> None:
    """Whether a model's output shares its input's memory does not depend on what anybody called before."""
    with Server(MODELS, devices="cpu", threads=1) as server, pb.connect(server.target) as client:
        seen = []
        for _ in range(3):
            x = client.tensor(np.zeros(2))
            client.model("same")(x).add_(1)
            seen.append(x.tolist())
        assert seen[0] == seen[1] == seen[2]


def test_models_that_write_behind_autograds_back(client: pb.Client) -> None:
    """SILENT: x says [1, 2], the server computes with [2, 4]; or not, in the first call."""
    for _ in range(2):
        x = client.tensor(np.array([1.0, 2.0]))
        client.model("writes_behind")(x)
        assert (x * 1).tolist() == x.tolist()


def test_integers_written_to_need_no_grad(session: pb.Session) -> None:
    x, n = pb.tensor(X, requires_grad=True), pb.tensor(np.zeros((2, 2), np.int64))
    n.copy_(x)
    assert n.tolist() == [[0, -1], [2, 0]]
    assert not n.requires_grad and n.is_leaf


def test_a_number_that_was_written_to_through_a_view(session: pb.Session) -> None:
    a, b = pb.tensor(2.0, requires_grad=True, dtype="float64"), pb.tensor(3.0, dtype="float64")
    v = b.reshape(1)
    v.add_(a)
    found = pb.autograd.grad(v.sum(), [b, a], allow_unused=True)
    assert [one.item() if one is not None else None for one in found] == [1, 1]


def test_real_and_imaginary_parts(session: pb.Session) -> None:
    z = pb.tensor(np.array([1 + 2j]), requires_grad=True)
    assert (z.real * z.imag).tolist() == [2]


def test_a_number_transposed(session: pb.Session) -> None:
    assert pb.tensor(2.0).T.item() == 2
    x = pb.tensor(3.0, requires_grad=True, dtype="float64")
    (x.sum().T * x).backward()
    equal(x.grad, np.float64(6.0))


def test_setting_items_to_wider_values(session: pb.Session) -> None:
    """torch drops leading axes of extent 1, and expands what is too small before it looks for overlaps."""
    x, t = pb.tensor(np.zeros((2, 3))), torch.zeros(2, 3, dtype=torch.float64)
    w, u = pb.tensor(normal(1, 1, 3), requires_grad=True), local(normal(1, 1, 3))
    for one, wide, values in ((x, w, np.ones((1, 1, 3))), (t, u, torch.ones(1, 1, 3))):
        one[0] = wide * 2
        one[1] = values[0]
        one[()] = one[-1]
        one[:, 1] = one[0, 0]
        one[0] = wide
    equal(x, t)
    (x * x).sum().backward()
    (t * t).sum().backward()
    equal(w.grad, u.grad)
    with pytest.raises(errors.BadOperand, match="single memory location"):
        x[0, :2] = x[0, 1:]
        x.numpy()
    with pytest.raises(errors.BadOperand):
        x[0] = np.ones((2, 3))
        x.numpy()


# The client's idea of what the server holds.


@pytest.mark.parametrize("model", [False, True])
def test_the_same_tensor_again(client: pb.Client, session: pb.Session, model: bool) -> None:
    """A cast to the dtype that it has, a model that returns its input: torch has one tensor for both."""
    for _ in range(2):
        x = pb.tensor(X)
        x * 1
        y = client.model("same")(x) if model else x.double()
        assert model or y is x
        y.requires_grad_()
        assert y.is_leaf and x.is_leaf
        shared = x.requires_grad
        (x * y).sum().backward()
        if shared:
            equal(x.grad, 2 * X)
        equal(y.grad, 2 * X if shared else X)
        y.grad = x.grad = None
        y.requires_grad_(False)
        assert not x.requires_grad
        with pytest.raises(errors.NotDifferentiable):
            (x * y).sum().backward()
    z = pb.tensor(X + 1j, requires_grad=True)
    assert x.real is x and x.conj() is x and z.to("complex128") is z
    assert z.real.to("float32").dtype == np.float32


def test_casts_of_what_is_on_its_way(session: pb.Session) -> None:
    x = pb.tensor(X)
    for name in ("float64", "float32", "int64", "bool", "complex128"):
        found = (x > 0).to(name)
        equal(found, (X > 0).astype(name))
    equal((x > 0).double() * 2, (X > 0) * 2.0)


def test_a_detached_view_does_not_touch_its_source(session: pb.Session) -> None:
    """The memory is one, the graphs are not."""
    x, w, b = pb.tensor(X, requires_grad=True), pb.tensor(V, requires_grad=True), pb.tensor(X)
    for source in (x, b):
        cut = source.detach()
        cut.mul_(w)
        assert cut.requires_grad and not cut.is_leaf
    assert x.is_leaf and x.requires_grad and b.is_leaf and not b.requires_grad
    (x * x).sum().backward()
    equal(x.grad, 2 * X * V)
    row = b[0]
    b.add_(w)
    assert b.requires_grad and row.requires_grad and not row.is_leaf
    row.sum().backward()
    equal(w.grad, [[1, 1], [0, 0]] * np.ones(1))


def test_views_whose_answers_nobody_looked_at(session: pb.Session) -> None:
    """Views of views that are gone, written to on either side."""
    b, w, t, u = pb.tensor(X), pb.tensor(V, requires_grad=True), torch.tensor(X), local(V)
    for base, other in ((b, w), (t, u)):
        flat = base.reshape(4).unsqueeze(0).T
        flat.mul_(other.reshape(4, 1))
        turned = base.T[0]
        base *= other
        (flat.sum() * 2 + turned.sum() * 3 + base.sum()).backward()
    equal(w.grad, u.grad)


def test_leaves_that_are_frozen_after_the_forward(session: pb.Session) -> None:
    """As in torch: the backward runs, and nothing is accumulated."""
    x = pb.tensor(X, requires_grad=True)
    y = (x * x).sum()
    x.requires_grad_(False)
    y.backward()
    assert x.grad is None
    with pytest.raises(errors.MissingCotangent):
        z = pb.tensor(X, requires_grad=True)
        u = z * 2
        z.requires_grad_(False)
        u.backward()
    x.requires_grad_()
    (x * x).sum().backward()
    equal(x.grad, 2 * X)


def test_a_session_that_has_ended_makes_no_tensors(client: pb.Client) -> None:
    session = client.session()
    x = session.tensor(X)
    session.close()
    with pytest.raises(errors.SessionLost, match="tensor"):
        session.tensor(X)
    # What was made before is data.
    equal(x * 1, X)


def test_threads_of_several_sessions_accumulate_into_one_leaf(client: pb.Client) -> None:
    x = client.tensor(np.zeros(3), requires_grad=True)

    def work(pipelined: bool) -> None:
        with client.session(pipelined=pipelined) as session:
            for _ in range(15):
                (x * session.tensor(np.ones(3))).sum().backward()

    in_threads(*(lambda n=n: work(bool(n % 2)) for n in range(4)))
    assert x.grad is not None
    equal(x.grad, np.full(3, 60.0))
