"""What is kept of each call: its id, its span, its count, and its line in the access log. Never what it carries."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc

from pullback_server import tracking
from pullback_server.faults import Fault
from pullback_server.rpc.ids import abort, id_of
from pullback_server.rpc.origin import Told
from pullback_server.telemetry import Metrics
from pullback_server.telemetry.tracing import Tracing
from pullback_server.tracking import Request
from pullback_wire import REQUEST_ID_KEY, TIMINGS_KEY

_access = logging.getLogger("pullback_server.access")

#: Characters of a caller's own words in a line or a span.
_LONGEST = 128
#: What a line begins with.
_TOLD = ("method", "code")
_TRACEPARENT, _TRACESTATE = "traceparent", "tracestate"


@dataclass(slots=True)
class Computed:
    """Where a call was computed, and where its time went.

    stages: seconds of decode, queue, transfer, forward, backward, encode. decoded: when that was done; timings: see
    fleet.seam.Reply. rows: of the merged computation it was a part of, or 0; batch: what that is known as.
    """

    version: str
    stages: Mapping[str, float]
    decoded: float
    timings: Mapping[str, float]
    worker: str
    rows: int
    batch: Request | None
    device_memory: int


class Journal:
    """Opens an entry for each call.

    label: the metric label for a model's name as a caller gave it. access: whether there is a line for each call.
    """

    def __init__(
        self, metrics: Metrics, label: Callable[[str], str], tracing: Tracing | None = None, access: bool = False
    ) -> None:
        self.metrics = metrics
        self.label = label
        self.tracing = tracing
        self.access = access

    def open(self, service: str, method: str, told: Told, began: float) -> Entry:
        """An entry for a call whose metadata are `told`; from here on what is logged in this task is about it."""
        entry = Entry(self, service, method, told, began)
        tracking.begin(entry.request)
        return entry

    def refused(self, path: str, told: Told, code: str, reason: str, caller: str) -> None:
        """A call was turned away at the gate: it has an id and a line like others.

        But no span, and it is not counted: anybody may make as many as they like.
        """
        request = Request(id_of(told)[0])
        tracking.begin(request)
        if self.access:
            _write(_word(path.rpartition("/")[2]), code, 0.0, {"reason": reason}, caller, request)


class Entry:
    """One call. began: on the time.monotonic clock."""

    __slots__ = ("_fault", "_journal", "_method", "_service", "_timed", "began", "request")

    def __init__(self, journal: Journal, service: str, method: str, told: Told, began: float) -> None:
        self._journal = journal
        self._service, self._method, self.began = service, method, began
        self._timed = told.get(TIMINGS_KEY) == "1"
        id, self._fault = id_of(told)
        traceparent = str(told.get(_TRACEPARENT, ""))
        if journal.tracing is not None:
            span, traceparent = journal.tracing.serve(
                service, method, began, traceparent, str(told.get(_TRACESTATE, "")), id
            )
            self.request = Request(id, traceparent, span)
        else:
            self.request = Request(id, traceparent if traceparent and tracking.is_traceparent(traceparent) else "")

    def check(self) -> None:
        """Raises Fault (BAD_OPTION) for an id that is none."""
        if self._fault is not None:
            raise self._fault

    @property
    def sampled_trace(self) -> str:
        """The id of its trace, for an exemplar; empty where it is not recorded."""
        return self.request.recorded_trace

    def trailers(self, computed: Computed | None) -> tuple[tuple[str, str], ...]:
        """What goes with the answer: the id, and if it was asked for, where the time went."""
        named = (REQUEST_ID_KEY, self.request.id)
        if not self._timed or computed is None:
            return (named,)
        told: dict[str, object] = {
            "seconds": round(time.monotonic() - self.began, 7),
            "stages": {stage: round(spent, 7) for stage, spent in computed.stages.items()},
            "worker": computed.worker,
        }
        if computed.rows:
            told["batch_rows"] = computed.rows
        if computed.device_memory:
            told["device_memory_bytes"] = computed.device_memory
        return (named, (TIMINGS_KEY, json.dumps(told, separators=(",", ":"))))

    async def abort(self, context: grpc.aio.ServicerContext, fault: Fault) -> None:
        """Answers with a fault. Raises what gRPC raises for that."""
        await abort(context, fault, self.request.id)

    def close(
        self,
        code: str,
        fault: Fault | None,
        *,
        model: str = "",
        caller: str = "",
        received: int = 0,
        sent: int = 0,
        computed: Computed | None = None,
    ) -> None:
        """Counts a unary call, ends its span, writes its line. model: as the caller named it."""
        journal = self._journal
        seconds = time.monotonic() - self.began
        journal.metrics.call(self._method, journal.label(model), code, seconds, self.sampled_trace)
        if self.request.span is not None:
            self._end(code, "" if fault is None else fault.reason.value, model, received, sent, computed)
        if journal.access:
            more: dict[str, str | int] = {"model": model, "request_bytes": received, "response_bytes": sent}
            self._line(code, seconds, caller, more)

    def open_session(self) -> None:
        """The call is a session, whose ops get spans of their own."""
        tracing, request = self._journal.tracing, self.request
        if tracing is not None:
            request.ops = lambda kind, id: tracing.op(kind, request.traceparent, id)

    def close_session(self, code: str, fault: Fault | None, caller: str) -> None:
        """Ends the span of a session, and writes its line."""
        if self.request.span is not None:
            reason = "" if fault is None else fault.reason.value
            self.request.span.end(code, reason, {"pullback.session.ops": self.request.count})
        if self._journal.access:
            self._line(code, time.monotonic() - self.began, caller, {"ops": self.request.count})

    def _end(self, code: str, reason: str, model: str, received: int, sent: int, computed: Computed | None) -> None:
        span = self.request.span
        assert span is not None
        about: dict[str, str | int | float | bool] = {
            "pullback.request.bytes": received,
            "pullback.response.bytes": sent,
        }
        if model:
            about["pullback.model"] = model[:_LONGEST]
        if computed is not None:
            about |= {"pullback.version": computed.version, "pullback.worker": computed.worker}
            stages, began = computed.stages, computed.timings["began"]
            waited = computed.decoded + stages["queue"]
            span.stage("decode", self.began, self.began + stages["decode"])
            span.stage("queue", computed.decoded, waited)
            span.stage("transfer", max(began - stages["transfer"], waited), max(began, waited))
            if computed.batch is not None and computed.batch.span is not None:
                about["pullback.batch.rows"] = computed.rows
                span.link(computed.batch.span)
            tracking.computed(span, computed.timings, computed.worker)
            now = time.monotonic()
            span.stage("encode", now - stages["encode"], now)
        span.end(code, reason, about)

    def _line(self, code: str, seconds: float, caller: str, more: Mapping[str, str | int]) -> None:
        _write(self._method, code, seconds, more, caller, self.request)


def _write(
    method: str, code: str, seconds: float, more: Mapping[str, str | int], caller: str, request: Request
) -> None:
    """A line of the access log."""
    fields = {
        "method": method,
        "code": code,
        "seconds": round(seconds, 6),
        **{name: value[:_LONGEST] if isinstance(value, str) else value for name, value in more.items()},
        "caller": caller,
        "request_id": request.id,
        "trace_id": request.trace_id,
    }
    told = [f"{name}={_word(value)}" for name, value in fields.items() if value != "" and name not in _TOLD]
    # Nothing is told twice: on a console the line goes on with the words, in JSON there are the fields.
    _access.info("%s %s", method, code, extra=fields | {"_words": " ".join(told)})


def _word(value: object) -> str:
    """A value in a line of words: a caller's own word must not look like several, nor like another line."""
    text = str(value)[:_LONGEST]
    return text if text.isascii() and text.isprintable() and " " not in text and '"' not in text else json.dumps(text)
