"""What every unary call has in common: deadline, metrics, its entry in the journal, and faults that become statuses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import grpc

from pullback_server.faults import Fault
from pullback_server.rpc import status
from pullback_server.rpc.journal import Computed, Entry, Journal
from pullback_server.rpc.origin import Told, origin_of, told
from pullback_server.scheduling import NOBODY, Origin
from pullback_server.telemetry import Metrics
from pullback_wire import Method


@dataclass
class Call:
    """One call being answered.

    deadline: on the time.monotonic clock; the caller's, or the server's own longest.
    model: set by the handler as soon as it knows; a caller's word, so not fit for a label as it stands.
    origin: whose call it is.
    began: when it came, on the same clock. trace_id: of the trace that records it, for exemplars, or empty.
    computed: set by the handler: where it was computed and where its time went.
    """

    deadline: float
    model: str = ""
    origin: Origin = NOBODY
    began: float = 0.0
    trace_id: str = ""
    computed: Computed | None = None


@dataclass(slots=True)
class Answered:
    """What a request came to: a result, or a fault."""

    entry: Entry
    result: bytes
    fault: Fault | None
    computed: Computed | None


Handler = Callable[[Method, bytes, Call], Awaitable[bytes]]


class Unary:
    """Makes gRPC method handlers of `Handler`s. Requests and answers are raw bytes.

    longest: seconds that a call without a deadline may take.
    """

    def __init__(self, metrics: Metrics, journal: Journal, longest: float) -> None:
        self._metrics = metrics
        self._journal = journal
        self.longest = longest

    def method_handler(self, method: Method, handler: Handler) -> grpc.RpcMethodHandler:
        """The gRPC handler of one method. No (de)serialisers: one that raises would reach the caller as UNKNOWN."""
        answering = self.answering(method, handler)
        sent = self._metrics.sent_bytes.labels(method.name)

        async def answer(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
            found = await answering(data, context, told(context))
            if found.fault is not None:
                await found.entry.abort(context, found.fault)
            context.set_trailing_metadata(found.entry.trailers(found.computed))
            sent.inc(len(found.result))
            return found.result

        return grpc.unary_unary_rpc_method_handler(answer)

    def answering(
        self, method: Method, handler: Handler
    ) -> Callable[[bytes, grpc.aio.ServicerContext, Told], Coroutine[Any, Any, Answered]]:
        """Answers one request of a method, given the metadata of its call, but leaves it to others to send that."""
        metrics, name = self._metrics, method.name
        in_flight = metrics.in_flight.labels(name)
        received = metrics.received_bytes.labels(name)

        async def answer(data: bytes, context: grpc.aio.ServicerContext, metadata: Told) -> Answered:
            began = time.monotonic()
            received.inc(len(data))
            # What it stays if the caller goes away, which arrives here as CancelledError.
            code = grpc.StatusCode.CANCELLED
            entry = self._journal.open(method.service, name, metadata, began)
            in_flight.inc()
            call = Call(began + self._seconds(context), began=began, trace_id=entry.sampled_trace)
            fault: Fault | None = None
            result = b""
            try:
                entry.check()
                call.origin = origin_of(context, metadata)
                result = await handler(method, data, call)
                code = grpc.StatusCode.OK
            except asyncio.CancelledError:
                raise
            except Exception as error:
                fault = status.fault_of(error, method.path)
                # Else it keeps this frame, which keeps it, and with them the request until the collector comes by.
                fault.__traceback__ = fault.__context__ = fault.__cause__ = None
                code = status.grpc_code(fault.reason)
            finally:
                # Before the answer is on its way, so that whoever has it finds it counted.
                in_flight.dec()
                entry.close(
                    code.name,
                    fault,
                    model=call.model,
                    caller=call.origin.caller,
                    received=len(data),
                    sent=len(result),
                    computed=call.computed,
                )
            return Answered(entry, result, fault, call.computed)

        return answer

    def _seconds(self, context: grpc.aio.ServicerContext) -> float:
        remaining = context.time_remaining()
        return self.longest if remaining is None else min(max(remaining, 0.0), self.longest)
