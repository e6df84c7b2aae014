"""What JAX adds to a call: jit(value_and_grad) of a hosted function against the plain client's, and NUTS's calls.

    python benchmarks/jax_calls.py

Prints ratios of medians within this run, and how many calls a step of NUTS makes for one chain and for eight.
"""

from __future__ import annotations

import statistics
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pullback as pb
from pullback.jax import remote_function
from pullback_server import Server

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)

MODELS = Path(__file__).parents[1] / "tests" / "jax_models.py"
ROUNDS = 400


def interleaved(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each, taken in turns."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(ROUNDS + 20):
        for name, work in works.items():
            begin = time.perf_counter()
            jax.block_until_ready(work())
            if round_ >= 20:
                taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in taken.items()}


def vjps(server: Server) -> int:
    """How many VJPs the server has answered."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    found = [line for line in lines if line.startswith("pullback_requests_total{") and "ComputeVjp" in line]
    return sum(int(float(line.rpartition(" ")[2])) for line in found)


def nuts(server: Server, density: Any, chains: int, steps: int = 50) -> tuple[float, float]:
    """Calls of the server and leaps of all chains, for each step."""
    import blackjax

    kernel = blackjax.nuts(density, step_size=0.5, inverse_mass_matrix=jnp.ones(2), max_num_doublings=5)

    def run(states: Any, keys: Any) -> Any:
        def step(states: Any, key: Any) -> Any:
            states, info = jax.vmap(kernel.step)(jax.random.split(key, chains), states)
            return states, info.num_integration_steps

        return jax.lax.scan(step, states, keys)

    start = jax.vmap(kernel.init)(jnp.zeros((chains, 2)))
    keys = jax.random.split(jax.random.key(0), steps)
    compiled = jax.jit(run).lower(start, keys).compile()
    before = vjps(server)
    _, leaps = jax.block_until_ready(compiled(start, keys))
    return (vjps(server) - before) / steps, float(np.asarray(leaps).sum()) / steps


def main() -> None:
    """Prints the table."""
    with Server(MODELS, threads=1) as server, pb.connect(server.target) as client:
        model = client.model("regression")
        point = np.ones(3)
        on_device = jnp.asarray(point)
        f = remote_function(model)
        compiled, eager = jax.jit(jax.value_and_grad(f)), jax.value_and_grad(f)
        medians = interleaved(
            {
                "client": lambda: model.value_and_grad(point),
                "jit": lambda: compiled(on_device),
                "eager": lambda: eager(on_device),
            }
        )
        floor = medians["client"]
        print(f"model.value_and_grad                    {floor * 1e3:6.2f} ms   1.00")
        print(f"jax.jit(jax.value_and_grad(remote))     {medians['jit'] * 1e3:6.2f} ms   {medians['jit'] / floor:.2f}")
        print(
            f"jax.value_and_grad(remote), without jit {medians['eager'] * 1e3:6.2f} ms   {medians['eager'] / floor:.2f}"
        )
        density = remote_function(client.model("density"), rows=True)
        for chains in (1, 8):
            calls, leaps = nuts(server, density, chains)
            print(f"NUTS, chains {chains}: {calls:.1f} calls a step, {leaps:.1f} leaps of all chains")


if __name__ == "__main__":
    main()
