"""A session's answers on their way to the client."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import cast

from pullback_server import ops
from pullback_server.faults import Fault
from pullback_server.fleet.seam import Reply, WorkerLost
from pullback_server.job import Outcome
from pullback_server.rpc import status
from pullback_server.rpc.answer import join, response, tensors_of
from pullback_server.rpc.ops import result_of
from pullback_server.rpc.request import wire_path
from pullback_server.rpc.sending import Op, until_told
from pullback_server.rpc.transfers import Outbox
from pullback_wire.v1 import session_service_pb2 as pb

#: Values that stay in an answer's own message, in all, where the client takes chunks.
_ROOM = 16 << 20


class AnswerWriter:
    """Writes answers. most: bytes of values in one message for a client that takes no chunks."""

    def __init__(
        self, write: Callable[[bytes], Awaitable[None]], outbox: Outbox, executor: Executor, most: int
    ) -> None:
        self._write = write
        self._outbox = outbox
        self._executor = executor
        self._room = _ROOM if outbox.chunks else most

    async def write(self, op: Op) -> str:
        """Waits for an op and writes what it came to. Returns its status code's name."""
        fault = op.fault
        reply: Reply | None = None
        if op.way is not None:
            try:
                reply = await op.way.reply()
            except Fault as error:
                fault = fault or error
            except WorkerLost:
                await until_told()
                raise
        if reply is None:
            assert fault is not None
            if op.job is not None:
                fault.field = wire_path(fault.field, op.job)
            frame = pb.SessionResponse(op=op.number, status=status.op_status(fault))
            await self._write(frame.SerializeToString())
            return str(status.grpc_code(fault.reason).name)
        with reply:
            await self._write_reply(op, reply)
        return "OK"

    async def _write_reply(self, op: Op, reply: Reply) -> None:
        frame = pb.SessionResponse(op=op.number)
        if isinstance(reply.outcome, ops.SessionOutcome):
            frame.result.CopyFrom(result_of(reply.outcome))
            tensors = [info.tensor for info in frame.result.handles if info.has_value]
        else:
            assert op.job is not None
            field = getattr(frame.stateless, op.job.kind)
            field.CopyFrom(response(op.job.kind, cast(Outcome, reply.outcome), op.job.version))
            tensors = list(tensors_of(field))
        transfers, staying = await self._outbox.send(reply.payloads, self._room)
        if transfers:
            places = {index: place for place, index in enumerate(staying)}
            for tensor in tensors:
                if tensor.payload in transfers:
                    tensor.transfer = transfers[tensor.payload]
                    tensor.payload = 0
                else:
                    tensor.payload = places[tensor.payload]
        payloads = [reply.payloads[index] for index in staying]
        await self._write(await join(frame.SerializeToString(), payloads, self._executor))
