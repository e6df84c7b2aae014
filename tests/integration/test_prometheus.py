"""Debian's Prometheus scrapes a server that has a hard time, by deploy/'s own configuration: what it then knows."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests.credentials import Authority
from tests.serving import Served

import pullback as pb
from pullback_server.rpc import new_key
from pullback_server.telemetry import Declared, declared

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed"),
    pytest.mark.timeout(600),
]

MONITORING = Path(__file__).parents[2] / "deploy/monitoring"
RULES = [rule for group in yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
}

MIB = 1 << 20
#: One model for each thing that can happen to a call.
MODELS = """
import os, signal, time
import torch
from pullback_server import Batching, GradientHealth, model, spec

ROWS = {"x": spec("float64", ["n", 3])}

@model("rows", inputs=ROWS, batch_axis=0, batching=Batching(max_rows=64, max_delay=0.02))
def rows(x):
    "Cubes; but a row with 13 raises, and with it a merged computation."
    if bool((x.detach() == 13).any()):
        raise ValueError("thirteen")
    return x**3

@model("greedy", inputs=ROWS, batch_axis=0)
def greedy(x):
    "Each row with 77 needs 16 MiB."
    rows = int((x.detach() == 77).any(1).sum())
    return x + x.new_zeros(rows, 1 << 21).sum() if rows else x + 0

@model("root", inputs={"x": spec("float64", ["n"], low=0.0)}, gate=False,
       gradient_health=GradientHealth(vanishing_below=1e-3, exploding_above=1e3))
def root(x):
    "Its gradient at zero is infinite."
    return x.sqrt()

@model("nap", kind="function")
def nap(x):
    time.sleep(float(x))
    return x

# On one worker alone, or nobody would be left for the others.
@model("deadly", inputs=ROWS, kind="function", gate=False, devices=["cpu-0"])
def deadly(x):
    if bool((x.detach() == 666).any()):
        os.kill(os.getpid(), signal.SIGKILL)
    return x * 1
"""
SCALE = """
import torch
from pullback_server import model

@model("{name}", inputs={{}})
def scale(x):
    return {body}
"""


class Prometheus:
    """A Prometheus of our own that has deploy/'s scrape configuration and rules."""

    def __init__(self, folder: Path, target: str) -> None:
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
        (job,) = config["scrape_configs"]
        job["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert PROMETHEUS is not None
        self.log = folder / "prometheus.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    PROMETHEUS,
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={self.address}",
                    "--log.level=warn",
                ],
                stderr=log,
                stdout=log,
            )

        end = time.monotonic() + 60
        while not self._ready():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def _ready(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=5):
            return True
        return False

    def get(self, path: str, **arguments: str) -> Any:
        """The data of an answer; an error of Prometheus' fails the test."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{arguments}: {error.read().decode()}") from None

    def query(self, text: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("query", query=text)["result"]
        return found

    def until(self, text: str, seconds: float = 120) -> None:
        """Waits until a query has a result."""
        end = time.monotonic() + seconds
        while not self.query(text):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, f"{text}: nothing"

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


class Load:
    """Callers of every sort, each in a thread, over and over until they are told to stop."""

    def __init__(self, folder: Path) -> None:
        authority = Authority()
        certificate, key = authority.certify("localhost")
        (folder / "tls.crt").write_bytes(certificate)
        (folder / "tls.key").write_bytes(key)
        self.token, everything = new_key("all", ["call", "session", "admin"])
        self.poor, little = new_key("poor", ["call", "session"], quota={"calls_per_second": 0.5, "sessions": 1})
        (folder / "principals.toml").write_text(f'{everything}\n{little}\n[anonymous]\nrights = ["metrics"]\n')
        (folder / "models.py").write_text(MODELS)
        self.repository = folder / "repository"
        self._version("steady", "2 * x")
        self.served = Served(
            folder, "models.py", "--devices", "cpu:2", "--quarantine-seconds", "0",
            "--worker-memory-bytes", str(200 * MIB), "--max-message-bytes", str(32 * MIB),
            "--repository", str(self.repository), "--repository-mode", "poll", "--repository-poll-seconds", "1",
            "--repository-settle-seconds", "0", "--no-exit-on-error",
            "--tls-cert", "tls.crt", "--tls-key", "tls.key", "--principals", "principals.toml",
        )  # fmt: skip
        # No Python at all.
        self._version("broken", "(")
        self._authority = authority.pem
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(64)
        # Each with its seconds between two turns: CI has two cores, and the metrics want variety, not numbers.
        self._running = [
            self._pool.submit(self._again, work, pause)
            for work, pause in (
                *[(self._merged, 0.05)] * 12,
                *[(self._nap, 0.1)] * 2,
                (self._failing, 0.05),
                (self._greedy, 0.5),
                (self._gradients, 0.2),
                (self._impatient, 0.1),
                (self._deadly, 4),
                (self._sessions, 0.2),
                (self._abandoned, 0.5),
                (self._stranger, 0.5),
                (self._poor, 0.2),
                (self._others, 0.2),
            )
        ]

    def _version(self, name: str, body: str) -> None:
        folder = self.repository / name / "1"
        folder.mkdir(parents=True)
        (self.repository / name / "model.toml").write_text('[inputs.x]\ndtype = "float64"\nshape = ["n"]\n')
        (folder / "model.py").write_text(SCALE.format(name=name, body=body))

    def client(self, token: str) -> pb.Client:
        return pb.connect(
            self.served.target,
            tls=pb.TLS(ca=self._authority, server_name="localhost"),
            token=token,
            retry=pb.RetryPolicy(attempts=1),
        )

    def _again(self, work: Callable[[pb.Client], None], pause: float) -> None:
        with self.client(self.token) as client:
            while not self._stop.wait(pause):
                # Under such a load any of them may be told that a worker was lost or that there is no room.
                with contextlib.suppress(pb.errors.PullbackError):
                    work(client)

    def _merged(self, client: pb.Client) -> None:
        x = np.arange(6.0).reshape(2, 3)
        client.model("rows").vjp(x, np.ones_like(x))

    def _failing(self, client: pb.Client) -> None:
        x = np.full((1, 3), 13.0)
        client.model("rows").vjp(x, np.ones_like(x))

    def _greedy(self, client: pb.Client) -> None:
        client.model("greedy").evaluate(np.full((20, 3), 77.0))

    def _gradients(self, client: pb.Client) -> None:
        for value in (0.0, 1e-12, 1.0, 1e12):
            client.model("root").vjp(np.array([value]), np.ones(1))
        client.model("root").vjp(np.array([np.nan]), np.ones(1))

    def _impatient(self, client: pb.Client) -> None:
        """Waits behind naps for less long than they take."""
        client.model("steady").evaluate(np.ones(2), timeout=0.1)

    def _nap(self, client: pb.Client) -> None:
        client.model("nap").evaluate(np.array(0.3))

    def _abandoned(self, client: pb.Client) -> None:
        """A process that goes away with its call under way, as far as the server can tell."""
        with self.client(self.token) as leaving:
            future = self._pool.submit(leaving.model("nap").evaluate, np.array(0.5))
            time.sleep(0.1)
        future.exception()

    def _deadly(self, client: pb.Client) -> None:
        client.model("deadly").evaluate(np.full((1, 3), 666.0))

    def _sessions(self, client: pb.Client) -> None:
        with client.session() as session:
            x = session.tensor(np.array([1.0, 4.0]), requires_grad=True)
            y = client.model("root")(x).sum()
            time.sleep(1)
            with contextlib.suppress(pb.errors.PullbackError):
                session.tensor(np.ones(2)).reshape(3, 3).numpy()
            y.backward()
            assert x.grad is not None
            x.grad.numpy()

    def _stranger(self, client: pb.Client) -> None:
        with self.client("no such token") as stranger:
            stranger.model("rows").evaluate(np.ones((1, 3)))

    def _poor(self, client: pb.Client) -> None:
        with self.client(self.poor) as poor:
            poor.model("rows").evaluate(np.ones((1, 3)))

    def _others(self, client: pb.Client) -> None:
        x = np.ones((2, 3))
        client.models()
        client.model("rows").hvp(x, x, x)
        client.model("rows").jvp(x, x)
        client.model("steady").jacobian(np.ones(3))

    def close(self) -> list[BaseException]:
        """Ends it; returns what callers did not expect."""
        self._stop.set()
        surprises = [error for future in self._running if (error := future.exception(60))]
        self._pool.shutdown()
        self.served.process.send_signal(signal.SIGTERM)
        self.served.process.wait(60)
        return surprises


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has watched for a while, and the load goes on."""
    folder = tmp_path_factory.mktemp("prometheus")
    load = Load(folder)
    prometheus = Prometheus(folder, urllib.parse.urlsplit(load.served.http).netloc)
    try:
        # What comes late: a version that fails to load, workers that die, rows that are split, merged calls that fail.
        for text in (
            'pullback_model_loads_total{outcome="failed"} > 0',
            "pullback_worker_deaths_total > 0",
            "pullback_memory_splits_total > 0",
            "pullback_unmerged_calls_total > 0",
            'pullback_dropped_calls_total{where="queue"} > 0',
            'pullback_sessions_ended_total{code="OK"} > 0',
            'pullback_quota_refusals_total{quota="calls"} > 0',
            "pullback_auth_failures_total > 0",
            'pullback_nonfinite_values_total{where="gradients", kind="inf"} > 0',
            "pullback_gradients_vanishing_total > 0",
            "pullback_gradients_exploding_total > 0",
        ):
            prometheus.until(text)
        # A rate needs two samples of each.
        prometheus.until("min(count_over_time(pullback_worker_deaths_total[1m])) >= 3")
        yield prometheus
    finally:
        surprises = load.close()
        prometheus.close()
    assert surprises == []


def test_the_target_is_up(prometheus: Prometheus) -> None:
    (target,) = prometheus.get("targets")["activeTargets"]
    assert (target["health"], target["lastError"], target["labels"]["job"]) == ("up", "", "pullback")
    assert prometheus.query('min_over_time(up{job="pullback"}[1m])')[0]["value"][1] == "1"


@pytest.mark.parametrize("metric", declared(), ids=lambda metric: metric.name)
def test_every_declared_metric_has_data(prometheus: Prometheus, metric: Declared) -> None:
    name = f"{metric.name}_bucket" if metric.kind == "histogram" else metric.name
    found = prometheus.query(f'{name}{{job="pullback"}}')
    assert found
    expected = {"__name__", "job", "instance", *metric.labels, *(["le"] if metric.kind == "histogram" else [])}
    # Prometheus leaves a label out whose value is empty, as that of a model is where a call names none.
    assert {label for one in found for label in one["metric"]} == expected


def test_nothing_undeclared_is_shown(prometheus: Prometheus) -> None:
    known = {metric.name for metric in declared()}
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in prometheus.get("label/__name__/values")
             if name.startswith(("pullback_", "process_"))}  # fmt: skip
    # prometheus_client says of each counter and histogram when it began.
    assert {name for name in names if not name.endswith("_created")} == known


@pytest.mark.parametrize("where", QUERIES)
def test_dashboard_queries_return_series(prometheus: Prometheus, where: str) -> None:
    text = QUERIES[where].replace("$__rate_interval", "15s")
    assert prometheus.query(re.sub(r"\$(namespace|pod|model)\b", ".*", text))


@pytest.mark.parametrize("mark", DASHBOARD["annotations"]["list"], ids=lambda mark: mark["name"])
def test_dashboard_marks_can_be_asked_for(prometheus: Prometheus, mark: dict[str, Any]) -> None:
    prometheus.query(re.sub(r"\$(namespace|pod)\b", ".*", mark["expr"]))


def test_rules_are_evaluated_without_errors(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(RULES)
    assert {(rule["name"], rule["health"], rule.get("lastError", "")) for rule in rules} == {
        (rule.get("alert", rule.get("record")), "ok", "") for rule in RULES
    }


@pytest.mark.parametrize("name", [rule["record"] for rule in RULES if "record" in rule])
def test_recorded_series_are_there(prometheus: Prometheus, name: str) -> None:
    prometheus.until(name)


def test_alerts_tell_of_what_happened(prometheus: Prometheus) -> None:
    for name in ("PullbackNonFiniteGradients", "PullbackModelLoadFailed", "PullbackWorkerCrashLoop"):
        prometheus.until(f'ALERTS{{alertname="{name}", alertstate="firing"}}')
    assert prometheus.query('ALERTS{alertname="PullbackNonFiniteGradients", model="root", kind="inf"}')
    # And not of what did not.
    quiet = "PullbackDown|PullbackNoReadyWorkers|PullbackCertificateExpiry|PullbackStuckDraining"
    assert prometheus.query(f'ALERTS{{alertname=~"{quiet}", alertstate="firing"}}') == []
