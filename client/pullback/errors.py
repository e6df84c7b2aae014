"""Everything a call can raise: one class for each cause, each also of the Python type that a user would catch.

    PullbackError
      InvalidArgument (ValueError)       MalformedRequest BadTensor BadName BadCotangent ValueOutOfRange BadOption
                                         MissingCotangent (RuntimeError too, as in torch) ResultTooLarge
                                         ComplexUnsupported BadHandle BadOperand (RuntimeError too, as in torch)
                                         BadUpload
      NotFound (LookupError)             ModelNotFound VersionNotFound LossNotFound OperationNotFound
      FailedPrecondition (RuntimeError)  NotDifferentiable UnusedInput GraphFreed OrderUnavailable UnsupportedByModel
                                         ModifiedInPlace NotOnSessionWorker DependencyFailed Quarantined
                                         LoadFailed NotInRepository
      AlreadyExists (FileExistsError)    VersionExists
      ResourceExhausted (RuntimeError)   Overloaded OutOfMemory (MemoryError too) SessionBudgetExceeded MessageTooLarge
                                         StorageFull (OSError too)
      InternalError (RuntimeError)       ModelError ProtocolError
      Unavailable (ConnectionError)      NotReady WorkerLost
      Aborted (RuntimeError)             SessionLost LoadConflict
      DeadlineExceeded (TimeoutError)    HardTimeout
      PermissionDenied (PermissionError) AdminDisabled
      Unauthenticated (PermissionError)
      Unimplemented (NotImplementedError)
      Cancelled (RuntimeError)           ClientClosed

A code that none of these has arrives as a plain PullbackError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from pullback_wire import Code, Reason


class Violation(NamedTuple):
    """One fault of a request: the path of the field ("inputs[0].shape") and what is wrong with it."""

    field: str
    description: str


class PullbackError(Exception):
    """A call failed.

    code: gRPC's status code, as a number (`pullback_wire.Code` names those in use).
    reason: the cause as the server names it ("BAD_TENSOR"); empty when no Pullback server named one.
    message: one sentence, which is str(error) too.
    violations: the request fields at fault.
    retry_after: seconds after which the server would like to be asked again; None: it did not say.
    request_id: what the server's log calls the call; also a note, which tracebacks show. Empty where none was made.
    """

    #: The code and the cause of errors that the client itself makes.
    default_code: ClassVar[int] = 2
    cause: ClassVar[Reason | None] = None

    def __init__(
        self,
        message: str,
        *,
        code: int | None = None,
        reason: str | None = None,
        violations: Sequence[Violation] = (),
        retry_after: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = self.default_code if code is None else code
        self.reason = (self.cause.value if self.cause else "") if reason is None else reason
        self.violations = tuple(violations)
        self.retry_after = retry_after
        self.request_id = request_id
        if request_id:
            self.add_note(f"request id: {request_id}")

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # By keywords, which BaseException's own pickling would lose.
        state = (self.message, self.code, self.reason, self.violations, self.retry_after, self.request_id)
        return (_rebuild, (type(self), *state))


def _rebuild(
    kind: type[PullbackError],
    message: str,
    code: int,
    reason: str,
    violations: Sequence[Violation],
    retry_after: float | None,
    request_id: str,
) -> PullbackError:
    return kind(
        message, code=code, reason=reason, violations=violations, retry_after=retry_after, request_id=request_id
    )


# ---- one class for each status code


class InvalidArgument(PullbackError, ValueError):
    """The request is wrong, whatever state the server is in."""

    default_code = Code.INVALID_ARGUMENT


class NotFound(PullbackError, LookupError):
    """There is nothing of that name."""

    default_code = Code.NOT_FOUND


class FailedPrecondition(PullbackError, RuntimeError):
    """The request is well formed, but cannot be done with this model or in this state."""

    default_code = Code.FAILED_PRECONDITION


class AlreadyExists(PullbackError, FileExistsError):
    """There is something of that name already."""

    default_code = Code.ALREADY_EXISTS


class ResourceExhausted(PullbackError, RuntimeError):
    """Something does not suffice: memory, queue, quota."""

    default_code = Code.RESOURCE_EXHAUSTED


class InternalError(PullbackError, RuntimeError):
    """A fault that is not the caller's."""

    default_code = Code.INTERNAL
    cause: ClassVar[Reason | None] = Reason.INTERNAL


class Unavailable(PullbackError, ConnectionError):
    """No server could be reached, or the connection broke."""

    default_code = Code.UNAVAILABLE


class Aborted(PullbackError, RuntimeError):
    """The work was ended half-way."""

    default_code = Code.ABORTED


class DeadlineExceeded(PullbackError, TimeoutError):
    """No answer came in time."""

    default_code = Code.DEADLINE_EXCEEDED
    cause = Reason.DEADLINE_EXCEEDED


class PermissionDenied(PullbackError, PermissionError):
    """The caller may not do this: its credentials do not give the right to."""

    default_code = Code.PERMISSION_DENIED
    cause: ClassVar[Reason | None] = Reason.PERMISSION_DENIED


class Unauthenticated(PullbackError, PermissionError):
    """The server does not know who is calling: `connect` was given no token, or one that is unknown or expired."""

    default_code = Code.UNAUTHENTICATED
    cause = Reason.UNAUTHENTICATED


class Unimplemented(PullbackError, NotImplementedError):
    """The server has no such call; is it a Pullback server, and as new as this client?"""

    default_code = Code.UNIMPLEMENTED


class Cancelled(PullbackError, RuntimeError):
    """The call was cancelled, e.g. because its client was closed meanwhile."""

    default_code = Code.CANCELLED


# ---- one class for each cause


class MalformedRequest(InvalidArgument):
    """The bytes of a message are not the message they should be."""

    cause = Reason.MALFORMED_REQUEST


class BadTensor(InvalidArgument):
    """A tensor's dtype, shape or byte count is wrong."""

    cause = Reason.BAD_TENSOR


class BadName(InvalidArgument):
    """An input, parameter, target, output or wrt is missing, unknown or named twice."""

    cause = Reason.BAD_NAME


class BadCotangent(InvalidArgument):
    """A cotangent or tangent has another shape or dtype than what it belongs to."""

    cause = Reason.BAD_COTANGENT


class MissingCotangent(InvalidArgument, RuntimeError):
    """No cotangent was given, and the output is not one real scalar."""

    cause = Reason.MISSING_COTANGENT


class ValueOutOfRange(InvalidArgument):
    """A value lies outside its declared range, e.g. a class index outside the classes."""

    cause = Reason.VALUE_OUT_OF_RANGE


class BadOption(InvalidArgument):
    """An option has a value it cannot have, or cannot be combined with another."""

    cause = Reason.BAD_OPTION


class ResultTooLarge(InvalidArgument):
    """The result would exceed the server's limit."""

    cause = Reason.RESULT_TOO_LARGE


class ComplexUnsupported(InvalidArgument):
    """Dense derivatives of complex tensors are not defined here; use vjp or jvp, or real views."""

    cause = Reason.COMPLEX_UNSUPPORTED


class BadHandle(InvalidArgument):
    """A tensor is not known to its session, or its number is taken."""

    cause = Reason.BAD_HANDLE


class BadOperand(InvalidArgument, RuntimeError):
    """Operands do not go together, or not with the operation."""

    cause = Reason.BAD_OPERAND


class ModelNotFound(NotFound):
    """No model of this name is hosted."""

    cause = Reason.MODEL_NOT_FOUND


class VersionNotFound(NotFound):
    """The model has no such version."""

    cause = Reason.VERSION_NOT_FOUND


class LossNotFound(NotFound):
    """No loss of this name."""

    cause = Reason.LOSS_NOT_FOUND


class OperationNotFound(NotFound):
    """No tensor operation of this name."""

    cause = Reason.OPERATION_NOT_FOUND


class NotDifferentiable(FailedPrecondition):
    """The output needs no grad, or what it should be differentiated by is not floating-point."""

    cause = Reason.NOT_DIFFERENTIABLE


class UnusedInput(FailedPrecondition):
    """The outputs do not depend on something named in wrt; allow_unused=True gives None for it."""

    cause = Reason.UNUSED_INPUT


class GraphFreed(FailedPrecondition):
    """The graph was freed by an earlier backward; retain_graph=True keeps it."""

    cause = Reason.GRAPH_FREED


class OrderUnavailable(FailedPrecondition):
    """A derivative of this order cannot be promised to be right."""

    cause = Reason.ORDER_UNAVAILABLE


class UnsupportedByModel(FailedPrecondition):
    """This kind of model cannot do what the call asks for."""

    cause = Reason.UNSUPPORTED_BY_MODEL


class ModifiedInPlace(FailedPrecondition):
    """A tensor that the backward needs was changed in place after the forward."""

    cause = Reason.MODIFIED_IN_PLACE


class NonFinite(FailedPrecondition, ArithmeticError):
    """An operation made NaN or infinity of finite numbers, and detect_anomaly asked to be told."""

    cause = Reason.NON_FINITE


class NotOnSessionWorker(FailedPrecondition):
    """The session's worker does not hold this model."""

    cause = Reason.NOT_ON_SESSION_WORKER


class DependencyFailed(FailedPrecondition):
    """What this depends on failed earlier."""

    cause = Reason.DEPENDENCY_FAILED


class Overloaded(ResourceExhausted):
    """Too much is waiting or in flight on the server."""

    cause = Reason.OVERLOADED


class QuotaExceeded(ResourceExhausted):
    """The caller has spent a quota of its own; retry_after tells when there will be some of it again."""

    cause = Reason.QUOTA_EXCEEDED


class OutOfMemory(ResourceExhausted, MemoryError):
    """The device's memory does not suffice."""

    cause = Reason.OUT_OF_MEMORY


class SessionBudgetExceeded(ResourceExhausted):
    """The session's byte budget is spent."""

    cause = Reason.SESSION_BUDGET


class MessageTooLarge(ResourceExhausted):
    """A request or an answer is larger than a limit of the client or of the server; the message says which."""


class ModelError(InternalError):
    """The model's own code raised, or returned what is no tensor."""

    cause = Reason.MODEL_ERROR


class ProtocolError(InternalError):
    """The server's answer contradicts itself or the contract."""

    cause = None


class NotReady(Unavailable):
    """The server, or the model, is loading or going away."""

    cause = Reason.NOT_READY


class WorkerLost(Unavailable):
    """The worker died under the call, and again when it was retried."""

    cause = Reason.WORKER_LOST


class HardTimeout(DeadlineExceeded):
    """The call computed for longer than the model's hard limit; its worker was ended."""

    cause = Reason.HARD_TIMEOUT


class Quarantined(FailedPrecondition):
    """Calls like this one have killed workers; it is not tried again for a while."""

    cause = Reason.QUARANTINED


class SessionLost(Aborted):
    """The worker died under the session."""

    cause = Reason.SESSION_LOST


class AdminDisabled(PermissionDenied):
    """This administrative call is not enabled."""

    cause = Reason.ADMIN_DISABLED


class LoadFailed(FailedPrecondition):
    """The version cannot be loaded, for the reason in the message; what served before goes on serving."""

    cause = Reason.LOAD_FAILED


class LoadConflict(Aborted):
    """Another load, unload or upload of the same model is under way."""

    cause = Reason.LOAD_CONFLICT


class NotInRepository(FailedPrecondition):
    """The model comes from what the server was started with, which can neither be loaded anew nor unloaded."""

    cause = Reason.NOT_IN_REPOSITORY


class BadUpload(InvalidArgument):
    """What was uploaded is not what was announced, no safetensors file, or too large."""

    cause = Reason.BAD_UPLOAD


class VersionExists(AlreadyExists):
    """The version that was to be uploaded is there already."""

    cause = Reason.VERSION_EXISTS


class StorageFull(ResourceExhausted, OSError):
    """The server's disk has no room for an upload."""

    cause = Reason.STORAGE_FULL


class ClientClosed(Cancelled):
    """The client was closed before the call."""


#: The class for each cause that a server names.
BY_REASON: dict[str, type[PullbackError]] = {
    cause.value: kind
    for kind in list(globals().values())
    if isinstance(kind, type) and issubclass(kind, PullbackError) and (cause := vars(kind).get("cause"))
}

#: The class for each status code that comes without a known cause.
BY_CODE: dict[int, type[PullbackError]] = {
    kind.default_code: kind
    for kind in (
        InvalidArgument,
        NotFound,
        FailedPrecondition,
        AlreadyExists,
        ResourceExhausted,
        InternalError,
        Unavailable,
        Aborted,
        DeadlineExceeded,
        PermissionDenied,
        Unauthenticated,
        Unimplemented,
        Cancelled,
    )
}
