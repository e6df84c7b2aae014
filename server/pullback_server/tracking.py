"""Which request is being worked on, for every floor: its id for the logs, and its place in a trace.

Knows no library for tracing; where there are spans, `telemetry.tracing` makes them.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Protocol

#: Ids of a batch's members that are told; of more, how many.
_TOLD = 8
#: W3C Trace Context, version 00 and those that only add to it.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")

Attributes = Mapping[str, str | int | float | bool]


class Span(Protocol):
    """A recorded span. Times are on the time.monotonic clock."""

    @property
    def traceparent(self) -> str:
        """Its W3C context, for what is done on its behalf elsewhere."""

    def stage(self, name: str, begin: float, end: float, attributes: Attributes | None = None) -> Span:
        """A child that has ended."""

    def batch(self, members: Sequence[Span], attributes: Attributes) -> Span:
        """What is computed for several at once, of which this is one: a child of this one that links to them all."""

    def link(self, other: Span) -> None:
        """Links this one to another."""

    def end(self, code: str = "OK", reason: str = "", attributes: Attributes | None = None) -> None:
        """Ends it, once. code: gRPC's status code by name; reason: of a failure."""


class Request:
    """A call, or an op of a session, as logs and traces know it.

    traceparent: of its span, else what its caller sent, else empty. span: None where nothing is recorded.
    members: the requests that are computed together, where this is a batch.
    ops: of a session: makes the span of an op, and its W3C context, given the op's kind and id. count: ops so far.
    """

    __slots__ = ("count", "id", "members", "ops", "span", "traceparent")

    def __init__(
        self, id: str, traceparent: str = "", span: Span | None = None, members: Sequence[Request | None] = ()
    ) -> None:
        self.id = id
        self.traceparent = traceparent
        self.span = span
        self.members = members
        self.ops: Callable[[str, str], tuple[Span | None, str]] | None = None
        self.count = 0

    def op(self, number: int, kind: str) -> Request:
        """An op of a session, which this is."""
        self.count += 1
        id = f"{self.id}/{number}"
        span, traceparent = (None, self.traceparent) if self.ops is None else self.ops(kind, id)
        return Request(id, traceparent, span)

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits; empty where there is no trace."""
        return self.traceparent[3:35]

    @property
    def recorded_trace(self) -> str:
        """The same, where the trace is recorded: for an exemplar."""
        return "" if self.span is None else self.trace_id

    def member(self, index: int) -> Request | None:
        """One of a batch's requests; of what is none, itself."""
        return self.members[index] if index < len(self.members) else self


_current: ContextVar[Request | None] = ContextVar("pullback_request", default=None)

#: The request at hand, if there is one; and sets it, for the rest of the present task.
current = _current.get
begin = _current.set


class as_of:
    """`with as_of(request):` what is done and logged inside is done for that request."""

    __slots__ = ("_request", "_token")

    def __init__(self, request: Request | None) -> None:
        self._request = request

    def __enter__(self) -> None:
        self._token: Token[Request | None] = _current.set(self._request)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.reset(self._token)


def new_id() -> str:
    """An id for a request that came without one: 16 hexadecimal digits."""
    return secrets.token_hex(8)


def is_traceparent(text: str) -> bool:
    """Whether it is a W3C trace context that can be gone on from."""
    return _TRACEPARENT.fullmatch(text) is not None and (len(text) == 55 or not text.startswith("00"))


def together(members: Sequence[Request | None], attributes: Attributes) -> Request | None:
    """What the computation for several requests at once is known as; None where none of them has a name."""
    named = [member for member in members if member is not None]
    if not named:
        return None
    ids = ",".join(member.id for member in named[:_TOLD])
    if len(named) > _TOLD:
        ids += f",and {len(named) - _TOLD} more"
    spans = [member.span for member in named if member.span is not None]
    if not spans:
        return Request(ids, members=members)
    span = spans[0].batch(spans, attributes)
    return Request(ids, span.traceparent, span, members)


def computed(span: Span, timings: Mapping[str, float], worker: str) -> None:
    """Tells a span what a worker did for it. timings: see `fleet.seam.Reply`."""
    began, seconds = timings["began"], timings["compute"]
    compute = span.stage("compute", began, began + seconds, {"pullback.worker": worker})
    # A worker tells how long each took in all; where there are several rounds of both, they stand as one of each.
    for stage in ("forward", "backward"):
        if (spent := timings.get(stage, 0.0)) > 0:
            compute.stage(stage, began, began + spent, {"pullback.worker": worker})
            began += spent
