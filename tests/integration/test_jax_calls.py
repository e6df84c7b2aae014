"""pullback.jax: how many calls transforms make, complex numbers, dtypes, custom backwards, and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.jax_models import SKEW
from tests.jax_serving import Hosted, hosting

import pullback as pb
from pullback.jax import remote_function


@pytest.fixture(scope="module")
def hosted() -> Iterator[Hosted]:
    with hosting() as found:
        yield found


RNG = np.random.default_rng(11)
X, Y = RNG.normal(size=4), RNG.normal(size=4)
Z = RNG.normal(size=3) + 1j * RNG.normal(size=3)


def close(left: Any, right: Any, tolerance: float = 1e-9) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# ---- calls


def test_a_value_and_gradient_are_one_call(hosted: Hosted) -> None:
    f = hosted("energy")
    assert hosted.calls(jax.jit(f), X, Y) == {"Evaluate": 1}
    for change in (jax.value_and_grad(f, (0, 1)), jax.grad(f), lambda x, y: jax.jvp(f, (x, y), (x, y)), jax.jacfwd(f)):
        assert hosted.calls(change, X, Y) == {"ComputeVjp": 1}
        assert hosted.calls(jax.jit(change), X, Y) == {"ComputeVjp": 1}


def test_mapped_rows_are_one_call(hosted: Hosted) -> None:
    f, xs = hosted("density", rows=True), RNG.normal(size=(6, 2))
    both = jax.jit(jax.vmap(jax.value_and_grad(f)))
    assert hosted.calls(both, xs) == {"ComputeVjp": 1}
    assert hosted.calls(jax.jit(jax.vmap(jax.vmap(jax.value_and_grad(f)))), xs.reshape(2, 3, 2)) == {"ComputeVjp": 1}
    assert hosted.calls(jax.jit(jax.grad(lambda xs: jax.vmap(f)(xs).sum())), xs) == {"ComputeVjp": 1}
    assert hosted.calls(jax.jit(jax.vmap(f)), xs) == {"Evaluate": 1}
    assert hosted.calls(jax.jit(jax.vmap(jax.jacrev(jax.jacrev(f)))), xs) == {"ComputeHvp": 1}
    assert hosted.calls(jax.jit(jax.vmap(jax.hessian(f))), xs) == {"ComputeHvp": 1}
    whole = hosted("network")
    loss = jax.vmap(jax.value_and_grad(lambda x: jnp.sin(whole(x)).sum()))
    assert hosted.calls(jax.jit(loss), RNG.normal(size=(5, 2, 3))) == {"Evaluate": 1, "ComputeVjp": 1}


def test_dense_derivatives_are_few_calls(hosted: Hosted) -> None:
    f, g, x = hosted("energy"), hosted("wide"), RNG.normal(size=3)
    assert hosted.calls(jax.jit(jax.hessian(f)), X, Y) == {"ComputeHessian": 1}
    assert hosted.calls(jax.jit(jax.jacrev(jax.jacrev(f))), X, Y) == {"ComputeHessian": 1}
    twice = jax.jit(jax.grad(lambda x: jax.grad(f)(x, Y) @ X))
    assert hosted.calls(twice, X) == {"ComputeHvp": 1}
    assert hosted.calls(jax.jit(jax.jacrev(g)), x) == {"ComputeVjp": 1}
    assert hosted.calls(jax.jit(jax.jacfwd(g)), x) == {"ComputeJacobian": 1}
    # Without a batch axis there is one call for each.
    assert hosted.calls(jax.jit(jax.vmap(jax.value_and_grad(f))), X[None] * Y[:, None], Y[None] * X[:, None]) == {
        "ComputeVjp": 4
    }


def test_many_cotangents_are_sent_in_pieces(hosted: Hosted) -> None:
    g, x = hosted("wide"), RNG.normal(size=3)
    _, pull = jax.vjp(g, x)
    cotangents = RNG.normal(size=(5000, 5))
    (found,) = jax.vmap(pull)(cotangents)
    close(found, jnp.asarray(cotangents) @ jax.jacrev(g)(x))


# ---- complex numbers


def analytic(z: Any) -> Any:
    return z**2 * z[0] + jnp.exp(0.5j * z)


def tangled(z: Any, x: Any) -> Any:
    return z.conj() * z[0] * x + jnp.sin(z.real) * x**2


def squared(z: Any) -> Any:
    return (z * z.conj()).real.sum() * z[0].imag + jnp.sin(z.real).sum()


def wave(x: Any) -> Any:
    return jnp.exp(1j * x) * x.sum()


def real_loss(f: Callable[..., Any]) -> Callable[..., Any]:
    def loss(*arguments: Any) -> Any:
        out = f(*arguments)
        return (out.real**2 + out.real * jnp.sin(out.imag)).sum()

    return loss


def along(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *xs: jax.jvp(f, xs, tuple(x * (2 - 1j) if jnp.iscomplexobj(x) else jnp.cos(x) for x in xs))


@pytest.mark.parametrize(
    ("name", "local", "points"),
    [("analytic", analytic, (Z,)), ("tangled", tangled, (Z, X[:3])), ("squared", squared, (Z,)), ("wave", wave, (X,))],
)
def test_complex_derivatives_follow_jax(hosted: Hosted, name: str, local: Callable[..., Any], points: Any) -> None:
    f, every = hosted(name), tuple(range(len(points)))
    # Reverse, reverse over reverse, and the three with forward mode in them.
    for change in (
        lambda g: along(g),
        lambda g: jax.value_and_grad(real_loss(g), every),
        lambda g: jax.grad(lambda *xs: sum((abs(d) ** 2).sum() for d in jax.grad(real_loss(g), every)(*xs)), every),
        lambda g: along(jax.grad(real_loss(g), every)),
        lambda g: jax.grad(lambda *xs: real_loss(lambda *a: along(g)(*a)[1])(*xs), every),
        lambda g: along(lambda *xs: along(g)(*xs)[1]),
    ):
        close(jax.jit(change(f))(*points), jax.jit(change(local))(*points))
    if name == "analytic":
        for change in (lambda g: jax.jacfwd(g, holomorphic=True), lambda g: jax.jacrev(g, holomorphic=True)):
            close(jax.jit(change(f))(*points), jax.jit(change(local))(*points))


# ---- dtypes


def test_dtypes_are_kept(hosted: Hosted) -> None:
    x = jnp.asarray([1.0, 2.0], jnp.bfloat16)
    value, grad = jax.jit(jax.value_and_grad(hosted("half")))(x)
    assert (value.dtype, grad.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert (float(value), grad.tolist()) == (5.0, [2.0, 4.0])
    same = hosted("plain")
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64, jnp.complex128):
        assert same(jnp.ones(2, dtype)).dtype == dtype
        assert jax.jit(same)(jnp.ones(2, dtype)).dtype == dtype


def test_64_bits_need_the_setting(hosted: Hosted) -> None:
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(TypeError, match=r"float64, and JAX would make it float32; .*jax_enable_x64"):
            hosted("energy")(X, Y)
        with pytest.raises(TypeError, match=r"is float32, the model takes float64; .*jax_enable_x64"):
            jax.jit(hosted("energy"))(jnp.ones(3), jnp.ones(3))
        f, x = hosted("single"), jnp.asarray([0.5, 1.0])
        assert f(x, 2.0).dtype == jnp.float32
        grad = jax.jit(jax.vmap(jax.grad(lambda a: f(a, 2.0).sum())))(x[:, None] * x)
        close(grad, 2 * jnp.cos(x[:, None] * x), 1e-6)
    finally:
        jax.config.update("jax_enable_x64", True)
    with pytest.raises(TypeError, match=r"input 'x' is float64, the model takes float32; .astype\('float32'\)"):
        hosted("single")(X, 1.0)


# ---- custom backwards, orders


def test_a_second_derivative_that_is_not_symmetric_is_not_transposed(hosted: Hosted) -> None:
    f, x, t = hosted("skewed"), RNG.normal(size=3), RNG.normal(size=3)
    # The gradient is SKEW sin(x): row i of its derivative belongs to its element i.
    expected = jnp.asarray(SKEW * np.cos(x))
    close(jax.grad(f)(x), jnp.asarray(SKEW @ np.sin(x)))
    for change in (jax.jacfwd(jax.grad(f)), jax.jacrev(jax.grad(f)), jax.jit(jax.hessian(f))):
        close(change(x), expected)
    close(jax.jvp(jax.grad(f), (x,), (t,))[1], expected @ t)
    close(jax.vjp(jax.grad(f), x)[1](jnp.asarray(t))[0], expected.T @ t)
    close(jax.jit(jax.vmap(jax.hessian(f)))(jnp.stack([x, t]))[0], expected)


def test_orders_that_are_not_promised_are_refused(hosted: Hosted, zoo: str) -> None:
    with pb.connect(zoo) as client:
        once = remote_function(client.model("once"))
        close(jax.jacrev(once)(X), jnp.diag(3 * X**2 + np.cos(X)))
        for change in (jax.hessian, lambda f: jax.jacrev(jax.jacrev(f))):
            with pytest.raises(pb.errors.OrderUnavailable):
                change(lambda x: once(x).sum())(X)
            with pytest.raises(pb.errors.OrderUnavailable, match="promises first derivatives alone"):
                jax.jit(change(lambda x: once(x).sum()))(X)
        # A second derivative that nobody looks at is nobody's loss.
        same = jax.grad(lambda x: once(x).sum() + jax.lax.stop_gradient(jax.grad(lambda y: once(y).sum())(x)).sum())
        close(jax.jit(same)(X), jnp.asarray(3 * X**2 + np.cos(X)))
    for third in (lambda g: jax.jacfwd(jax.hessian(g)), lambda g: jax.jacrev(jax.jacrev(jax.jacrev(g)))):
        with pytest.raises(pb.errors.OrderUnavailable, match="a third derivative"):
            jax.jit(third(hosted("energy")))(X, Y)


# ---- parameters, losses, seeds


def test_parameters_and_losses(hosted: Hosted) -> None:
    model = hosted.client.model("network")
    x, target = RNG.normal(size=(6, 3)), RNG.normal(size=(6, 2))
    w, b, v, c = RNG.normal(size=(4, 3)), RNG.normal(size=4), RNG.normal(size=(2, 4)), RNG.normal(size=2)
    given = {"0.weight": w, "0.bias": b, "2.weight": v, "2.bias": c}

    def local(p: Any, x: Any, t: Any) -> Any:
        return ((jnp.tanh(x @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"] - t) ** 2).mean()

    f = remote_function(model, loss="mse_loss")
    args = (jax.tree.map(jnp.asarray, given), x, target)
    batches = (args[0], x.reshape(2, 3, 3), target.reshape(2, 3, 2))
    for change, at in (
        (lambda g: jax.value_and_grad(g, (0, 1, 2)), args),
        (lambda g: jax.grad(lambda *a: (jax.grad(g)(*a)["0.weight"] ** 2).sum(), (0, 1)), args),
        (lambda g: jax.vmap(jax.grad(g), (None, 0, 0)), batches),
    ):
        close(*(jax.jit(change(g))(*at) for g in (lambda p, x, t: f(x, parameters=p, target=t), local)))
    # One row of each, and its target.
    row = remote_function(model, loss="mse_loss", rows=True)
    each = jax.vmap(jax.grad(lambda x, t: row(x, parameters=given, target=t)))(x, target)
    close(each, jax.vmap(jax.grad(lambda x, t: local(given, x, t)))(x, target))


def test_random_numbers_are_drawn_by_the_seed(hosted: Hosted) -> None:
    f, x = hosted("dropout", train=True), RNG.normal(size=(2, 3))
    with pytest.raises(TypeError, match="seed is missing"):
        f(x)
    key = jax.random.key(3)
    drawn = jax.jit(lambda x, key: f(x, seed=key))
    close(drawn(x, key), f(x, seed=key))
    assert not np.array_equal(f(x, seed=1), f(x, seed=2))
    close(f(x, seed=2**63 + 5), jnp.asarray(hosted.client.model("dropout").evaluate(x, train=True, seed=2**63 + 5)))
    keys = jax.random.split(key, 3)
    close(jax.vmap(lambda k: f(x, seed=k))(keys)[1], f(x, seed=keys[1]))
    # The gradient is of the same masks: the network is linear, so its JVP by x is exact.
    close(jax.jvp(lambda x: f(x, seed=key), (x,), (x,))[1], f(x, seed=key) - f(0 * x, seed=key))


# ---- what is refused


def test_errors_are_the_clients_own(hosted: Hosted) -> None:
    f = hosted("raises")
    assert float(f(np.ones(3))) == 3.0
    with pytest.raises(pb.errors.ModelError, match="no good"):
        f(-np.ones(3))
    with pytest.raises(pb.errors.ModelError, match="no good"):
        jax.grad(f)(-np.ones(3))
    with pytest.raises(RuntimeError, match=r"ModelError: model 'raises' raised ValueError: no good"):
        jax.block_until_ready(jax.jit(jax.grad(f))(-np.ones(3)))
    with pytest.raises(pb.errors.ModelError, match="no good"):
        jax.vmap(f)(-np.ones((3, 3)))


def test_what_cannot_be_is_refused_while_tracing(hosted: Hosted) -> None:
    energy = hosted("energy")
    with pytest.raises(pb.errors.BadName, match="an input 'y', which is missing; it takes 'x', 'y'"):
        jax.jit(energy)(X)
    with pytest.raises(pb.errors.BadName, match="no input 'q'"):
        energy(X, Y, q=1)
    with pytest.raises(pb.errors.BadTensor, match=r"\[3\], expected \['n'\]; 'n' is 4 elsewhere"):
        energy(X, Y[:3])
    with pytest.raises(pb.errors.BadTensor, match=r"\[2, 3\], expected \[3\] \(one row\)"):
        hosted("network", rows=True)(RNG.normal(size=(2, 3)))
    with pytest.raises(pb.errors.UnsupportedByModel, match="declares no batch_axis"):
        hosted("energy", rows=True)(X, Y)
    with pytest.raises(TypeError, match="without a loss"):
        energy(X, Y, target=X)
    with pytest.raises(TypeError, match=r"expected a jax\.ShapeDtypeStruct"):
        hosted("energy", outputs=3)(X, Y)


def test_announced_shapes_are_held_against_what_comes(hosted: Hosted) -> None:
    told = hosted("plain", outputs=lambda inputs: inputs["x"])
    before = hosted.counts()
    close(jax.jit(jax.grad(lambda x: told(x).sum()))(X), jnp.asarray(3 * X**2))
    after = hosted.counts()
    assert after["ComputeVjp"] == before.get("ComputeVjp", 0) + 1
    assert after.get("Evaluate", 0) == before.get("Evaluate", 0)
    wrong = hosted("plain", outputs=jax.ShapeDtypeStruct((2,), jnp.float64))
    with pytest.raises(TypeError, match=r"is float64\[4\], announced was float64\[2\]"):
        wrong(X)
    with pytest.raises(RuntimeError, match=r"announced was float64\[2\]"):
        jax.block_until_ready(jax.jit(wrong)(X))


def test_exports_are_refused(hosted: Hosted) -> None:
    from jax import export

    with pytest.raises(NotImplementedError, match="host_callbacks"):
        export.export(jax.jit(hosted("energy")))(X, Y)


# ---- losses of rows, random numbers, outputs that are cut off


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_rows_under_a_loss_are_losses_of_their_own(hosted: Hosted, reduction: str) -> None:
    reduce = {"none": lambda a: a, "mean": jnp.mean, "sum": jnp.sum}[reduction]
    # "turned" has its rows in columns.
    f = hosted("turned", rows=True, loss=pb.Loss("mse_loss", reduction=reduction))
    xs, targets = RNG.normal(size=(2, 3)), RNG.normal(size=(2, 2))

    def local(x: Any, t: Any) -> Any:
        return reduce((jnp.stack([x[0] * jnp.sin(x[1]), x[2] ** 3 * x[0]]) - t) ** 2)

    for change in (
        jax.jacrev,
        lambda g: jax.hessian(lambda x, t: jnp.sin(g(x, t)).sum(), (0, 1)),
        lambda g: jax.jacfwd(jax.jacrev(g)),
    ):
        close(*(jax.jit(jax.vmap(change(g)))(xs, targets) for g in (lambda x, t: f(x, target=t), local)))


def test_what_a_model_draws_by_itself_is_drawn_once(hosted: Hosted, zoo: str) -> None:
    with pb.connect(zoo) as client:
        noisy = remote_function(client.model("noisy"))
        y, pull = jax.vjp(noisy, X)
        close(pull(jnp.ones(4))[0], y / X)
        close(jax.jvp(noisy, (X,), (2 * X,)), (y, 2 * y))
        close(jax.jit(noisy)(X), y)
        assert not np.array_equal(noisy(X, seed=1), y)


def test_an_output_that_is_cut_off_adds_nothing(hosted: Hosted, zoo: str) -> None:
    with pb.connect(zoo) as client:
        f = remote_function(client.model("detached"))

        def loss(x: Any) -> Any:
            out = f(x)
            return (out["kept"] ** 2 * out["cut"]).sum()

        # JAX's stop_gradient: 2 x is kept, 3 x is not.
        for change in (jax.grad(loss), jax.jit(jax.grad(loss)), lambda x: jax.jvp(loss, (x,), (jnp.ones(4),))[1]):
            close(change(X), jnp.asarray(24 * X**2) if change(X).ndim else jnp.asarray((24 * X**2).sum()))
        jacobian = jax.jit(jax.jacrev(lambda x: (f(x)["kept"], f(x)["kept"] * 2)))(X)
        close(jacobian, (2 * jnp.eye(4), 4 * jnp.eye(4)))
        # Alone it is refused, as nothing would be left of the gradient.
        with pytest.raises(pb.errors.NotDifferentiable, match="'cut'") as raised:
            jax.grad(lambda x: f(x)["cut"].sum())(X)
        assert any("stop_gradient" in note for note in raised.value.__notes__)


def test_one_of_many_that_fails_fails_them_all(hosted: Hosted) -> None:
    f, xs = hosted("raises"), np.ones((30, 3))
    xs[7] = -1
    mapped = jax.jit(jax.vmap(jax.grad(f)))
    with pytest.raises((RuntimeError, ValueError), match="no good"):
        jax.block_until_ready(mapped(xs))
    close(mapped(abs(xs)), jnp.ones((30, 3)))


def test_another_version_with_other_rows_is_refused(hosted: Hosted) -> None:
    f = hosted("turned", rows=True)
    compiled = jax.jit(jax.vmap(f))
    xs = RNG.normal(size=(2, 3))
    expected = compiled(xs)
    # As of a version that was replaced: the same is traced, and its rows were elsewhere.
    (call,) = f._calls.values()
    object.__setattr__(call, "version", ("0", 0))
    close(compiled(xs), expected)
    object.__setattr__(call, "axis", 0)
    # JAX raises the one or the other, as it calls what is compiled.
    with pytest.raises((RuntimeError, ValueError), match="another batch axis"):
        jax.block_until_ready(compiled(xs))


def test_functions_pickle(hosted: Hosted) -> None:
    f = hosted("turned", rows=True, concurrency=3)
    copied = pickle.loads(pickle.dumps(f))
    assert repr(copied) == repr(f)
    close(copied(X[:3]), f(X[:3]))


def test_signatures_that_say_the_shapes_need_no_trial(hosted: Hosted) -> None:
    assert all(None not in (one.dtype, one.shape) for one in hosted.client.model("turned").info.outputs)
    before = hosted.counts()
    jax.jit(jax.vmap(jax.grad(lambda x: hosted("turned", rows=True)(x).sum())))(RNG.normal(size=(5, 3)))
    jax.eval_shape(hosted("named"), X, 2)
    after = hosted.counts()
    assert after.get("Evaluate", 0) == before.get("Evaluate", 0)
