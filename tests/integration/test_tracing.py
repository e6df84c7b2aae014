"""Traces from a caller's own span to what its worker computed, as a real collector gets them."""

import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState
from tests.collector import Collector, Span
from tests.serving import Served

import pullback as pb

MODELS = """
import opentelemetry.trace
import torch
from pullback_server import Batching, model, spec

@model("square", inputs={"x": spec("float64", ["n"])})
def square(x):
    return x * x

@model("rows", inputs={"x": spec("float64", ["n", 3])}, batch_axis=0, batching=Batching(max_rows=4, max_delay=30.0))
def rows(x):
    return x**3

@model("raises", inputs={"x": spec("float64", ["n"])})
def raises(x):
    if x.shape[0] == 5:
        raise ValueError("five")
    return x

@model("traced", kind="function")
def traced(x):
    "The trace and the span that a span of the model's own would belong to, in bytes."
    context = opentelemetry.trace.get_current_span().get_span_context()
    both = context.trace_id.to_bytes(16, "big") + context.span_id.to_bytes(8, "big")
    return torch.tensor(list(both), dtype=torch.float64)
"""
#: A number that no log and no span may show, in any form that a tensor takes.
SECRET = 31415.926535
TOKEN = "hush-this-is-a-token"


class House(NamedTuple):
    served: Served
    client: pb.Client
    collector: Collector


@contextmanager
def house(folder: Path, collector: Collector, *arguments: str, **environment: str) -> Iterator[House]:
    (folder / "models.py").write_text(MODELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        for name, value in environment.items():
            patch.setenv(name, value)
        served = Served(folder, "models.py", "--tracing", *arguments)
    try:
        with pb.connect(served.target, metadata={"authorization": f"Bearer {TOKEN}"}) as client:
            yield House(served, client, collector)
    finally:
        served.process.terminate()
        assert served.process.wait(30) == 0, served.log.read_text()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


@pytest.fixture(scope="module")
def traced(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("traced"), collector, "--log-format", "json", "--access-log") as found:
        yield found


@contextmanager
def span(number: int, sampled: bool = True) -> Iterator[str]:
    """The caller's span; its trace."""
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    context = SpanContext(0xABC0000000000000000000000000000 + number, 0x1230 + number, False, flags, TraceState())
    with trace.use_span(NonRecordingSpan(context)):
        yield f"{context.trace_id:032x}"


def test_a_call_is_traced_from_its_caller_to_its_worker(traced: House) -> None:
    model = traced.client.model("square")
    # Else the first call asks for the signature, under the same span.
    assert model.info.inputs
    with span(1) as id, pb.request_id("call one"):
        model.vjp(np.array([SECRET, 2.0]), np.array([1.0, SECRET]))
    stages = {"decode", "queue", "transfer", "compute", "encode"}
    method = "pullback.v1.GradientService/ComputeVjp"
    spans = traced.collector.of_trace(id, {method, "forward", "backward", *stages})
    root = spans[method]
    assert root.parent == f"{0x1231:016x}"
    assert {name: spans[name].parent for name in stages} == dict.fromkeys(stages, root.id)
    assert spans["forward"].parent == spans["backward"].parent == spans["compute"].id
    assert root.service == "pullback-server"
    assert not root.failed
    told = root.attributes
    assert told["rpc.system"] == "grpc"
    assert (told["rpc.service"], told["rpc.method"]) == ("pullback.v1.GradientService", "ComputeVjp")
    assert told["rpc.grpc.status_code"] == 0
    assert (told["pullback.model"], told["pullback.version"]) == ("square", "1")
    assert told["pullback.request_id"] == "call one"
    assert told["pullback.worker"] == spans["forward"].attributes["pullback.worker"] == "cpu-0"
    # What happened one after the other stands so, and within the call; the worker's clock is the front's.
    order = ["decode", "queue", "forward", "backward", "encode"]
    ends = [spans[name].end for name in order]
    assert ends == sorted(ends)
    for one in spans.values():
        assert root.begin <= one.begin <= one.end <= root.end, (one.name, root)
    assert spans["compute"].end > spans["compute"].begin


def test_a_model_goes_on_with_its_callers_trace_in_the_worker(traced: House) -> None:
    model = traced.client.model("traced")
    with span(2) as id:
        both = bytes(int(one) for one in model.evaluate(np.zeros(1)))
    assert both[:16].hex() == id
    method = "pullback.v1.GradientService/Evaluate"
    root = traced.collector.of_trace(id, {method})[method]
    assert both[16:].hex() == root.id


def test_errors_have_their_status_and_their_reason_but_not_their_words(traced: House) -> None:
    with span(3) as missing, pytest.raises(pb.errors.ModelNotFound):
        traced.client.model("none such").evaluate({"x": np.zeros(1)})
    with span(4) as broken, pytest.raises(pb.errors.ModelError):
        traced.client.model("raises").evaluate({"x": np.zeros(5)})
    method = "pullback.v1.GradientService/Evaluate"
    callers = traced.collector.of_trace(missing, {method})[method]
    assert not callers.failed, "a wrong name is no fault of the server's"
    assert callers.attributes["rpc.grpc.status_code"] == 5
    assert callers.attributes["error.type"] == "MODEL_NOT_FOUND"
    servers = traced.collector.of_trace(broken, {method})[method]
    assert servers.failed
    assert servers.attributes["rpc.grpc.status_code"] == 13
    assert servers.attributes["error.type"] == "MODEL_ERROR"
    assert not any(b"five" in body for body in traced.collector.bodies)


def test_what_is_computed_at_once_links_to_all_who_asked(traced: House) -> None:
    model = traced.client.model("rows")
    # The signature is asked for before, so that there is one call for each span.
    assert model.info.inputs

    def ask(number: int) -> str:
        with span(number) as id:
            model.vjp(np.full((1, 3), float(number)), np.ones((1, 3)))
        return id

    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(ask, range(10, 14)))
    method = "pullback.v1.GradientService/ComputeVjp"
    roots = {id: traced.collector.of_trace(id, {method})[method] for id in ids}

    def batches(spans: list[Span]) -> list[Span]:
        return [one for one in spans if one.name == "batch"]

    (batch,) = traced.collector.wait(batches)
    assert sorted(batch.links) == sorted((id, root.id) for id, root in roots.items())
    assert batch.trace in ids
    assert batch.parent == roots[batch.trace].id
    assert batch.attributes["pullback.batch.rows"] == batch.attributes["pullback.batch.calls"] == 4
    inside = traced.collector.of_trace(batch.trace, {"forward", "backward"})
    assert inside
    for root in roots.values():
        assert root.links == [(batch.trace, batch.id)]
        assert root.attributes["pullback.batch.rows"] == 4


def test_a_session_has_a_span_and_its_ops_have_linked_ones(traced: House) -> None:
    with span(20) as id, pb.request_id("session one"), traced.client.session():
        x = pb.tensor(np.array([SECRET, 2.0]), requires_grad=True)
        y = traced.client.model("square")(x)
        y.backward(np.ones(2))
        with pytest.raises(pb.errors.GraphFreed):
            y.backward(np.ones(2))
    session = traced.collector.of_trace(id, {"pullback.v1.SessionService/Session"})[
        "pullback.v1.SessionService/Session"
    ]
    assert session.attributes["pullback.request_id"] == "session one"
    assert session.attributes["rpc.grpc.status_code"] == 0

    def ops(spans: list[Span]) -> list[Span]:
        found = [one for one in spans if one.links == [(id, session.id)]]
        return found if len(found) >= session.attributes["pullback.session.ops"] else []

    found = traced.collector.wait(ops)
    assert {one.name for one in found} >= {"op call", "op grad"}
    assert all(one.attributes["pullback.request_id"].startswith("session one/") for one in found)
    assert len({one.trace for one in found} | {id}) == len(found) + 1, "each is a trace of its own"
    grads = [one for one in found if one.name == "op grad"]
    assert sorted(one.attributes["rpc.grpc.status_code"] for one in grads) == [0, 9]
    computed = traced.collector.of_trace(next(one.trace for one in grads if "error.type" not in one.attributes), set())
    assert "compute" in computed


def test_who_does_not_sample_is_not_traced_and_his_trace_goes_on(traced: House) -> None:
    model = traced.client.model("traced")
    with span(30, sampled=False) as id:
        both = bytes(int(one) for one in model.evaluate(np.zeros(1)))
    assert both[:16].hex() == id
    with span(31) as later:
        model.evaluate(np.zeros(1))
    traced.collector.of_trace(later, {"pullback.v1.GradientService/Evaluate"})
    assert not [one for one in traced.collector.spans if one.trace == id]


def test_a_context_that_is_none_begins_a_new_trace(traced: House) -> None:
    client = pb.connect(traced.served.target, metadata={"traceparent": "00-zz-1-01"})
    with pb.request_id("no context"):
        client.model("square").evaluate({"x": np.zeros(2)})
    client.close()

    def wanted(spans: list[Span]) -> list[Span]:
        return [one for one in spans if one.attributes.get("pullback.request_id") == "no context"]

    (root,) = traced.collector.wait(wanted)
    assert root.parent == ""


def test_metrics_have_the_trace_as_an_exemplar(traced: House) -> None:
    with span(40) as id:
        traced.client.model("square").vjp(np.ones(2), np.ones(2))
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    with urllib.request.urlopen(urllib.request.Request(f"{traced.served.http}/metrics", headers=accept)) as answer:
        lines = answer.read().decode().splitlines()
    for metric in ("pullback_request_duration_seconds", "pullback_stage_duration_seconds"):
        found = [line for line in lines if line.startswith(f"{metric}_bucket") and f'trace_id="{id}"' in line]
        assert found, [line for line in lines if line.startswith(f"{metric}_bucket")]


def test_lines_about_a_call_have_its_trace(traced: House) -> None:
    with span(50) as id, pytest.raises(pb.errors.ModelError):
        traced.client.model("raises").evaluate({"x": np.zeros(5)})
    lines = [json.loads(line) for line in traced.served.log.read_text().splitlines()]
    about = [line for line in lines if line.get("trace_id") == id]
    assert {line["logger"] for line in about} == {"pullback_server.fleet.jobs", "pullback_server.access"}


def test_nothing_that_was_sent_is_told(traced: House) -> None:
    """After all that was sent in this module: neither numbers nor tokens, in spans or in the log."""
    log = traced.served.log.read_bytes()
    for told in [log, *traced.collector.bodies]:
        assert TOKEN.encode() not in told
        assert np.float64(SECRET).tobytes() not in told
        assert b"31415" not in told


def test_the_last_spans_are_sent_before_the_server_ends(collector: Collector, tmp_path: Path) -> None:
    """Also where the sampler is another, and the service has another name."""
    with house(
        tmp_path,
        collector,
        OTEL_BSP_SCHEDULE_DELAY="600000",
        OTEL_SERVICE_NAME="gradients",
        OTEL_TRACES_SAMPLER="always_on",
    ) as found:
        model = found.client.model("square")
        with span(60, sampled=False) as id:
            model.vjp(np.ones(2), np.ones(2))
        assert not [one for one in collector.spans if one.trace == id]
    assert {"forward", "backward"} <= {one.name for one in collector.spans if one.trace == id}
    assert {one.service for one in collector.spans if one.trace == id} == {"gradients"}


def test_a_collector_that_never_answers_holds_up_neither_calls_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a pod would be killed at the end of its grace, with files of its own left behind."""
    (tmp_path / "models.py").write_text(MODELS)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "900000")
        served = Served(tmp_path, "models.py", "--tracing")
        try:
            with pb.connect(served.target) as client:
                for _ in range(20):
                    client.model("square").vjp(np.ones(2), np.ones(2))
            served.process.terminate()
            assert served.process.wait(90) == 0
        finally:
            served.process.kill()
            served.process.wait(30)
    assert "the last traces could not be sent" in served.log.read_text()


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        ("import sys; sys.modules['opentelemetry.sdk'] = None", "pullback[server,otel]"),
        ("import os; os.environ['OTEL_EXPORTER_OTLP_PROTOCOL'] = 'grpc'", "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"),
        ("import os; os.environ['OTEL_TRACES_EXPORTER'] = 'zipkin'", "OTEL_TRACES_EXPORTER is 'zipkin'"),
    ],
)
def test_what_cannot_be_traced_is_said_at_the_start(prepare: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    arguments = ["serve", "models.py", "--tracing", "--port", "0", "--metrics-port", "0"]
    code = f"{prepare}; from pullback_server.cli import main; sys.exit(main({arguments}))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
