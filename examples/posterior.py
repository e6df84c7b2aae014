"""A planet's orbit from twenty velocities of its star: NUTS over a log-likelihood that a server hosts.

The likelihood is on the server; the prior, the transformation of the eccentricity and the sampler (blackjax) are JAX
here, and `pullback.jax.remote_function` makes one jitted program of it all. Chains run side by side under vmap, so that
the gradient of all of them is one call. Three of the five unknowns can be integrated out exactly, which leaves a plane:
sums over a grid of it tell what the sampler should have found, and this program holds it against that.
"""

from collections.abc import Callable

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from _gallery import BLUE, GREY, ORANGE, RED, arguments, connected, panels, save
from blackjax.diagnostics import effective_sample_size, potential_scale_reduction

import pullback as pb
from pullback.jax import remote_function

jax.config.update("jax_enable_x64", True)

#: Nights of observation; width of the prior of a, b and c; the largest eccentricity; the sampler's step.
NIGHTS, PRIOR, MOST, STEP = 20, 20.0, 0.95, 0.7
Density = Callable[[jax.Array], jax.Array]
#: Of a made-up star: eccentricity, phase; a, b and c as in examples/models/orbit.py.
ECCENTRICITY, PHASE, LINEAR = 0.4, 0.2, np.array([3.0, 4.0, 1.0])


def basis(kepler: pb.RemoteModel, e: np.ndarray, phase: np.ndarray, time: np.ndarray) -> np.ndarray:
    """What a, b and c are multiplied by in the velocities: [..., times, 3] for e and phase [...]. One call."""
    mean = 2 * np.pi * (np.asarray(phase)[..., None] + time)
    e = np.broadcast_to(np.asarray(e)[..., None], mean.shape)
    anomaly = kepler.evaluate({"mean": mean.ravel(), "eccentricity": e.ravel()}).reshape(mean.shape)
    distance = 1 - e * np.cos(anomaly)
    cosine, sine = (np.cos(anomaly) - e) / distance, np.sqrt(1 - e**2) * np.sin(anomaly) / distance
    return np.stack([cosine + e, -sine, np.ones_like(sine)], -1)


def log_marginal(known: np.ndarray, velocity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log p(velocity | e, phase) with a, b and c integrated out under their normal prior, and their means then.

    known: their basis.
    """
    precision = np.einsum("...ni,...nj->...ij", known, known) + np.eye(3) / PRIOR**2
    pull = known.swapaxes(-1, -2) @ velocity
    best = np.linalg.solve(precision, pull[..., None])[..., 0]
    return 0.5 * (pull * best).sum(-1) - 0.5 * np.linalg.slogdet(precision)[1], best


def sample(density: Density, start: jax.Array, chains: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions [chains, draws, 5] of NUTS from around `start`, and its acceptance rates [chains, draws]."""

    def program(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Second derivatives, through the server, tell the width in all directions; it samples where all are about 1.
        root = jnp.linalg.cholesky(jnp.linalg.inv(-jax.hessian(density)(start)))
        nuts = blackjax.nuts(lambda u: density(start + root @ u), STEP, jnp.ones(5), max_num_doublings=3)

        def chain(u: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            def step(state, key):
                state, info = nuts.step(key, state)
                return state, (start + root @ state.position, info.acceptance_rate)

            return jax.lax.scan(step, nuts.init(u), jax.random.split(key, draws))[1]

        first = jax.random.normal(jax.random.key(1), (chains, 5))
        return jax.vmap(chain)(first, jax.random.split(jax.random.key(2), chains))

    return tuple(map(np.asarray, jax.jit(program)(start)))


def main() -> None:
    options = arguments(__doc__, __file__)
    chains, draws, burn = (32, 30, 10) if options.small else (64, 80, 20)
    rng = np.random.default_rng(4)
    time = np.sort(rng.uniform(0, 3, NIGHTS))
    with connected(options, "orbit", "kepler") as client:
        kepler = client.model("kepler")
        velocity = basis(kepler, ECCENTRICITY, PHASE, time) @ LINEAR + rng.normal(size=NIGHTS)

        # Eccentricity and phase by quadrature: what is right.
        e_grid, phase_grid = np.linspace(0.002, MOST - 0.002, 120), PHASE + np.linspace(-0.5, 0.5, 121)[:-1]
        e_at, phase_at = np.meshgrid(e_grid, phase_grid, indexing="ij")
        known = basis(kepler, e_at, phase_at, time)
        exact, linear = log_marginal(known, velocity)
        at = np.unravel_index(exact.argmax(), exact.shape)

        likelihood = remote_function(client.model("orbit"), rows=True)

        def density(x: jax.Array) -> jax.Array:
            """Log posterior of (z, phase, a, b, c) with e = MOST * sigmoid(z), which is uniform a priori."""
            e = MOST * jax.nn.sigmoid(x[0])
            prior = jax.nn.log_sigmoid(x[0]) + jax.nn.log_sigmoid(-x[0]) - 0.5 * (x[2:] ** 2).sum() / PRIOR**2
            return likelihood(e, x[1:], time, velocity) + prior

        share = e_at[at] / MOST
        start = np.array([np.log(share / (1 - share)), phase_at[at], *linear[at]])
        positions, accepted = sample(density, start, chains, draws + burn)
        positions = positions[:, burn:]
        some = positions.reshape(-1, 5)[:: positions[..., 0].size // 40]
        eccentricities = MOST / (1 + np.exp(-positions[..., 0]))
        curve_at = np.linspace(0, 3, 400)
        curves = basis(kepler, MOST / (1 + np.exp(-some[:, 0])), some[:, 1], curve_at) @ some[:, 2:, None]

    weights = np.exp(exact - exact.max())
    weights /= weights.sum()
    effective = jax.jit(effective_sample_size)
    for name, drawn, grid in (("eccentricity", eccentricities, e_at), ("phase", positions[..., 1], phase_at)):
        mean, size = (weights * grid).sum(), float(effective(drawn))
        spread = np.sqrt((weights * (grid - mean) ** 2).sum())
        print(
            f"{name} {drawn.mean():.4f} +- {drawn.std():.4f}, exact {mean:.4f} +- {spread:.4f} ({size:.0f} effective)"
        )
        assert abs(drawn.mean() - mean) < 5 * spread / np.sqrt(size), "the chains have another mean"
        assert abs(drawn.std() / spread - 1) < 10 / np.sqrt(size), "the chains have another width"
    rhat = float(jax.jit(potential_scale_reduction)(positions).max())
    print(f"{chains} chains of {draws} draws: r-hat {rhat:.3f}, acceptance {accepted.mean():.2f}")
    assert rhat < (1.1 if options.small else 1.02), "the chains have not mixed"

    picture, (left, middle, right) = panels(1, 3, width_ratios=[1.3, 1, 1])
    left.plot(curve_at, curves[..., 0].T, color=BLUE, linewidth=0.5, alpha=0.3)
    left.errorbar(time, velocity, 1, fmt="o", color=RED, markersize=3, linewidth=1)
    left.set(title=f"{NIGHTS} velocities, and {len(some)} orbits drawn", xlabel="periods", ylabel="velocity, in errors")
    levels = np.interp([0.05, 0.32], np.cumsum(np.sort(weights.ravel())), np.sort(weights.ravel()))
    middle.plot(eccentricities.ravel(), positions[..., 1].ravel(), ".", color=BLUE, markersize=1.5, alpha=0.5)
    middle.contour(e_at, phase_at, weights, levels, colors=ORANGE)
    middle.plot(ECCENTRICITY, PHASE, "+", color=RED, markersize=12, markeredgewidth=2)
    middle.set(title="NUTS; 68 and 95 % by quadrature", xlabel="eccentricity", ylabel="phase", xlim=(0, 0.8))
    middle.set_ylim(positions[..., 1].min(), positions[..., 1].max())
    right.hist(eccentricities.ravel(), 40, density=True, color=BLUE, alpha=0.5, label=f"NUTS, {chains} chains")
    right.plot(e_grid, weights.sum(1) / (e_grid[1] - e_grid[0]), color=ORANGE, label="quadrature")
    right.axvline(ECCENTRICITY, color=GREY, linestyle=":", label="truth")
    right.set(title="Eccentricity", xlabel="eccentricity", ylabel="density", xlim=(0, 0.8))
    right.set_ylim(0, 1.25 * right.get_ylim()[1])
    right.legend(loc="upper left")
    save(picture, options)


if __name__ == "__main__":
    main()
