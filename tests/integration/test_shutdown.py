"""How a server ends: what callers, probes and sessions see, and what is left. And how it begins, for probes."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2
from tests.serving import Served, command
from tests.session_wire import Wire

import pullback as pb

MODELS = """
import time
import torch
from pullback_server import model, spec

@model("square", inputs={"x": spec("float64", ["n"])})
def square(x):
    return x * x

@model("slow")
def slow(x):
    time.sleep(float(x.sum()))
    return x
"""
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
CHECK = "/grpc.health.v1.Health/Check"


def health(channel: grpc.Channel, service: str) -> int:
    call = channel.unary_unary(CHECK, None, health_pb2.HealthCheckResponse.FromString)
    request = health_pb2.HealthCheckRequest(service=service).SerializeToString()
    return int(call(request, timeout=20, wait_for_ready=True).status)


def eventually(found: Callable[[], bool], what: str, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def probes_of(server: Served) -> grpc.Channel:
    found = re.search(r"probes alone on 127\.0\.0\.1:(\d+)", server.log.read_text())
    assert found, server.log.read_text()
    return grpc.insecure_channel(f"127.0.0.1:{found[1]}")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def serve(*arguments: str, models: str = MODELS) -> Served:
        (tmp_path / "models.py").write_text(models)
        started.append(Served(tmp_path, "models.py", "--health-port", "0", *arguments))
        return started[-1]

    yield serve
    for server in started:
        server.process.kill()
        server.process.wait(30)


def test_draining_loses_nothing_and_says_so_everywhere(served: Callable[..., Served]) -> None:
    server = served("--drain-seconds", "6", "--grace", "20")
    probes = probes_of(server)
    assert health(probes, "readiness") == health(probes, "liveness") == SERVING
    assert health(server.channel, "") == health(server.channel, "square") == SERVING
    with pb.connect(server.target) as client:
        session = Wire(server.target, "square")
        _, x = session.put(np.array([3.0]), requires_grad=True)
        _, y = session.call_op("model:square", {"x": x})
        np.testing.assert_allclose(session.get(y), [[9.0]])
        empty = Wire(server.target, "square")
        running = server.vjp([8.0], model="slow", timeout=60)
        eventually(lambda: 'in_flight{method="ComputeVjp"} 1.0' in server.get("/metrics"), "the call runs")
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: health(probes, "readiness") == NOT_SERVING, "the probes turn callers away")
        assert health(probes, "liveness") == SERVING
        assert health(server.channel, "") == health(server.channel, "square") == NOT_SERVING
        with pytest.raises(Exception, match="503"):
            server.get("/readyz")
        assert server.get("/livez") == "ok\n"
        assert "pullback_draining 1.0" in server.get("/metrics")
        # Calls are answered all the while, what would last is refused and may be had elsewhere.
        np.testing.assert_allclose(client.model("square").vjp(np.array([2.0]), np.array([1.0])).gradients, [4.0])
        with pytest.raises(grpc.RpcError) as refused:
            Wire(server.target, "square")
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        # A session learns how long it has, and keeps what it holds; one that holds nothing ends.
        session.get(x)
        away = [frame.go_away for frame in session.seen if frame.WhichOneof("frame") == "go_away"]
        assert len(away) == 1 and "shutting down" in away[0].reason
        assert 19 < away[0].time_left.ToMilliseconds() / 1000 <= 26
        with pytest.raises(grpc.RpcError) as ended:
            empty.wait(99)
        assert ended.value.code() is grpc.StatusCode.ABORTED
        op, (gradient,) = session.grad([y], [x])
        session.wait(op)
        np.testing.assert_allclose(session.get(gradient), [[6.0]])
        session.close()
        running.result(timeout=60)
        assert server.process.wait(60) == 0
        # The call of 8 seconds began before the end of the drain and ended after it.
        assert time.monotonic() - began >= 6
    assert not any(worker.is_running() for worker in server.workers)


def test_a_second_signal_ends_everything_at_once(served: Callable[..., Served]) -> None:
    server = served("--drain-seconds", "100", "--grace", "100")
    running = server.vjp([90.0], model="slow", timeout=120)
    eventually(lambda: 'in_flight{method="ComputeVjp"} 1.0' in server.get("/metrics"), "the call runs")
    server.process.send_signal(signal.SIGTERM)
    eventually(lambda: "stopping: calls are taken for another 100 s" in server.log.read_text(), "it drains")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(40) == 128 + signal.SIGTERM
    assert running.exception(timeout=10) is not None
    gone, alive = psutil.wait_procs(server.workers, timeout=20)
    assert gone and not alive


def test_a_second_signal_does_not_wait_for_calls_either(served: Callable[..., Served]) -> None:
    server = served("--drain-seconds", "0", "--grace", "100")
    running = server.vjp([90.0], model="slow", timeout=120)
    eventually(lambda: 'in_flight{method="ComputeVjp"} 1.0' in server.get("/metrics"), "the call runs")
    server.process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(40) == 128 + signal.SIGINT
    assert running.exception(timeout=10) is not None


def test_a_signal_before_anything_is_there_ends_it(tmp_path: Path) -> None:
    """The first process of a container has only the handlers that it installs, so one must stand before the imports."""
    code = """
import os, signal, sys

class Asked:
    def find_spec(self, name, path=None, target=None):
        if name == "pullback_server.cli":
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Asked())
sys.argv = ["pullback-server", "serve", "models.py"]
from pullback_server.__main__ import main
sys.exit(main())
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_terminal_does_not_drain(served: Callable[..., Served], number: signal.Signals) -> None:
    server = served("--drain-seconds", "100")
    server.process.send_signal(number)
    assert server.process.wait(40) == 0


def test_probes_answer_while_models_load(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text("import time\ntime.sleep(6)\n" + MODELS)
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = str(found.getsockname()[1])
    process = subprocess.Popen(
        command("serve", "models.py", "--port", "0", "--metrics-port", "0", "--health-port", port, "--threads", "1"),
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    try:
        channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        assert health(channel, "liveness") == SERVING
        assert health(channel, "readiness") == NOT_SERVING
        eventually(lambda: health(channel, "readiness") == SERVING, "it becomes ready", 60)
        # Nothing else is there.
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/pullback.v1.ModelService/ListModels")(b"", timeout=20)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        process.kill()
        process.wait(30)


def test_a_server_without_a_ready_worker_is_not_ready_and_is_again(served: Callable[..., Served]) -> None:
    server = served(models="import pathlib, time\ntime.sleep(4 if pathlib.Path('again').exists() else 0)\n" + MODELS)
    probes = probes_of(server)
    assert health(probes, "readiness") == SERVING and server.get("/readyz") == "ok\n"
    (server.log.parent / "again").touch()
    for worker in server.workers:
        worker.kill()
    eventually(lambda: health(probes, "readiness") == NOT_SERVING, "it says that nobody computes")
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.get("/readyz")
    assert refused.value.read() == b"no worker is ready\n"
    # The server itself serves: what comes here nevertheless waits for the worker that is being started.
    assert health(probes, "liveness") == health(server.channel, "") == SERVING
    assert server.vjp([2.0], timeout=60).result()
    eventually(lambda: health(probes, "readiness") == SERVING, "it is ready again", 60)


@pytest.mark.parametrize("option", ["--port", "--metrics-port", "--health-port"])
def test_a_taken_port_is_told_before_models_are_loaded(tmp_path: Path, option: str) -> None:
    (tmp_path / "models.py").write_text("raise RuntimeError('this was loaded')\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ports = {"--port": "0", "--metrics-port": "0", option: port}
        arguments = [word for pair in ports.items() for word in pair]
        found = subprocess.run(
            command("serve", "models.py", *arguments), cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
    assert found.returncode == 1
    assert found.stderr == f"pullback-server: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_a_front_that_crashes_leaves_no_process_and_no_memory(served: Callable[..., Served]) -> None:
    server = served("--devices", "cpu:2")
    everybody = psutil.Process(server.process.pid).children(recursive=True)
    session = Wire(server.target, "square")
    # In shared memory, which only the descriptors of these processes keep.
    session.put(np.ones(4_000_000), requires_grad=True)
    calls = [server.vjp([60.0], model="slow", timeout=100) for _ in range(2)]
    eventually(lambda: 'in_flight{method="ComputeVjp"} 2.0' in server.get("/metrics"), "the calls run")
    before = set(Path("/dev/shm").iterdir())
    server.process.kill()
    server.process.wait(30)
    gone, alive = psutil.wait_procs(everybody, timeout=30)
    assert len(gone) >= 2 and not alive
    assert set(Path("/dev/shm").iterdir()) <= before
    for call in calls:
        error = call.exception(timeout=20)
        assert isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.UNAVAILABLE
