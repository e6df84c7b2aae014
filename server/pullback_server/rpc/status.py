"""Faults as gRPC statuses with google.rpc details."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import grpc
from google.protobuf.any_pb2 import Any
from google.rpc import error_details_pb2, status_pb2

from pullback_server.faults import Fault
from pullback_wire import ERROR_DOMAIN, Reason, WireError
from pullback_wire.v1 import session_service_pb2

logger = logging.getLogger(__name__)

#: Metadata key of the serialised google.rpc.Status, by gRPC's convention.
DETAILS_KEY = "grpc-status-details-bin"
#: What a message may cost as gRPC sends it, from its beginning and from its end. It travels percent-encoded and, in the
#: details, up to twice in base64; from 8 KiB of trailers on, peers drop them at random.
_BEGINNING, _END = 1100, 300

_CODES = {code.value[0]: code for code in grpc.StatusCode}


def grpc_code(reason: Reason) -> grpc.StatusCode:
    """The gRPC status code of a cause."""
    return _CODES[int(reason.code)]


def _cost(character: str) -> int:
    """Bytes of a character after percent-encoding."""
    return 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode("utf-8", "replace"))


def _affordable(characters: Iterable[str], budget: int) -> str:
    """The longest prefix within a budget."""
    taken = []
    for character in characters:
        budget -= _cost(character)
        if budget < 0:
            break
        taken.append(character)
    return "".join(taken)


def clip(text: str) -> str:
    """Shortens a message to what a trailer can carry, keeping its beginning and its end."""
    beginning = _affordable(text, _BEGINNING + _END)
    if len(beginning) == len(text):
        return text
    beginning = _affordable(text, _BEGINNING)
    return f"{beginning} ... {_affordable(reversed(text), _END)[::-1]}"


def details(fault: Fault, request_id: str = "") -> bytes:
    """A serialised google.rpc.Status: ErrorInfo always, BadRequest for a named field, RetryInfo for a retry time."""
    message = clip(fault.message)
    whole = status_pb2.Status(
        code=int(fault.reason.code), message=message, details=_details(fault, message, request_id)
    )
    return bytes(whole.SerializeToString())


def op_status(fault: Fault, request_id: str = "") -> session_service_pb2.OpStatus:
    """The same, for an op of a session."""
    message = clip(fault.message)
    return session_service_pb2.OpStatus(
        code=int(fault.reason.code), message=message, details=_details(fault, message, request_id)
    )


def _details(fault: Fault, message: str, request_id: str) -> list[Any]:
    packed: list[Any] = []

    def pack(detail: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo) -> None:
        holder = Any()
        holder.Pack(detail)
        packed.append(holder)

    info = error_details_pb2.ErrorInfo(reason=fault.reason.value, domain=ERROR_DOMAIN)
    if request_id:
        info.metadata["request_id"] = request_id
    pack(info)
    if fault.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_affordable(fault.field, 200), description=message
        )
        pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if fault.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(fault.retry_after * 1000))
        pack(retry)
    return packed


def fault_of(error: Exception, what: str) -> Fault:
    """What a caller is told of an exception; of one that nobody foresaw the log has the details. what: failed."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, WireError):
        return as_fault(error)
    logger.error("%s failed inside the server", what, exc_info=error)
    return Fault(Reason.INTERNAL, f"the server failed ({type(error).__name__}); its log has the details")


def as_fault(error: WireError) -> Fault:
    """A codec error as a fault: about a tensor when it names a field, else about the whole message."""
    return Fault(Reason.BAD_TENSOR if error.field else Reason.MALFORMED_REQUEST, str(error), error.field)
