"""Random programs of JAX's transforms, of hosted functions mixed with local ones, against the same functions in JAX.

A program is a base function, and transforms that are put around it one by one, each of which makes another function
of one real vector. What it comes to is compared, in double precision.

PULLBACK_RANDOM_PROGRAMS=2000 PULLBACK_RANDOM_SEED=1 hunts; without them the suite runs a few that are always the same.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tests.jax_models import COVARIANCE, MEAN, SKEW
from tests.jax_serving import Hosted, hosting

COUNT = int(os.environ.get("PULLBACK_RANDOM_PROGRAMS", "8"))
SEED = int(os.environ.get("PULLBACK_RANDOM_SEED", "0"))

Function = Callable[[Any], Any]
#: Of each vector, and the most numbers that a function may return.
SIZE, MOST = 3, 120


@dataclass(frozen=True)
class Base:
    """A hosted function of a vector, and the same here.

    honest: whether its derivative is that of its value. Of another, JAX's own second derivatives inside a scan are not
    those outside of it.
    """

    hosted: Callable[[Hosted], Function]
    local: Function
    honest: bool = True


@jax.custom_jvp
def _skewed(x: Any) -> Any:
    return 0.5 * (x * x).sum()


@_skewed.defjvp
def _skewed_jvp(at: Any, along: Any) -> Any:
    return _skewed(at[0]), (jnp.asarray(SKEW) @ jnp.sin(at[0])) @ along[0]


@jax.custom_jvp
def _crooked(x: Any) -> Any:
    return jnp.stack([x[0] * x[1], jnp.sin(x[2])])


@_crooked.defjvp
def _crooked_jvp(at: Any, along: Any) -> Any:
    x = at[0]
    return _crooked(x), jnp.stack([jnp.cos(x) @ jnp.asarray(SKEW), x * jnp.roll(x, 1) ** 2]) @ along[0]


def _energy(x: Any, y: Any) -> Any:
    return (jnp.sin(x) * y**2).sum() + x[0] * y.sum() ** 2


def _wide(x: Any) -> Any:
    return jnp.concatenate([jnp.sin(x) * x[0], x[:2] ** 2 * x[2]])


def _turned(x: Any) -> Any:
    return jnp.stack([x[0] * jnp.sin(x[1]), x[2] ** 3 * x[0]])


def _density(x: Any) -> Any:
    return -0.5 * (x - MEAN) @ jnp.asarray(np.linalg.inv(COVARIANCE)) @ (x - MEAN)


def _tangled(z: Any, x: Any) -> Any:
    return z.conj() * z[0] * x + jnp.sin(z.real) * x**2


def _real(z: Any) -> Any:
    return z.real * jnp.cos(z.imag)


_FIXED = np.array([0.3, -0.8, 0.5])
_WEIGHT = np.linspace(-1, 1, 6).reshape(2, 3)


def _named(f: Any) -> Function:
    def run(x: Any) -> Any:
        out = f(x, jnp.asarray(2))
        return out["power"] * out["norm"] + out["count"]

    return run


def _complex(f: Any) -> Function:
    return lambda x: _real(f(x + 1j * jnp.sin(x), x * x))


def _two(f: Any) -> Function:
    return lambda x: f(x * x[0], jnp.cos(x))


def _columns(f: Any) -> Function:
    # A whole batch, so that vmap makes more rows of it.
    return lambda x: f(jnp.stack([x, x[::-1] ** 2], 1))[:, 1] * f(x[:, None])[:, 0]


def _by_weight(f: Any) -> Function:
    return lambda x: f(x[None], jnp.asarray(_WEIGHT) * x[0], _FIXED[:2] * x[1:])[0]


def _network(x: Any, w: Any, t: Any) -> Any:
    return ((jnp.tanh(x @ w.T) - t) ** 2).mean()[None]


def _hosted_network(hosted: Hosted) -> Any:
    f = hosted("network", loss="mse_loss")
    fixed = {"0.bias": np.zeros(4), "2.bias": np.zeros(2), "2.weight": np.eye(2, 4)}

    def run(x: Any, w: Any, t: Any) -> Any:
        first = jnp.concatenate([w, jnp.zeros_like(w)])
        return f(x, parameters={**fixed, "0.weight": first}, target=t[None])[None]

    return run


BASES: dict[str, Base] = {
    "energy": Base(lambda h: _two(h("energy")), _two(_energy)),
    "wide": Base(lambda h: h("wide"), _wide),
    "turned": Base(lambda h: h("turned", rows=True), _turned),
    "columns": Base(lambda h: _columns(h("turned")), _columns(_turned)),
    "density": Base(
        lambda h: lambda x: h("density", rows=True)(x[:2] * x[2]), lambda x: _density(x[:2] * x[2])
    ),
    "named": Base(lambda h: _named(h("named")), _named(lambda x, n: {
        "power": x ** (n + 1), "norm": (x * x).sum(), "count": n * x.shape[0]})),
    "tangled": Base(lambda h: _complex(h("tangled")), _complex(_tangled)),
    "skewed": Base(lambda h: h("skewed"), _skewed, honest=False),
    "crooked": Base(lambda h: h("crooked", rows=True), _crooked, honest=False),
    "network": Base(lambda h: _by_weight(_hosted_network(h)), _by_weight(_network)),
}  # fmt: skip


# ---- transforms: each makes, of a function of a vector, another one. Those of the second table differentiate.


def _summed(f: Function) -> Function:
    def run(x: Any) -> Any:
        out = f(x)
        return (jnp.sin(out) * (1 + jnp.arange(out.size).reshape(out.shape))).sum()

    return run


def _pulled(f: Function) -> Function:
    def run(x: Any) -> Any:
        out, pull = jax.vjp(f, x)
        return pull(jnp.sin(out))[0]

    return run


def _pushed(f: Function) -> Function:
    return lambda x: sum(jax.jvp(f, (x,), (jnp.cos(x),)))


def _linear(f: Function) -> Function:
    def run(x: Any) -> Any:
        out, push = jax.linearize(f, x)
        return jax.linear_transpose(push, x)(push(x * 2) + out)[0]

    return run


def _mapped(inside: int, outside: int) -> Callable[[Function], Function]:
    """vmap over three vectors, which are the columns of a matrix or its rows."""

    def change(f: Function) -> Function:
        def run(x: Any) -> Any:
            many = jnp.stack([x, x * x[0], jnp.sin(x)], inside)
            rank = len(jax.eval_shape(f, x).shape)
            return jax.vmap(f, in_axes=inside, out_axes=outside % (rank + 1))(many)

        return run

    return change


def _shared(f: Function) -> Function:
    """vmap over a number, where the function's vector is another's too."""
    return lambda x: jax.vmap(lambda a, b: a * f(b) + f(a * b), in_axes=(0, None))(x[:2], x)


def _scanned(f: Function) -> Function:
    def run(x: Any) -> Any:
        def step(carry: Any, each: Any) -> Any:
            out = f(carry + each)
            return carry * (1 + 0.1 * jnp.tanh(out.sum())), out

        last, outs = lax.scan(step, x, jnp.array([0.1, -0.2]))
        return outs * last.sum()

    return run


def _chosen(f: Function) -> Function:
    return lambda x: lax.cond(x[0] > x[1], lambda x: f(x) * 2, lambda x: jnp.sin(f(x[::-1])), x)


def _beside(f: Function) -> Function:
    return lambda x: f(jnp.tanh(x) + 0.3 * x[::-1]) * x[1]


PLAIN: dict[str, Callable[[Function], Function]] = {
    "summed": _summed,
    "beside": _beside,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": _scanned,
    "cond": _chosen,
    "shared": _shared,
    "map": lambda f: lambda x: lax.map(f, jnp.stack([x, 2 * x])),
    **{f"vmap {i} {o}": _mapped(i, o) for i, o in ((0, 0), (1, 0), (0, 1), (1, 2))},
}
FIRST: dict[str, Callable[[Function], Function]] = {
    "jacfwd": jax.jacfwd,
    "jacrev": jax.jacrev,
    "pulled": _pulled,
    "pushed": _pushed,
    "linear": _linear,
    "grad": lambda f: jax.grad(_summed(f)),
    "value and grad": lambda f: lambda x: jnp.append(*jax.value_and_grad(_summed(f))(x)),
}
SECOND: dict[str, Callable[[Function], Function]] = {
    "hessian": lambda f: jax.hessian(_summed(f)),
    "hessian of all": jax.hessian,
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(f)),
}
EVERY = {**PLAIN, **FIRST, **SECOND}


def drawn(rng: random.Random) -> tuple[str, list[str], bool]:
    """A base, its transforms, and whether the whole is compiled."""
    base, changes, orders = rng.choice(list(BASES)), [], 0
    for _ in range(rng.randint(2, 5)):
        first = FIRST if orders < 2 else ()
        name = rng.choice([*PLAIN, *first, *first, *(SECOND if not orders else ())])
        if name in ("scan", "map") and not BASES[base].honest:
            continue
        size = jax.eval_shape(built(BASES[base].local, [*changes, name]), jnp.ones(SIZE)).size
        if size <= MOST:
            changes.append(name)
            orders += 1 if name in FIRST else 2 if name in SECOND else 0
    return base, changes, rng.random() < 0.85


def built(f: Function, changes: list[str]) -> Function:
    for name in changes:
        f = EVERY[name](f)
    return f


def compared(hosted: Hosted, base: str, changes: list[str], compiled: bool, x: Any) -> str:
    """What is different; empty: nothing."""
    wanted = jax.jit(built(BASES[base].local, changes))(x)
    function = built(BASES[base].hosted(hosted), changes)
    found = (jax.jit(function) if compiled else function)(x)
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return f"{found.dtype}{found.shape}, expected {wanted.dtype}{wanted.shape}"
    scale = float(jnp.abs(wanted).max(initial=1.0))
    apart = float(jnp.abs(found - wanted).max(initial=0.0)) / scale
    return "" if apart < 1e-7 else f"apart by {apart:.3g} of {scale:.3g}"


@pytest.fixture(scope="module")
def hosted() -> Iterator[Hosted]:
    with hosting() as found:
        yield found


def test_random_programs(hosted: Hosted) -> None:
    failures = []
    for seed in range(SEED, SEED + COUNT):
        rng = random.Random(seed)
        base, changes, compiled = drawn(rng)
        x = jnp.asarray([rng.uniform(-1.2, 1.2) for _ in range(SIZE)])
        try:
            why = compared(hosted, base, changes, compiled, x)
        except Exception as error:
            why = f"{type(error).__name__}: {str(error)[-800:]}"
        if why:
            failures.append(f"seed {seed}: {base} | {' | '.join(changes)} | {'jit' if compiled else 'eager'}: {why}")
    assert not failures, "\n".join(failures)
