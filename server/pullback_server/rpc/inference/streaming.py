"""ModelStreamInfer: requests on one stream, answered in their order, several computed at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from pullback_server.faults import Fault
from pullback_server.rpc import status
from pullback_server.rpc.ids import id_of, refuse
from pullback_server.rpc.inference.infer import InferHandler, id_in
from pullback_server.rpc.origin import Told, told
from pullback_server.rpc.security import caller
from pullback_server.rpc.unary import Answered, Call, Unary
from pullback_server.telemetry import Metrics
from pullback_wire import REQUEST_ID_KEY, Method, Reason
from pullback_wire.inference import STREAM_INFER
from pullback_wire.inference import open_inference_pb2 as pb

#: Requests of one stream that are being answered. The next is read when the oldest has its answer.
_AT_ONCE = 16
#: Metadata key with which a client wants the first failure to end the stream, as its status.
_STRICT = "triton_grpc_error"
#: Characters of an id, as `id_of` has it.
_LONGEST_ID = 128


class Streams:
    """Serves them."""

    def __init__(self, handler: InferHandler, unary: Unary, metrics: Metrics) -> None:
        self._handler = handler
        self._answering = unary.answering(STREAM_INFER, self._answer)
        #: Seconds in which an answer must have been read, by a client that still is there.
        self._patience = unary.longest
        self._sent = metrics.sent_bytes.labels(STREAM_INFER.name)
        self._stopping = asyncio.Event()

    def method_handler(self) -> grpc.RpcMethodHandler:
        """The gRPC handler. No (de)serialisers, as in `unary`."""
        return grpc.stream_stream_rpc_method_handler(self._serve)

    def stop(self) -> None:
        """Streams read no more, answer what they have read, and end."""
        self._stopping.set()

    async def _answer(self, method: Method, data: bytes, call: Call) -> bytes:
        # The gate has counted the stream as a call, and nothing of what comes on it.
        caller().usage.call(len(data))
        return await self._handler(method, data, call)

    async def _serve(self, _: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        metadata = told(context)
        id, fault = id_of(metadata)
        if fault is not None:
            await refuse(context, fault)
        answers: asyncio.Queue[tuple[bytes, asyncio.Task[Answered]] | None] = asyncio.Queue(_AT_ONCE)
        reading = asyncio.create_task(self._read(context, metadata, id, answers))
        try:
            while (found := await answers.get()) is not None:
                data, task = found
                answered = await task
                if answered.fault is not None and metadata.get(_STRICT) == "true":
                    fault = answered.fault
                    break
                await self._send(context, data, answered)
            else:
                fault = await reading
        except grpc.aio.InternalError:
            # The connection is gone, and with it whoever could be told.
            pass
        except Exception as error:
            fault = status.fault_of(error, "a stream")
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            left = [found[1] for found in _rest(answers) if found is not None]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        if fault is not None:
            await refuse(context, fault)

    async def _send(self, context: grpc.aio.ServicerContext, data: bytes, answered: Answered) -> None:
        result, fault = answered.result, answered.fault
        if fault is not None:
            # Without a status of its own, a failure tells its reason in words.
            message = f"{status.clip(fault.message)} [{fault.reason.value}]"
            failed = pb.ModelStreamInferResponse(
                error_message=message, infer_response=pb.ModelInferResponse(id=id_in(data))
            )
            result = failed.SerializeToString()
        try:
            async with asyncio.timeout(self._patience):
                await context.write(result)
        except TimeoutError:
            raise Fault(
                Reason.DEADLINE_EXCEEDED, f"the client has not read what it is sent for {self._patience:g} s"
            ) from None
        caller().usage.sent(len(result))
        self._sent.inc(len(result))

    async def _read(
        self,
        context: grpc.aio.ServicerContext,
        metadata: Told,
        id: str,
        answers: asyncio.Queue[tuple[bytes, asyncio.Task[Answered]] | None],
    ) -> Fault | None:
        """Begins what comes. Why there will be no more: None where the client has ended it."""
        stopping = asyncio.create_task(self._stopping.wait())
        number = 0
        fault: Fault | None = None
        try:
            while True:
                reading = asyncio.ensure_future(context.read())
                try:
                    await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
                    if not reading.done():
                        fault = Fault(Reason.NOT_READY, "the server is shutting down", "", 1.0)
                        break
                    data = reading.result()
                finally:
                    reading.cancel()
                if data is grpc.aio.EOF:
                    break
                try:
                    caller().need("call")
                except Fault as lost:
                    fault = lost
                    break
                number += 1
                own = (
                    metadata if REQUEST_ID_KEY not in metadata else {**metadata, REQUEST_ID_KEY: _numbered(id, number)}
                )
                task = asyncio.create_task(self._answering(data, context, own))
                try:
                    await answers.put((data, task))
                except asyncio.CancelledError:
                    task.cancel()
                    raise
        except Exception:
            # Whoever waits for answers learns of it when it asks how reading went.
            await answers.put(None)
            raise
        finally:
            stopping.cancel()
        await answers.put(None)
        return fault


def _numbered(id: str, number: int) -> str:
    """The id of a stream's request, no longer than one may be."""
    end = f"/{number}"
    return id[: _LONGEST_ID - len(end)] + end


def _rest(
    answers: asyncio.Queue[tuple[bytes, asyncio.Task[Answered]] | None],
) -> list[tuple[bytes, asyncio.Task[Answered]] | None]:
    found = []
    while not answers.empty():
        found.append(answers.get_nowait())
    return found
