"""What every call goes through first: who makes it, and whether that one may make such calls at all."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NoReturn

import grpc

from pullback_server.faults import Fault
from pullback_server.rpc import status
from pullback_server.rpc.ids import refuse
from pullback_server.rpc.probes import is_open
from pullback_server.rpc.security.access import Access
from pullback_server.rpc.security.callers import Caller, Credentials, enter
from pullback_server.rpc.security.principals import Right
from pullback_server.rpc.security.quotas import Bucket
from pullback_wire import GRADIENT_METHODS, MODEL_METHODS, SESSION_SERVICE, Reason
from pullback_wire.inference import INFERENCE_METHODS, STREAM_INFER

logger = logging.getLogger(__name__)

_CHECK, _WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
#: Calls that may last for days: who loses the right to them loses them. A session sees to that itself.
_LASTING = frozenset((_WATCH, STREAM_INFER.path))
#: Probes of another protocol, which tell nothing of models either.
OPEN = frozenset(INFERENCE_METHODS[name].path for name in ("ServerLive", "ServerReady"))
#: What each key of metadata costs besides its characters, as HTTP/2 counts.
_OF_EACH = 32
#: Characters of a method's name that the log repeats, for it is whatever a caller writes.
_SHOWN = 128
_ANY: tuple[Right, ...] = ("call", "session")
_READING: tuple[Right, ...] = ("call", "session", "upload", "admin")
_MODELS: dict[str, tuple[Right, ...]] = {
    "ListModels": _READING,
    "GetModel": _READING,
    "GetModelGraph": _ANY,
    "LoadModel": ("admin",),
    "UnloadModel": ("admin",),
}

#: The rights of which a method needs one. What is not in here is not offered to anybody.
NEEDED: dict[str, tuple[Right, ...]] = {
    **{method.path: ("call",) for method in GRADIENT_METHODS.values()},
    **{method.path: _MODELS[method.name] for method in MODEL_METHODS.values()},
    f"/{next(iter(MODEL_METHODS.values())).service}/UploadWeights": ("upload",),
    f"/{SESSION_SERVICE}/Session": ("session",),
    **{method.path: _READING for method in INFERENCE_METHODS.values() if method.path not in OPEN},
    INFERENCE_METHODS["ModelInfer"].path: ("call",),
    STREAM_INFER.path: ("call",),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ANY,
}
#: Raises Fault, or else has entered the caller, whom it returns where quotas count. Given a request and its context.
_Before = Callable[[Any, grpc.aio.ServicerContext], Caller | None]

#: Told of each call that is turned away: its path, its metadata, the status code's name, the reason, and who made it.
Refused = Callable[[str, Mapping[str, str | bytes], str, str, str], None]


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """The interceptor. Health alone is open to all, but for what it says of models.

    certificates: whether clients have any, so that who calls is known only once the connection can be asked.
    max_metadata_bytes: of a call. gRPC holds its peer to that, too, but not before the peer has agreed to it, and so
    not the first calls of a connection.
    """

    def __init__(self, access: Access, certificates: bool, max_metadata_bytes: int, refused: Refused) -> None:
        self._access = access
        self._certificates = certificates
        self._max_metadata_bytes = max_metadata_bytes
        self._refused = refused
        self._log = _Refusals()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[grpc.RpcMethodHandler | None]], details: Any
    ) -> grpc.RpcMethodHandler:
        """The handler for a call: one that refuses it, unless everything is as it should be."""
        method = details.method
        try:
            handler = await continuation(details)
            if (size := _size(details.invocation_metadata)) > self._max_metadata_bytes:
                return self._too_large(size, method)
            credentials = _credentials(details.invocation_metadata)
            if handler is not None and method in (_CHECK, _WATCH):
                return self._wrapped(handler, self._of_health(credentials), method)
            if handler is not None and method in OPEN:
                return self._wrapped(handler, lambda request, context: None, method)
            before = self._of_call(method, credentials)
            if handler is None or method not in NEEDED:
                # Said only to those who may know what there is.
                return self._refusing(before, method)
            return self._wrapped(handler, before, method)
        except Exception as error:
            fault = status.fault_of(error, f"letting {method!r} in")

            def refuse(request: Any, context: grpc.aio.ServicerContext) -> NoReturn:
                raise fault

            return self._refusing(refuse, method)

    def _too_large(self, size: int, method: str) -> grpc.RpcMethodHandler:
        async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
            self._refused(method, {}, code.name, "", context.peer())
            # As gRPC says it of others, so that it does not depend on who is first.
            limit = self._max_metadata_bytes
            await context.abort(code, f"received metadata size exceeds hard limit ({size} vs. {limit})")

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _of_call(self, method: str, credentials: Credentials) -> _Before:
        """Raises Fault where the call can be refused before a byte of its request is read."""
        known = None if self._certificates and not credentials.authorization else self._admit(method, credentials)

        def before(request: Any, context: grpc.aio.ServicerContext) -> Caller:
            caller = known or self._admit(method, credentials._replace(certificate=_certificate(context)))
            if caller.stale and method in NEEDED:
                # The request may have come long after its metadata.
                caller.need(*NEEDED[method])
            caller.usage.call(len(request) if isinstance(request, bytes) else 0)
            enter(caller)
            return caller

        return before

    def _of_health(self, credentials: Credentials) -> _Before:
        def before(request: Any, context: grpc.aio.ServicerContext) -> Caller | None:
            name = request.service
            if is_open(name):
                return None
            caller = self._access.admit(credentials._replace(certificate=_certificate(context)))
            caller.need(*_ANY)
            caller.need_model(name, "service")
            caller.models.add(name)
            return caller

        return before

    def _admit(self, method: str, credentials: Credentials) -> Caller:
        """Raises Fault."""
        caller = self._access.admit(credentials)
        if method in NEEDED:
            caller.need(*NEEDED[method])
        return caller

    def _wrapped(self, handler: grpc.RpcMethodHandler, before: _Before, method: str) -> grpc.RpcMethodHandler:
        """A handler like another, that asks first. Raises TypeError for one that is neither coroutine nor generator."""
        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        behaviour = getattr(handler, kind)
        if inspect.isasyncgenfunction(behaviour):

            async def generate(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
                await self._let_in(before, request, context, method)
                async for one in behaviour(request, context):
                    yield one

            wrapped: Callable[..., Any] = generate
        elif inspect.iscoroutinefunction(behaviour):

            async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
                caller = await self._let_in(before, request, context, method)
                work = behaviour(request, context)
                if caller is not None and method in _LASTING:
                    work = self._while_allowed(work, caller, context)
                result = await work
                if caller is not None and isinstance(result, bytes):
                    caller.usage.sent(len(result))
                return result

            wrapped = answer
        else:
            raise TypeError(f"the handler of {method} is neither a coroutine function nor an asynchronous generator")
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(wrapped, handler.request_deserializer, handler.response_serializer)

    async def _while_allowed(self, work: Any, caller: Caller, context: grpc.aio.ServicerContext) -> Any:
        """What somebody may do, or know of a model, today may be none of theirs tomorrow."""
        right = next(right for right in _ANY if right in caller.renew().rights)
        lost: asyncio.Future[Fault] = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(work)
        try:
            with self._access.keep(caller, right, lost.set_result):
                await asyncio.wait((task, lost), return_when=asyncio.FIRST_COMPLETED)
            if lost.done():
                await refuse(context, lost.result())
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _refusing(self, before: _Before, method: str) -> grpc.RpcMethodHandler:
        """A handler that reads nothing, whatever kind of call it is: it tells what `before` raises, else that there is
        no such method."""

        async def refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
            await self._let_in(before, None, context, method)
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")

        return grpc.stream_stream_rpc_method_handler(refuse)

    async def _let_in(
        self, before: _Before, request: Any, context: grpc.aio.ServicerContext, method: str
    ) -> Caller | None:
        try:
            return before(request, context)
        except Exception as error:
            fault = status.fault_of(error, f"letting {method!r} in")
        code, metadata = status.grpc_code(fault.reason).name, dict(context.invocation_metadata() or ())
        self._refused(method, metadata, code, fault.reason.value, context.peer())
        self._log.tell(fault, method, context.peer())
        # Raises.
        await refuse(context, fault)
        raise AssertionError("a call that was refused went on")


class _Refusals:
    """Logs who was turned away, but not as often as whoever wants the disk to be full."""

    def __init__(self) -> None:
        self._bucket = Bucket(1.0, 10.0)
        self._passed_over = 0

    def tell(self, fault: Fault, method: str, peer: str) -> None:
        if fault.reason is Reason.QUOTA_EXCEEDED:
            return
        if self._bucket.wait(1.0):
            self._passed_over += 1
            return
        self._bucket.take(1.0)
        more = f" (and {self._passed_over} others before)" if self._passed_over else ""
        self._passed_over = 0
        # A method's name is the caller's word, which must not look like several lines.
        shown = ascii(method[:_SHOWN])[1:-1]
        logger.warning("%s of %s refused with %s: %s%s", shown, peer, fault.reason.value, fault.message, more)


def _size(metadata: Any) -> int:
    return sum(len(key) + len(value) + _OF_EACH for key, value in metadata or ())


def _credentials(metadata: Any) -> Credentials:
    values = [value for key, value in metadata or () if key == "authorization"]
    return Credentials(tuple(value if isinstance(value, str) else "" for value in values))


def _certificate(context: grpc.aio.ServicerContext) -> bytes | None:
    """The client's, which TLS has verified; None: it has none."""
    found = context.auth_context().get("x509_pem_cert")
    return bytes(found[0]) if found else None
