"""ModelInfer: a request, on the road that a request of GradientService takes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor

from pullback_server.faults import Fault
from pullback_server.fleet.seam import Buffer
from pullback_server.job import Job, Outcome, Signature
from pullback_server.rpc import status
from pullback_server.rpc.answer import join
from pullback_server.rpc.catalogue import Catalogue
from pullback_server.rpc.computing import Computing
from pullback_server.rpc.inference.answering import RAW, check_outputs, response
from pullback_server.rpc.inference.contents import Parts, read, take_apart
from pullback_server.rpc.inference.parameters import split_name
from pullback_server.rpc.inference.translating import Asked, in_their_words, translate
from pullback_server.rpc.known import KnownRequests
from pullback_server.rpc.request import Translator, wire_path
from pullback_server.rpc.security import caller
from pullback_server.rpc.signature import SignatureView
from pullback_server.rpc.unary import Call
from pullback_server.scheduling import Origin
from pullback_wire import Method, WireError
from pullback_wire.framing import nested, parse
from pullback_wire.inference import STREAM_INFER
from pullback_wire.inference import open_inference_pb2 as pb

#: Typed contents larger than this become arrays off the event loop.
_READ_ASIDE = 256 << 10
#: Number of ModelStreamInferResponse.infer_response.
_ANSWER = 2
_FINAL = pb.ModelInferResponse(parameters={"triton_final_response": pb.InferParameter(bool_param=True)})


class InferHandler:
    """Answers ModelInfer, and one request of ModelStreamInfer.

    most: bytes that the inputs of a request may have.
    """

    def __init__(
        self, catalogue: Catalogue, translator: Translator, computing: Computing, executor: Executor, most: int
    ) -> None:
        self._catalogue = catalogue
        self._translator = translator
        self._computing = computing
        self._executor = executor
        self._most = most
        self._known: KnownRequests[Asked] = KnownRequests()

    async def __call__(self, method: Method, data: bytes, call: Call) -> bytes:
        """Raises Fault or WireError."""
        parts = take_apart(data)
        known = self._known.find("", parts.header, parts.raw) if parts.raw else None
        if known is not None:
            # As in GradientHandler.
            call.model = known.model
            caller().need_model(known.model, "model_name")
        if known is not None and self._view(known.model, known.version).signature is known.signature:
            job, signature, asked, payloads = known.job, known.signature, known.more, parts.raw
        else:
            request, payloads = await self._read(parts)
            call.model = split_name(request.model_name)[0]
            caller().need_model(call.model, "model_name")
            job, signature, asked = self._translated(request, payloads)
            # With an id, or typed contents, it does not come again.
            if parts.raw and not request.id:
                self._known.add("", parts.header, parts.raw, job, call.model, request.model_version, signature, asked)
        if asked.seconds is not None:
            call.deadline = min(call.deadline, call.began + asked.seconds)
        if asked.urgent:
            call.origin = Origin(call.origin.caller, True)
        streamed = method is STREAM_INFER

        async def encode(outcome: Outcome, results: Sequence[Buffer]) -> bytes:
            header, contents = response(asked, job, outcome, results)
            if streamed:
                header = nested(_ANSWER, header + _FINAL.SerializeToString(), contents, RAW)
            return await join(header, contents, self._executor, RAW)

        try:
            return await self._computing(job, payloads, signature, call, encode)
        except Fault as fault:
            raise _theirs(
                Fault(fault.reason, fault.message, wire_path(fault.field, job), fault.retry_after), asked
            ) from None

    async def _read(self, parts: Parts) -> tuple[pb.ModelInferRequest, list[memoryview]]:
        if parts.typed < _READ_ASIDE:
            return read(parts, self._most)
        return await asyncio.get_running_loop().run_in_executor(self._executor, read, parts, self._most)

    def _view(self, model: str, version: str) -> SignatureView:
        try:
            return self._catalogue.find(model, version, "function.")
        except Fault as fault:
            raise in_their_words(fault) from None

    def _translated(
        self, request: pb.ModelInferRequest, payloads: Sequence[memoryview]
    ) -> tuple[Job, Signature, Asked]:
        view = self._view(split_name(request.model_name)[0], request.model_version)
        ours, asked = translate(request, view)
        try:
            job = self._translator.job(ours, payloads)
        except (Fault, WireError) as error:
            raise _theirs(status.fault_of(error, "a request"), asked) from None
        check_outputs(asked, job)
        return job, view.signature, asked


def _theirs(fault: Fault, asked: Asked) -> Fault:
    return in_their_words(fault, asked.places, "outputs" if asked.wrt_by_outputs else "parameters[wrt]")


def id_in(data: bytes) -> str:
    """The id of a request that has failed, so that its caller knows which one; empty where it cannot be read."""
    try:
        return parse(pb.ModelInferRequest, take_apart(data).header).id
    except WireError:
        return ""
