"""The id of a call: its caller's, else one of ours. It goes back with every answer, whatever that says."""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from pullback_server import tracking
from pullback_server.faults import Fault
from pullback_server.rpc import status
from pullback_wire import REQUEST_ID_KEY, Reason

#: Characters of an id.
_LONGEST = 128


def id_of(told: Mapping[str, str | bytes]) -> tuple[str, Fault | None]:
    """The id in a call's metadata, or a new one; and what is wrong with that which came."""
    id = told.get(REQUEST_ID_KEY)
    if id is None:
        return tracking.new_id(), None
    if isinstance(id, str) and 0 < len(id) <= _LONGEST and id.isascii() and id.isprintable():
        return id, None
    return tracking.new_id(), Fault(
        Reason.BAD_OPTION,
        f"metadata {REQUEST_ID_KEY} has {len(id)} characters, expected 1 to {_LONGEST} printable ASCII characters",
        REQUEST_ID_KEY,
    )


async def abort(context: grpc.aio.ServicerContext, fault: Fault, request_id: str) -> None:
    """Answers with a fault. Raises what gRPC raises for that."""
    await context.abort(
        status.grpc_code(fault.reason),
        status.clip(fault.message),
        ((status.DETAILS_KEY, status.details(fault, request_id)), (REQUEST_ID_KEY, request_id)),
    )


async def refuse(context: grpc.aio.ServicerContext, fault: Fault) -> None:
    """As `abort`, for a call that is turned away before anything is done for it."""
    request = tracking.current()
    id = id_of(dict(context.invocation_metadata() or ()))[0] if request is None else request.id
    await abort(context, fault, id)
