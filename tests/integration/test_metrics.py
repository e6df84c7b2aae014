"""What a server counts, held against what was done to it: through its own /metrics, over real sockets and processes."""

from __future__ import annotations

import math
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

import pullback as pb
from pullback_server import GradientHealth, model, spec
from pullback_server.embedded import Server
from pullback_server.fleet.seam import WorkerState
from pullback_server.job import Health, HealthRecord
from pullback_server.telemetry import Devices, Metrics, declared
from pullback_wire import TensorWriter, encode_message
from pullback_wire.v1 import gradient_service_pb2 as messages
from pullback_wire.v1.function_pb2 import Function

ROWS = {"x": spec("float64", ["n", 3])}


@model("net", inputs={"input": spec("float64", ["n", 3])}, batch_axis=0)
def net() -> nn.Module:
    """A small network of torch's own modules; some of its units are dead."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double()


@model("logarithm", inputs={"x": spec("float64", ["n"])}, gate=False)
def logarithm(x: torch.Tensor) -> torch.Tensor:
    """NaN of what is negative, infinity of zero."""
    return torch.log(x)


@model(
    "scaled",
    inputs={"x": spec("float64", ["n"])},
    gradient_health=GradientHealth(vanishing_below=1e-3, exploding_above=1e3),
)
def scaled(x: torch.Tensor) -> torch.Tensor:
    """A gradient as large as the cotangent."""
    return x * 1.0


@model("unseen", inputs={"x": spec("float64", ["n"])}, gradient_health=GradientHealth(enabled=False))
def unseen(x: torch.Tensor) -> torch.Tensor:
    """At whose numbers nobody looks."""
    return x * 2


@model("slow", kind="function", gate=False)
def slow(x: torch.Tensor) -> torch.Tensor:
    """Takes its time."""
    time.sleep(0.4)
    return x * 1


Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Scraped:
    """One look at /metrics."""

    def __init__(self, server: Server) -> None:
        url = f"http://127.0.0.1:{server.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            self.text = answer.read().decode()
        self.families = {
            family.name: family
            for family in text_string_to_metric_families(self.text)  # type: ignore[no-untyped-call]
        }
        self.series: Series = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """The value of a series; 0 where there is none."""
        return self.series.get((name, tuple(sorted(labels.items()))), 0.0)

    def values(self, label: str) -> set[str]:
        return {dict(labels)[label] for _, labels in self.series if label in dict(labels)}


def difference(server: Server, work: Callable[[], object]) -> Callable[..., float]:
    """How much series grew while something was done."""
    before = Scraped(server)
    work()
    after = Scraped(server)
    return lambda name, **labels: after(name, **labels) - before(name, **labels)


def settled(server: Server, expected: dict[str, float]) -> None:
    """Waits until gauges have these values."""
    until = time.monotonic() + 60
    while True:
        seen = Scraped(server)
        found = {name: seen(name) for name in expected}
        if found == expected:
            return
        assert time.monotonic() < until, found
        time.sleep(0.05)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(net, logarithm, scaled, unseen, slow, threads=1, max_calls=64, gradient_health_cost=0) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[pb.Client]:
    with pb.connect(server.target, timeout=60) as connected:
        yield connected


def as_text(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def as_open(registry: CollectorRegistry) -> str:
    shown: bytes = exposition.generate_latest(registry)  # type: ignore[no-untyped-call]
    return shown.decode()


# What is declared.


def test_declared_is_what_is_shown(server: Server, client: pb.Client) -> None:
    client.model("net").vjp(np.ones((1, 3)), np.ones((1, 2)))
    families = Scraped(server).families
    for one in declared():
        name = one.name.removesuffix("_total") if one.kind == "counter" else one.name
        assert families[name].type == one.kind, one.name
        assert families[name].documentation == one.help
    ours = {name for name in families if name.startswith(("pullback_", "process_")) and not name.endswith("_created")}
    assert ours == {one.name.removesuffix("_total") if one.kind == "counter" else one.name for one in declared()}


def test_labels_are_as_declared(server: Server, client: pb.Client) -> None:
    client.model("net").evaluate(np.ones((1, 3)))
    labels = {one.name: set(one.labels) for one in declared()}
    for name, of_series in Scraped(server).series:
        base = name
        for suffix in ("_bucket", "_sum", "_count", "_created"):
            base = base if base in labels else base.removesuffix(suffix)
        if base in labels:
            assert {label for label, _ in of_series} - {"le"} == labels[base], name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say(server: Server, client: pb.Client) -> None:
    client.model("logarithm").vjp(np.array([-1.0]), np.ones(1))
    with client.session() as session:
        client.model("net")(session.tensor(np.ones((1, 3)), requires_grad=True)).numpy()
    text = Scraped(server).text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_callers_do_not_make_series(server: Server, client: pb.Client) -> None:
    def strange(index: int) -> None:
        with pytest.raises(pb.errors.PullbackError):
            client.model(f"strange-{index}").evaluate({"x": np.ones(1)})

    strange(0)
    before = Scraped(server)
    with grpc.insecure_channel(server.target) as channel:
        for index in range(20):
            strange(index)
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/pullback.v1.GradientService/Strange{index}")(b"")
            with client.session() as session:
                session.tensor(np.ones(1)).numpy()
    after = Scraped(server)
    assert after.values("model") == before.values("model")
    assert after.values("method") == before.values("method")
    names = {"", "net", "logarithm", "scaled", "unseen", "slow"}
    assert after.values("model") <= names
    assert after.values("stage") <= {"decode", "queue", "transfer", "forward", "backward", "encode"}
    assert after.values("state") <= {"loading", "ready", "failed", "unloading", *(s.value for s in WorkerState)}
    assert after.values("op") <= {"put", "call", "grad", "get", "parameters", "stateless", "release"}
    assert "strange" not in after.text.lower()


# Stages.


def test_stages_are_those_that_a_call_goes_through(server: Server, client: pb.Client) -> None:
    one = client.model("net")

    def count(grown: Callable[..., float]) -> dict[str, float]:
        stages = ("decode", "queue", "transfer", "forward", "backward", "encode")
        return {s: grown("pullback_stage_duration_seconds_count", stage=s, model="net") for s in stages}

    x, v = np.ones((2, 3)), np.ones((2, 2))
    evaluated = count(difference(server, lambda: one.evaluate(x)))
    assert evaluated == dict.fromkeys(evaluated, 1) | {"backward": 0}
    works: list[Callable[[], object]] = [
        lambda: one.vjp(x, v),
        lambda: one.jvp(x, np.ones((2, 3))),
        lambda: one.jacobian(x),
        lambda: one.hvp(x, np.ones((2, 3)), cotangents=v),
    ]
    for work in works:
        found = count(difference(server, work))
        assert found == dict.fromkeys(found, 1)


def test_stages_make_up_the_time_of_a_call(server: Server, client: pb.Client) -> None:
    grown = difference(server, lambda: client.model("slow").vjp(np.ones(1), np.ones(1)))
    took = grown("pullback_request_duration_seconds_sum", method="ComputeVjp", model="slow")
    stages = ("decode", "queue", "transfer", "forward", "backward", "encode")
    spent = {s: grown("pullback_stage_duration_seconds_sum", stage=s, model="slow") for s in stages}
    # The model sleeps, in its forward.
    assert spent["forward"] >= 0.4
    assert spent["forward"] <= sum(spent.values()) <= took


# Health.


def gradient_by(y: Any, leaf: pb.Tensor, given: pb.Tensor | None = None) -> pb.Tensor:
    (found,) = pb.autograd.grad(y, [leaf], None if given is None else [given])
    assert found is not None
    return found


def health_of(grown: Callable[..., float], name: str) -> tuple[float, float, float, float]:
    """Calls with a norm, the sum of norms, calls with a share of zeros, the sum of these."""
    return (
        grown("pullback_gradient_norm_count", model=name),
        grown("pullback_gradient_norm_sum", model=name),
        grown("pullback_gradient_zero_ratio_count", model=name),
        grown("pullback_gradient_zero_ratio_sum", model=name),
    )


def test_norms_and_zeros_are_those_of_torch(server: Server, client: pb.Client) -> None:
    generator = np.random.default_rng(0)
    x, v = generator.standard_normal((4, 3)), generator.standard_normal((4, 2))
    x[2] = v[3] = 0
    leaf = torch.from_numpy(x).requires_grad_()
    (gradient,) = torch.autograd.grad(net()(leaf), leaf, torch.from_numpy(v))
    found = health_of(difference(server, lambda: client.model("net").vjp(x, v)), "net")
    zeros = float((gradient == 0).double().mean())
    assert zeros > 0
    assert found == pytest.approx((1, float(gradient.norm()), 1, zeros))
    assert health_of(difference(server, lambda: client.model("net").evaluate(x)), "net") == (0, 0, 0, 0)


def test_merged_callers_are_counted_like_lone_ones(server: Server, client: pb.Client) -> None:
    generator = np.random.default_rng(1)
    calls = [(generator.standard_normal((n, 3)), generator.standard_normal((n, 2))) for n in [1, 2, 3] * 16]
    one = client.model("net")
    alone = difference(server, lambda: [one.vjp(x, v) for x, v in calls])
    assert alone("pullback_merged_calls_total", model="net") == 0

    def together() -> None:
        with ThreadPoolExecutor(24) as pool:
            # A call that holds up the worker, so that others have to wait, and are merged.
            held = pool.submit(client.model("slow").evaluate, np.ones(1))
            time.sleep(0.1)
            list(pool.map(lambda call: one.vjp(*call), calls))
            held.result()

    merged = difference(server, together)
    assert merged("pullback_merged_calls_total", model="net") > 0
    assert health_of(merged, "net") == pytest.approx(health_of(alone, "net"), rel=1e-9)
    assert health_of(merged, "net")[0] == len(calls)


def bad(grown: Callable[..., float], name: str) -> dict[tuple[str, str], float]:
    found = {
        (where, kind): grown("pullback_nonfinite_values_total", model=name, where=where, kind=kind)
        for where in ("outputs", "gradients")
        for kind in ("nan", "inf")
    }
    return {key: value for key, value in found.items() if value}


def test_nan_and_infinity_are_counted_where_they_are(server: Server, client: pb.Client) -> None:
    one = client.model("logarithm")
    x, v = np.array([1.0, 0.0, -1.0, -2.0]), np.ones(4)
    outputs = {("outputs", "nan"): 2.0, ("outputs", "inf"): 1.0}
    assert bad(difference(server, lambda: one.evaluate(x)), "logarithm") == outputs
    grown = difference(server, lambda: one.vjp(x, v))
    assert bad(grown, "logarithm") == outputs | {("gradients", "inf"): 1.0}
    # It stays a sum that can be read, and the call is in the last bucket.
    assert grown("pullback_gradient_norm_bucket", model="logarithm", le="100000000.0") == 0
    assert grown("pullback_gradient_norm_count", model="logarithm") == 1
    grown = difference(server, lambda: one.vjp(np.array([math.nan]), np.array([math.nan])))
    assert bad(grown, "logarithm") == {("outputs", "nan"): 1.0, ("gradients", "nan"): 1.0}
    assert bad(difference(server, lambda: one.vjp(np.ones(2), np.ones(2))), "logarithm") == {}


def test_sessions_are_counted_for_their_model(server: Server, client: pb.Client) -> None:
    x = np.array([3.0, 4.0])

    def work() -> None:
        with client.session() as session:
            leaf = session.tensor(x, requires_grad=True)
            # Half the square, by torch's own operations after the model's.
            y = (client.model("scaled")(leaf) ** 2).sum() / 2
            gradient = gradient_by(y, leaf)
            assert gradient.numpy().tolist() == [3.0, 4.0]
            bare = session.tensor(x, requires_grad=True)
            gradient = gradient_by((bare * 2).sum(), bare)
            assert gradient.numpy().tolist() == [2.0, 2.0]
            client.model("logarithm")(session.tensor(np.array([-1.0]), requires_grad=True)).numpy()

    grown = difference(server, work)
    assert health_of(grown, "scaled") == pytest.approx((1, 5.0, 1, 0))
    assert health_of(grown, "") == pytest.approx((1, math.sqrt(8), 1, 0))
    assert bad(grown, "logarithm") == {("outputs", "nan"): 1.0}


@pytest.mark.parametrize("way", ["unary", "session"])
def test_thresholds_are_the_models_own(server: Server, client: pb.Client, way: str) -> None:
    def gradient_of(scale: float) -> None:
        if way == "unary":
            client.model("scaled").vjp(np.ones(1), np.array([scale]))
            return
        with client.session() as session:
            leaf = session.tensor(np.ones(1), requires_grad=True)
            gradient_by(client.model("scaled")(leaf), leaf, session.tensor(np.array([scale]))).numpy()

    wanted = {0.0: (1, 0), 1e-4: (1, 0), 1e-3: (0, 0), 1.0: (0, 0), 1e4: (0, 1), math.inf: (0, 1), math.nan: (0, 1)}
    for scale, counts in wanted.items():
        grown = difference(server, lambda scale=scale: gradient_of(scale))
        names = ("vanishing", "exploding")
        assert tuple(grown(f"pullback_gradients_{n}_total", model="scaled") for n in names) == counts, scale
    grown = difference(server, lambda: client.model("net").vjp(np.ones((1, 3)), np.full((1, 2), 1e30)))
    assert grown("pullback_gradients_exploding_total", model="net") == 0


def test_a_model_and_a_server_that_do_not_look(server: Server, client: pb.Client) -> None:
    client.model("unseen").vjp(np.ones(1), np.array([math.nan]))
    assert not [
        labels for name, labels in Scraped(server).series if "gradient" in name and ("model", "unseen") in labels
    ]
    with Server(logarithm, threads=1, gradient_health=False) as blind, pb.connect(blind.target) as other:
        other.model("logarithm").vjp(np.array([-1.0]), np.ones(1))
        with other.session() as session:
            leaf = session.tensor(np.array([-1.0]), requires_grad=True)
            gradient_by(other.model("logarithm")(leaf).sum(), leaf).numpy()
        seen = Scraped(blind)
    assert not [name for name, _ in seen.series if name.startswith(("pullback_gradient", "pullback_nonfinite"))]
    assert seen("pullback_requests_total", method="ComputeVjp", model="logarithm", code="OK") == 1


# What goes up comes down.

IDLE: dict[str, float] = dict.fromkeys(
    (
        "pullback_sessions",
        "pullback_session_handles",
        "pullback_session_graphs",
        "pullback_session_retained_bytes",
        "pullback_bytes_in_flight",
        "pullback_queue_length",
        "pullback_queue_age_seconds",
    ),
    0.0,
)


def test_sessions_give_back_what_they_hold(server: Server, client: pb.Client) -> None:
    settled(server, IDLE)
    session = client.session()
    leaf = session.tensor(np.ones((2, 3)), requires_grad=True)
    y = client.model("net")(leaf)
    z = y.sum()
    z.numpy()
    settled(server, {"pullback_sessions": 1, "pullback_session_handles": 3, "pullback_session_graphs": 2})
    del z
    # What was dropped is told with the next op.
    plain = session.tensor(np.ones(1))
    kept = [plain + 1]
    settled(server, {"pullback_session_handles": 4, "pullback_session_graphs": 1})
    assert Scraped(server)("pullback_session_retained_bytes") > 0
    del y
    kept.append(plain + 1)
    settled(server, {"pullback_session_handles": 4, "pullback_session_graphs": 0})
    session.close()
    settled(server, IDLE)


def test_callers_that_leave_leave_nothing(server: Server) -> None:
    settled(server, IDLE)
    channels = [grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(8)]

    def begin(channel: grpc.Channel) -> Any:
        request = pb_request("slow")
        return channel.unary_unary("/pullback.v1.GradientService/ComputeVjp").future(request, timeout=60)

    calls = [begin(channel) for channel in channels for _ in range(2)]
    until = time.monotonic() + 30
    while Scraped(server)("pullback_requests_in_flight", method="ComputeVjp") == 0:
        assert time.monotonic() < until
    client = pb.connect(server.target)
    session = client.session()
    y = client.model("net")(session.tensor(np.ones((1, 3)), requires_grad=True))
    # Half of them say that they go, the others are just gone; and so is a session with an op on its way.
    for call in calls[::2]:
        call.cancel()
    for channel in channels:
        channel.close()
    ended = threading.Thread(target=client.close)
    ended.start()
    ended.join()
    del y
    settled(server, IDLE)
    until = time.monotonic() + 30
    while Scraped(server)("pullback_requests_in_flight", method="ComputeVjp"):
        assert time.monotonic() < until
        time.sleep(0.05)


def pb_request(name: str) -> bytes:
    writer = TensorWriter()
    one = np.ones(1)
    message = messages.ComputeVjpRequest(
        function=Function(model=name), inputs=[writer.add("x", one)], cotangents=[writer.add("output", one)]
    )
    return encode_message(message, writer.payloads)


# Workers and devices.


def test_memory_is_that_of_the_processes(server: Server) -> None:
    workers = [p for p in psutil.Process().children() if "engine.worker" in " ".join(p.cmdline())]
    seen = Scraped(server)
    held = seen("pullback_worker_memory_bytes", worker="cpu-0")
    assert any(0.5 < held / process.memory_info().rss < 2 for process in workers)
    used = seen("pullback_device_memory_used_bytes", device="cpu")
    assert held / 4 < used <= seen("pullback_device_memory_total_bytes", device="cpu")
    assert 0 <= seen("pullback_device_utilization_ratio", device="cpu") <= 1


def test_a_device_that_tells_nothing_has_no_series(caplog: pytest.LogCaptureFixture) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a driver here, which tells")

    class Lost:
        """A worker on a device of which no management library knows."""

        name, device, device_id, device_memory, pid = "cuda-0", "cuda:0", "0123", 5, None

    devices = Devices(lambda: [Lost()])  # type: ignore[list-item]
    readings = [*devices.read(), *devices.read()]
    assert {(one.worker, one.held) for one in readings if one.worker} == {("cuda-0", 5)}
    assert [one for one in readings if one.used is not None or one.utilization is not None] == []
    assert len([record for record in caplog.records if "cannot be told" in record.message]) == 1


# Traces.


def test_exemplars_are_shown_to_those_who_read_them() -> None:
    metrics = Metrics()
    trace = "0af7651916cd43dd8448eb211c80319c"
    metrics.call("ComputeVjp", "net", "OK", 0.003, trace)
    metrics.stages("net", {"queue": 0.001}, trace)
    metrics.session_op("grad", "OK", 0.01, trace)
    metrics.health("net", Health(1.5, 4, 1), HealthRecord(), trace)
    shown = [line for line in as_open(metrics.registry).splitlines() if trace in line]
    assert {line.partition("{")[0] for line in shown} == {
        f"pullback_{name}_bucket"
        for name in (
            "request_duration_seconds",
            "stage_duration_seconds",
            "session_op_duration_seconds",
            "gradient_norm",
            "gradient_zero_ratio",
        )
    }
    assert trace not in as_text(metrics.registry)
    metrics = Metrics()
    metrics.call("ComputeVjp", "net", "OK", 0.003)
    assert "trace_id" not in as_open(metrics.registry)


def test_openmetrics_is_served_to_those_who_ask(server: Server) -> None:
    url = f"http://127.0.0.1:{server.metrics_port}/metrics"
    request = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        assert answer.read().endswith(b"# EOF\n")


def test_a_certificate_that_is_not_there_has_no_end() -> None:
    metrics = Metrics()
    name = "pullback_certificate_expiry_timestamp_seconds"
    assert f"\n{name} " not in as_text(metrics.registry)
    metrics.certificate_expiry.set(4e9)
    assert f"\n{name} 4e+09" in as_text(metrics.registry)
