"""pullback.jax: every transform of a hosted model equals that of the same function written in JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads
from tests.jax_serving import Hosted, hosting


@pytest.fixture(scope="module")
def hosted() -> Iterator[Hosted]:
    with hosting() as found:
        yield found


RNG = np.random.default_rng(7)
X, Y = RNG.normal(size=4), RNG.normal(size=4)


def local_energy(x: Any, y: Any) -> Any:
    return (jnp.sin(x) * y**2).sum() + x[0] * y.sum() ** 2


def local_wide(x: Any) -> Any:
    return jnp.concatenate([jnp.sin(x) * x[0], x[:2] ** 2 * x[2]])


def local_turned(x: Any) -> Any:
    return jnp.stack([x[0] * jnp.sin(x[1]), x[2] ** 3 * x[0]])


def local_named(x: Any, steps: Any) -> dict[str, Any]:
    return {"power": x ** (steps + 1), "norm": (x * x).sum(), "count": steps * x.shape[0]}


def same(left: Any, right: Any, tolerance: float = 1e-9) -> None:
    left_leaves, left_tree = jax.tree.flatten(left)
    right_leaves, right_tree = jax.tree.flatten(right)
    assert left_tree == right_tree
    for a, b in zip(left_leaves, right_leaves, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def loss_of(f: Callable[..., Any]) -> Callable[..., Any]:
    """A real number that depends on every output in its own way."""

    def loss(*arguments: Any) -> Any:
        out = f(*arguments)
        return (jnp.sin(out) * (1 + jnp.arange(out.size).reshape(out.shape))).sum()

    return loss


def pushed(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *xs: jax.jvp(f, xs, tuple(jnp.cos(x) for x in xs))


def linear(f: Callable[..., Any]) -> Callable[..., Any]:
    def run(*xs: Any) -> Any:
        y, push = jax.linearize(f, *xs)
        pull = jax.linear_transpose(push, *xs)
        return y, push(*(jnp.cos(x) for x in xs)), pull(jnp.sin(y))

    return run


def scanned(f: Callable[..., Any]) -> Callable[..., Any]:
    """Gradient descent: a gradient in a scan, with a condition, under grad."""

    def run(*xs: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            slope = jax.grad(loss_of(f))(*carry)
            moved = carry[0] - 0.01 * slope
            return (lax.cond(moved[0] > 0, lambda: moved, lambda: moved * 0.5), *carry[1:]), moved.sum()

        return lax.scan(step, xs, None, length=2)

    return run


def looped(f: Callable[..., Any]) -> Callable[..., Any]:
    def run(*xs: Any) -> Any:
        def body(state: Any) -> Any:
            i, x = state
            return i + 1, x - 0.01 * jax.grad(loss_of(f))(x, *xs[1:])

        return lax.while_loop(lambda state: state[0] < 3, body, (0, xs[0]))

    return run


TRANSFORMS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "value_and_grad": lambda f: jax.value_and_grad(loss_of(f)),
    "jvp": pushed,
    "linearize": linear,
    "jacfwd": jax.jacfwd,
    "jacrev": jax.jacrev,
    "hessian": jax.hessian,
    "hessian of a loss": lambda f: jax.hessian(loss_of(f)),
    "jacrev jacrev": lambda f: jax.jacrev(jax.jacrev(f)),
    "jacrev jacfwd": lambda f: jax.jacrev(jax.jacfwd(f)),
    "jacfwd jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "grad of a gradient's norm": lambda f: jax.grad(lambda *xs: (jax.grad(loss_of(f))(*xs) ** 2).sum()),
    "jvp of grad": lambda f: pushed(jax.grad(loss_of(f))),
    "grad of jvp": lambda f: jax.grad(lambda *xs: pushed(loss_of(f))(*xs)[1]),
    "checkpoint": lambda f: jax.hessian(jax.checkpoint(loss_of(f))),
    "scan": scanned,
    "while": looped,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_equal_those_of_local_functions(hosted: Hosted, transform: str) -> None:
    change = TRANSFORMS[transform]
    same(jax.jit(change(hosted("energy")))(X, Y), jax.jit(change(local_energy))(X, Y))
    x = RNG.normal(size=3)
    same(jax.jit(change(hosted("wide")))(x), jax.jit(change(local_wide))(x))


def test_transforms_without_jit(hosted: Hosted) -> None:
    x = RNG.normal(size=3)
    same(hosted("wide")(x), jax.jit(local_wide)(x))
    for change in (jax.jacfwd, jax.hessian, lambda f: jax.grad(lambda *xs: jax.grad(loss_of(f))(*xs).sum())):
        same(change(hosted("energy"))(X, Y), jax.jit(change(local_energy))(X, Y))
    same(pushed(jax.jacrev(hosted("wide")))(x), jax.jit(pushed(jax.jacrev(local_wide)))(x))


OF_ROWS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "value": lambda f: jax.vmap(f),
    "value_and_grad": lambda f: jax.vmap(jax.value_and_grad(loss_of(f))),
    "grad of a sum over vmap": lambda f: jax.grad(lambda xs: loss_of(jax.vmap(f))(xs)),
    "jacfwd": lambda f: jax.vmap(jax.jacfwd(f)),
    "jacrev": lambda f: jax.vmap(jax.jacrev(f)),
    "jacrev outside": lambda f: jax.jacrev(jax.vmap(f)),
    "hessian": lambda f: jax.vmap(jax.hessian(f)),
    "reverse twice": lambda f: jax.vmap(jax.jacrev(jax.jacrev(f))),
    "hessian outside": lambda f: jax.hessian(loss_of(jax.vmap(f))),
    "nested": lambda f: lambda xs: jax.vmap(lambda x: jax.vmap(lambda s: jax.grad(loss_of(f))(s * x))(X))(xs),
    "out_axes": lambda f: lambda xs: jax.vmap(jax.jacrev(f), in_axes=1, out_axes=2)(xs.T),
}


@pytest.mark.parametrize("transform", OF_ROWS)
@pytest.mark.parametrize("name", ["turned", "wide"])
def test_mapped_functions_equal_local_ones(hosted: Hosted, transform: str, name: str) -> None:
    # "turned" has a batch axis, which is its second; "wide" has none, and is called once for each row.
    f = hosted(name, rows=name == "turned")
    local = {"turned": local_turned, "wide": local_wide}[name]
    xs = RNG.normal(size=(5, 3))
    same(jax.jit(OF_ROWS[transform](f))(xs), jax.jit(OF_ROWS[transform](local))(xs))


def test_whole_batches_are_mapped_too(hosted: Hosted) -> None:
    f, xs = hosted("turned"), RNG.normal(size=(4, 3, 2))
    for change in (lambda g: g, lambda g: jax.grad(loss_of(g)), lambda g: jax.hessian(loss_of(g))):
        same(*(jax.jit(jax.vmap(change(g)))(xs) for g in (f, local_turned)))


def test_one_of_several_inputs_is_mapped(hosted: Hosted) -> None:
    f, ys = hosted("energy"), RNG.normal(size=(3, 4))
    for axes in ((None, 0), (0, None)):
        for change in (lambda g: jax.grad(g, (0, 1)), lambda g: jax.hessian(g, (0, 1)), lambda g: pushed(jax.grad(g))):
            mapped = [
                jax.jit(jax.vmap(change(g), axes))(*((X, ys) if axes[1] == 0 else (ys, Y))) for g in (f, local_energy)
            ]
            same(*mapped)
    # The shared input's gradient is the sum over the axis that it has not.
    same(
        jax.grad(lambda x: jax.vmap(f, (None, 0))(x, ys).sum())(X),
        jax.grad(lambda x: jax.vmap(local_energy, (None, 0))(x, ys).sum())(X),
    )
    empty = jnp.zeros((0, 4))
    assert jax.vmap(jax.grad(f), (None, 0))(X, empty).shape == (0, 4)


def test_several_outputs_and_integers(hosted: Hosted) -> None:
    f, steps = hosted("named"), jnp.asarray(2)
    for value in (steps, jnp.asarray(2, jnp.int32), 2):
        same(f(X, value), local_named(X, steps))
    same(f({"x": X, "steps": steps}), f(steps=steps, x=X))

    def loss(g: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, n: g(x, n)["power"].sum() * g(x, n)["norm"] + g(x, n)["count"]

    for change in (jax.grad, jax.hessian, lambda g: jax.jacrev(jax.jacrev(g))):
        same(*(jax.jit(change(loss(g)))(X, steps) for g in (f, local_named)))
    integer = jax.grad(loss(f), argnums=1, allow_int=True)(X, steps)
    assert integer.dtype == jax.dtypes.float0
    _, change = jax.jvp(lambda x: f(x, steps), (X,), (X,))
    assert change["count"].dtype == jax.dtypes.float0
    same(change["norm"], 2 * (X @ X))


def test_check_grads_and_adjoints(hosted: Hosted) -> None:
    f, x = hosted("wide"), RNG.normal(size=3)
    check_grads(jax.jit(f), (x,), order=2, modes=["fwd", "rev"])
    check_grads(hosted("energy"), (X, Y), order=2, modes=["fwd", "rev"])
    u, t = RNG.normal(size=5), RNG.normal(size=3)
    np.testing.assert_allclose(u @ jax.jvp(f, (x,), (t,))[1], jax.vjp(f, x)[1](u)[0] @ t)
    # And of the derivative of the gradient.
    slope = jax.grad(loss_of(f))
    w = RNG.normal(size=3)
    np.testing.assert_allclose(w @ jax.jvp(slope, (x,), (t,))[1], jax.vjp(slope, x)[1](w)[0] @ t)


def test_an_unused_input_has_zeros(hosted: Hosted) -> None:
    f = hosted("apart")
    same(jax.grad(f, (0, 1))(X, Y), (jnp.asarray(3 * X**2), jnp.zeros(4)))
    same(jax.jit(jax.grad(f, 1))(X, Y), jnp.zeros(4))
    same(jax.hessian(f, (0, 1))(X, Y)[1][0], jnp.zeros((4, 4)))
    same(jax.jvp(lambda y: f(X, y), (Y,), (Y,))[1], jnp.zeros(()))


def test_donation_leaves_the_operands_alone(hosted: Hosted) -> None:
    f, x = hosted("wide"), jnp.asarray(RNG.normal(size=3))
    expected = x - jax.grad(loss_of(local_wide))(x)
    step = jax.jit(lambda x: x - jax.grad(loss_of(f))(x), donate_argnums=0)
    same(step(x + 0), expected)
