"""What goes with each call beside its message: an id, the caller's trace, and the wish to know where the time goes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from pullback_wire import REQUEST_ID_KEY, TIMINGS_KEY

Metadata = tuple[tuple[str, str | bytes], ...]

_LONGEST = 128
_TIMED = (TIMINGS_KEY, "1")
_id: ContextVar[str | None] = ContextVar("pullback_request_id", default=None)
_recorded: ContextVar[list[CallTimings] | None] = ContextVar("pullback_timings", default=None)

#: The list that timings are to be added to; None: nobody wants them.
recorded = _recorded.get


@dataclass(frozen=True)
class CallTimings:
    """Where the time of one call went, in seconds.

    call: what errors call it, e.g. "model 'square': vjp". request_id: what the server's log calls it.
    round_trip: as seen here. seconds: in the server, from the request's arrival to its answer.
    stages: of those: decode, queue (waiting for a worker), transfer (to it and back), forward, backward, encode.
    worker: where it was computed.
    batch_rows: rows of the computation, where it was merged with other callers' requests, whose forward and backward
        these are then; else 0.
    device_memory_bytes: in use on the worker's device after the call; 0 where the device does not say.
    """

    call: str
    request_id: str
    round_trip: float
    seconds: float
    stages: Mapping[str, float] = field(default_factory=dict)
    worker: str = ""
    batch_rows: int = 0
    device_memory_bytes: int = 0


@contextlib.contextmanager
def record_timings() -> Iterator[list[CallTimings]]:
    """Collects where the time of each call goes that this thread (or task) makes inside.

        with pb.record_timings() as timings:
            model.vjp(x, v)
        print(timings[-1].stages)

    Of stateless calls, as far as they travel as one message; the ops of sessions have none. Calls that fail, and
    servers that do not tell, add nothing.
    """
    found: list[CallTimings] = []
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


@contextlib.contextmanager
def request_id(id: str) -> Iterator[str]:
    """Calls that this thread (or task) makes inside, and sessions it opens, carry this id: in the server's log, its
    traces, and in what they raise (`PullbackError.request_id`). Without it each call makes an id of its own.

    Raises ValueError for what has not 1 to 128 printable ASCII characters.
    """
    if not 0 < len(id) <= _LONGEST or not all(" " <= letter <= "~" for letter in id):
        raise ValueError(f"a request id has 1 to {_LONGEST} printable ASCII characters, not {id[:200]!r}")
    token = _id.set(id)
    try:
        yield id
    finally:
        _id.reset(token)


def accompany(metadata: Metadata, timed: bool = False) -> tuple[str, Metadata]:
    """The id of a call that begins now, and all the metadata that it is sent with. metadata: of each call."""
    id = _id.get()
    if id is None:
        for key, value in metadata:
            if key == REQUEST_ID_KEY:
                return str(value), (*metadata, *_trace(), _TIMED) if timed else (*metadata, *_trace())
        id = os.urandom(8).hex()
    else:
        metadata = tuple(pair for pair in metadata if pair[0] != REQUEST_ID_KEY)
    if timed:
        return id, (*metadata, (REQUEST_ID_KEY, id), *_trace(), _TIMED)
    return id, (*metadata, (REQUEST_ID_KEY, id), *_trace())


def _trace() -> Metadata:
    """The W3C context of the span that is active, where the program has loaded OpenTelemetry; we do not."""
    trace = sys.modules.get("opentelemetry.trace")
    current: Any = getattr(trace, "get_current_span", None)
    if current is None:
        return ()
    context = current().get_span_context()
    if not context.is_valid:
        return ()
    parent = ("traceparent", f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}")
    state = context.trace_state.to_header() if context.trace_state else ""
    return (parent, ("tracestate", state)) if state else (parent,)


def read_timings(
    trailers: Iterable[tuple[str, str | bytes]] | None, call: str, request_id: str, round_trip: float
) -> CallTimings | None:
    """What a server told of a call; None where it did not, or not so that it can be read."""
    for key, value in trailers or ():
        if key == TIMINGS_KEY:
            try:
                told = json.loads(value)
                return CallTimings(
                    call=call,
                    request_id=request_id,
                    round_trip=round_trip,
                    seconds=float(told["seconds"]),
                    stages={str(stage): float(spent) for stage, spent in told["stages"].items()},
                    worker=str(told.get("worker", "")),
                    batch_rows=int(told.get("batch_rows", 0)),
                    device_memory_bytes=int(told.get("device_memory_bytes", 0)),
                )
            except (ValueError, KeyError, TypeError, AttributeError):
                return None
    return None
