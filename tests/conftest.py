"""One real server for every test that needs no server of its own."""

import os

# Two test processes share two cores; more threads would only contend.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ZOO = Path(__file__).with_name("zoo.py")


@pytest.fixture(scope="session")
def zoo() -> Iterator[str]:
    """Target of a server that hosts tests/zoo.py, for the whole run."""
    from pullback_server import Server

    with Server(ZOO, threads=1, max_message_bytes=64 << 20) as server:
        yield server.target


@pytest.fixture(scope="module", params=["sync", "aio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Any]:
    """`pullback.connect`, and the asyncio client's with the same face: for what both have to do alike."""
    from tests.both_clients import connecting

    with connecting(request.param) as found:
        yield found
