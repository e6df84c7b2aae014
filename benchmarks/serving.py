"""Starts the servers that the benchmarks measure, as they are deployed: processes of their own."""

import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pullback as pb

HERE = Path(__file__).parent
#: Seconds in which a server must serve; models may be compiled meanwhile.
START_SECONDS = 600


class Running(NamedTuple):
    """A server that serves: where, its process, and its metrics."""

    target: str
    process: subprocess.Popen[bytes]
    metrics: str

    def mean_seconds(self) -> dict[str, tuple[float, float]]:
        """Sum and count of each stage so far; of whole requests as "request", of forward and backward as "compute"."""
        with urllib.request.urlopen(self.metrics, timeout=10) as answer:
            text = answer.read().decode()
        found: dict[str, tuple[float, float]] = {}
        for family, name in (("stage", r'stage="(\w+)"'), ("request", "")):
            pattern = rf"^pullback_{family}_duration_seconds_(sum|count)\{{[^}}]*{name}[^}}]*\}} (.+)$"
            for groups in re.findall(pattern, text, re.MULTILINE):
                kind, value = groups[0], float(groups[-1])
                key = groups[1] if name else "request"
                total, count = found.get(key, (0.0, 0.0))
                found[key] = (total + value, count) if kind == "sum" else (total, count + value)
        if "forward" in found:
            total, count = found["forward"]
            found["compute"] = (total + found.get("backward", (0.0, 0.0))[0], count)
        return found


class Child(NamedTuple):
    """A server of this folder: where it answers, and its process."""

    target: str
    process: subprocess.Popen[str]


@contextmanager
def child_process(script: str) -> Iterator[Child]:
    """A server of this folder that prints its port and ends when its standard input does."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield Child(f"127.0.0.1:{int(process.stdout.readline())}", process)
    finally:
        process.stdin.close()
        process.wait(10)


@contextmanager
def child(script: str) -> Iterator[str]:
    """As `child_process`; gives its target."""
    with child_process(script) as running:
        yield running.target


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def pullback_server(*arguments: str, program: Sequence[str] = ("-m", "pullback_server.cli")) -> Iterator[Running]:
    """`pullback-server serve ARGUMENTS` on free ports, once it serves. program: what Python runs for that."""
    port, metrics_port = free_port(), free_port()
    command = [sys.executable, *program, "serve", *arguments]
    command += ["--port", str(port), "--metrics-port", str(metrics_port), "--log-level", "warning"]
    process = subprocess.Popen(command)
    try:
        with pb.connect(f"127.0.0.1:{port}", timeout=2) as client:
            until = time.monotonic() + START_SECONDS
            while True:
                if process.poll() is not None:
                    raise SystemExit(f"the server ended with status {process.returncode}")
                try:
                    client.ping()
                    break
                except pb.errors.PullbackError:
                    if time.monotonic() > until:
                        raise SystemExit(f"the server does not serve after {START_SECONDS} s") from None
                    time.sleep(0.1)
        yield Running(f"127.0.0.1:{port}", process, f"http://127.0.0.1:{metrics_port}/metrics")
    finally:
        process.terminate()
        process.wait(60)
