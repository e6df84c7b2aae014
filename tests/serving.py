"""A server process of a test's own, and where it listens."""

import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import psutil

from pullback_wire import GRADIENT_METHODS, TensorWriter, encode_message
from pullback_wire.v1 import gradient_service_pb2 as pb

#: Of a principals file: what those may do who bring no token.
EVERYBODY = '[anonymous]\nrights = ["call", "session", "metrics"]\n'


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pullback_server.cli", *arguments]


class Served:
    """A server process and where it listens, as its log says."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command(
                    "serve", "--drain-seconds", "0", *arguments, "--port", "0", "--metrics-port", "0", "--threads", "1"
                ),
                stderr=log,
                cwd=folder,
            )
        try:
            found = self._listening()
        except BaseException:
            # Nobody else knows of it yet.
            self.process.kill()
            self.process.wait()
            raise
        self.channel = grpc.insecure_channel(f"127.0.0.1:{found[1]}")
        self.target = f"127.0.0.1:{found[1]}"
        self.http = found[2]
        self.workers = psutil.Process(self.process.pid).children()

    def _listening(self) -> re.Match[str]:
        until = time.monotonic() + 90
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)
            said = self.log.read_text()
            if found := re.search(r"gRPC on 127\.0\.0\.1:(\d+), metrics on (http://127\.0\.0\.1:\d+)", said):
                return found

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.http + path, timeout=10) as answer:
            return str(answer.read().decode())

    def vjp(self, values: list[float], model: str = "square", timeout: float = 30) -> grpc.Future:
        writer = TensorWriter()
        x = np.array(values)
        request = pb.ComputeVjpRequest(
            function={"model": model},
            inputs=[writer.add("x", x)],
            cotangents=[writer.add("output", np.ones_like(x))],
        )
        call = self.channel.unary_unary(GRADIENT_METHODS["ComputeVjp"].path)
        return call.future(encode_message(request, writer.payloads), timeout=timeout)
