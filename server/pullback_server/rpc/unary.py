"""What every unary call has in common: deadline, metrics, and faults that become statuses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc

from pullback_server.faults import Fault
from pullback_server.rpc import status
from pullback_server.rpc.access import Metadata
from pullback_server.rpc.origin import origin_of
from pullback_server.scheduling import NOBODY, Origin
from pullback_server.telemetry import Metrics
from pullback_wire import Method


@dataclass
class Call:
    """One call being answered.

    deadline: on the time.monotonic clock; the caller's, or the server's own longest.
    model: set by the handler as soon as it knows; a caller's word, so not fit for a label as it stands.
    origin: whose call it is. metadata: tells what came along.
    """

    deadline: float
    model: str = ""
    origin: Origin = NOBODY
    metadata: Callable[[], Metadata | None] = lambda: None


Handler = Callable[[Method, bytes, Call], Awaitable[bytes]]


class Unary:
    """Makes gRPC method handlers of `Handler`s. Requests and answers are raw bytes.

    label: the metric label for a model's name as a caller gave it.
    longest: seconds that a call without a deadline may take.
    """

    def __init__(self, metrics: Metrics, label: Callable[[str], str], longest: float) -> None:
        self._metrics = metrics
        self._label = label
        self._longest = longest

    def method_handler(self, method: Method, handler: Handler) -> grpc.RpcMethodHandler:
        """The gRPC handler of one method. No (de)serialisers: one that raises would reach the caller as UNKNOWN."""
        metrics, name = self._metrics, method.name
        in_flight = metrics.in_flight.labels(name)
        received = metrics.received_bytes.labels(name)
        sent = metrics.sent_bytes.labels(name)

        async def answer(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
            began = time.monotonic()
            received.inc(len(data))
            in_flight.inc()
            # What it stays if the caller goes away, which arrives here as CancelledError.
            code = grpc.StatusCode.CANCELLED
            call = Call(began + self._seconds(context))
            fault: Fault | None = None
            result = b""
            try:
                call.origin = origin_of(context)
                call.metadata = context.invocation_metadata
                result = await handler(method, data, call)
                code = grpc.StatusCode.OK
            except asyncio.CancelledError:
                raise
            except Exception as error:
                fault = status.fault_of(error, method.path)
                code = status.grpc_code(fault.reason)
            finally:
                # Before the answer is on its way, so that whoever has it finds it counted.
                in_flight.dec()
                metrics.call(name, self._label(call.model), code.name, time.monotonic() - began)
            if fault is not None:
                await context.abort(code, status.clip(fault.message), ((status.DETAILS_KEY, status.details(fault)),))
            sent.inc(len(result))
            return result

        return grpc.unary_unary_rpc_method_handler(answer)

    def _seconds(self, context: grpc.aio.ServicerContext) -> float:
        remaining = context.time_remaining()
        return self._longest if remaining is None else min(max(remaining, 0.0), self._longest)
