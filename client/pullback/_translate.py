"""gRPC statuses as Pullback's exceptions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pullback import errors
from pullback_wire import ERROR_DOMAIN

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any as AnyMessage

#: Metadata key of the serialised google.rpc.Status, by gRPC's convention.
_DETAILS_KEY = "grpc-status-details-bin"
#: How gRPC itself refuses a message: "SERVER: Received message larger than max (5000 vs. 1000)".
_TOO_LARGE = re.compile(r"(CLIENT|SERVER): (Received|Sent) message larger than max \((\d+) vs\. (\d+)\)")
#: The same from versions that do not say who speaks.
_TOO_LARGE_SOMEWHERE = "message larger than max"
#: How gRPC refuses metadata.
_METADATA_TOO_LARGE = "received metadata size exceeds"
#: How gRPC itself begins to say that it found no server to send a call to.
_NO_CONNECTION = ("failed to connect to all addresses", "errors resolving ", "DNS resolution failed")


def from_rpc_error(
    error: Any, what: str, target: str, timeout: float | None, request_id: str = ""
) -> errors.PullbackError:
    """The exception for a `grpc.RpcError`.

    what: the call, as the user knows it ("model 'square': vjp"); target: where it went; timeout: what it was given.
    request_id: what it was sent with.
    """
    code = int(error.code().value[0])
    message = error.details() or ""
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            translated = _from_details(code, message, value, request_id)
            if translated is not None:
                return translated
    if code == errors.ResourceExhausted.default_code and _TOO_LARGE_SOMEWHERE in message:
        return errors.MessageTooLarge(f"{what}: {_too_large(message)}", request_id=request_id)
    if code == errors.ResourceExhausted.default_code and _METADATA_TOO_LARGE in message:
        message = f"the metadata are more than {target} takes (pullback-server serve --max-metadata-bytes): {message}"
    elif code == errors.DeadlineExceeded.default_code:
        given = "in time" if timeout is None else f"within {timeout:g} s"
        message = f"no answer from {target} {given}; timeout= sets how long a call may take"
    elif code == errors.Unavailable.default_code:
        message = f"{target} cannot be reached (is a pullback-server serving there?): {message}"
    elif code == errors.Cancelled.default_code:
        message = f"{target} ended the call without an answer, as a server does that shuts down: {message}"
    elif code == errors.Unimplemented.default_code:
        message = f"{target} does not offer this call ({message}): is it a Pullback server, and as new as this client?"
    return _make(code, "", f"{what}: {message or error.code().name}", request_id=request_id)


def never_connected(error: errors.PullbackError) -> bool:
    """Whether a call failed before anything of it was sent. False where that is not known."""
    if not isinstance(error, errors.Unavailable) or error.reason:
        return False
    details = getattr(error.__cause__, "details", None)
    return details is not None and (details() or "").startswith(_NO_CONNECTION)


def from_status(code: int, message: str, details: Iterable[AnyMessage], request_id: str = "") -> errors.PullbackError:
    """The exception for the parts of a google.rpc.Status; what is in `details` and unknown is passed over.

    request_id: where the details tell none.
    """
    from google.rpc import error_details_pb2

    reason = ""
    violations: list[errors.Violation] = []
    retry_after: float | None = None
    for detail in details:
        info = error_details_pb2.ErrorInfo()
        request = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
            # A proxy's own ErrorInfo names causes of its own.
            if info.domain == ERROR_DOMAIN:
                reason, request_id = info.reason, info.metadata.get("request_id", request_id)
        elif detail.Is(request.DESCRIPTOR):
            detail.Unpack(request)
            violations += [errors.Violation(one.field, one.description) for one in request.field_violations]
        elif detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
            retry_after = max(retry.retry_delay.ToTimedelta().total_seconds(), 0.0)
    return _make(code, reason, message, violations, retry_after, request_id)


def _from_details(code: int, message: str, data: bytes | str, request_id: str) -> errors.PullbackError | None:
    from google.protobuf.message import DecodeError
    from google.rpc import status_pb2

    try:
        status = status_pb2.Status.FromString(data if isinstance(data, bytes) else data.encode("latin-1"))
        if status.code != code:
            # Not about this status: the call's own code is what gRPC acted on.
            return None
        return from_status(code, status.message or message, status.details, request_id)
    except DecodeError:
        return None


def _make(
    code: int,
    reason: str,
    message: str,
    violations: Iterable[errors.Violation] = (),
    retry_after: float | None = None,
    request_id: str = "",
) -> errors.PullbackError:
    kind = errors.BY_REASON.get(reason) or errors.BY_CODE.get(code, errors.PullbackError)
    return kind(
        message,
        code=code,
        reason=reason,
        violations=tuple(violations),
        retry_after=retry_after,
        request_id=request_id,
    )


def _too_large(message: str) -> str:
    found = _TOO_LARGE.search(message)
    if found is None:
        return f"{message}; see max_message_bytes of pullback.connect and --max-message-bytes of the server"
    side, direction, size, limit = found.groups()
    what = "request" if (side == "SERVER") == (direction == "Received") else "answer"
    setting = (
        "the server's limit (pullback-server serve --max-message-bytes)"
        if side == "SERVER"
        else "this client's limit (max_message_bytes of pullback.connect)"
    )
    return f"the {what} has {int(size):,} bytes, {setting} is {int(limit):,}"
