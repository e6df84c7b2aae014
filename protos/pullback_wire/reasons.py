"""Every cause of failure: its ErrorInfo.reason and its one gRPC status code."""

from __future__ import annotations

import enum

#: ErrorInfo.domain of every error that Pullback itself reports.
ERROR_DOMAIN = "pullback.v1"


class Code(enum.IntEnum):
    """gRPC's status codes (google.rpc.Code), so that neither grpc nor google.rpc is needed to name one."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class Reason(enum.Enum):
    """ErrorInfo.reason and status code of each cause; the docstring of a member says when it is used."""

    code: Code

    def __new__(cls, reason: str, code: Code) -> Reason:
        member = object.__new__(cls)
        member._value_ = reason
        member.code = code
        return member

    #: The bytes are not the message they should be.
    MALFORMED_REQUEST = "MALFORMED_REQUEST", Code.INVALID_ARGUMENT
    #: dtype, shape, byte count or payload index is wrong.
    BAD_TENSOR = "BAD_TENSOR", Code.INVALID_ARGUMENT
    #: An input, parameter, target, output or wrt is missing, unknown or named twice.
    BAD_NAME = "BAD_NAME", Code.INVALID_ARGUMENT
    #: A cotangent or tangent has another shape or dtype than what it belongs to.
    BAD_COTANGENT = "BAD_COTANGENT", Code.INVALID_ARGUMENT
    #: No cotangent, and the output is not one real scalar.
    MISSING_COTANGENT = "MISSING_COTANGENT", Code.INVALID_ARGUMENT
    #: An integer lies outside its declared range, or a class index outside the classes.
    VALUE_OUT_OF_RANGE = "VALUE_OUT_OF_RANGE", Code.INVALID_ARGUMENT
    #: An option has a value it cannot have, or cannot be combined with another.
    BAD_OPTION = "BAD_OPTION", Code.INVALID_ARGUMENT
    #: The result, or the number of cotangents, would exceed the limit.
    RESULT_TOO_LARGE = "RESULT_TOO_LARGE", Code.INVALID_ARGUMENT
    #: Dense derivatives of complex tensors are not defined here.
    COMPLEX_UNSUPPORTED = "COMPLEX_UNSUPPORTED", Code.INVALID_ARGUMENT
    #: No model of this name.
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND", Code.NOT_FOUND
    #: The model has no such version.
    VERSION_NOT_FOUND = "VERSION_NOT_FOUND", Code.NOT_FOUND
    #: No loss of this name.
    LOSS_NOT_FOUND = "LOSS_NOT_FOUND", Code.NOT_FOUND
    #: The output needs no grad, or what it should be differentiated by is not floating-point.
    NOT_DIFFERENTIABLE = "NOT_DIFFERENTIABLE", Code.FAILED_PRECONDITION
    #: The outputs do not depend on a named wrt, and allow_unused is false.
    UNUSED_INPUT = "UNUSED_INPUT", Code.FAILED_PRECONDITION
    #: The graph was freed by an earlier backward.
    GRAPH_FREED = "GRAPH_FREED", Code.FAILED_PRECONDITION
    #: A derivative of this order cannot be promised to be right.
    ORDER_UNAVAILABLE = "ORDER_UNAVAILABLE", Code.FAILED_PRECONDITION
    #: What the call asks for, this kind of model cannot do.
    UNSUPPORTED_BY_MODEL = "UNSUPPORTED_BY_MODEL", Code.FAILED_PRECONDITION
    #: A tensor that a backward needs was changed in place after the forward.
    MODIFIED_IN_PLACE = "MODIFIED_IN_PLACE", Code.FAILED_PRECONDITION
    #: An operation made NaN or infinity of finite numbers, and the call asked to be told.
    NON_FINITE = "NON_FINITE", Code.FAILED_PRECONDITION
    #: A handle is not known to the session, or is in use already.
    BAD_HANDLE = "BAD_HANDLE", Code.INVALID_ARGUMENT
    #: Operands do not go together, or not with the tensor operation.
    BAD_OPERAND = "BAD_OPERAND", Code.INVALID_ARGUMENT
    #: No tensor operation of this name.
    OPERATION_NOT_FOUND = "OPERATION_NOT_FOUND", Code.NOT_FOUND
    #: The session's worker does not hold this model.
    NOT_ON_SESSION_WORKER = "NOT_ON_SESSION_WORKER", Code.FAILED_PRECONDITION
    #: An op depends on a handle that an earlier failed op should have made.
    DEPENDENCY_FAILED = "DEPENDENCY_FAILED", Code.FAILED_PRECONDITION
    #: Too much is waiting or in flight; comes with RetryInfo.
    OVERLOADED = "OVERLOADED", Code.RESOURCE_EXHAUSTED
    #: The principal has spent a quota of its own; comes with RetryInfo where waiting helps.
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED", Code.RESOURCE_EXHAUSTED
    #: The device's memory does not suffice.
    OUT_OF_MEMORY = "OUT_OF_MEMORY", Code.RESOURCE_EXHAUSTED
    #: The session's byte budget is spent.
    SESSION_BUDGET = "SESSION_BUDGET", Code.RESOURCE_EXHAUSTED
    #: The model's own code raised, or returned what is no tensor.
    MODEL_ERROR = "MODEL_ERROR", Code.INTERNAL
    #: A fault of the server's own.
    INTERNAL = "INTERNAL", Code.INTERNAL
    #: The worker died under the call, and again when it was retried.
    WORKER_LOST = "WORKER_LOST", Code.UNAVAILABLE
    #: The call computed for longer than the model's hard limit; its worker was ended.
    HARD_TIMEOUT = "HARD_TIMEOUT", Code.DEADLINE_EXCEEDED
    #: Calls like this one have killed workers; it is not tried again for a while.
    QUARANTINED = "QUARANTINED", Code.FAILED_PRECONDITION
    #: Loading or draining; comes with RetryInfo.
    NOT_READY = "NOT_READY", Code.UNAVAILABLE
    #: The worker died under the session.
    SESSION_LOST = "SESSION_LOST", Code.ABORTED
    #: The call's time ran out before it was computed.
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED", Code.DEADLINE_EXCEEDED
    #: This administrative call is not enabled.
    ADMIN_DISABLED = "ADMIN_DISABLED", Code.PERMISSION_DENIED
    #: No credentials, or such as are not known, not valid any more, or not for this server.
    UNAUTHENTICATED = "UNAUTHENTICATED", Code.UNAUTHENTICATED
    #: The principal has not the right to make this call.
    PERMISSION_DENIED = "PERMISSION_DENIED", Code.PERMISSION_DENIED
    #: The version cannot be loaded; what served before goes on serving.
    LOAD_FAILED = "LOAD_FAILED", Code.FAILED_PRECONDITION
    #: Another load, unload or upload of the same model is under way.
    LOAD_CONFLICT = "LOAD_CONFLICT", Code.ABORTED
    #: The model comes from what the server was started with, which cannot be loaded anew or unloaded.
    NOT_IN_REPOSITORY = "NOT_IN_REPOSITORY", Code.FAILED_PRECONDITION
    #: An upload is not what its header says, no safetensors file, or too large.
    BAD_UPLOAD = "BAD_UPLOAD", Code.INVALID_ARGUMENT
    #: The version of an upload is there already.
    VERSION_EXISTS = "VERSION_EXISTS", Code.ALREADY_EXISTS
    #: The server's disk has no room for it.
    STORAGE_FULL = "STORAGE_FULL", Code.RESOURCE_EXHAUSTED
