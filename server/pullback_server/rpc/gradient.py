"""GradientService: one handler for its six methods, which differ only in their messages."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import cast

from pullback_server.faults import Fault
from pullback_server.fleet.seam import Buffer
from pullback_server.job import Outcome
from pullback_server.rpc.answer import header, join
from pullback_server.rpc.computing import Computing
from pullback_server.rpc.known import KnownRequests
from pullback_server.rpc.request import Request, Translator, wire_path
from pullback_server.rpc.security import caller
from pullback_server.rpc.unary import Call
from pullback_wire import Method
from pullback_wire.framing import parse, split


class GradientHandler:
    """Answers a gradient request: decode, check, schedule, encode."""

    def __init__(self, translator: Translator, computing: Computing, executor: Executor) -> None:
        self._translator = translator
        self._computing = computing
        self._executor = executor
        self._known: KnownRequests[None] = KnownRequests()

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
            self._known.add(method.name, asked, payloads, job, function.model, function.version, signature, None)

        async def encode(outcome: Outcome, results: Sequence[Buffer]) -> bytes:
            return await join(header(job.kind, outcome, job.version), results, self._executor)

        try:
            return await self._computing(job, payloads, signature, call, encode)
        except Fault as fault:
            fault.field = wire_path(fault.field, job)
            raise
