"""Objectives under scipy's solvers, against the same problems with derivatives computed here."""

from __future__ import annotations

import pickle
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from scipy.optimize import Bounds, least_squares, minimize, rosen, rosen_der, rosen_hess, rosen_hess_prod
from sklearn.datasets import load_breast_cancer, load_digits
from tests import zoo
from torch import nn

import pullback as pb
from pullback_server import Server, model, spec

F64 = "float64"
LOGISTIC = Path(__file__).parents[2] / "examples" / "models" / "logistic.py"
START = np.linspace(-1.2, 1.0, 12)


@model("rosenbrock", inputs={"x": spec(F64, ["n"])})
def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


@model("decay", inputs={"p": spec(F64, [3]), "t": spec(F64, ["m"])})
def decay(p: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return p[0] * torch.exp(-p[1] * t) + p[2]


@model("parts", inputs={"a": spec(F64, ["n", 2]), "b": spec(F64, []), "c": spec("float32", [3], low=0.1, high=2)})
def parts(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> dict[str, torch.Tensor]:
    """Several inputs, one 0-d, one float32 with bounds; linear in b. A count goes along, which is not minimised."""
    return {"value": (a.sin() * a.flip(0)).sum() + b * 3 + c.double().log().sum() * a[0, 0], "count": torch.tensor(7)}


@model("outputs", inputs={"x": spec(F64, ["n"]), "s": spec(F64, [])})
def outputs(x: torch.Tensor, s: torch.Tensor) -> dict[str, torch.Tensor]:
    """The second output does not depend on s, the third on nothing."""
    return {"wide": torch.outer(x, x) * s, "narrow": x.sum().exp(), "cut": x.detach() * 2}


@model("trained", inputs={"input": spec("float32", ["batch", 4])})
def trained() -> nn.Module:
    return zoo.seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2)))


class Twisted(torch.autograd.Function):
    """x0² + x1², with a backward whose derivative is not symmetric: (2 x0, 2 x1 + x0)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return g * torch.stack([2 * x[0], 2 * x[1] + x[0]])


@model("twisted", inputs={"x": spec(F64, [2])}, intended={"gradient": "twisted for a test"})
def twisted(x: torch.Tensor) -> torch.Tensor:
    return Twisted.apply(x)  # type: ignore[no-any-return, no-untyped-call]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    models = [
        rosenbrock,
        decay,
        parts,
        outputs,
        trained,
        twisted,
        zoo.once,
        zoo.modulus,
        zoo.holomorphic,
        zoo.half_used,
    ]
    with Server(*models, zoo.not_finite, str(LOGISTIC), threads=1) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[pb.Client]:
    with pb.connect(server.target, timeout=100) as found:
        yield found


@pytest.fixture
def banana(client: pb.Client) -> Any:
    return client.model("rosenbrock").objective(START)


def calls(objective: Any) -> dict[str, int]:
    found = dict(objective.calls)
    objective.calls.clear()
    return found


# ---- solvers


@pytest.mark.parametrize(
    ("method", "second"),
    [
        *((name, "hessp") for name in ("Newton-CG", "trust-ncg", "trust-krylov", "trust-constr")),
        *((name, "hess") for name in ("Newton-CG", "trust-exact", "trust-ncg")),
        *((name, "") for name in ("CG", "BFGS", "L-BFGS-B", "SLSQP")),
    ],
)
def test_solvers_go_the_way_they_go_with_local_derivatives(banana: Any, method: str, second: str) -> None:
    here: dict[str, Any] = {"hessp": rosen_hess_prod, "hess": rosen_hess}
    options: dict[str, Any] = {"gtol": 1e-6} if method == "trust-constr" else {}
    local = minimize(
        rosen, START, method=method, jac=rosen_der, options=options, **({second: here[second]} if second else {})
    )
    derivatives = {second: getattr(banana, second)} if second else {}
    found = minimize(banana.fun, banana.x0, method=method, jac=banana.jac, options=options, **derivatives)
    assert found.success
    np.testing.assert_allclose(found.x, local.x, atol=1e-5)
    # What is summed in another order may take CG another way round.
    assert abs(found.nit - local.nit) <= (0 if second else local.nit // 10)
    if second:
        assert found.nfev == local.nfev
        np.testing.assert_allclose(found.x, 1, atol=1e-4)


def test_each_point_is_computed_once(banana: Any) -> None:
    found = minimize(banana.fun, banana.x0, jac=banana.jac, method="L-BFGS-B")
    assert calls(banana) == {"vjp": found.nfev}
    found = minimize(banana.value_and_grad, banana.x0, jac=True, method="BFGS")
    assert calls(banana) == {"vjp": found.nfev}
    found = minimize(banana.fun, banana.x0, method="Nelder-Mead", options={"maxiter": 40})
    # Where nobody asks for gradients none is computed, but for the first.
    assert calls(banana).keys() <= {"evaluate", "vjp"}
    found = minimize(banana.fun, banana.x0, jac=banana.jac, hess=banana.hess, method="trust-exact")
    used = calls(banana)
    assert used["hessian"] == found.nhev
    assert used.get("vjp", 0) + used.get("evaluate", 0) <= 2


def test_products_at_one_point_share_its_graph(banana: Any) -> None:
    products = [banana.hessp(START, row) for row in np.eye(12)]
    np.testing.assert_allclose(products, rosen_hess(START), rtol=1e-12, atol=1e-9)
    assert calls(banana) == {"call": 1, "grad": 13}
    # The gradient and the value came along; the next point's come with a graph, and one may step back.
    assert banana.fun(START) == pytest.approx(rosen(START), rel=1e-14)
    np.testing.assert_allclose(banana.jac(START), rosen_der(START), rtol=1e-12)
    assert calls(banana) == {}
    banana.fun(START + 1)
    banana.hessp(START, START)
    banana.hessp(START + 1, START)
    assert calls(banana) == {"call": 1, "grad": 3}


@pytest.mark.parametrize("data", ["cancer", "digits"])
def test_trust_ncg_on_a_hosted_logistic_loss(client: pb.Client, data: str) -> None:
    if data == "cancer":
        x, y = load_breast_cancer(return_X_y=True)
        x = (x - x.mean(0)) / x.std(0)
    else:
        x, y = load_digits(return_X_y=True)
        x, y = np.tile(x / 16, (2, 1)), np.tile(y == 8, 2)
    y = y.astype(np.float64)

    def value(w: Any) -> Any:
        z = x @ w
        return np.mean(np.logaddexp(0, z) - y * z) + 5e-4 * w @ w

    def gradient(w: Any) -> Any:
        return x.T @ (1 / (1 + np.exp(-x @ w)) - y) / len(y) + 1e-3 * w

    def product(w: Any, p: Any) -> Any:
        s = 1 / (1 + np.exp(-x @ w))
        return x.T @ (s * (1 - s) * (x @ p)) / len(y) + 1e-3 * p

    start = np.zeros(x.shape[1])
    options = {"gtol": 1e-9}
    local = minimize(value, start, jac=gradient, hessp=product, method="trust-ncg", options=options)
    o = client.model("logistic").objective({"weights": start, "data": x, "labels": y}, wrt="weights")
    found = minimize(o.fun, o.x0, jac=o.jac, hessp=o.hessp, method="trust-ncg", options=options)
    assert found.success
    assert local.success
    assert (found.nit, found.nfev) == (local.nit, local.nfev)
    np.testing.assert_allclose(found.x, local.x, rtol=1e-6, atol=1e-8)
    used = calls(o)
    # 1.8 MB of images went once, to the session; the little of the other goes with each call there is outside of it.
    assert used.get("vjp", 0) == (1 if data == "cancer" else 0)
    assert used["call"] <= found.nfev + 1


def test_least_squares(client: pb.Client) -> None:
    t = np.linspace(0, 4, 40)
    y = 3 * np.exp(-1.3 * t) + 0.5

    def jacobian(p: Any) -> Any:
        decayed = np.exp(-p[1] * t)
        return np.stack([decayed, -p[0] * t * decayed, np.ones_like(t)], 1)

    local = least_squares(lambda p: p[0] * np.exp(-p[1] * t) + p[2] - y, np.ones(3), jac=jacobian)
    o = client.model("decay").objective({"p": np.ones(3), "t": t}, wrt="p", target=y)
    found = least_squares(o.residuals, o.x0, jac=o.jacobian)
    assert (found.nfev, found.njev) == (local.nfev, local.njev)
    np.testing.assert_allclose(found.x, [3, 1.3, 0.5], atol=1e-7)
    assert calls(o) == {"evaluate": found.nfev, "jacobian": found.njev}
    large = least_squares(o.residuals, o.x0, jac=o.jacobian_operator, tr_solver="lsmr", x_scale=1.0)
    np.testing.assert_allclose(large.x, [3, 1.3, 0.5], atol=1e-5)
    assert calls(o)["jvp"] > 0
    bounded = least_squares(o.residuals, o.x0, jac=o.jacobian, bounds=([0, 0, 0.6], [10, 10, 10]))
    assert bounded.x[2] == pytest.approx(0.6, abs=1e-3)


def test_residuals_of_several_outputs(client: pb.Client) -> None:
    x, s = np.array([0.3, -0.2, 0.5]), np.array(1.7)
    targets = {"narrow": np.array(2.0)}
    o = client.model("outputs").objective({"x": x, "s": s}, targets=targets)
    wanted = [*(np.outer(x, x) * s).ravel(), np.exp(x.sum()) - 2, *(2 * x)]
    np.testing.assert_allclose(o.residuals(o.x0), wanted, rtol=1e-14)
    wide = torch.autograd.functional.jacobian(
        lambda v: torch.cat([(torch.outer(v[:3], v[:3]) * v[3]).ravel(), v[:3].sum().exp()[None]]),
        torch.from_numpy(np.append(x, s)),
    )
    j = o.jacobian(o.x0)
    np.testing.assert_allclose(j, np.concatenate([wide.numpy(), np.zeros((3, 4))]), rtol=1e-12)
    operator = o.jacobian_operator(o.x0)
    u, v = np.random.default_rng(0).normal(size=13), np.random.default_rng(1).normal(size=4)
    np.testing.assert_allclose(operator @ v, j @ v, rtol=1e-12)
    np.testing.assert_allclose(operator.T @ u, j.T @ u, rtol=1e-12)


# ---- vectors


def test_several_arrays_pack_and_differentiate(client: pb.Client) -> None:
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 2)), np.array(0.4), rng.uniform(0.5, 1, 3).astype(np.float32)
    o = client.model("parts").objective((a.T.copy().T, b, c))
    assert o.x0.shape == (10,)
    assert {n: (v.dtype, v.shape) for n, v in o.unpack(o.x0).items()} == {
        "a": (np.float64, (3, 2)), "b": (np.float64, ()), "c": (np.float32, (3,)),
    }  # fmt: skip
    np.testing.assert_array_equal(o.pack({"c": c, "b": b, "a": a}), o.x0)
    lower, upper = o.bounds()
    assert np.isinf(lower[:7]).all()
    assert np.isinf(upper[:7]).all()
    # As near to the declared 0.1 as float32 comes without being below it.
    assert 0.1 <= lower[7] < 0.1 + 1e-7
    at = np.concatenate([o.x0[:7], lower[7:]])
    assert np.isfinite(o.fun(at))

    def local(v: torch.Tensor) -> torch.Tensor:
        x = v[:6].reshape(3, 2)
        return (x.sin() * x.flip(0)).sum() + v[6] * 3 + v[7:].log().sum() * x[0, 0]

    x = torch.from_numpy(o.x0)
    p = rng.normal(size=10).astype(np.float32).astype(np.float64)
    hessian = torch.autograd.functional.hessian(local, x).numpy()
    assert o.fun(o.x0) == pytest.approx(local(x).item(), rel=1e-7)
    np.testing.assert_allclose(o.jac(o.x0), torch.autograd.functional.jacobian(local, x).numpy(), rtol=1e-6)
    for found in (o.hess(o.x0), o):
        product = found @ p if isinstance(found, np.ndarray) else found.hessp(o.x0, p)
        np.testing.assert_allclose(product, hessian @ p, rtol=1e-5, atol=1e-6)
    stateless = client.model("parts").objective((a, b, c))
    stateless._function._patience = 0
    np.testing.assert_allclose(stateless.hessp(o.x0, p), hessian @ p, rtol=1e-5, atol=1e-6)
    assert calls(stateless) == {"hvp": 1}
    # What varies linearly alone has no curvature, whichever way it is asked.
    linear = client.model("parts").objective({"a": a, "b": b, "c": c}, wrt="b")
    assert linear.hessp([0.4], [1.0]) == linear.hess([0.4]) == 0
    found = minimize(o.fun, o.x0, jac=o.jac, bounds=Bounds(*o.bounds()), method="L-BFGS-B", options={"maxiter": 3})
    assert found.fun < o.fun(o.x0)


def test_hosted_and_given_parameters_vary(client: pb.Client) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 4)).astype(np.float32), rng.integers(0, 2, 20)
    remote = client.model("trained")
    given = np.zeros(2, np.float32)
    o = remote.objective(
        x,
        wrt=["0.*", "3.bias"],
        loss=pb.Loss("cross_entropy", weight=[1.0, 2.0]),
        target=y,
        parameters={"3.bias": given},
    )
    start = o.unpack(o.x0)
    assert list(start) == ["0.weight", "0.bias", "3.bias"]
    np.testing.assert_array_equal(start["3.bias"], given)
    hosted = {n: p.numpy() for n, p in remote.named_parameters()}
    np.testing.assert_array_equal(start["0.weight"], hosted["0.weight"])

    def local(v: torch.Tensor) -> torch.Tensor:
        w, b, last = v[:20].reshape(5, 4), v[20:25], v[25:]
        logits = torch.tanh(torch.from_numpy(x).double() @ w.T + b) @ torch.from_numpy(hosted["3.weight"]).double().T
        weight = torch.tensor([1.0, 2.0], dtype=torch.float64)
        return nn.functional.cross_entropy(logits + last, torch.from_numpy(y), weight=weight)

    at = torch.from_numpy(o.x0)
    assert o.fun(o.x0) == pytest.approx(local(at).item(), rel=1e-6)
    np.testing.assert_allclose(o.jac(o.x0), torch.autograd.functional.jacobian(local, at), atol=1e-6)
    p = rng.normal(size=27)
    product = torch.autograd.functional.vhp(local, at, torch.from_numpy(p))[1]
    np.testing.assert_allclose(o.hessp(o.x0, p), product, atol=1e-5)
    np.testing.assert_allclose(o.hess(o.x0) @ p, product, atol=1e-5)
    found = minimize(o.fun, o.x0, jac=o.jac, hessp=o.hessp, method="trust-ncg", options={"gtol": 1e-3})
    assert found.success
    assert found.fun < o.fun(o.x0)
    # The hosted ones stay.
    assert remote.objective(x, wrt="0.bias", loss="cross_entropy", target=y).x0 == pytest.approx(hosted["0.bias"])
    # In train mode the same dropout at each call.
    noisy = remote.objective(x, wrt="0.bias", loss="cross_entropy", target=y, train=True)
    assert noisy.fun(noisy.x0) == noisy._function.stateless("evaluate", noisy._packing.named(noisy.x0))
    assert noisy.fun(noisy.x0) != noisy.fun(noisy.x0 + 1e-3)


def test_what_a_solver_changes_in_place(banana: Any) -> None:
    x = banana.x0
    value, gradient = banana.fun(x), banana.jac(x)
    gradient *= 0
    x += 0.5
    np.testing.assert_allclose(banana.jac(START), rosen_der(START), rtol=1e-12)
    assert banana.fun(x) == pytest.approx(rosen(START + 0.5), rel=1e-14) != value
    banana.hess(x)[:] = 0
    np.testing.assert_allclose(banana.hess(x), rosen_hess(x), rtol=1e-12)
    banana.x0[:] = 7
    np.testing.assert_array_equal(banana.x0, START)


def test_nan_and_inf_are_values(client: pb.Client) -> None:
    o = client.model("not_finite").objective(np.array([-1.0]))
    assert np.isnan(o.fun([-1.0]))
    assert o.fun([0.0]) == -np.inf
    assert np.isinf(o.jac([0.0])).all()
    assert np.isnan(o.fun([np.nan]))


# ---- what is refused


def test_what_cannot_be_an_objective(client: pb.Client) -> None:
    ones = np.ones(3)
    with pytest.raises(pb.errors.ComplexUnsupported, match="real view"):
        client.model("modulus").objective(ones * 1j)
    with pytest.raises(pb.errors.ComplexUnsupported):
        client.model("holomorphic").objective(ones + 0j)
    with pytest.raises(pb.errors.BadName, match="'nothing'"):
        client.model("trained").objective(np.ones((1, 4), np.float32), wrt="nothing")
    with pytest.raises(ValueError, match="cannot vary"):
        client.model("half_used").objective({"x": ones, "y": np.arange(3)}, wrt=["x", "y"])
    o = client.model("decay").objective({"p": ones, "t": ones})
    with pytest.raises(pb.errors.MissingCotangent):
        o.fun(o.x0)
    with pytest.raises(pb.errors.MissingCotangent):
        o.hessp(o.x0, o.x0)
    with pytest.raises(ValueError, match="shape"):
        o.residuals(ones)
    with pytest.raises(TypeError, match="real"):
        o.residuals(o.x0 * 1j)
    o = client.model("half_used").objective({"x": np.ones(1), "y": np.ones(1)})
    for ask in (o.fun, o.hess, o.jacobian, lambda x: o.hessp(x, x)):
        with pytest.raises(pb.errors.UnusedInput):
            ask(o.x0)


def test_an_order_that_is_not_promised(client: pb.Client) -> None:
    o = client.model("once").objective(np.array([0.4]))
    assert o.fun([0.4]) == pytest.approx(0.4**3 + np.sin(0.4))
    for ask in (o.hess, lambda x: o.hessp(x, np.ones(1))):
        with pytest.raises(pb.errors.OrderUnavailable):
            ask([0.4])
    # First derivatives go on.
    assert o.jac([0.5]) == pytest.approx(3 * 0.5**2 + np.cos(0.5))


def test_a_hessian_that_is_not_symmetric(client: pb.Client) -> None:
    remote, x = client.model("twisted"), np.array([0.3, 0.7])
    o = remote.objective(x)
    if remote.info.max_order == 1:
        with pytest.raises(pb.errors.OrderUnavailable):
            o.hessp(x, x)
        return
    p = np.array([1.0, -2.0])
    # ∂<g, p>/∂x of g = (2 x0, 2 x1 + x0).
    np.testing.assert_allclose(o.hessp(x, p), [2 * p[0] + p[1], 2 * p[1]], rtol=1e-12)
    np.testing.assert_allclose(o.hess(x).T @ p, o.hessp(x, p), rtol=1e-12)


def test_a_session_that_one_thread_loses_is_not_the_next_one(banana: Any) -> None:
    banana.hessp(START, START)
    held = banana._function._held
    (home,) = held._homes.values()
    home.session.close()
    with ThreadPoolExecutor(1) as pool:
        # The other thread is the first to notice, and opens the next session.
        pool.submit(banana.hessp, START + 1, START).result()
        (other,) = held._homes.values()
        assert other.session is not home.session
        held.lose()
        assert other.session.usable
        assert list(held._homes.values()) == [other]


def test_no_session_is_left_open_where_another_version_answers(banana: Any, server: Server) -> None:
    def sessions() -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30) as answer:
            said = answer.read().decode()
        return sum(float(value) for value in re.findall(r"^pullback_sessions(?:\{.*\})? (\S+)$", said, re.MULTILINE))

    banana._function.version = ("9", 0)
    before = sessions()
    kept = []
    for _ in range(3):
        with pytest.raises(pb.errors.Aborted, match="version 9") as raised:
            banana.hessp(START, START)
        kept.append(raised)  # and what its traceback holds
    assert sessions() <= before


def test_another_version_is_another_function(banana: Any) -> None:
    banana._function.version = ("9", 0)
    for ask in (banana.jac, lambda x: banana.hessp(x, x), banana.hess):
        with pytest.raises(pb.errors.Aborted, match="version 9"):
            ask(START)


# ---- processes, threads, losses


def test_threads_share_an_objective(banana: Any) -> None:
    starts = [START + shift for shift in (0, 0.5)]

    def solve(start: Any) -> Any:
        options = {"maxiter": 30}
        return minimize(banana.fun, start, jac=banana.jac, hessp=banana.hessp, method="trust-ncg", options=options)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(solve, starts))
    for start, one in zip(starts, found, strict=True):
        options = {"maxiter": 30}
        local = minimize(rosen, start, jac=rosen_der, hessp=rosen_hess_prod, method="trust-ncg", options=options)
        assert one.nit == local.nit
        np.testing.assert_allclose(one.x, local.x, atol=1e-4)


def test_it_pickles(banana: Any) -> None:
    banana.hessp(START, START)
    copied = pickle.loads(pickle.dumps(banana))
    assert copied.calls.total() == 0
    np.testing.assert_allclose(copied.hessp(START, START), rosen_hess_prod(START, START), rtol=1e-12)


#: In a process of its own: here are a server's threads, which a forked child would miss.
_FORKING = """
import multiprocessing, os, sys
import numpy as np
from scipy.optimize import rosen_der, rosen_hess_prod
import pullback as pb

start = np.linspace(-1.2, 1.0, 12)
banana = pb.connect(sys.argv[1], timeout=100).model("rosenbrock").objective(start)
banana.hessp(start, start)

def child(shift):
    return banana.hessp(start + shift, start), banana.jac(start + shift), os.getpid()

with multiprocessing.get_context("fork").Pool(2) as pool:
    for shift, (product, gradient, pid) in zip((0, 0.1), pool.map(child, (0, 0.1), 1), strict=True):
        assert pid != os.getpid()
        np.testing.assert_allclose(product, rosen_hess_prod(start + shift, start), rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(gradient, rosen_der(start + shift), rtol=1e-12, atol=1e-9)
np.testing.assert_allclose(banana.hessp(start, 2 * start), rosen_hess_prod(start, 2 * start), rtol=1e-12)
print("both were right")
"""


def test_forks(server: Server) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FORKING, server.target], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout == "both were right\n", done.stderr


def _worker() -> psutil.Process:
    return next(
        one for one in psutil.Process().children(recursive=True) if "pullback_server.engine" in " ".join(one.cmdline())
    )


def _close(session: Any) -> None:
    session.close()


def _kill(session: Any) -> None:
    _worker().send_signal(signal.SIGKILL)


@pytest.mark.parametrize("end", [_close, _kill])
def test_a_lost_session(banana: Any, end: Callable[[Any], None]) -> None:
    banana.hessp(START, START)
    (home,) = banana._function._held._homes.values()
    end(home.session)
    np.testing.assert_allclose(banana.hessp(START, START + 1), rosen_hess_prod(START, START + 1), rtol=1e-12)
    found = minimize(banana.fun, START, jac=banana.jac, hessp=banana.hessp, method="trust-ncg")
    assert found.success
