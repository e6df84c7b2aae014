"""What a server lets in: connections, streams on one, metadata, slow beginners; and how connections age."""

import contextlib
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import pullback
from pullback import errors
from pullback_server import Server

MODELS = """
from pullback_server import model, spec

@model("square", inputs={"x": spec("float64", ["n"])})
def square(x):
    return x * x
"""
ONCE = pullback.RetryPolicy(attempts=1)
PATIENT = pullback.RetryPolicy(attempts=100, initial_backoff=0.1, max_backoff=0.2)
X = np.array([1.0, 2.0, 3.0])
#: Seconds for a connection's beginning, and for its life.
HANDSHAKE, AGE = 1.0, 1.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("limits") / "models.py"
    file.write_text(MODELS)
    return file


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pullback_server.rpc.server._HANDSHAKE_MS", int(HANDSHAKE * 1000))
        with Server(
            models, threads=1, max_connections=4, max_connection_streams=2, max_metadata_bytes=8 << 10
        ) as running:
            yield running


@pytest.fixture(scope="module")
def aging(models: Path) -> Iterator[list[Server]]:
    with (
        Server(models, threads=1, max_connection_age_seconds=AGE) as one,
        Server(models, threads=1, max_connection_age_seconds=AGE) as two,
    ):
        yield [one, two]


@contextlib.contextmanager
def silent(server: Server, count: int, first_words: bytes) -> Iterator[list[socket.socket]]:
    """Connections that begin with a few bytes and never go on."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
            one.sendall(first_words)
            found.append(one)
        yield found


def test_metadata_are_refused_with_the_name_of_the_limit(server: Server) -> None:
    value = np.random.default_rng(0).bytes(100_000).hex()
    with pullback.connect(server.target, retry=ONCE, metadata={"x-big": value[:6000]}) as client:
        np.testing.assert_array_equal(client.model("square").vjp(X, X).gradients, 2 * X * X)
    for length in (9000, 200_000):
        with (
            pullback.connect(server.target, retry=ONCE, metadata={"x-big": value[:length]}) as client,
            pytest.raises(errors.ResourceExhausted, match="--max-metadata-bytes") as caught,
        ):
            client.models()
        assert value[:100] not in str(caught.value)


def test_connections_beyond_the_limit_are_closed_and_those_there_are_left_in_peace(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(pullback.connect(server.target, retry=PATIENT)) for _ in range(4)]
        for client in clients:
            client.models()
        with pullback.connect(server.target, retry=ONCE) as beyond, pytest.raises(errors.Unavailable):
            beyond.models()
        for client in clients:
            np.testing.assert_array_equal(client.model("square").vjp(X, X).gradients, 2 * X * X)
        clients[0].close()
        with pullback.connect(server.target, retry=PATIENT) as fifth:
            np.testing.assert_array_equal(fifth.model("square").vjp(X, X).gradients, 2 * X * X)


def test_streams_beyond_the_limit_wait_for_those_of_their_own_connection(server: Server) -> None:
    with (
        pullback.connect(server.target, retry=PATIENT) as client,
        pullback.connect(server.target, retry=PATIENT) as other,
        client.session() as first,
    ):
        second = client.session()
        # Both streams are taken. gRPC lets the call wait at the client.
        with pytest.raises(errors.DeadlineExceeded):
            client.models(timeout=0.5)
        np.testing.assert_array_equal(other.model("square").vjp(X, X).gradients, 2 * X * X)
        second.close()
        np.testing.assert_array_equal(client.model("square").vjp(X, X).gradients, 2 * X * X)
        np.testing.assert_array_equal((first.tensor(X) * 2.0).numpy(), 2 * X)


@pytest.mark.parametrize("first_words", [b"", b"PRI * HTTP/2.0\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
def test_connections_that_do_not_get_on_are_closed_and_their_places_are_free_again(
    server: Server, first_words: bytes
) -> None:
    with silent(server, 4, first_words) as sockets, pullback.connect(server.target, retry=PATIENT) as client:
        # They hold every place there is, but only for so long.
        np.testing.assert_array_equal(client.model("square").vjp(X, X).gradients, 2 * X * X)
        for one in sockets:
            with contextlib.suppress(ConnectionResetError):
                while one.recv(1 << 16):
                    pass


class Turns:
    """Hands connections to servers in turn, as a balancer does that knows nothing of HTTP/2."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = ports
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.taken = 0
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._ports[self.taken % len(self._ports)]))
                self.taken += 1
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()
        for one in self._open:
            one.close()


def answered(server: Server) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as answer:
        rows = answer.read().decode().splitlines()
    return sum(float(row.rsplit(" ", 1)[1]) for row in rows if row.startswith("pullback_requests_total{"))


def test_calls_move_to_new_connections_and_sessions_stay_on_the_old(aging: list[Server]) -> None:
    turns = Turns([server.port for server in aging])
    with pullback.connect(turns.target) as client, client.session() as session:
        x = session.tensor(X, requires_grad=True)
        client.model("square")(x).backward(X)
        began = time.monotonic()
        made = 0
        # Several ages, for gRPC draws each within a tenth of what is asked.
        while time.monotonic() - began < 4 * AGE or turns.taken < 3:
            np.testing.assert_array_equal(client.model("square").vjp(X, X).gradients, 2 * X * X)
            np.testing.assert_array_equal((x * 2.0).numpy(), 2 * X)
            made += 1
            time.sleep(0.01)
            assert time.monotonic() - began < 60
        assert min(answered(server) for server in aging) > 0
        assert sum(answered(server) for server in aging) >= made
        np.testing.assert_array_equal(x.grad.numpy(), 2 * X * X)
    turns.close()
