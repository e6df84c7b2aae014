"""`pullback bench` and `pullback top` against a real server, in processes of their own."""

import contextlib
import fcntl
import http.server
import json
import os
import pty
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.asking import ask
from tests.credentials import Authority
from tests.unit.client_server import Fake, serving

import pullback as pb
from pullback._cli import main
from pullback_server import Server
from pullback_server.faults import Fault
from pullback_server.telemetry import Endpoint, Metrics, Status, Vitals
from pullback_wire import Reason

MODELS = """
import torch
from torch import nn
from pullback_server import model, spec

@model("mlp", inputs={"input": spec("float32", ["batch", 4])}, batch_axis=0)
def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

@model("energy", inputs={"x": spec("float64", ["n"], low=1.0, high=2.0)})
def energy(x):
    return x.log().square().sum()

@model("logarithm", inputs={"x": spec("float64", ["n"])}, gate=False)
def logarithm(x):
    return x.log()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "models.py").write_text(MODELS)
    with Server(folder / "models.py", threads=1, gradient_health_cost=0) as server:
        yield server


def counted(server: Server, method: str, model: str) -> int:
    """Calls that were answered OK, as a scrape says."""
    found = re.search(
        rf'^pullback_requests_total{{code="OK",method="{method}",model="{model}"}} (\S+)$',
        ask(server.metrics_port, "/metrics")[2],
        re.MULTILINE,
    )
    return int(float(found[1])) if found else 0


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def started(*arguments: str, by: tuple[str, ...] = (), **streams: Any) -> Iterator[subprocess.Popen[str]]:
    """by: a command that starts it."""
    process = subprocess.Popen([*by, sys.executable, "-m", "pullback", *arguments], text=True, **streams)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def terminal() -> tuple[int, int]:
    """Both ends of one of 140 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    return ours, theirs


class Shown:
    """What has been written to a terminal, without its control sequences."""

    def __init__(self, end: int) -> None:
        self._end = end
        self.raw = b""

    def text(self) -> str:
        with contextlib.suppress(OSError):
            while select.select([self._end], [], [], 0)[0]:
                read = os.read(self._end, 65536)
                if not read:
                    break
                self.raw += read
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.decode(errors="replace"))


@contextlib.contextmanager
def load(server: Server) -> Iterator[None]:
    """Calls of mlp, and of logarithm with NaN, one after the other."""
    stop = threading.Event()

    def call() -> None:
        with pb.connect(server.target) as client:
            mlp, logarithm = client.model("mlp"), client.model("logarithm")
            while not stop.is_set():
                mlp.vjp(np.ones((2, 4), np.float32), np.ones((2, 3), np.float32))
                logarithm.vjp(np.array([-1.0]), np.ones(1))

    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# bench


def test_bench_counts_what_the_server_counts(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    before = counted(server, "ComputeVjp", "mlp")
    line = ["bench", "mlp", "--rows", "3", "--concurrency", "1,8", "--seconds", "0.3", "--warmup", "0.1"]
    assert main([*line, "--json", "--target", server.target]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert found["inputs"] == {"input": {"dtype": "float32", "shape": [3, 4]}} and found["rows"] == 3
    assert (found["request_bytes"], found["response_bytes"]) == (4 * 3 * (4 + 3), 4 * 3 * (3 + 4))
    made = 1 + sum(level["calls"] + level["warmup_calls"] for level in found["levels"])
    assert counted(server, "ComputeVjp", "mlp") - before == made
    for level in found["levels"]:
        assert level["errors"] == {} and level["answered"] == level["calls"] > 0 and level["seconds"] >= 0.3
        assert level["rows_per_second"] == pytest.approx(3 * level["calls_per_second"])
        assert sum(level["shares"].values()) == pytest.approx(1, abs=0.05)
        assert {"queue", "transfer", "forward", "backward", "between", "client+network"} <= set(level["shares"])
        # So many callers cannot have spent more than their time.
        assert level["latency_ms"]["mean"] * level["calls"] / 1e3 <= level["callers"] * level["seconds"]
    assert found["levels"][0]["merged_calls"] == 0
    assert found["levels"][1]["merged_rows"] is None or found["levels"][1]["merged_rows"] > 3


@pytest.mark.parametrize("method", ["evaluate", "jvp", "hvp"])
def test_bench_of_each_method(server: Server, capsys: pytest.CaptureFixture[str], method: str) -> None:
    rpc = "Evaluate" if method == "evaluate" else f"Compute{method.title()}"
    before = counted(server, rpc, "energy")
    line = ["bench", "energy", "--method", method, "--shape", "x=6", "--concurrency", "2", "--seconds", "0.1"]
    assert main([*line, "--warmup", "0", "--target", server.target]) == 0
    out, err = capsys.readouterr()
    head, names, row, title, stages, shares = out.splitlines()
    assert f"energy version 1 at {server.target}: {method} of x float64[6]" in head and err == ""
    assert names.split()[:3] == ["CALLERS", "CALLS/S", "ROWS/S"]
    # It has no batch axis, hence no rows.
    assert row.split()[0] == "2" and row.split()[2] == "-" and row.split()[-1] == "0"
    assert title == "where the time went:" and len(stages.split()) == len(shares.split())
    assert counted(server, rpc, "energy") > before


def test_bench_of_a_loss_with_given_inputs(server: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 4), np.float32))
    given = ["--input", f"@{tmp_path / 'x.npy'}", "--loss", "cross_entropy", "--loss-target", "[0, 2]"]
    line = ["bench", "mlp", *given, "--concurrency", "1", "--seconds", "0.1", "--warmup", "0", "--json"]
    assert main([*line, "--target", server.target]) == 0
    found = json.loads(capsys.readouterr().out)
    # Two rows of four float32 and two class indices there; the loss and the gradient back.
    assert (found["request_bytes"], found["response_bytes"], found["rows"]) == (32 + 16, 4 + 32, 2)


def test_ctrl_c_in_a_bench_prints_what_there_is(server: Server) -> None:
    before = counted(server, "ComputeVjp", "mlp")
    line = ("bench", "mlp", "--concurrency", "1,2", "--seconds", "600", "--warmup", "0", "--target", server.target)
    with started(*line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for(lambda: counted(server, "ComputeVjp", "mlp") > before + 20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""
    rows = [line.split() for line in out.splitlines()]
    (row,) = [row for row in rows if row[0] == "1" and "%" not in row[1]]
    assert float(row[1].replace(",", "")) > 0
    assert "where the time went:" in out


def test_progress_of_a_bench_is_for_terminals(server: Server) -> None:
    ours, theirs = terminal()
    line = ("bench", "mlp", "--concurrency", "2", "--seconds", "1", "--warmup", "0.2", "--target", server.target)
    shown = Shown(ours)
    try:
        with started(*line, stdout=subprocess.PIPE, stderr=theirs) as process:
            wait_for(lambda: re.search(r"2 callers .*calls, [\d,.]+/s", shown.text()))
            out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "\x1b" not in out and "━" not in out
    finally:
        os.close(ours)
        os.close(theirs)


# top


def test_top_once(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{server.metrics_port}"

    def once() -> str:
        assert main(["top", "--once", "--metrics", url]) == 0
        return capsys.readouterr().out

    def nan() -> str | None:
        out = once()
        return out if any(line.split()[0] == "logarithm" and line.split()[-3] != "0"
                          for line in out.splitlines() if line) else None  # fmt: skip

    with load(server):
        out = wait_for(nan)
    assert out.startswith(f"{url}  Pullback ") and "  ready  up " in out
    assert re.search(r"^calls [\d,.]+/s  errors 0/s  p50 [\d.]+ (µs|ms|s)  p95 ", out, re.MULTILINE)
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert rows["mlp"][1:3] == ["1", "ready"] and float(rows["mlp"][3].replace(",", "")) > 0
    assert int(rows["mlp"][-2].replace(",", "")) > 0
    assert rows["cpu-0"][:3] == ["cpu-0", "cpu", "ready"]


def test_top_in_json_moves(server: Server) -> None:
    line = ("top", "--json", "--interval", "0.3", "--metrics", f"127.0.0.1:{server.metrics_port}")
    totals: set[int] = set()
    with load(server), started(*line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        while len(totals) < 3:
            found = json.loads(process.stdout.readline())
            assert found["error"] is None and found["server"]["ready"]
            totals |= {one["total"] for one in found["traffic"]["models"] if one["name"] == "mlp"}
        # Whoever reads has read enough.
        process.stdout.close()
        assert process.wait(30) == 1
        assert process.stderr is not None and process.stderr.read() == ""
        process.stdout = None


@pytest.mark.parametrize("key", ["xq", "Ctrl-C", "SIGTERM"])
def test_top_on_a_terminal(server: Server, key: str) -> None:
    ours, theirs = terminal()
    shown = Shown(ours)
    before = termios.tcgetattr(theirs)
    line = ("top", "--interval", "0.2", "--metrics", f"http://127.0.0.1:{server.metrics_port}")
    # Without the size that test runners tell of their own output.
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment["TERM"] = "xterm-256color"
    try:
        # Controlling, so that Ctrl-C is a signal; by setsid, as gRPC's threads do not bear Python code after a fork.
        streams = {"stdin": theirs, "stdout": theirs, "stderr": subprocess.PIPE}
        with load(server), started(*line, by=("setsid", "--ctty"), env=environment, **streams) as process:
            wait_for(lambda: re.search(r"mlp +1 ready +[1-9]", shown.text()))
            # Calls since the start, as they were drawn one after the other.
            wait_for(lambda: len(set(re.findall(r"mlp +1 ready .*?([\d,]+) +\d+ *\r?\n", shown.text()))) >= 3)
            assert "queue " in shown.text() and "cpu-0" in shown.text() and "q ends" in shown.text()
            if key == "SIGTERM":
                process.terminate()
            else:
                # Both keys at once: a hasty hand.
                os.write(ours, b"xq" if key == "xq" else b"\x03")
            assert process.wait(30) == (143 if key == "SIGTERM" else 0)
            assert process.stderr is not None and process.stderr.read() == ""
        shown.text()
        # The alternate screen is left, and the terminal as it was.
        assert shown.raw.rstrip().endswith((b"\x1b[?1049l", b"\x1b[?25h"))
        assert b"\x1b[?1049l" in shown.raw
        assert termios.tcgetattr(theirs) == before
    finally:
        os.close(ours)
        os.close(theirs)


def test_top_goes_on_trying() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = ("top", "--json", "--interval", "0.2", "--target", "127.0.0.1:1", "--metrics", f"http://127.0.0.1:{port}")
    with started(*line, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(2):
            assert "cannot be reached" in json.loads(process.stdout.readline())["error"]
        metrics, vitals = Metrics(), Vitals()
        status = Status(metrics, vitals)
        endpoint = Endpoint("127.0.0.1", port, metrics.registry, vitals, status)
        try:
            for _ in range(200):
                status.beat()
                found = json.loads(process.stdout.readline())
                if found["error"] is None:
                    break
            assert found["error"] is None and not found["server"]["ready"]
        finally:
            endpoint.close()
        for _ in range(200):
            if (found := json.loads(process.stdout.readline()))["error"] is not None:
                break
        assert "cannot be reached" in found["error"]


def test_top_of_another_port(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--metrics", f"http://{server.target}"]) == 1
    told = capsys.readouterr().err
    assert "answers, but not in HTTP" in told and told[:-1].isprintable()


def test_top_of_a_status_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    class Odd(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"now": {"server": {}, "traffic": None}, "points": [{"time": 1.0}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Odd) as odd:
        thread = threading.Thread(target=odd.serve_forever)
        thread.start()
        try:
            assert main(["top", "--once", "--metrics", f"http://127.0.0.1:{odd.server_port}"]) == 1
        finally:
            odd.shutdown()
            thread.join()
    assert "sent a status that cannot be read" in capsys.readouterr().err


def test_top_without_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    metrics, vitals = Metrics(), Vitals()
    endpoint = Endpoint("127.0.0.1", 0, metrics.registry, vitals, None)
    try:
        assert main(["top", "--once", "--metrics", f"http://127.0.0.1:{endpoint.port}"]) == 1
    finally:
        endpoint.close()
    assert "--page false" in capsys.readouterr().err


def test_top_of_a_server_that_asks_who_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority()
    certificate, key = authority.certify("localhost")
    for name, pem in (("ca", authority.pem), ("other", Authority().pem), ("cert", certificate), ("key", key)):
        (tmp_path / name).write_bytes(pem)
    monkeypatch.chdir(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("cert", "key")

    def admit(authorization: str | None, certificate: bytes | None) -> None:
        if authorization == "Bearer caller":
            raise Fault(Reason.PERMISSION_DENIED, "no right")
        if authorization != "Bearer viewer":
            raise Fault(Reason.UNAUTHENTICATED, "nobody")

    metrics, vitals = Metrics(), Vitals()
    status = Status(metrics, vitals)
    endpoint = Endpoint("127.0.0.1", 0, metrics.registry, vitals, status, admit, context)
    where = f"localhost:{endpoint.port}"
    try:
        status.beat()
        # HTTPS by itself, since there are options of TLS.
        for token, ca, expected, told in (
            ("viewer", "ca", 0, f"https://{where}  Pullback"),
            ("caller", "ca", 1, "has not the right `metrics`"),
            ("", "ca", 1, "give --token"),
            ("viewer", "other", 1, "certificate verify failed"),
        ):
            more = ["--token", token] if token else []
            assert main(["top", "--once", "--metrics", where, "--tls-ca", ca, *more]) == expected
            out, err = capsys.readouterr()
            assert told in (err if expected else out) and "viewer" not in out + err
    finally:
        endpoint.close()


def test_a_certificate_that_nobody_vouches_for(tmp_path: Path) -> None:
    authority = Authority()
    (tmp_path / "ca").write_bytes(authority.pem)
    (tmp_path / "other").write_bytes(Authority().pem)
    certificate, key = authority.certify("localhost")
    credentials = grpc.ssl_server_credentials([(key, certificate)])
    with serving(Fake(), credentials=credentials) as fake:
        target = fake.target.replace("127.0.0.1", "localhost")
        for ca, told in (("ca", ""), ("other", f"pullback: {target}: --tls-ca {tmp_path / 'other'} cannot vouch for")):
            line = ("ping", "--target", target, "--tls-ca", str(tmp_path / ca), "--timeout", "20")
            with started(*line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                _, err = process.communicate(timeout=60)
            assert process.returncode == bool(told) and err.count("\n") == bool(told) and err.startswith(told)
