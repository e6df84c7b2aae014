"""A server of tests/jax_models.py, JAX in double precision on the CPU, and how many calls were made."""

import re
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

import pullback as pb
from pullback.jax import RemoteFunction, remote_function
from pullback_server import Server

jax.config.update("jax_platforms", "cpu")
MODELS = Path(__file__).with_name("jax_models.py")


@contextmanager
def double_precision() -> Iterator[None]:
    """By the setting that all threads see: callbacks run in threads of XLA's. Other tests find it as it was."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


class Hosted:
    """The models, as JAX functions."""

    def __init__(self, server: Server, client: pb.Client) -> None:
        self.server = server
        self.client = client

    def __call__(self, name: str, **options: Any) -> RemoteFunction:
        return remote_function(self.client.model(name), **options)

    def counts(self) -> dict[str, int]:
        """Calls of the server so far, by method, gradient methods alone."""
        address = f"http://127.0.0.1:{self.server.metrics_port}/metrics"
        with urllib.request.urlopen(address, timeout=30) as answer:
            said = answer.read().decode()
        found: dict[str, int] = {}
        for labels, count in re.findall(r"^pullback_requests_total\{(.*)\} (\S+)$", said, re.MULTILINE):
            method = re.search(r'method="([^"]*)"', labels)
            assert method is not None
            name = method[1].rpartition("/")[2]
            if name.startswith(("Compute", "Evaluate")):
                found[name] = found.get(name, 0) + int(float(count))
        return found

    def calls(self, work: Callable[..., Any], *arguments: Any) -> dict[str, int]:
        """What `work` calls, when it has been traced and compiled before."""
        jax.block_until_ready(work(*arguments))
        before = self.counts()
        jax.block_until_ready(work(*arguments))
        after = self.counts()
        return {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}


@contextmanager
def hosting() -> Iterator[Hosted]:
    """The server, a client, and 64 bits."""
    with Server(MODELS, threads=1) as server, pb.connect(server.target, timeout=60) as client, double_precision():
        yield Hosted(server, client)
