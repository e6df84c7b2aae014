"""pullback.jax used for real: NUTS of blackjax and numpyro over hosted log-densities finds known posteriors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import MCMC, NUTS
from tests.jax_models import COVARIANCE, FEATURES, MEAN, NOISE, OBSERVED, PRIOR
from tests.jax_serving import Hosted, hosting

PRECISION = FEATURES.T @ FEATURES / NOISE**2 + np.eye(3) / PRIOR**2
POSTERIOR_COVARIANCE = np.linalg.inv(PRECISION)
POSTERIOR_MEAN = POSTERIOR_COVARIANCE @ FEATURES.T @ OBSERVED / NOISE**2


@pytest.fixture(scope="module")
def hosted() -> Iterator[Hosted]:
    with hosting() as found:
        yield found


def assert_is(samples: Any, mean: Any, covariance: Any, effective: float) -> None:
    """samples: [count, n]; effective: a lower bound of how many independent ones they are worth."""
    deviation = np.sqrt(np.diag(covariance))
    errors = (np.mean(samples, 0) - mean) / deviation
    assert (np.abs(errors) < 4.5 / np.sqrt(effective)).all(), errors
    # Standard errors of a covariance of n samples are sqrt((1 + rho^2) / n), in units of the deviations.
    apart = (np.cov(np.asarray(samples).T) - covariance) / np.outer(deviation, deviation)
    assert (np.abs(apart) < 4.5 * np.sqrt(2 / effective)).all(), apart


def test_blackjax_chains_share_their_calls(hosted: Hosted) -> None:
    density, chains = hosted("density", rows=True), 8
    nuts = blackjax.nuts(density, step_size=0.9, inverse_mass_matrix=np.diag(COVARIANCE), max_num_doublings=4)
    keys = jax.random.split(jax.random.key(1), chains)
    start = jax.vmap(nuts.init)(jnp.zeros((chains, 2)))

    def steps(states: Any, keys: Any) -> Any:
        def step(states: Any, key: Any) -> Any:
            states, info = jax.vmap(nuts.step)(jax.random.split(key, chains), states)
            return states, (states.position, info.num_integration_steps)

        return jax.lax.scan(step, states, keys)

    run = jax.jit(steps)
    compiled = run.lower(start, jax.random.split(keys[0], 110)).compile()
    before = hosted.counts().get("ComputeVjp", 0)
    _, (positions, leaps) = compiled(start, jax.random.split(keys[0], 110))
    positions = np.asarray(jax.block_until_ready(positions))
    calls = hosted.counts()["ComputeVjp"] - before
    # All chains leap together, so there are as many calls as the chain with most leaps has, not their sum.
    longest = int(np.asarray(leaps).max(1).sum())
    assert calls < 1.5 * longest < 0.5 * int(np.asarray(leaps).sum())
    assert_is(positions[10:].reshape(-1, 2), MEAN, COVARIANCE, effective=300)


def test_numpyro_finds_a_conjugate_posterior(hosted: Hosted) -> None:
    posterior = hosted("regression")
    # The right metric from the start: fewer leaps for as good samples.
    kernel = NUTS(
        potential_fn=lambda w: -posterior(w),
        inverse_mass_matrix=jnp.asarray(POSTERIOR_COVARIANCE),
        adapt_mass_matrix=False,
        dense_mass=True,
    )
    sampler = MCMC(kernel, num_warmup=40, num_samples=120, progress_bar=False)
    sampler.run(jax.random.key(2), init_params=jnp.zeros(3))
    assert_is(np.asarray(sampler.get_samples()), POSTERIOR_MEAN, POSTERIOR_COVARIANCE, effective=80)
