"""What must hold whatever was sent: statuses of the contract; a server that answers as before, and holds no more."""

from __future__ import annotations

import gc
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from google.rpc import error_details_pb2, status_pb2

from pullback_wire import ERROR_DOMAIN, GRADIENT_METHODS, Reason, TensorReader, TensorWriter, decode, encode_message
from pullback_wire.v1 import gradient_service_pb2 as pb

_DETAILS = "grpc-status-details-bin"
#: Nobody may bring these about: the server's own faults, and harm to others.
_NEVER = frozenset((Reason.INTERNAL, Reason.WORKER_LOST, Reason.SESSION_LOST, Reason.HARD_TIMEOUT, Reason.QUARANTINED,
                    Reason.DEADLINE_EXCEEDED))  # fmt: skip
#: What gRPC itself says before a request has come to us, as the beginnings of its words.
_BY_GRPC = {
    grpc.StatusCode.UNIMPLEMENTED: ("Method not found", "Compression algorithm"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: ("Received message larger", "CLIENT: Received message larger",
                                         "Decompressed message larger", "received metadata size exceeds"),
}  # fmt: skip
_GAUGES = ("requests_in_flight", "queue_length", "bytes_in_flight", "sessions", "session_handles",
           "session_retained_bytes")  # fmt: skip


class Findings:
    """What was told, how often, and what should not have been told."""

    def __init__(self) -> None:
        self.told: Counter[str] = Counter()
        self.wrong: list[str] = []

    def found(self, what: str, data: bytes | Sequence[bytes] = b"") -> None:
        """Something that should not be; data: what brought it about."""
        if len(self.wrong) < 100:
            self.wrong.append(f"{what}: {data!r}"[:4000])

    def error(self, error: grpc.RpcError, data: bytes | Sequence[bytes] = b"") -> None:
        """A call that failed, held against the contract's table."""
        code, text = error.code(), error.details() or ""
        details = next((value for key, value in error.trailing_metadata() or () if key == _DETAILS), None)
        if details is None:
            self.told[f"{code.name}, by gRPC"] += 1
            if code is grpc.StatusCode.CANCELLED and text.startswith("Locally cancelled"):
                return
            if not text.startswith(_BY_GRPC.get(code, ("\0",))):
                self.found(f"{code.name} without a reason ({text})", data)
            return
        status = status_pb2.Status.FromString(details)
        self._check(status.code, status.details, text, data)
        if status.code != code.value[0]:
            self.found(f"{code.name}, but its details say {status.code}", data)

    def op(self, status: Any, data: bytes | Sequence[bytes] = b"") -> None:
        """The status of an op in a session."""
        if status.code:
            self._check(status.code, status.details, status.message, data)
        else:
            self.told["OK"] += 1

    def message(self, text: str, data: bytes | Sequence[bytes] = b"") -> None:
        """The `error_message` of an answer on a stream of inferences."""
        reason = text.rpartition("[")[2].removesuffix("]") if text else "OK"
        self.told[reason] += 1
        if text and (reason not in Reason.__members__ or Reason[reason] in _NEVER):
            self.found(f"an answer on a stream says {text}", data)

    def _check(self, code: int, details: Iterable[Any], text: str, data: bytes | Sequence[bytes]) -> None:
        info = error_details_pb2.ErrorInfo()
        if not any(detail.Unpack(info) for detail in details) or info.domain != ERROR_DOMAIN:
            self.found(f"status {code} without a reason ({text})", data)
            return
        try:
            reason = Reason(info.reason)
        except ValueError:
            self.found(f"a reason that is none: {info.reason}", data)
            return
        self.told[reason.value] += 1
        if int(reason.code) != code:
            self.found(f"{reason.value} came with status {code}", data)
        if reason in _NEVER:
            self.found(f"{reason.value} ({text})", data)


class House:
    """A server process under fire, seen from outside. log: the file that it writes to."""

    def __init__(self, process: int, target: str, http: str, log: Path) -> None:
        self.target = target
        self.http = http
        self._front = psutil.Process(process)
        self._log = log
        self._workers = {worker.pid for worker in self._front.children()}

    def answers(self) -> None:
        """Raises AssertionError or grpc.RpcError where a known VJP is not answered rightly."""
        x, v = np.array([1.5, -2.0, 3.0]), np.array([1.0, 2.0, -1.0])
        writer = TensorWriter()
        request = pb.ComputeVjpRequest(
            function={"model": "cube"}, inputs=[writer.add("x", x)], cotangents=[writer.add("output", v)]
        )
        with grpc.insecure_channel(self.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = channel.unary_unary(GRADIENT_METHODS["ComputeVjp"].path)
            data = call(encode_message(request, writer.payloads), timeout=60, wait_for_ready=True)
        answer, payloads = decode(pb.ComputeVjpResponse, data)
        found = TensorReader(payloads)
        np.testing.assert_allclose(found.array(answer.outputs[0], ""), x**3, rtol=1e-12)
        np.testing.assert_allclose(found.array(answer.gradients[0].value, ""), 3 * x**2 * v, rtol=1e-12)

    def samples(self) -> dict[str, float]:
        """Pullback's metrics, summed over their labels."""
        with urllib.request.urlopen(f"{self.http}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        found: Counter[str] = Counter()
        for line in lines:
            if line.startswith("pullback_"):
                name, _, value = line.rpartition(" ")
                found[name.partition("{")[0].removeprefix("pullback_")] += float(value)
        return dict(found)

    def settled(self, seconds: float = 30.0) -> dict[str, float]:
        """Gauges that do not come back to zero within so long."""
        end = time.monotonic() + seconds
        while True:
            samples = self.samples()
            left = {name: samples[name] for name in _GAUGES if samples.get(name)}
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.1)

    def check(self, findings: Findings) -> None:
        """Whether everything is as it should be."""
        self.answers()
        if left := self.settled():
            findings.found(f"gauges that do not come back to zero: {left}")
        if {worker.pid for worker in self._front.children()} != self._workers:
            findings.found("a worker is another process than before")
        for line in self.complaints():
            findings.found(f"the log says: {line}")

    def complaints(self) -> list[str]:
        """Lines of the log that tell of a fault of the server's own."""
        marks = ("inside the server", "raised by servicer", "never retrieved", "Exception ignored", "request failed")
        return [line for line in self._log.read_text(errors="replace").splitlines() if any(m in line for m in marks)]

    def holds(self) -> dict[str, int]:
        """Resident bytes, descriptors and threads of the front, and resident bytes of its workers."""
        gc.collect()
        workers = self._front.children()
        return {
            "front": self._front.memory_info().rss,
            "workers": sum(worker.memory_info().rss for worker in workers),
            "descriptors": self._front.num_fds(),
            "threads": self._front.num_threads(),
        }
