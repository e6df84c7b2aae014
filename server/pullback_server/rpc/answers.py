"""A session's answers on their way to the client."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import cast

from pullback_server import ops, tracking
from pullback_server.faults import Fault
from pullback_server.fleet.seam import Reply, WorkerLost
from pullback_server.job import BatchOutcome, Outcome
from pullback_server.rpc import status
from pullback_server.rpc.answer import join, response, tensors_of
from pullback_server.rpc.ops import result_of
from pullback_server.rpc.request import wire_path
from pullback_server.rpc.sending import Op, until_told
from pullback_server.rpc.transfers import Outbox
from pullback_server.telemetry import Metrics
from pullback_wire import Reason
from pullback_wire.v1 import session_service_pb2 as pb

#: Values that stay in an answer's own message, in all, where the client takes chunks.
_ROOM = 16 << 20


class AnswerWriter:
    """Writes answers. most: bytes of values in one message for a client that takes no chunks."""

    def __init__(
        self,
        write: Callable[[bytes], Awaitable[None]],
        outbox: Outbox,
        executor: Executor,
        most: int,
        metrics: Metrics,
    ) -> None:
        self._write = write
        self._outbox = outbox
        self._executor = executor
        self._metrics = metrics
        self._room = _ROOM if outbox.chunks else most

    async def write(self, op: Op) -> str:
        """Waits for an op and writes what it came to. Returns its status code's name."""
        fault = op.fault
        reply: Reply | None = None
        if op.way is not None:
            try:
                # An op may be sent again here.
                with tracking.as_of(op.request):
                    reply = await op.way.reply()
            except Fault as error:
                fault = fault or error
                if op.over is not None and fault.reason is Reason.SESSION_BUDGET:
                    fault = op.over()
            except WorkerLost:
                await until_told()
                raise
        if reply is None:
            assert fault is not None
            if op.job is not None:
                fault.field = wire_path(fault.field, op.job)
            request = op.request
            answered = status.op_status(fault, "" if request is None else request.id)
            await self._write(pb.SessionResponse(op=op.number, status=answered).SerializeToString())
            code = str(status.grpc_code(fault.reason).name)
            if request is not None and request.span is not None:
                request.span.end(code, fault.reason.value)
            return code
        with reply:
            # Before the answer is on its way, so that whoever has it finds it counted.
            self._count(op, reply)
            await self._write_reply(op, reply)
            if op.way is not None and op.request is not None and op.request.span is not None:
                tracking.computed(op.request.span, reply.timings, op.way.worker)
                op.request.span.end("OK")
        return "OK"

    def _count(self, op: Op, reply: Reply) -> None:
        outcome = reply.outcome
        if isinstance(outcome, BatchOutcome) or outcome.health is None:
            return
        trace_id = "" if op.request is None else op.request.recorded_trace
        if isinstance(outcome, ops.SessionOutcome):
            self._metrics.health(outcome.model, outcome.health, outcome.limits, trace_id)
        elif op.job is not None:
            self._metrics.health(op.job.model, outcome.health, op.limits, trace_id)

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
