"""OpenTelemetry traces of calls and sessions, as spans of `tracking`. The library is an extra, loaded when asked for.

Everything is recorded and exported by the front: workers hand their times back with each result, so that nothing but
the model runs in them, and nothing is lost with one that is killed.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pullback_server.tracking import Attributes, is_traceparent

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span as OtelSpan

logger = logging.getLogger(__name__)

_SERVICE = "pullback-server"
#: Seconds that the last spans have to be sent when the server ends, and their collector does not answer.
_FLUSH = 5.0
#: gRPC's codes that are a server's failure, by OpenTelemetry's conventions; the others are the caller's own.
_FAILURES = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
#: gRPC's codes by number.
_CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip


class TracingError(Exception):
    """Traces were asked for and cannot be made; the message says why."""


class Tracing:
    """Makes the spans of one server, and sends them where OTEL_* variables say.

    exporter: instead of those; for programs that embed a server.

    Raises TracingError where the library is missing, or a variable says what it cannot do.
    """

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        try:
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise TracingError(
                f"--tracing needs OpenTelemetry, which is not installed ({error}): pip install 'pullback[server,otel]'"
            ) from error
        attributes = {} if _names_service(os.environ) else {SERVICE_NAME: _SERVICE}
        # Not the process's global one: two embedded servers, and the program around them, have their own.
        self._provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
        self._processor = BatchSpanProcessor(exporter or _exporter())
        self._provider.add_span_processor(self._processor)
        self.tracer = self._provider.get_tracer("pullback_server")
        self._propagator = TraceContextTextMapPropagator()

    def serve(
        self, service: str, method: str, began: float, traceparent: str, tracestate: str, request_id: str
    ) -> tuple[CallSpan | None, str]:
        """The span of a call, None where it is not sampled, and the W3C context of what is done for it.

        began: on the time.monotonic clock. traceparent, tracestate: the caller's, or empty.
        """
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind

        clock = _Clock()
        around = Context()
        if is_traceparent(traceparent):
            around = self._propagator.extract({"traceparent": traceparent, "tracestate": tracestate}, around)
        span = self.tracer.start_span(
            f"{service}/{method}",
            around,
            SpanKind.SERVER,
            {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method, "pullback.request_id": request_id},
            start_time=clock(began),
        )
        made = CallSpan(self, span, clock)
        return made if span.is_recording() else None, made.traceparent

    def op(self, kind: str, session: str, request_id: str) -> tuple[CallSpan | None, str]:
        """As `serve`, for an op of a session: in a trace of its own that links to the session's, and sampled by itself.

        A trace of all that a session does would have no bounds. session: its W3C context.
        """
        from opentelemetry.context import Context
        from opentelemetry.trace import Link, get_current_span

        clock = _Clock()
        around = self._propagator.extract({"traceparent": session}, Context())
        span = self.tracer.start_span(
            f"op {kind}",
            Context(),
            attributes={"pullback.op": kind, "pullback.request_id": request_id},
            links=[Link(get_current_span(around).get_span_context())],
            start_time=clock(time.monotonic()),
        )
        made = CallSpan(self, span, clock)
        return made if span.is_recording() else None, made.traceparent

    def close(self) -> None:
        """Sends what has not been sent, but does not wait long for a collector that does not answer."""
        # The library keeps to no time: it goes on for as long as its exporter tries.
        ending = threading.Thread(target=self._end, name="pullback-traces", daemon=True)
        ending.start()
        ending.join(_FLUSH)
        if ending.is_alive():
            logger.warning("the last traces could not be sent within %g s", _FLUSH)

    def _end(self) -> None:
        self._processor.force_flush(int(_FLUSH * 1000))
        self._provider.shutdown()


class CallSpan:
    """See `tracking.Span`."""

    def __init__(self, tracing: Tracing, span: OtelSpan, clock: _Clock) -> None:
        self._tracing = tracing
        self._span = span
        self._clock = clock
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        self._children: Context | None = None

    def stage(self, name: str, begin: float, end: float, attributes: Attributes | None = None) -> CallSpan:
        child = self._tracing.tracer.start_span(
            name, self._around(), attributes=dict(attributes or {}), start_time=self._clock(begin)
        )
        child.end(self._clock(max(begin, end)))
        return CallSpan(self._tracing, child, self._clock)

    def _around(self) -> Context:
        from opentelemetry.trace import set_span_in_context

        if self._children is None:
            from opentelemetry.context import Context

            self._children = set_span_in_context(self._span, Context())
        return self._children

    def batch(self, members: Sequence[Any], attributes: Attributes) -> CallSpan:
        from opentelemetry.trace import Link

        span = self._tracing.tracer.start_span(
            "batch",
            self._around(),
            attributes=dict(attributes),
            links=[Link(member._span.get_span_context()) for member in members],
            start_time=self._clock(time.monotonic()),
        )
        return CallSpan(self._tracing, span, self._clock)

    def link(self, other: Any) -> None:
        self._span.add_link(other._span.get_span_context())

    def end(self, code: str = "OK", reason: str = "", attributes: Attributes | None = None) -> None:
        from opentelemetry.trace import Status, StatusCode

        span = self._span
        if attributes:
            span.set_attributes(dict(attributes))
        span.set_attribute("rpc.grpc.status_code", _CODES.index(code))
        if code != "OK":
            # Never the message: it may quote what a model's code said of its inputs.
            span.set_attribute("error.type", reason or code)
            if code in _FAILURES:
                span.set_status(Status(StatusCode.ERROR, reason or code))
        span.end(self._clock(time.monotonic()))


class _Clock:
    """Nanoseconds since 1970 of moments on the time.monotonic clock: one reading of both for all spans of a call, so
    that they fit together whatever is done to the system's time."""

    __slots__ = ("_offset",)

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def __call__(self, moment: float) -> int:
        return int(moment * 1e9) + self._offset


def _names_service(environment: Mapping[str, str]) -> bool:
    return bool(environment.get("OTEL_SERVICE_NAME")) or "service.name=" in environment.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )


def _exporter() -> SpanExporter:
    """What OTEL_TRACES_EXPORTER and OTEL_EXPORTER_OTLP_*PROTOCOL ask for. Raises TracingError."""
    kind = os.environ.get("OTEL_TRACES_EXPORTER", "otlp").strip() or "otlp"
    if kind != "otlp":
        raise TracingError(f"OTEL_TRACES_EXPORTER is {kind!r}, this server has 'otlp'")
    protocol = (
        os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or "http/protobuf"
    ).strip()
    if protocol != "http/protobuf":
        raise TracingError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}, this server speaks 'http/protobuf'")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise TracingError(
            f"--tracing needs OpenTelemetry's exporter, which is not installed ({error}): "
            "pip install 'pullback[server,otel]'"
        ) from error
    return OTLPSpanExporter()
