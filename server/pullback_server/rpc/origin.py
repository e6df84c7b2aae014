"""Whose a call is, and how urgent: from its metadata and its connection."""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from pullback_server.faults import Fault
from pullback_server.rpc.security import caller
from pullback_server.scheduling import Origin
from pullback_wire import CALLER_KEY, PRIORITY_KEY, Reason

#: A call's metadata; of a key that comes twice, the last.
Told = Mapping[str, str | bytes]
#: A caller's name is a label among thousands, not a document.
_LONGEST = 128
_URGENT: dict[str | bytes, bool] = {"high": True, "normal": False}


def told(context: grpc.aio.ServicerContext) -> dict[str, str | bytes]:
    """The metadata of a call, which gRPC makes anew each time it is asked."""
    return dict(context.invocation_metadata() or ())


def origin_of(context: grpc.aio.ServicerContext, told: Told) -> Origin:
    """The principal; where there are none, the caller that the metadata name, else the connection.

    Raises Fault (BAD_OPTION) for a priority that is none, and for a name that is too long.
    """
    name = str(told.get(CALLER_KEY, ""))
    if len(name) > _LONGEST:
        raise Fault(
            Reason.BAD_OPTION,
            f"metadata {CALLER_KEY} has {len(name)} characters, at most {_LONGEST} are allowed",
            CALLER_KEY,
        )
    priority = told.get(PRIORITY_KEY, "normal")
    if priority not in _URGENT:
        raise Fault(
            Reason.BAD_OPTION, f"metadata {PRIORITY_KEY} is {priority!r}, expected high or normal", PRIORITY_KEY
        )
    return Origin(caller().counted_as(name, context.peer()), _URGENT[priority])
