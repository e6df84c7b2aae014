"""An OpenTelemetry collector: it keeps what it is sent, over OTLP/HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Sent


@dataclass(frozen=True)
class Span:
    """A span as it came. Times are nanoseconds; links are pairs of trace and span."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    begin: int
    end: int
    failed: bool
    attributes: dict[str, Any]
    links: list[tuple[str, str]]


class Collector:
    """Listens on a free port of loopback. bodies: all that was received, as it was."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces", self.path
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector._take(body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait(self, wanted: Callable[[list[Span]], Any], seconds: float = 30) -> Any:
        """What `wanted` finds in the spans, as soon as that is something."""
        until = time.monotonic() + seconds
        while not (found := wanted(list(self.spans))):
            assert time.monotonic() < until, [(span.name, span.attributes) for span in self.spans]
            time.sleep(0.02)
        return found

    def of_trace(self, trace: str, names: set[str]) -> dict[str, Span]:
        """The spans of a trace by name, once those named are there."""

        def wanted(spans: list[Span]) -> dict[str, Span]:
            found = {span.name: span for span in spans if span.trace == trace}
            return found if names <= found.keys() else {}

        return dict(self.wait(wanted))

    def _take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        self.bodies.append(body)
        for resource in request.resource_spans:
            about = {pair.key: _value(pair.value) for pair in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [_span(str(about["service.name"]), span) for span in scope.spans]


def _span(service: str, span: Sent) -> Span:
    return Span(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == 2,
        {pair.key: _value(pair.value) for pair in span.attributes},
        [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
    )


def _value(value: AnyValue) -> Any:
    return getattr(value, str(value.WhichOneof("value")))
