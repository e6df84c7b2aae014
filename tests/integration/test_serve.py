"""`pullback-server serve` as an operator meets it: ports, probes, metrics, health, reflection, signals, failures."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.serving import Served, command

from pullback_wire.v1 import model_service_pb2

MODELS = """
import torch
from pullback_server import model, spec

@model("square", inputs={"x": spec("float64", ["n"])})
def square(x):
    "Squares."
    return x * x

@model("slow")
def slow(x):
    import time
    time.sleep(float(x.sum()))
    return x
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "models.py").write_text(MODELS)
    server = Served(folder, "models.py")
    yield server
    server.process.terminate()
    assert server.process.wait(30) == 0, server.log.read_text()
    assert not any(worker.is_running() for worker in server.workers)


def test_the_log_says_what_is_served_where(served: Served) -> None:
    log = served.log.read_text()
    assert "serving square version 1: inputs x;" in log
    assert "serving slow version 1: inputs x;" in log


def test_probes_and_metrics(served: Served) -> None:
    assert served.get("/livez") == "ok\n"
    assert served.get("/readyz") == "ok\n"
    before = served.get("/metrics")
    served.vjp([1.0, 2.0]).result()
    with pytest.raises(grpc.RpcError):
        served.vjp([1.0], model="no such model, with a label that no metric may have").result()
    after = served.get("/metrics")

    def value(text: str, line: str) -> float:
        found = [row.rsplit(" ", 1)[1] for row in text.splitlines() if row.startswith(line + " ")]
        return float(found[0]) if found else 0.0

    ok = 'pullback_requests_total{code="OK",method="ComputeVjp",model="square"}'
    assert value(after, ok) == value(before, ok) + 1
    unknown = 'pullback_requests_total{code="NOT_FOUND",method="ComputeVjp",model=""}'
    assert value(after, unknown) == value(before, unknown) + 1
    assert "no such model" not in after
    for stage in ("decode", "queue", "transfer", "forward", "backward", "encode"):
        line = f'pullback_stage_duration_seconds_count{{model="square",stage="{stage}"}}'
        assert value(after, line) == value(before, line) + 1
    assert value(after, 'pullback_requests_in_flight{method="ComputeVjp"}') == 0
    assert value(after, 'pullback_workers{state="ready"}') == 1
    assert value(after, "pullback_worker_restarts_total") == 0
    assert value(after, "pullback_bytes_in_flight") == 0


def test_unknown_paths_are_not_found(served: Served) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        served.get("/nothing")
    assert caught.value.code == 404


@pytest.mark.parametrize("service", ["", "square", "pullback.v1.GradientService", "pullback.v1.ModelService"])
def test_health(served: Served, service: str) -> None:
    check = served.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    answer = check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        check(health_pb2.HealthCheckRequest(service="nobody"), timeout=10)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(served: Served) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10)
    names = {service.name for service in answer.list_services_response.service}
    assert {"pullback.v1.GradientService", "pullback.v1.ModelService", "grpc.health.v1.Health"} <= names
    (answer,) = stub.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(file_containing_symbol="pullback.v1.GradientService")]), timeout=10
    )
    assert answer.file_descriptor_response.file_descriptor_proto


def test_admin_calls_are_off(served: Served) -> None:
    call = served.channel.unary_unary("/pullback.v1.ModelService/LoadModel")
    with pytest.raises(grpc.RpcError) as caught:
        call(model_service_pb2.LoadModelRequest(name="square").SerializeToString(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_the_front_never_maps_torch_and_the_worker_does(served: Served) -> None:
    def maps(pid: int) -> str:
        return Path(f"/proc/{pid}/maps").read_text()

    assert "libtorch" not in maps(served.process.pid)
    assert all("libtorch" in maps(worker.pid) for worker in served.workers)
    assert len(served.workers) == 1


def test_probes_answer_while_a_model_computes(served: Served) -> None:
    busy = served.vjp([1.5], model="slow")
    assert served.get("/livez") == "ok\n"
    assert served.get("/readyz") == "ok\n"
    assert not busy.done()
    busy.result()


def test_a_call_whose_deadline_passes_in_the_queue_is_told_and_the_next_is_served(served: Served) -> None:
    busy = served.vjp([1.0], model="slow")
    with pytest.raises(grpc.RpcError) as caught:
        served.vjp([1.0], timeout=0.2).result()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    served.vjp([1.0]).result()
    busy.result()


def test_sigterm_lets_running_calls_end(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    server = Served(tmp_path, "models.py")
    server.vjp([1.0]).result()
    running = server.vjp([1.0], model="slow")
    while 'in_flight{method="ComputeVjp"} 1.0' not in server.get("/metrics"):
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    running.result()
    assert server.process.wait(30) == 0
    assert not any(worker.is_running() for worker in server.workers)


def test_a_front_that_is_killed_leaves_no_worker(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    server = Served(tmp_path, "models.py", "--devices", "cpu:2")
    assert len(server.workers) == 2
    server.process.kill()
    server.process.wait(30)
    gone, alive = psutil.wait_procs(server.workers, timeout=30)
    assert len(gone) == 2
    assert not alive


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import nothing_of_this_name", "nothing_of_this_name"),
        ("def broken(:", "SyntaxError"),
        ("x = 1", "no model is registered"),
        ("import sys; sys.exit(3)", "exit(3)"),
        (
            "from pullback_server import model\n@model('m')\ndef make():\n    raise RuntimeError('no weights here')",
            "no weights here",
        ),
        ("from pullback_server import model\n@model('m')\ndef make():\n    return 3", "nn.Module"),
        ("from pullback_server import model\n@model('bad name')\ndef f(x):\n    return x", "bad name"),
        (
            "from pullback_server import model\n@model('m')\ndef f(x): return x\n@model('m')\ndef g(x): return x",
            "two models",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "worker"),
    ],
)
def test_models_that_cannot_be_served_end_serve_with_one_message(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "models.py").write_text(source)
    done = subprocess.run(
        command("serve", "models.py", "--port", "0", "--metrics-port", "0"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    last = [line for line in done.stderr.splitlines() if line.startswith("pullback-server: ")]
    assert len(last) == 1
    assert words in last[0]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["serve"], 2, "no models"),
        (["serve", "missing.py", "--port", "0", "--metrics-port", "0"], 1, "missing.py: no such file"),
        (["serve", "m.py", "--port", "70000"], 2, "--port: Input should be less than or equal to 65535"),
        (["serve", "m.py", "--prot", "1"], 2, "--prot"),
        (["serve", "m.py", "--devices", "tpu", "--port", "0", "--metrics-port", "0"], 1, "tpu"),
        (["nonsense"], 2, "usage"),
    ],
)
def test_bad_usage(tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    (tmp_path / "m.py").write_text(MODELS)
    done = subprocess.run(command(*arguments), cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert words in done.stderr


def test_a_taken_port_is_an_error_not_a_second_listener(served: Served, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(MODELS)
    port = served.http.rpartition(":")[2]
    for flags in (["--port", "0", "--metrics-port", port], ["--port", port, "--metrics-port", "0"]):
        done = subprocess.run(
            command("serve", "m.py", *flags), cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert port in done.stderr


def test_every_flag_has_an_environment_twin_and_is_in_help() -> None:
    from pullback_server.config import Config

    text = subprocess.run(command("serve", "--help"), capture_output=True, text=True, timeout=60, check=True).stdout
    for name in Config.model_fields:
        if name != "models":
            assert f"--{name.replace('_', '-')}" in text
    code = "from pullback_server.config import Config; c = Config(); print(c.models, c.port, c.grace)"
    environment = {**os.environ, "PULLBACK_MODELS": "a.py,b c.py", "PULLBACK_PORT": "1234", "PULLBACK_GRACE": "2.5"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "['a.py', 'b c.py'] 1234 2.5"
