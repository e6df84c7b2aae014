"""Whose a call is, and how urgent: from its metadata and its connection."""

from __future__ import annotations

import grpc

from pullback_server.faults import Fault
from pullback_server.scheduling import Origin
from pullback_wire import CALLER_KEY, PRIORITY_KEY, Reason

#: A caller's name is a label among thousands, not a document.
_LONGEST = 128
_URGENT = {"high": True, "normal": False}


def origin_of(context: grpc.aio.ServicerContext) -> Origin:
    """The caller that the metadata name, else the connection.

    Raises Fault (BAD_OPTION) for a priority that is none, and for a name that is too long.
    """
    caller = ""
    urgent = False
    for key, value in context.invocation_metadata() or ():
        if key == CALLER_KEY:
            caller = str(value)
            if len(caller) > _LONGEST:
                raise Fault(
                    Reason.BAD_OPTION,
                    f"metadata {CALLER_KEY} has {len(caller)} characters, at most {_LONGEST} are allowed",
                    CALLER_KEY,
                )
        elif key == PRIORITY_KEY:
            if value not in _URGENT:
                raise Fault(
                    Reason.BAD_OPTION, f"metadata {PRIORITY_KEY} is {value!r}, expected high or normal", PRIORITY_KEY
                )
            urgent = _URGENT[str(value)]
    return Origin(caller or context.peer(), urgent)
