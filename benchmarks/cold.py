"""Cold starts: a server until it is ready and until it has answered a VJP, and imports, against `import torch`.

Every contestant is a process that starts anew; they take turns within a round. Ratios are taken within a round, figures
are medians of rounds. The files are in the page cache. Run: python benchmarks/cold.py
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from statistics import median

import grpc
import numpy as np
from serving import free_port

from pullback_wire import GRADIENT_METHODS, TensorWriter, encode_message
from pullback_wire.v1 import gradient_service_pb2 as messages
from pullback_wire.v1.function_pb2 import Function

MODEL = """
from torch import nn
from pullback_server import model, spec

@model("mlp", inputs={"input": spec("float32", ["batch", 784])}%s)
def mlp():
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
"""
BASE = "import torch"
IMPORTS = {"python -c pass": "pass", BASE: BASE, "import pullback": "import pullback"} | {
    "import of the server's front": "import pullback_server.cli"
}
#: What is served, and how: the rows of the first are probed and a batch is timed before it is ready.
SERVED = {"serve an MLP with a batch axis": ", batch_axis=0", "serve an MLP without": ""}


def seconds_of(code: str) -> float:
    """Until an interpreter that runs some code has ended."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def request() -> bytes:
    writer = TensorWriter()
    x, v = np.ones((1, 784), dtype=np.float32), np.ones((1, 10), dtype=np.float32)
    message = messages.ComputeVjpRequest(
        function=Function(model="mlp"),
        inputs=[writer.add("input", x)],
        cotangents=[writer.add("output", v)],
        wrt=["input"],
    )
    return encode_message(message, writer.payloads)


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        # No answer yet, or 503.
        return False


def start(source: Path, data: bytes) -> tuple[float, float]:
    """Starts a server. Returns the seconds until /readyz says 200, and until a VJP was answered."""
    port, metrics_port = free_port(), free_port()
    command = [sys.executable, "-m", "pullback_server.cli", "serve", str(source), "--devices", "cpu:1"]
    command += ["--port", str(port), "--metrics-port", str(metrics_port), "--log-level", "warning"]
    began = time.perf_counter()
    process = subprocess.Popen(command)
    try:
        while not is_ready(f"http://127.0.0.1:{metrics_port}/readyz"):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with status {process.returncode}")
            time.sleep(0.005)
        ready = time.perf_counter() - began
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            channel.unary_unary(GRADIENT_METHODS["ComputeVjp"].path)(data, timeout=60)
        return ready, time.perf_counter() - began
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, grpcio {grpc.__version__}"
    )
    seen: dict[str, list[float]] = {name: [] for name in IMPORTS}
    seen |= {f"{name}: {what}": [] for name in SERVED for what in ("/readyz", "first VJP")}
    data = request()
    with tempfile.TemporaryDirectory() as folder:
        # The first one fills the page cache.
        for measured in range(-1, arguments.rounds):
            found = {name: [seconds_of(code)] for name, code in IMPORTS.items()}
            for number, (name, axis) in enumerate(SERVED.items()):
                source = Path(folder) / f"served_{number}.py"
                source.write_text(MODEL % axis)
                ready, answered = start(source, data)
                found |= {f"{name}: /readyz": [ready], f"{name}: first VJP": [answered]}
            if measured >= 0:
                for name, values in found.items():
                    seen[name] += values
    print(f"\nprocess start until ..., of {arguments.rounds} rounds\n  {'':<44} {'median s':>8}  x {BASE}")
    for name, values in seen.items():
        ratios = [value / base for value, base in zip(values, seen[BASE], strict=True)]
        print(f"  {name:<44} {median(values):8.3f}  {median(ratios):5.2f}")


if __name__ == "__main__":
    main()
