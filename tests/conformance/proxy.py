"""A server in front of a real one that breaks one thing at a time: what the conformance suite is tried on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2

from pullback_wire import GRADIENT_METHODS, MODEL_METHODS, SESSION_SERVICE, decode, encode_message, numpy_dtype
from pullback_wire.v1 import session_service_pb2

_DETAILS = "grpc-status-details-bin"
_SESSION = f"/{SESSION_SERVICE}/Session"
_METHODS = {method.path: method for method in (*GRADIENT_METHODS.values(), *MODEL_METHODS.values())}
_STREAMS = (_SESSION, "/grpc.reflection.")


class Body:
    """A message and its payloads, to be changed."""

    def __init__(self, kind: Any, data: bytes) -> None:
        self.message, payloads = decode(kind, data)
        self.payloads = [bytearray(payload) for payload in payloads]

    def encode(self) -> bytes:
        return encode_message(self.message, self.payloads)

    def array(self, tensor: Any) -> np.ndarray:
        """A tensor's values, which may be written to."""
        flat = np.frombuffer(self.payloads[tensor.payload], numpy_dtype(tensor.dtype))
        return flat.reshape(tuple(tensor.shape))

    def set(self, tensor: Any, array: np.ndarray, dtype: int) -> None:
        """Other values, in another dtype."""
        self.payloads[tensor.payload] = bytearray(array.tobytes())
        tensor.dtype = dtype

    def add(self, tensor: Any, array: np.ndarray, name: str = "") -> None:
        """Fills an empty tensor with a float64 array."""
        tensor.name, tensor.dtype, tensor.payload = name, 13, len(self.payloads)
        tensor.shape.extend(array.shape)
        self.payloads.append(bytearray(array.tobytes()))


class Refusal(Exception):
    """The proxy's own refusal."""

    def __init__(self, code: grpc.StatusCode, message: str = "refused", details: bytes = b"") -> None:
        super().__init__(message)
        self.code, self.message, self.details = code, message, details


@dataclass
class Fault:
    """What is broken. Each gets the method's name and may change what it is given, or return something else.

    bytes_: the request's bytes. request, response: a Body. error: a google.rpc.Status, and the request's bytes; bytes
    that it returns are the answer instead. trailers: metadata by name. frame: a session's frame from the client, and
    answer: one from the server, as a Body; a list that they return is sent instead. ends: the status that a session
    ended with, or None; returns whether that is to be told.
    """

    bytes_: Callable[[str, bytes], bytes | None] | None = None
    request: Callable[[str, Body], None] | None = None
    response: Callable[[str, Body], None] | None = None
    error: Callable[[str, Any, bytes], bytes | None] | None = None
    trailers: Callable[[dict[str, Any]], None] | None = None
    frame: Callable[[Body], list[Body] | None] | None = None
    answer: Callable[[Body], list[Body] | None] | None = None
    ends: Callable[[Any], bool] | None = None
    raw: Callable[[str, bytes], bytes] | None = None


class Proxy(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The server; `fault` may be changed while it runs."""

    def __init__(self, target: str) -> None:
        self.fault = Fault()
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.insecure_channel(target, options)
        self._server = grpc.server(ThreadPoolExecutor(64), handlers=[self], options=options)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Proxy:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(0).wait()
        self._channel.close()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        path = details.method
        if path.startswith(_STREAMS):
            return grpc.stream_stream_rpc_method_handler(lambda frames, context: self._stream(path, frames, context))
        return grpc.unary_unary_rpc_method_handler(lambda data, context: self._unary(path, data, context))

    def _unary(self, path: str, data: bytes, context: grpc.ServicerContext) -> bytes:
        fault, method = self.fault, _METHODS.get(path)
        name = path.rpartition("/")[2]
        try:
            if fault.bytes_ is not None:
                data = fault.bytes_(name, data) or data
            if fault.request is not None and method is not None:
                body = Body(method.request, data)
                fault.request(name, body)
                data = body.encode()
            answer, call = self._channel.unary_unary(path).with_call(
                data, timeout=context.time_remaining(), metadata=_forwarded(context)
            )
        except Refusal as refusal:
            details = ((_DETAILS, refusal.details),) if refusal.details else ()
            context.set_trailing_metadata(details)
            context.abort(refusal.code, refusal.message)
        except grpc.RpcError as error:
            return self._refuse(name, data, error, context)
        trailers = dict(call.trailing_metadata() or ())
        if fault.trailers is not None:
            fault.trailers(trailers)
        context.set_trailing_metadata(tuple(trailers.items()))
        if fault.response is not None and method is not None:
            body = Body(method.response, answer)
            fault.response(name, body)
            answer = body.encode()
        return fault.raw(name, answer) if fault.raw is not None else answer

    def _refuse(self, name: str, data: bytes, error: Any, context: grpc.ServicerContext) -> bytes:
        trailers = dict(error.trailing_metadata() or ())
        code, message = error.code(), error.details()
        if self.fault.error is not None and _DETAILS in trailers:
            status = status_pb2.Status.FromString(trailers[_DETAILS])
            instead = self.fault.error(name, status, data)
            if instead is not None:
                return instead
            trailers[_DETAILS] = status.SerializeToString()
            code = next(one for one in grpc.StatusCode if one.value[0] == status.code)
            message = status.message
        if self.fault.trailers is not None:
            self.fault.trailers(trailers)
        context.set_trailing_metadata(tuple(trailers.items()))
        context.abort(code, message)
        raise AssertionError

    def _stream(self, path: str, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        fault = self.fault
        session = path == _SESSION

        def sent() -> Iterator[bytes]:
            for data in frames:
                if session and fault.frame is not None:
                    try:
                        body = Body(session_service_pb2.SessionRequest, data)
                    except ValueError:
                        yield data
                        continue
                    instead = fault.frame(body)
                    yield from [one.encode() for one in ([body] if instead is None else instead)]
                else:
                    yield data

        call = self._channel.stream_stream(path)(sent(), metadata=_forwarded(context), timeout=context.time_remaining())
        context.add_callback(call.cancel)
        ended: Any = None
        try:
            for data in call:
                if session and fault.answer is not None:
                    body = Body(session_service_pb2.SessionResponse, data)
                    instead = fault.answer(body)
                    yield from [one.encode() for one in ([body] if instead is None else instead)]
                elif fault.raw is not None and not session:
                    yield fault.raw("reflection", data)
                else:
                    yield data
        except grpc.RpcError as error:
            ended = error
        if fault.ends is not None and not fault.ends(ended):
            ended = None if ended is not None else Refusal(grpc.StatusCode.INTERNAL, "broken")
        if isinstance(ended, Refusal):
            context.abort(ended.code, ended.message)
        elif ended is not None:
            context.set_trailing_metadata(tuple(ended.trailing_metadata() or ()))
            context.abort(ended.code(), ended.details())


def _forwarded(context: grpc.ServicerContext) -> tuple[tuple[str, Any], ...]:
    return tuple(pair for pair in context.invocation_metadata() if not pair[0].startswith(("user-agent", "grpc-")))


def edit(status: Any, change: Callable[[Any], None], kind: Any = error_details_pb2.ErrorInfo) -> None:
    """Changes the ErrorInfo (or another detail) of a google.rpc.Status or an OpStatus."""
    for detail in status.details:
        found = kind()
        if detail.Unpack(found):
            change(found)
            detail.Pack(found)
