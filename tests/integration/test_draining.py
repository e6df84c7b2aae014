"""One of two servers shuts down under 64 callers: nobody loses a call, and sessions are told."""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.proxies import Proxy, binary, serving_pair
from tests.serving import Served

import pullback
from pullback import errors
from pullback_wire import GRADIENT_METHODS, TensorWriter, encode_message
from pullback_wire.v1 import gradient_service_pb2 as pb

MODELS = """
from pullback_server import model, spec

@model("square", inputs={"x": spec("float64", ["n"])}, batch_axis=0)
def square(x):
    return x * x
"""
CALLERS = 64
X = np.array([1.0, 2.0, 3.0])


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[Served]]:
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    with serving_pair(folders, MODELS, "--drain-seconds", "3", "--grace", "3") as found:
        yield found


def ways() -> list[object]:
    """How callers reach both servers."""
    found: list[object] = ["round_robin"]
    for kind in ("envoy", "nginx"):
        skip = pytest.mark.skipif(binary(kind) is None, reason=f"{kind} is not installed")
        found.append(pytest.param(kind, marks=skip))
    return found


@contextlib.contextmanager
def reached(way: str, servers: list[Served], folder: Path) -> Iterator[str]:
    targets = [server.target for server in servers]
    if way == "round_robin":
        yield f"ipv4:{','.join(targets)}"
        return
    (folder / way).mkdir()
    with Proxy(way, folder / way, targets) as proxy:
        yield proxy.target


def value(server: Served, name: str) -> float:
    rows = [row.rsplit(" ", 1) for row in server.get("/metrics").splitlines() if row.startswith(name)]
    return sum(float(number) for _, number in rows)


@pytest.mark.parametrize("way", ways())
def test_no_call_is_lost_and_sessions_are_told(way: str, servers: list[Served], tmp_path: Path) -> None:
    leaving, staying = servers
    with reached(way, servers, tmp_path) as target, pullback.connect(target) as client:
        model = client.model("square")
        stop = threading.Event()

        def call() -> int:
            made = 0
            while not stop.is_set():
                np.testing.assert_array_equal(model.vjp(X, X).gradients, 2 * X * X)
                made += 1
            return made

        def call_in_chunks() -> int:
            # What is larger than this client sends in one message goes through sessions of its own.
            made = 0
            big = np.arange(1 << 19, dtype=np.float64)
            with pullback.connect(target, max_message_bytes=4 << 20) as other:
                while not stop.is_set():
                    np.testing.assert_array_equal(other.model("square").vjp(big, big).gradients, 2 * big * big)
                    made += 1
            return made

        def open_sessions() -> int:
            made = 0
            while not stop.is_set():
                # What is opened in time may yet end with its server; what is opened later goes to the other.
                with contextlib.suppress(errors.SessionLost), client.session() as session:
                    x = session.tensor(X, requires_grad=True)
                    model(x).backward(X)
                    np.testing.assert_array_equal(x.grad.numpy(), 2 * X * X)
                    made += 1
            return made

        def keep(session: pullback.Session) -> tuple[pullback.Session, errors.SessionLost | None]:
            x = session.tensor(X, requires_grad=True)
            model(x).backward(X)
            while not stop.is_set():
                try:
                    np.testing.assert_array_equal((x.grad * x).numpy(), 2 * X**3)
                except errors.SessionLost as error:
                    return session, error
                time.sleep(0.05)
            return session, None

        sessions = [client.session() for _ in range(6)]
        there = value(leaving, "pullback_sessions ")
        assert 0 < there < 6
        with ThreadPoolExecutor(CALLERS + 8) as threads:
            try:
                callers = [threads.submit(call) for _ in range(CALLERS - 2)]
                callers += [threads.submit(call_in_chunks), threads.submit(open_sessions)]
                kept = [threads.submit(keep, session) for session in sessions]
                time.sleep(1)
                leaving.process.send_signal(signal.SIGTERM)
                assert leaving.process.wait(60) == 0, leaving.log.read_text()
                time.sleep(1)
            finally:
                stop.set()
            assert all(caller.result() > 0 for caller in callers)
            ended = [one.result() for one in kept]
        lost = [(session, error) for session, error in ended if error is not None]
        assert len(lost) == there
        for session, error in lost:
            assert session.going_away
            assert "the server is shutting down" in str(error)
        # In the place of what went there is what stays.
        with client.session() as session:
            x = session.tensor(X, requires_grad=True)
            model(x).backward(X)
            np.testing.assert_array_equal(x.grad.numpy(), 2 * X * X)
        assert staying.process.poll() is None


def test_other_clients_that_watch_health_lose_nothing_without_retries(servers: list[Served]) -> None:
    leaving, _ = servers
    config = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}
    options = [("grpc.service_config", json.dumps(config)), ("grpc.enable_retries", 0)]
    writer = TensorWriter()
    request = pb.EvaluateRequest(function={"model": "square"}, inputs=[writer.add("x", X)])
    data = encode_message(request, writer.payloads)
    stop = threading.Event()
    with grpc.insecure_channel(f"ipv4:{','.join(server.target for server in servers)}", options) as channel:
        evaluate = channel.unary_unary(GRADIENT_METHODS["Evaluate"].path)
        evaluate(data, timeout=30, wait_for_ready=True)

        def call() -> int:
            made = 0
            while not stop.is_set():
                evaluate(data, timeout=30)
                made += 1
            return made

        with ThreadPoolExecutor(CALLERS) as threads:
            try:
                callers = [threads.submit(call) for _ in range(CALLERS)]
                time.sleep(1)
                leaving.process.send_signal(signal.SIGTERM)
                assert leaving.process.wait(60) == 0, leaving.log.read_text()
                time.sleep(0.5)
            finally:
                stop.set()
            assert all(caller.result() > 0 for caller in callers)
