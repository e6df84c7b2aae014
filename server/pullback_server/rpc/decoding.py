"""Requests of services that are not ours (health, reflection), which gRPC decodes: bytes that are no such request.

gRPC would answer UNKNOWN, and write a traceback into the log for each.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from pullback_server.faults import Fault
from pullback_server.rpc.ids import refuse
from pullback_wire import Reason


class Decoding(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """The interceptor; the first of several, so that the others get requests as they should be."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[grpc.RpcMethodHandler | None]], details: Any
    ) -> grpc.RpcMethodHandler | None:
        """The handler for a call: one that decodes by itself, where gRPC would."""
        handler = await continuation(details)
        return handler if handler is None or handler.request_deserializer is None else _by_itself(handler)


def _by_itself(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    kind = ("stream" if handler.request_streaming else "unary") + (
        "_stream" if handler.response_streaming else "_unary"
    )
    behaviour = getattr(handler, kind)
    decode = handler.request_deserializer

    async def one(data: bytes, context: grpc.aio.ServicerContext) -> Any:
        try:
            return decode(data)
        except Exception as error:
            await refuse(context, Fault(Reason.MALFORMED_REQUEST, str(error)))
            raise

    async def each(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        async for data in requests:
            yield await one(data, context)

    async def given(request: Any, context: grpc.aio.ServicerContext) -> Any:
        return each(request, context) if handler.request_streaming else await one(request, context)

    if inspect.isasyncgenfunction(behaviour):

        async def generate(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async for answer in behaviour(await given(request, context), context):
                yield answer

        wrapped: Callable[..., Any] = generate
    else:

        async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
            return await behaviour(await given(request, context), context)

        wrapped = answer
    return getattr(grpc, f"{kind}_rpc_method_handler")(wrapped, None, handler.response_serializer)
