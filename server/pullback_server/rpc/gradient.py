"""GradientService: one handler for its six methods, which differ only in their messages."""

from __future__ import annotations

import time
from concurrent.futures import Executor
from typing import cast

from pullback_server.faults import Fault
from pullback_server.job import Kind, Outcome
from pullback_server.rpc.answer import header, join
from pullback_server.rpc.journal import Computed
from pullback_server.rpc.known import KnownRequests
from pullback_server.rpc.request import Request, Translator, wire_path
from pullback_server.rpc.security import caller
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
        asked, payloads = split(data, bounded=True)
        known = self._known.find(method.name, asked, payloads)
        if known is not None:
            # Whoever asked before may have been somebody else. First of all: what else is said tells of the model.
            caller().need_model(known.model, "function.model")
        if known is not None and self._translator.signature(known.model, known.version) is known.signature:
            job, signature = known.job, known.signature
            call.model = known.model
        else:
            request = cast(Request, parse(method.request, asked))
            function = request.function
            call.model = function.model
            caller().need_model(function.model, "function.model")
            job = self._translator.job(request, payloads)
            signature = self._translator.signature(function.model, function.version)
            self._known.add(method.name, asked, payloads, job, function.model, function.version, signature)
        decoded = time.monotonic()
        try:
            scheduled = await self._scheduler.submit(job, payloads, call.deadline, call.origin)
        except Fault as fault:
            fault.field = wire_path(fault.field, job)
            raise
        with scheduled.reply as reply:
            kind: Kind = job.kind
            outcome, timings = cast(Outcome, reply.outcome), reply.timings
            answered = time.monotonic()
            answer = await join(header(kind, outcome, job.version), reply.payloads, self._executor)
            stages = {
                "decode": decoded - call.began,
                "queue": scheduled.queued,
                "transfer": timings["transfer"],
                "forward": timings.get("forward", 0.0),
                "backward": timings.get("backward", 0.0),
                "encode": time.monotonic() - answered,
            }
            call.computed = Computed(
                job.version,
                stages,
                decoded,
                timings,
                scheduled.worker,
                scheduled.rows,
                scheduled.batch,
                outcome.device_memory,
            )
            # The others take place in every call, however short they are.
            passed = stages if "backward" in timings else {name: stages[name] for name in stages if name != "backward"}
            self._metrics.stages(job.model, passed, call.trace_id)
            if outcome.health is not None:
                self._metrics.health(job.model, outcome.health, signature.health, call.trace_id)
        return answer
