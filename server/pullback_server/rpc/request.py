"""From a request message of GradientService to a `Job`, checked against the model's signature."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from google.protobuf import json_format

from pullback_server.faults import Fault, nearest
from pullback_server.job import Job, Kind, LossCall, Signature, TensorRef, Wrt
from pullback_server.rpc.catalogue import Catalogue
from pullback_server.rpc.kept import Kept
from pullback_server.rpc.signature import SignatureView
from pullback_wire import Reason, TensorReader, dtype_name
from pullback_wire.dtypes import RESULT_DTYPES
from pullback_wire.v1 import function_pb2, tensor_pb2
from pullback_wire.v1 import gradient_service_pb2 as pb

Request: TypeAlias = (
    pb.EvaluateRequest
    | pb.ComputeVjpRequest
    | pb.ComputeJvpRequest
    | pb.ComputeHvpRequest
    | pb.ComputeJacobianRequest
    | pb.ComputeHessianRequest
)


#: Bytes of a loss's options, and of an operation's: they are a handful of numbers and words, which cost far more than
#: their bytes to read.
LARGEST_OPTIONS = 64 << 10


@dataclass(frozen=True)
class ResultLimits:
    """What one call may ask for: bytes of results, and cotangents at once."""

    bytes: int
    cotangents: int


class Translator:
    """Makes jobs of requests."""

    def __init__(self, catalogue: Catalogue | Kept, limits: ResultLimits) -> None:
        self._catalogue = catalogue
        self._limits = limits

    def signature(self, model: str, version: str) -> Signature:
        """Of a model as a request names it. Raises Fault."""
        return self._catalogue.find(model, version, "function.").signature

    def job(self, request: Request, payloads: Sequence[memoryview]) -> Job:
        """The job that a request asks for. Its tensors refer to `payloads`, of which nothing is copied.

        Raises Fault or WireError for what is wrong with the request, as far as that can be told without running it.
        """
        function = request.function
        view = self._catalogue.find(function.model, function.version, "function.")
        reader = TensorReader(payloads)
        inputs = _tensors(reader, request.inputs, "inputs")
        targets = _tensors(reader, request.targets, "targets")
        parameters = _tensors(reader, request.parameters, "parameters")
        view.check_inputs(inputs)
        if parameters:
            view.check_parameters(parameters)
        loss = loss_of(function, view)
        if targets and loss is None:
            raise Fault(Reason.BAD_NAME, f"target {targets[0].name!r} is given but no loss is named", "targets")
        job = Job(
            kind=_KINDS[type(request)],
            model=view.signature.name,
            version=view.signature.id,
            loss=loss,
            train=train_of(function),
            seed=function.seed if function.HasField("seed") else None,
            inputs=inputs,
            parameters=parameters,
            targets=targets,
            wrt=[],
            cotangents=[],
            batched=False,
            tangents=[],
            allow_unused=False,
            return_outputs=not request.results.omit_outputs,
            return_cotangent_derivatives=False,
            result_dtype=_result_dtype(request.results.dtype),
            max_norm=None,
            max_result_bytes=self._limits.bytes,
            max_cotangents=self._limits.cotangents,
            detect_anomaly=function.detect_anomaly,
        )
        self._derivative(job, request, reader, view)
        reader.finish()
        return job

    def _derivative(self, job: Job, request: Request, reader: TensorReader, view: SignatureView) -> None:
        """What differs between the kinds of request."""
        if isinstance(request, pb.EvaluateRequest):
            if request.results.omit_outputs:
                raise Fault(
                    Reason.BAD_OPTION,
                    "results.omit_outputs is set, but Evaluate returns nothing but outputs",
                    "results.omit_outputs",
                )
            return
        if isinstance(request, pb.ComputeJvpRequest):
            job.tangents = _tensors(reader, request.tangents, "tangents")
            if not job.tangents:
                raise Fault(Reason.BAD_NAME, "at least one tangent is needed", "tangents")
            job.wrt, job.tangents = self._tangents(job, view, None)
            return
        job.wrt = view.resolve(request.wrt, job.inputs, job.targets, "wrt")
        job.allow_unused = request.allow_unused
        if isinstance(request, pb.ComputeVjpRequest):
            job.cotangents = _tensors(reader, request.cotangents, "cotangents")
            job.batched = request.cotangents_batched
            if job.batched and not job.cotangents:
                raise Fault(
                    Reason.MISSING_COTANGENT, "cotangents_batched is set but there are no cotangents", "cotangents"
                )
            if request.HasField("max_norm"):
                # Infinity clips nothing and still reports the norm.
                if math.isnan(request.max_norm) or request.max_norm <= 0:
                    raise Fault(
                        Reason.BAD_OPTION, f"max_norm is {request.max_norm}, expected a positive number", "max_norm"
                    )
                job.max_norm = request.max_norm
        elif isinstance(request, pb.ComputeHvpRequest):
            job.cotangents = _tensors(reader, request.cotangents, "cotangents")
            job.tangents = _tensors(reader, request.tangents, "tangents")
            if not job.tangents:
                raise Fault(Reason.BAD_NAME, "at least one tangent is needed", "tangents")
            _, job.tangents = self._tangents(job, view, job.wrt)
            job.return_cotangent_derivatives = request.return_cotangent_derivatives

    def _tangents(
        self, job: Job, view: SignatureView, among: Sequence[Wrt] | None
    ) -> tuple[list[Wrt], list[TensorRef]]:
        """Resolves the tangents' names, and renames the tangents to the labels; `among`: what they may name."""
        wrt: list[Wrt] = []
        for index, tangent in enumerate(job.tangents):
            field = f"tangents[{index}]"
            # A glob is no name for one tensor; the bare name is looked up as it stands.
            if any(mark in tangent.name for mark in "*?[") or not tangent.name:
                raise Fault(Reason.BAD_NAME, f"{field}.name is {tangent.name!r}, expected one name", f"{field}.name")
            resolved = view.resolve([tangent.name], job.inputs, job.targets, "tangents")[0]
            if resolved in wrt:
                raise Fault(Reason.BAD_NAME, f"tangent {tangent.name!r} is given twice", f"{field}.name")
            if among is not None and resolved not in among:
                raise Fault(
                    Reason.BAD_NAME,
                    f"tangent {tangent.name!r} is not among wrt: {', '.join(repr(one.label) for one in among)}",
                    f"{field}.name",
                )
            wrt.append(resolved)
        renamed = [
            TensorRef(resolved.label, tangent.dtype, tangent.shape, tangent.payload)
            for resolved, tangent in zip(wrt, job.tangents, strict=True)
        ]
        return wrt, renamed


_KINDS: dict[type[Request], Kind] = {
    pb.EvaluateRequest: "evaluate",
    pb.ComputeVjpRequest: "vjp",
    pb.ComputeJvpRequest: "jvp",
    pb.ComputeHvpRequest: "hvp",
    pb.ComputeJacobianRequest: "jacobian",
    pb.ComputeHessianRequest: "hessian",
}


_MODES = frozenset(function_pb2.Mode.values())


def _tensors(reader: TensorReader, tensors: Iterable[tensor_pb2.Tensor], field: str) -> list[TensorRef]:
    refs = []
    for index, tensor in enumerate(tensors):
        if tensor.transfer:
            raise Fault(
                Reason.BAD_TENSOR,
                f"{field}[{index}].transfer is set; only a session has transfers",
                f"{field}[{index}]",
            )
        reader.claim(tensor, f"{field}[{index}]")
        refs.append(TensorRef(tensor.name, tensor.dtype, tuple(tensor.shape), tensor.payload))
    return refs


def loss_of(function: function_pb2.Function, view: SignatureView) -> LossCall | None:
    """The function's loss. Raises Fault when there is none of its name."""
    if not function.HasField("loss"):
        return None
    loss = function.loss
    if loss.name not in view.losses:
        raise Fault(
            Reason.LOSS_NOT_FOUND,
            f"no loss is called {loss.name!r}; {nearest(loss.name, sorted(view.losses))}",
            "function.loss.name",
        )
    return LossCall(loss.name, loss_options(loss), dict(loss.bindings))


def loss_options(loss: function_pb2.Loss) -> dict[str, Any]:
    """A loss's options. Raises Fault for numbers that are none."""
    if not loss.HasField("options"):
        return {}
    if (size := loss.options.ByteSize()) > LARGEST_OPTIONS:
        raise Fault(
            Reason.BAD_OPTION,
            f"function.loss.options has {size} bytes, at most {LARGEST_OPTIONS} are allowed",
            "function.loss.options",
        )
    try:
        return json_format.MessageToDict(loss.options)
    # What a Struct can hold and JSON cannot: NaN and infinities.
    except ValueError as error:
        raise Fault(Reason.BAD_OPTION, f"function.loss.options: {error}", "function.loss.options") from None


def train_of(function: function_pb2.Function) -> bool:
    """Whether the function's mode is MODE_TRAIN. Raises Fault for a mode that does not exist."""
    mode = function.mode
    if mode not in _MODES:
        raise Fault(Reason.BAD_OPTION, f"function.mode is {mode}, expected MODE_EVAL or MODE_TRAIN", "function.mode")
    return mode == function_pb2.MODE_TRAIN


def _result_dtype(number: int) -> int:
    if number and number not in RESULT_DTYPES:
        wanted = ", ".join(dtype_name(known) for known in sorted(RESULT_DTYPES))
        raise Fault(
            Reason.BAD_OPTION, f"results.dtype is {dtype_name(number)}, expected one of {wanted}", "results.dtype"
        )
    return number


_NAMED_FIELD = re.compile(r"(inputs|parameters|targets|cotangents|tangents)\[(.*)\](.*)")


def wire_path(field: str, job: Job) -> str:
    """The path of a field as the message has it: a worker says "cotangents[output].shape", the wire counts."""
    found = _NAMED_FIELD.fullmatch(field)
    if found is None:
        # Globs were resolved, so a place in the job's wrt is none in the message's.
        return "wrt" if field.startswith("wrt[") else field
    names = [tensor.name for tensor in getattr(job, found[1])]
    return f"{found[1]}[{names.index(found[2])}]{found[3]}" if found[2] in names else found[1]
