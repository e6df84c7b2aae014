"""A session's ops on their way to its worker, one after the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pullback_server import ops, tracking
from pullback_server.faults import Fault
from pullback_server.fleet.seam import Upload, WorkerLost
from pullback_server.job import FaultRecord, HealthRecord, Job
from pullback_server.rpc import status
from pullback_server.rpc.ops import OpTranslator, handles_of, tensors_in
from pullback_server.rpc.security import SessionUse
from pullback_server.rpc.transfers import Inbox
from pullback_server.scheduling import OnItsWay, Pinned
from pullback_server.tracking import Request
from pullback_wire import Reason, WireError
from pullback_wire.v1 import session_service_pb2 as pb

#: Payloads of more bytes are copied to the worker off the event loop.
_AT_ONCE = 256 << 10


@dataclass(eq=False)
class Op:
    """An op from its arrival until its answer is written.

    kind: "put", "call", ... bytes: of its payloads. job: of a stateless op. fault: why it was refused on its way.
    way: absent where the worker need not know of it. request: what logs and traces know it as.
    over: what it failed with when its session's budget, cut by a quota, does not suffice.
    """

    number: int
    kind: str
    frame: pb.SessionRequest
    payloads: Sequence[memoryview]
    bytes: int
    fault: Fault | None = None
    arrived: float = field(default_factory=time.monotonic)
    job: Job | None = None
    limits: HealthRecord | None = None
    way: OnItsWay | None = None
    request: Request | None = None
    over: Callable[[], Fault] | None = None


class Sender:
    """Translates ops and posts them.

    use: may cut the budget. budget, max_result_bytes: see ops.SessionJob. seconds: an op may wait and take.
    """

    def __init__(
        self,
        pinned: Pinned,
        inbox: Inbox,
        translator: OpTranslator,
        use: SessionUse,
        budget: int,
        max_result_bytes: int,
        seconds: float,
    ) -> None:
        self._pinned = pinned
        self._inbox = inbox
        self._translator = translator
        self._use = use
        self._budget = budget
        self._max_result_bytes = max_result_bytes
        self._seconds = seconds

    def ready(self, op: Op) -> bool:
        """Whether `send` would return without having waited."""
        return op.bytes <= _AT_ONCE and self._pinned.free

    async def send(self, op: Op) -> None:
        """Returns when the op is on its way, or has failed. Raises Fault when the session cannot go on."""
        session = tracking.current()
        if session is not None:
            op.request = session.op(op.number, op.kind)
        with tracking.as_of(op.request):
            await self._send(op)

    async def _send(self, op: Op) -> None:
        frame = op.frame
        uploads: list[Upload] = []
        job: Job | ops.SessionJob
        try:
            if op.fault is not None:
                raise op.fault
            payloads = self._with_uploads(frame, op.payloads, uploads)
            if op.kind == "stateless":
                job = op.job = self._translator.stateless(frame, payloads, self._max_result_bytes)
                op.limits = self._translator.limits(frame)
            else:
                job = self._job(op, self._translator.op(frame, payloads))
            self._check_held(job)
            way = await self._pinned.post(job, op.payloads, time.monotonic() + self._seconds, uploads)
        except (Fault, WireError) as error:
            await self._refuse(op, error if isinstance(error, Fault) else status.as_fault(error))
        except WorkerLost:
            await until_told()
        else:
            op.way = way
        finally:
            # Those that went with the op are not here any more.
            for upload in uploads:
                upload.drop()

    def _job(self, op: Op, what: ops.Op) -> ops.SessionJob:
        budget = self._use.budget(self._budget)
        if budget < self._budget:
            op.over = self._use.usage.retained
        return ops.SessionJob(
            session=self._pinned.seat.session,
            number=op.number,
            release=list(op.frame.release),
            op=what,
            budget=budget,
            max_result_bytes=self._max_result_bytes,
        )

    def _check_held(self, job: Job | ops.SessionJob) -> None:
        """Raises Fault where the op needs a model that the session's worker does not have."""
        if isinstance(job, Job):
            model, version = job.model, job.version
        elif isinstance(job.op, ops.Call) and isinstance(job.op.callee, ops.Model):
            model, version = job.op.callee.name, job.op.callee.version
        elif isinstance(job.op, ops.Parameters):
            model, version = job.op.model, job.op.version
        else:
            return
        worker = self._pinned.worker
        if not worker.holds(model, version):
            raise Fault(
                Reason.NOT_ON_SESSION_WORKER,
                f"model {model!r} version {version} is not on worker {worker.name}, where this session is; name the "
                "models of a session when it is opened",
            )

    async def _refuse(self, op: Op, fault: Fault) -> None:
        """Has the worker know of an op that cannot be sent, where other ops may depend on it."""
        op.fault = fault
        handles = [handle for handle in handles_of(op.frame) if 0 < handle < 2**63]
        if not handles and not op.frame.release:
            return
        record = FaultRecord(fault.reason.value, fault.message, fault.field, fault.retry_after)
        broken = self._job(op, ops.Broken(handles, record))
        try:
            way = await self._pinned.post(broken, (), time.monotonic() + self._seconds)
        except WorkerLost:
            await until_told()
        except Fault as another:
            # Ops that depend on this one would not learn of it.
            raise Fault(Reason.SESSION_LOST, f"the session cannot go on: {another.message}") from another
        else:
            op.way = way

    def _with_uploads(
        self, frame: pb.SessionRequest, payloads: Sequence[memoryview], uploads: list[Upload]
    ) -> Sequence[memoryview]:
        """The op's payloads and, after them, the transfers that it refers to, which are added to `uploads`."""
        found = list(payloads)
        for tensor in tensors_in(frame):
            if tensor.transfer:
                upload = self._inbox.claim(tensor)
                uploads.append(upload)
                tensor.payload = len(found)
                tensor.transfer = 0
                found.append(upload.view)
        return found


async def until_told() -> None:
    """The worker is gone; the session's own task learns of that as well, and cancels whoever waits here."""
    await asyncio.Event().wait()
