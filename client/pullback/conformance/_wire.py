"""Calls as bytes over gRPC, and answers read as strictly as the contract allows."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import Message

from pullback.conformance._check import Mismatch
from pullback.conformance._draft import Draft
from pullback_wire import GRADIENT_METHODS, MODEL_METHODS, TensorReader, WireError, decode

_DETAILS = "grpc-status-details-bin"
Metadata = tuple[tuple[str, str | bytes], ...]


class Refused(Exception):
    """A call, or a session's op, was answered with an error.

    code: gRPC's name of it. reason, domain: of its ErrorInfo, or empty. violations: field and description of each of
    BadRequest's. retry: seconds of its RetryInfo. size: bytes of the details. asked: the request in words.
    """

    def __init__(self, code: str, message: str, details: Sequence[Any], size: int, asked: str) -> None:
        super().__init__(f"{code}: {message}")
        from google.rpc import error_details_pb2

        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        for detail in details:
            for kind in (info, bad, retry):
                detail.Unpack(kind)
        self.code, self.message, self.size, self.asked = code, message, size, asked
        self.reason, self.domain = str(info.reason), str(info.domain)
        self.violations = [(one.field, one.description) for one in bad.field_violations]
        self.retry = retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None
        self.metadata: dict[str, Any] = {}

    @property
    def words(self) -> str:
        """What came, for people."""
        return f"{self.code} {self.reason or '(no reason)'}: {self.message[:300]}"


def refused_by(error: Any, asked: str) -> Refused:
    """Of a grpc.RpcError. Raises Mismatch where the details contradict the status."""
    from google.rpc import status_pb2

    trailing = dict(error.trailing_metadata() or ())
    raw = trailing.get(_DETAILS, b"")
    code, message = error.code(), error.details() or ""
    try:
        status = status_pb2.Status.FromString(raw)
    except Exception:
        raise Mismatch(f"{_DETAILS} to be a google.rpc.Status", repr(raw[:80]), asked) from None
    if raw and (status.code != code.value[0] or status.message != message):
        raise Mismatch(
            f"details with the status's own code and message ({code.name}: {message[:100]})",
            f"code {status.code}: {status.message[:100]}",
            asked,
        )
    found = Refused(code.name, message, status.details, len(raw), asked)
    found.metadata = trailing
    return found


@dataclass
class Answer:
    """A response and its tensors, each checked against its payload; no payload is left over."""

    message: Any
    reader: TensorReader
    raw: bytes
    trailers: dict[str, Any]

    def outputs(self) -> dict[str, np.ndarray]:
        """The function's outputs by name."""
        return dict(self._outputs)

    def gradients(self, field: str = "gradients") -> dict[str, np.ndarray | None]:
        """A list of Gradient by name; None: unused."""
        return dict(self._fields[field])

    def blocks(self) -> dict[tuple[str, str], np.ndarray | None]:
        """Blocks by row and column; None: unused."""
        return dict(self._blocks)

    def __post_init__(self) -> None:
        self._outputs: dict[str, np.ndarray] = {}
        self._fields: dict[str, dict[str, np.ndarray | None]] = {}
        self._blocks: dict[tuple[str, str], np.ndarray | None] = {}
        for of in self.message.DESCRIPTOR.fields:
            kind = of.message_type.name if of.message_type is not None else ""
            if kind not in ("Tensor", "Gradient", "Block"):
                continue
            found: dict[Any, np.ndarray | None] = {}
            for index, entry in enumerate(getattr(self.message, of.name)):
                where = f"{of.name}[{index}]"
                key = (entry.row, entry.column) if kind == "Block" else entry.name
                if key in found:
                    raise Mismatch(f"each of {of.name} once", f"{key!r} twice")
                if kind != "Tensor" and entry.unused:
                    if entry.HasField("value"):
                        raise Mismatch(f"{where}: no value, for it is unused", "both")
                    found[key] = None
                    continue
                if kind != "Tensor" and not entry.HasField("value"):
                    raise Mismatch(f"{where}: a value, or unused set", "neither")
                found[key] = self.reader.array(entry if kind == "Tensor" else entry.value, where)
            if kind == "Block":
                self._blocks = found
            elif kind == "Gradient":
                self._fields[of.name] = found
            else:
                self._outputs = {name: array for name, array in found.items() if array is not None}
        self.reader.finish()


class Wire:
    """A channel to the server under test. Safe to use from several threads.

    timeout: seconds for each call. metadata: sent with each.
    """

    def __init__(self, target: str, credentials: Any, metadata: Metadata, timeout: float, authority: str = "") -> None:
        self.target, self.metadata, self.timeout = target, metadata, timeout
        self._credentials, self._authority = credentials, authority
        self._said = threading.local()
        self.channel = self.open()

    def open(self) -> Any:
        """Another channel, on a connection of its own."""
        import grpc

        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if self._authority:
            options.append(("grpc.ssl_target_name_override", self._authority))
        if self._credentials is None:
            return grpc.insecure_channel(self.target, options)
        return grpc.secure_channel(self.target, self._credentials, options)

    def close(self) -> None:
        self.channel.close()

    @property
    def asked(self) -> str:
        """This thread's last request in words."""
        return getattr(self._said, "words", "")

    def say(self, words: str) -> None:
        """Remembers what is about to be asked."""
        self._said.words = words

    def call(
        self,
        path: str,
        data: bytes,
        asked: str,
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        channel: Any = None,
    ) -> tuple[bytes, dict[str, Any]]:
        """The answer's bytes and its trailers. metadata: instead of the usual. Raises Refused."""
        import grpc

        self.say(asked)
        try:
            method = (channel or self.channel).unary_unary(path)
            answer, call = method.with_call(
                data, timeout=timeout or self.timeout, metadata=self.metadata if metadata is None else metadata
            )
        except grpc.RpcError as error:
            raise refused_by(error, asked) from None
        return answer, dict(call.trailing_metadata() or ())

    def ask(self, what: Draft, *, data: bytes | None = None, **how: Any) -> Answer:
        """Sends a request of GradientService. data: instead of its own bytes. Raises Refused, Mismatch."""
        method = GRADIENT_METHODS[what.method]
        raw, trailers = self.call(method.path, what.encode() if data is None else data, what.words, **how)
        try:
            message, payloads = decode(method.response, raw)
            return Answer(message, TensorReader(payloads), raw, trailers)
        except WireError as error:
            raise Mismatch(f"a {method.response.DESCRIPTOR.name} that can be read", str(error), what.words) from None

    def model(self, name: str, request: Message, **how: Any) -> Any:
        """Asks ModelService. Raises Refused, Mismatch."""
        method = MODEL_METHODS[name]
        asked = f"{name}({str(request).strip().replace(chr(10), ', ')})"
        raw, _ = self.call(method.path, request.SerializeToString(), asked, **how)
        try:
            return decode(method.response, raw)[0]
        except WireError as error:
            raise Mismatch(f"a {method.response.DESCRIPTOR.name} that can be read", str(error), asked) from None
