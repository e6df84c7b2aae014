"""The trace that a job belongs to, for models that make spans of their own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from pullback_server.ipc import messages
from pullback_server.tracking import Request, as_of


@contextlib.contextmanager
def on_behalf_of(run: messages.Run) -> Iterator[None]:
    """What is logged inside names the run's request, and spans that a model makes are children of its call's.

    OpenTelemetry is not loaded for that: where no model has loaded it, nobody makes spans.
    """
    with as_of(Request(run.request, run.traceparent) if run.request else None):
        if not run.traceparent or "opentelemetry.trace" not in sys.modules:
            yield
            return
        from opentelemetry import context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        around = TraceContextTextMapPropagator().extract({"traceparent": run.traceparent}, context.Context())
        token = context.attach(around)
        try:
            yield
        finally:
            context.detach(token)
