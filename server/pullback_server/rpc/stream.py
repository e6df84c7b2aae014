"""One open session: reading frames, sending ops to the worker in order, writing answers in order."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import grpc

from pullback_server.faults import Fault
from pullback_server.rpc.answers import AnswerWriter
from pullback_server.rpc.ops import OpTranslator
from pullback_server.rpc.security import SessionUse
from pullback_server.rpc.sending import Op, Sender
from pullback_server.rpc.transfers import LARGEST_CHUNK, WINDOW, Inbox, Outbox, ProtocolBreach
from pullback_server.scheduling import Pinned
from pullback_server.telemetry import Metrics
from pullback_wire import Reason, decode
from pullback_wire.v1 import session_service_pb2 as pb

#: Ops in flight, and bytes of the tensors in their frames; what comes on top is refused, for reading never waits.
MAX_OPS = 4096
MAX_OP_BYTES = 512 << 20
#: Ops that were sent and whose answers are not written: no more are sent until some are, so that a client which does
#: not read holds only so many results in the worker.
_MAX_UNWRITTEN = 64
#: A session that holds nothing and has no op for this part of the time that a server has to shut down, or so many
#: seconds, ends early.
_QUIET_PART = 0.1
_QUIET = 2.0


@dataclass(frozen=True)
class SessionOptions:
    """What a session may hold and how long it may keep silent.

    budget_bytes: of tensors and graphs; None: a quarter of the worker's memory.
    idle_seconds: without an op. heartbeat_seconds: without any frame.
    max_call_seconds: that an op may wait for its worker.
    """

    budget_bytes: int | None
    idle_seconds: float
    heartbeat_seconds: float
    max_message_bytes: int
    max_call_seconds: float


class Stream:
    """Reads, sends and writes, each in a task of its own, so that none of them waits for another."""

    def __init__(
        self,
        context: grpc.aio.ServicerContext,
        pinned: Pinned,
        opening: pb.OpenSession,
        options: SessionOptions,
        translator: OpTranslator,
        metrics: Metrics,
        executor: Executor,
        use: SessionUse,
    ) -> None:
        self._context = context
        self._pinned = pinned
        self._options = options
        self._metrics = metrics
        #: Bytes that the session may hold.
        self.budget = options.budget_bytes or pinned.worker.memory // 4
        use.retained = lambda: pinned.seat.retained
        self._use = use
        self._inbox = Inbox(pinned.seat, use, self.budget)
        self._outbox = Outbox(self._write, opening.chunk_threshold or LARGEST_CHUNK, opening.credit_bytes)
        most = options.max_message_bytes
        self._writer = AnswerWriter(self._write, self._outbox, executor, most, metrics)
        results = 2**62 if self._outbox.chunks else most
        self._sender = Sender(pinned, self._inbox, translator, use, self.budget, results, options.max_call_seconds)
        self._writing = asyncio.Lock()
        #: Read and not sent; sent and not written.
        self._ops: deque[Op] = deque()
        self._answers: deque[Op] = deque()
        self._op_came = asyncio.Event()
        self._answer_came = asyncio.Event()
        self._written = asyncio.Event()
        self._ended = self._sent_all = False
        self._op_bytes = 0
        self._latest = 0
        self._to_grant = 0
        self._nudge = asyncio.Event()
        self._leave = asyncio.Event()
        self._told = False
        self._dismissed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._leaving: pb.GoAway | None = None
        self._leave_at = float("inf")
        self._quiet = _QUIET
        self._heard = self._wrote = self._busy = time.monotonic()
        #: Since when a frame has been waiting for the client to read.
        self._pushing = float("inf")

    async def serve(self, first: int) -> None:
        """Until the client ends the session. first: number of the op that opened it.

        Raises Fault (SESSION_LOST: the worker died, or the session was idle or silent for too long), ProtocolBreach,
        WireError.
        """
        self._latest = first
        work = [self._read_all(), self._send_all(), self._write_all(), self._keep(), self._watch()]
        tasks: list[asyncio.Future[Any]] = [asyncio.create_task(one) for one in work]
        _, _, writer, *_ = tasks
        lost = asyncio.ensure_future(self._lost())
        try:
            # The writer ends when everything that was read has been answered.
            waiting = {*tasks, lost, self._dismissed}
            while not writer.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in (*tasks, lost, self._dismissed):
                task.cancel()
            await asyncio.gather(*tasks, lost, self._dismissed, return_exceptions=True)
            for op in self._answers:
                if op.way is not None:
                    op.way.give_up()
                if op.request is not None and op.request.span is not None:
                    op.request.span.end("CANCELLED")
            self._inbox.close()
            self._op_bytes = 0
            for op in self._ops:
                self._use.forget_upload(op.bytes)

    def go_away(self, seconds: float, reason: str) -> None:
        """Tells the client how long the session has left."""
        self._leaving = pb.GoAway(reason=reason)
        self._leaving.time_left.FromMilliseconds(int(seconds * 1000))
        self._leave_at = time.monotonic() + seconds
        self._quiet = min(_QUIET, seconds * _QUIET_PART)
        self._nudge.set()
        self._leave.set()

    def end(self, fault: Fault) -> None:
        """Ends the session with a fault, whatever it is doing."""
        if not self._dismissed.done():
            self._dismissed.set_exception(fault)

    async def _lost(self) -> None:
        await asyncio.shield(self._pinned.seat.lost)
        raise Fault(Reason.SESSION_LOST, f"worker {self._pinned.worker.name} was lost, and the session with it")

    # Reading. Nothing here waits for anything but the next frame.

    async def _read_all(self) -> None:
        while True:
            data = await self._context.read()
            if data is grpc.aio.EOF:
                break
            self._heard = time.monotonic()
            frame, payloads = decode(pb.SessionRequest, data, bounded=True)
            kind = frame.WhichOneof("frame")
            if kind == "chunk":
                self._to_grant += self._inbox.take(frame.chunk, payloads)
                self._busy = self._heard
                if self._to_grant >= WINDOW // 4:
                    self._nudge.set()
            elif kind == "credit":
                if frame.credit.bytes < 0:
                    raise ProtocolBreach(f"credit.bytes is {frame.credit.bytes}")
                self._outbox.grant(frame.credit.bytes)
            elif kind == "close":
                break
            elif kind == "open":
                raise ProtocolBreach("a session is opened once")
            elif kind is None and (frame.op or frame.release):
                raise ProtocolBreach(f"op {frame.op} is of no kind")
            elif kind not in ("heartbeat", None):
                op = self._take(frame, kind, payloads)
                if self._resting and self._sender.ready(op):
                    # As the sender would, without waking its task.
                    await self._send(op)
                else:
                    self._ops.append(op)
                    self._op_came.set()
        self._ended = True
        self._op_came.set()

    def _take(self, frame: pb.SessionRequest, kind: str, payloads: Sequence[memoryview]) -> Op:
        if frame.op <= self._latest:
            raise ProtocolBreach(f"op {frame.op} comes after op {self._latest}; ops count up")
        self._latest = frame.op
        size = sum(len(payload) for payload in payloads)
        refused = None
        in_flight = len(self._ops) + len(self._answers)
        if in_flight >= MAX_OPS or (self._op_bytes + size > MAX_OP_BYTES and in_flight):
            refused = Fault(
                Reason.OVERLOADED,
                f"{in_flight} ops with {self._op_bytes} bytes are in flight, and this one brings {size}; wait for "
                "answers",
                "",
                0.1,
            )
        else:
            try:
                self._use.admit_op(kind, size)
            except Fault as fault:
                refused = fault
        if refused is not None:
            payloads, size = (), 0
        self._op_bytes += size
        return Op(frame.op, kind, frame, payloads, size, refused)

    # Sending to the worker, op after op.

    async def _send_all(self) -> None:
        while True:
            while not self._ops:
                if self._ended:
                    self._sent_all = True
                    self._answer_came.set()
                    return
                self._op_came.clear()
                await self._op_came.wait()
            while len(self._answers) >= _MAX_UNWRITTEN:
                self._written.clear()
                await self._written.wait()
            await self._send(self._ops[0])
            self._ops.popleft()

    @property
    def _resting(self) -> bool:
        """Whether the sender has nothing to do, and may do something."""
        return not self._ops and len(self._answers) < _MAX_UNWRITTEN

    async def _send(self, op: Op) -> None:
        try:
            await self._sender.send(op)
        finally:
            self._op_bytes -= op.bytes
            self._use.forget_upload(op.bytes)
            op.payloads, op.bytes = (), 0
        if op.way is not None and self._use.limited:
            op.way.then(self._weigh)
        self._answers.append(op)
        self._answer_came.set()

    def _weigh(self) -> None:
        fault = self._use.exceeded()
        if fault is not None:
            self.end(fault)

    # Writing.

    async def _write_all(self) -> None:
        while True:
            while not self._answers:
                if self._sent_all:
                    return
                self._answer_came.clear()
                await self._answer_came.wait()
            op = self._answers[0]
            code = await self._writer.write(op)
            self._answers.popleft()
            self._written.set()
            self._busy = time.monotonic()
            trace = "" if op.request is None else op.request.recorded_trace
            self._metrics.session_op(op.kind, code, self._busy - op.arrived, trace)

    async def _write(self, data: bytes) -> None:
        async with self._writing:
            self._pushing = time.monotonic()
            self._use.usage.sent(len(data))
            await self._context.write(data)
            self._pushing = float("inf")
        self._wrote = time.monotonic()

    # Credits and heartbeats.

    async def _keep(self) -> None:
        options = self._options
        beat = options.heartbeat_seconds / 3
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause(beat)):
                    await self._nudge.wait()
            self._nudge.clear()
            if self._to_grant:
                grant, self._to_grant = self._to_grant, 0
                await self._write(pb.SessionResponse(credit=pb.Credit(bytes=grant)).SerializeToString())
            if self._leaving is not None:
                leaving, self._leaving = self._leaving, None
                await self._write(pb.SessionResponse(go_away=leaving).SerializeToString())
                self._told = True
            if time.monotonic() - self._wrote >= beat:
                await self._write(pb.SessionResponse(heartbeat=pb.Heartbeat()).SerializeToString())

    def _pause(self, beat: float) -> float:
        """Seconds until something is to be written, if nothing nudges."""
        return max(self._wrote + beat - time.monotonic(), 0.05)

    # The end of those that keep silent. Nothing here writes: a client that does not read holds up whoever does.

    async def _watch(self) -> None:
        options = self._options
        while True:
            now = time.monotonic()
            idle = now - self._busy if not (self._ops or self._answers) else 0.0
            if now - self._heard >= options.heartbeat_seconds:
                raise Fault(
                    Reason.SESSION_LOST, f"nothing was heard from the client for {options.heartbeat_seconds:g} s"
                )
            if idle >= options.idle_seconds:
                raise Fault(Reason.SESSION_LOST, f"the session was idle for {options.idle_seconds:g} s")
            if now - min(self._pushing, self._outbox.waiting) >= options.idle_seconds:
                raise Fault(
                    Reason.SESSION_LOST, f"the client has not read what it is sent for {options.idle_seconds:g} s"
                )
            # What holds nothing loses nothing; a graph is kept for as long as was promised.
            spare = self._told and not self._pinned.seat.live
            if now >= self._leave_at or (spare and idle >= self._quiet):
                raise Fault(Reason.SESSION_LOST, "the server is shutting down")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._due() - time.monotonic()):
                    await self._leave.wait()
                self._leave.clear()

    def _due(self) -> float:
        """When somebody may have kept silent for too long."""
        options = self._options
        since = min(self._busy, self._pushing, self._outbox.waiting)
        due = min(self._heard + options.heartbeat_seconds, since + options.idle_seconds, self._leave_at)
        now = time.monotonic()
        if self._leave_at < float("inf"):
            due = min(due, now + 0.1)
        # What waits for an answer is busy, however long ago it was sent.
        return max(due, now + 0.05)
