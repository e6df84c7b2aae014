"""Objectives without a real server, torch or scipy: vectors, the cache, and servers that have no sessions."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.unit.client_server import Fake, serving

import pullback as pb
from pullback._packing import Packing
from pullback._points import Points


@pytest.fixture
def server() -> Iterator[Fake]:
    with serving(Fake()) as fake:
        yield fake


@pytest.fixture
def square(server: Fake) -> Iterator[Any]:
    with pb.connect(server.target) as client:
        yield client.model("square")


def loss_of(model: Any, x: Any) -> Any:
    """sum((x**2 - 1)**2)."""
    return model.objective(x, loss="mse_loss", target=np.ones_like(x))


def test_value_and_gradient_are_one_call(server: Fake, square: Any) -> None:
    x = np.array([1.0, 2.0, 3.0])
    o = loss_of(square, x)
    assert o.fun(x) == 9 + 64
    np.testing.assert_array_equal(o.jac(x), 4 * x * (x**2 - 1))
    assert o.value_and_grad(x)[0] == 73
    assert server.calls("ComputeVjp") == 1
    assert o.calls == {"vjp": 1}
    # The solver's own array, changed in place.
    x += 1
    np.testing.assert_array_equal(o.jac(x), 4 * x * (x**2 - 1))
    np.testing.assert_array_equal(o.x0, [1, 2, 3])


def test_what_is_given_is_copied(square: Any) -> None:
    x, target = np.array([1.0, 2.0]), np.zeros(2)
    o = square.objective({"x": x}, loss="mse_loss", target=target)
    target += 100
    x += 1
    assert o.fun(o.x0) == 1 + 16


def test_few_points_are_kept(server: Fake, square: Any) -> None:
    o = loss_of(square, np.ones(2))
    for shift in range(20):
        o.value_and_grad(o.x0 + shift)
    o.value_and_grad(o.x0 + 19)
    o.value_and_grad(o.x0 + 13)
    assert server.calls("ComputeVjp") == 20
    o.value_and_grad(o.x0)
    assert server.calls("ComputeVjp") == 21


def test_large_points_are_not_kept() -> None:
    points = Points()
    first = points.at(np.zeros(2))
    first.hessian = np.zeros((3000, 3000))
    second = points.at(np.ones(2))
    assert points.at(np.ones(2)) is second
    assert points.at(np.zeros(2)) is not first


def test_gradients_are_computed_ahead_where_they_are_wanted(server: Fake, square: Any) -> None:
    # One element, so that the outputs are one number.
    o = square.objective(np.array([3.0]))
    for shift in range(5):
        o.fun(o.x0 + shift)
    assert o.calls == {"vjp": 1, "evaluate": 4}
    o.jac(o.x0 + 4)
    o.fun(o.x0 + 5)
    o.jac(o.x0 + 5)
    assert o.calls == {"vjp": 3, "evaluate": 4}


def test_a_server_without_sessions(server: Fake, square: Any) -> None:
    o = square.objective(np.array([3.0]))
    assert o.hessp([3.0], [2.0]) == [4.0]
    assert o.hessp([3.0], [1.0]) == [2.0]
    assert o.calls["hvp"] == 2
    # They brought the value and the gradient along.
    assert (o.fun([3.0]), o.jac([3.0])) == (9, [6])
    assert o.hess([3.0]) == [[2.0]]
    assert server.calls("ComputeVjp") == 0


def test_residuals_and_their_jacobian(server: Fake, square: Any) -> None:
    x = np.array([1.0, 2.0])
    o = square.objective(x, target=np.array([0.5, 0.5]))
    np.testing.assert_array_equal(o.residuals(x), [0.5, 3.5])
    np.testing.assert_array_equal(o.jacobian(x), np.diag(2 * x))
    o.residuals(x)
    assert (server.calls("Evaluate"), server.calls("ComputeJacobian")) == (1, 1)
    with pytest.raises(pb.errors.BadTensor, match="target"):
        square.objective(x, target=np.ones(3)).residuals(x)


def test_another_version_answers(server: Fake, square: Any) -> None:
    o = square.objective(np.array([3.0]))
    o.jac([3.0])
    server.answers_as = ("3", 0)
    assert o.jac([3.0]) == [6]
    with pytest.raises(pb.errors.Aborted, match="version 2, and version 3 answers"):
        o.jac([4.0])


def test_pickled(square: Any) -> None:
    o = loss_of(square, np.ones(3))
    o.fun(o.x0 + 1)
    copied = pickle.loads(pickle.dumps(o))
    assert copied.fun(o.x0 + 1) == o.fun(o.x0 + 1)
    assert copied.calls == {"vjp": 1}
    assert "3 numbers (x: float64[3])" in repr(copied)


def test_threads(square: Any) -> None:
    o = loss_of(square, np.ones(3))
    points = np.random.default_rng(0).normal(size=(40, 3))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(o.value_and_grad, points))
    for x, (value, gradient) in zip(points, found, strict=True):
        assert value == ((x**2 - 1) ** 2).sum()
        np.testing.assert_array_equal(gradient, 4 * x * (x**2 - 1))
    assert o.calls.total() == 40


def test_packing() -> None:
    values = [np.ones((2, 3)), np.array(5, ml_dtypes.bfloat16), np.zeros((0, 4), np.float32), np.full(2, 7, np.float16)]
    chosen = [("input", "x"), ("param", "x"), ("input", "e"), ("param", "w")]
    packing = Packing(chosen, values)
    named = dict(zip(["input:x", "param:x", "e", "w"], values, strict=True))
    vector = packing.pack(named)
    np.testing.assert_array_equal(vector, [1, 1, 1, 1, 1, 1, 5, 7, 7])
    for value, found in zip(values, packing.split(vector), strict=True):
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert found.flags.owndata or found.base.flags.owndata
        np.testing.assert_array_equal(found, value)
    # What float16 cannot hold.
    assert np.isinf(packing.split(np.append(vector[:-1], 1e9))[3][1])
    with pytest.raises(pb.errors.BadName):
        packing.pack({**named, "more": 1})
    with pytest.raises(ValueError, match=r"\[3, 2\]"):
        packing.pack({**named, "input:x": np.ones((3, 2))})
    with pytest.raises(ValueError, match=r"expected \[9\]"):
        packing.vector(np.ones(8))


def test_what_varies(square: Any) -> None:
    x = np.ones(2)
    with pytest.raises(pb.errors.ComplexUnsupported):
        square.objective(x * 1j)
    with pytest.raises(ValueError, match="floating-point"):
        square.objective(np.arange(2))
    with pytest.raises(ValueError, match="cannot vary"):
        square.objective(np.arange(2), wrt="x")
    with pytest.raises(ValueError, match="targets are fixed"):
        square.objective(x, wrt="target:target")
    with pytest.raises(pb.errors.BadName, match="'nothing'"):
        square.objective(x, wrt=["x", "nothing"])
    o = square.objective(x, wrt=["*"], parameters={"w": np.array([4, 5, 6], np.float32)})
    assert list(o.unpack(o.x0)) == ["x", "w"]
    np.testing.assert_array_equal(o.x0, [1, 1, 4, 5, 6])
