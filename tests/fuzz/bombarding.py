"""Hostile calls over a socket: unary ones, sessions and uploads, many at once."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
from tests.fuzz import mutating
from tests.fuzz.house import Findings
from tests.fuzz.recording import SESSION, Recording

from pullback_wire import GRADIENT_METHODS, MODEL_METHODS, WireError, decode
from pullback_wire.v1 import model_service_pb2, session_service_pb2

#: Seconds in which whatever is sent must be answered.
PATIENCE = 60.0
_UPLOAD = "/pullback.v1.ModelService/UploadWeights"
_OTHERS = (
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/pullback.v1.GradientService/Nothing",
    "/nothing",
    "/" + "x" * 200,
)
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]
_TYPES = {method.path: method.request for method in (*GRADIENT_METHODS.values(), *MODEL_METHODS.values())}
_GRADIENT = [method.path for method in GRADIENT_METHODS.values()]
#: Unary calls at once.
_AT_ONCE = 16


class Bombardment:
    """Sends what is not as it should be, and looks at what comes back."""

    def __init__(self, target: str, recording: Recording, findings: Findings, seed: int) -> None:
        self._target = target
        self._recording = recording
        self._findings = findings
        self._rng = random.Random(seed)
        self.sent = 0

    def burst(self, count: int) -> None:
        """So many calls of all kinds, on a connection of their own."""
        rng = self._rng
        with grpc.insecure_channel(self._target, options=_OPTIONS) as channel:
            left = count
            while left > 0:
                kind = rng.random()
                if kind < 0.4:
                    calls = [self._request() for _ in range(min(_AT_ONCE, left))]
                    left -= len(calls)
                    self.unary(channel, calls)
                    continue
                left -= 1
                if kind < 0.95:
                    frames = mutating.session(rng.choice(self._recording.sessions), rng)
                    self.stream(channel, SESSION, frames, rng.choice(("close", "close", "cancel", "wait")))
                else:
                    self.stream(channel, _UPLOAD, self._upload(), rng.choice(("close", "cancel")))

    def _request(self) -> tuple[str, bytes, list[tuple[str, str | bytes]]]:
        rng = self._rng
        path = rng.choice(_GRADIENT if rng.random() < 0.8 else sorted(_TYPES))
        seeds = self._recording.unary.get(path) or [b""]
        if rng.random() < 0.05:
            return rng.choice(_OTHERS), rng.randbytes(rng.randrange(50)), []
        if rng.random() < 0.05:
            # Another method's request.
            path = rng.choice(sorted(_TYPES))
        metadata: list[tuple[str, str | bytes]] = []
        if rng.random() < 0.1:
            metadata = [rng.choice(_METADATA)]
        if rng.random() < 0.05:
            return path, rng.randbytes(rng.randrange(300)), metadata
        return path, mutating.mutated(rng.choice(seeds), _TYPES[path], rng), metadata

    def unary(self, channel: grpc.Channel, calls: Sequence[tuple[str, bytes, Any]]) -> None:
        """Calls at once; some of them are given up, or have no time."""
        rng = self._rng
        under_way = []
        for path, data, metadata in calls:
            hurried = rng.random() < 0.05
            call = channel.unary_unary(path).future(
                data,
                timeout=rng.uniform(0, 0.02) if hurried else 0.5 if path.endswith("/Watch") else PATIENCE,
                metadata=metadata,
            )
            if rng.random() < 0.05:
                call.cancel()
                hurried = True
            under_way.append((path, data, call, hurried))
            self.sent += 1
        for path, data, call, hurried in under_way:
            try:
                call.result(PATIENCE + 30)
                self._findings.told["OK"] += 1
            except (grpc.FutureTimeoutError, grpc.FutureCancelledError):
                if not hurried:
                    self._findings.found(f"{path} never came back", data)
            except grpc.RpcError as error:
                # What goes on until the caller leaves has no end of its own.
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and (hurried or path.endswith("/Watch")):
                    continue
                self._findings.error(error, data)

    def stream(self, channel: grpc.Channel, path: str, frames: Sequence[bytes], end: str) -> None:
        """A stream of frames, which is then closed, cancelled at once, or left open until it is answered or quiet."""
        out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

        def sending() -> Iterator[bytes]:
            while (frame := out.get()) is not None:
                yield frame

        for frame in frames:
            out.put(frame)
        if end == "close":
            out.put(None)
        if path == SESSION:
            call: Any = channel.stream_stream(path)(sending(), timeout=PATIENCE)
            read: Callable[[], None] = lambda: self._read_session(call, frames)  # noqa: E731
        else:
            call = channel.stream_unary(path).future(sending(), timeout=PATIENCE)
            read = call.result
        timer = threading.Timer(self._rng.uniform(0, 0.05) if end == "cancel" else 0.3, call.cancel)
        self.sent += 1
        began = time.monotonic()
        if end != "close":
            timer.start()
        try:
            read()
            self._findings.told["stream ended"] += 1
        except grpc.FutureCancelledError:
            self._findings.told["CANCELLED, by us"] += 1
        except grpc.RpcError as error:
            if time.monotonic() - began >= PATIENCE:
                self._findings.found(f"{path} did not end", frames)
            elif not (end != "close" and error.code() is grpc.StatusCode.CANCELLED):
                self._findings.error(error, frames)
        finally:
            timer.cancel()
            out.put(None)

    def _read_session(self, call: Any, frames: Sequence[bytes]) -> None:
        latest = 0
        for data in call:
            try:
                frame, _ = decode(session_service_pb2.SessionResponse, data)
            except WireError as error:
                self._findings.found(f"an answer that cannot be read: {error}", frames)
                return
            if frame.op:
                if frame.op <= latest:
                    self._findings.found(f"op {frame.op} is answered after op {latest}", frames)
                latest = frame.op
                self._findings.op(frame.status, frames)

    def _upload(self) -> list[bytes]:
        rng = self._rng
        header = model_service_pb2.UploadHeader(
            model="small", version="7", size_bytes=rng.choice((0, 8, 100, 1 << 62, -1)), sha256=rng.randbytes(32)
        )
        parts = [model_service_pb2.UploadWeightsRequest(header=header)]
        parts += [model_service_pb2.UploadWeightsRequest(data=rng.randbytes(rng.randrange(200))) for _ in range(3)]
        if rng.random() < 0.5:
            rng.shuffle(parts)
        return [
            mutating.mutated(part.SerializeToString(), type(part), rng)
            if rng.random() < 0.5
            else part.SerializeToString()
            for part in parts
        ]


_METADATA: list[tuple[str, str | bytes]] = [
    ("pullback-priority", "urgent"),
    ("pullback-priority", "high"),
    ("pullback-caller", "x" * 500),
    ("pullback-caller", "somebody"),
    ("pullback-caller-bin", b"\0\xff"),
    ("pullback-request-id", "y" * 4000),
    ("pullback-request-id", ""),
    ("pullback-timings", "perhaps"),
    ("traceparent", "00-zz-zz-zz"),
    ("traceparent", "00-" + "f" * 32 + "-" + "f" * 16 + "-01"),
    ("tracestate", "=" * 300),
    ("baggage", "a=b," * 200),
    ("authorization", "Bearer"),
    ("authorization", "Bearer " + "a" * 500),
    ("authorization", "Bearer e30.e30."),
    ("authorization", "Basic AAAA"),
    ("grpc-status-details-bin", b"\xff" * 100),
    ("filler", "z" * 6000),
]
