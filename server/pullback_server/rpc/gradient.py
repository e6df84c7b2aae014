"""GradientService: one handler for its six methods, which differ only in their messages."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import cast

from pullback_server.faults import Fault
from pullback_server.job import Kind, Outcome
from pullback_server.rpc.answer import header, join
from pullback_server.rpc.known import KnownRequests
from pullback_server.rpc.request import Request, Translator, wire_path
from pullback_server.rpc.unary import Call
from pullback_server.scheduling import Scheduler
from pullback_server.telemetry import Metrics
from pullback_wire import Method
from pullback_wire.framing import parse, split


class GradientHandler:
    """Answers a gradient request: decode, check, schedule, encode."""

    def __init__(self, translator: Translator, scheduler: Scheduler, metrics: Metrics, executor: Executor) -> None:
        self._translator = translator
        self._scheduler = scheduler
        self._metrics = metrics
        self._executor = executor
        self._known = KnownRequests()

    async def __call__(self, method: Method, data: bytes, call: Call) -> bytes:
        """Raises Fault or WireError."""
        asked, payloads = split(data)
        known = self._known.find(method.name, asked, payloads)
        if known is not None and self._translator.signature(known.model, known.version) is known.signature:
            job = known.job
            call.model = known.model
        else:
            request = cast(Request, parse(method.request, asked))
            function = request.function
            call.model = function.model
            job = self._translator.job(request, payloads)
            signature = self._translator.signature(function.model, function.version)
            self._known.add(method.name, asked, payloads, job, function.model, function.version, signature)
        try:
            scheduled = await self._scheduler.submit(job, payloads, call.deadline, call.origin)
        except Fault as fault:
            fault.field = wire_path(fault.field, job)
            raise
        with scheduled.reply as reply:
            kind: Kind = job.kind
            described = header(kind, cast(Outcome, reply.outcome), job.version)
            answer = await join(described, reply.payloads, self._executor)
            timings = reply.timings
            self._metrics.stages(job.model, scheduled.queued, timings["transfer"], timings["compute"])
        return answer
