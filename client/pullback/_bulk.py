"""Stateless calls with large tensors, as ops of sessions that nobody else uses: chunks know no limit of size."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from pullback import errors
from pullback._fork import gate
from pullback._frames import FrameReader, FrameWriter
from pullback._session import Session
from pullback._transfers import CHUNK_THRESHOLD
from pullback._transport import Transport
from pullback_wire import Method
from pullback_wire.framing import Buffer
from pullback_wire.v1 import session_service_pb2 as pb

M = TypeVar("M", bound=Message)

#: Seconds after which a session that nobody uses is not used again.
_IDLE = 30.0
_FIELDS = ("inputs", "targets", "parameters", "cotangents", "tangents")


class Pool:
    """Sessions for large calls: one for each call under way, used again by later ones."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport.line()
        #: With when it was last used; by generation, as sessions do not survive a fork.
        self._idle: dict[int, deque[tuple[float, Session]]] = {}

    def call(
        self,
        method: Method,
        request: Message,
        payloads: Sequence[Buffer],
        response: type[M],
        what: str,
        timeout: float | None,
    ) -> tuple[M, FrameReader]:
        """The answer, and a reader of its tensors. Retried as unary calls are; once more for a session that was lost.

        Raises PullbackError.
        """
        deadline = self._transport.deadline(timeout)
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._attempt(method, request, payloads, response, what, deadline)
            except errors.PullbackError as error:
                pause = self._transport.retry.pause(error, attempt)
                if pause is None and attempt == 1 < self._transport.retry.attempts:
                    # Most likely of a session that was lost while nobody used it; the call is pure.
                    pause = 0.0 if isinstance(error, errors.SessionLost) else None
                if pause is None or time.monotonic() + pause >= deadline:
                    raise
            time.sleep(pause)

    def _attempt(
        self,
        method: Method,
        request: Message,
        payloads: Sequence[Buffer],
        response: type[M],
        what: str,
        deadline: float,
    ) -> tuple[M, FrameReader]:
        function: Any = getattr(request, "function", None)
        left = max(deadline - time.monotonic(), 1e-3)
        session = self._take() or Session(self._transport, [(function.model, function.version)], timeout=left)
        writer = session.writer(what, left)
        kind = method.name.removeprefix("Compute").lower()
        op = pb.StatelessOp()
        getattr(op, kind).CopyFrom(_described_anew(request, payloads, writer))
        pending = session.stateless(op, writer, what)
        try:
            reply = pending.wait(max(deadline - time.monotonic(), 1e-3))
            answer = getattr(reply.message.stateless, kind)
        finally:
            # A failed op leaves its session as good as it was.
            if session.usable:
                self._idle.setdefault(gate.generation, deque()).append((time.monotonic(), session))
        if not isinstance(answer, response):
            raise errors.ProtocolError(f"{what}: the answer is a {type(answer).__name__}")
        return answer, session.reader(reply)

    def _take(self) -> Session | None:
        idle = self._idle.get(gate.generation)
        while idle:
            try:
                used, session = idle.pop()
            except IndexError:
                return None
            if time.monotonic() - used < _IDLE and session.is_alive() and not session.going_away:
                return session
        return None


def _described_anew(request: Any, payloads: Sequence[Buffer], writer: FrameWriter) -> Any:
    """The request with its tensors described for a frame, large ones being sent ahead. Raises PullbackError."""
    copied = type(request)()
    copied.CopyFrom(request)
    for field in _FIELDS:
        for tensor in getattr(copied, field, ()):
            data = memoryview(payloads[tensor.payload])
            if len(data) >= CHUNK_THRESHOLD and writer.takes_chunks:
                tensor.payload, tensor.transfer = 0, writer.upload(data)
            else:
                tensor.payload = writer.inline(data)
    return copied


def pool_of(transport: Transport) -> Pool:
    """The client's pool."""
    found: Pool = transport.belongings.get("pool") or transport.belongings.setdefault("pool", Pool(transport))
    return found
