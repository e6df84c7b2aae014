"""From the frames of a session to ops, and from what they came to back to frames."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from google.protobuf.message import Message

from pullback_server import ops
from pullback_server.faults import Fault
from pullback_server.job import HealthRecord, Job, LossCall, TensorRef
from pullback_server.rpc.kept import Kept
from pullback_server.rpc.request import LARGEST_OPTIONS, Translator, loss_of, loss_options, train_of
from pullback_wire import Reason, TensorReader
from pullback_wire.operations import OPERATIONS
from pullback_wire.v1 import session_service_pb2 as pb
from pullback_wire.v1 import tensor_pb2

#: Handles are unsigned 64-bit numbers that msgpack and Python know as they are; some room is left to count on.
_LARGEST_HANDLE = 2**63
#: Tensors and operands of one frame, which cost far more than their bytes to look at.
_MOST_OPERANDS = 1 << 16
#: How deep lists and objects of options may lie in one another; `index` takes lists of lists.
_DEEPEST = 64


def tensors_in(frame: pb.SessionRequest) -> Iterator[tensor_pb2.Tensor]:
    """Every tensor of a frame. Raises Fault where there are too many."""
    kind = frame.WhichOneof("frame")
    _check_count(frame, kind)
    if kind == "put":
        yield from frame.put.tensors
    elif kind == "call":
        for operand in (*frame.call.inputs, *frame.call.targets, *frame.call.parameters):
            if operand.HasField("tensor"):
                yield operand.tensor
    elif kind == "grad":
        for operand in frame.grad.grad_outputs:
            if operand.HasField("tensor"):
                yield operand.tensor
    elif kind == "stateless":
        request: Any = stateless_request(frame)
        for field in ("inputs", "targets", "parameters", "cotangents", "tangents"):
            yield from getattr(request, field, ())


def _check_count(frame: pb.SessionRequest, kind: str | None) -> None:
    count = 0
    if kind == "put":
        count = len(frame.put.tensors)
    elif kind == "call":
        count = len(frame.call.inputs) + len(frame.call.targets) + len(frame.call.parameters)
    elif kind == "grad":
        count = len(frame.grad.grad_outputs)
    elif kind == "stateless":
        request: Any = stateless_request(frame)
        fields = ("inputs", "targets", "parameters", "cotangents", "tangents")
        count = sum(len(getattr(request, field, ())) for field in fields)
    if count > _MOST_OPERANDS:
        raise Fault(
            Reason.MALFORMED_REQUEST, f"{kind} has {count} tensors, at most {_MOST_OPERANDS} are allowed", kind or ""
        )


def stateless_request(frame: pb.SessionRequest) -> Message:
    """The request inside a stateless op. Raises Fault."""
    kind = frame.stateless.WhichOneof("request")
    if kind is None:
        raise Fault(Reason.MALFORMED_REQUEST, "stateless.request is not set", "stateless.request")
    request: Message = getattr(frame.stateless, kind)
    return request


def handles_of(frame: pb.SessionRequest) -> list[int]:
    """The handles that an op would make."""
    kind = frame.WhichOneof("frame")
    if kind in ("put", "call", "grad", "parameters"):
        return list(getattr(frame, kind).handles)
    return []


class OpTranslator:
    """Makes ops of frames, as far as that can be told without the session's tensors."""

    def __init__(self, catalogue: Kept, translator: Translator) -> None:
        self._catalogue = catalogue
        self._translator = translator

    def stateless(self, frame: pb.SessionRequest, payloads: Sequence[memoryview], max_result_bytes: int) -> Job:
        """Raises Fault or WireError."""
        request: Any = stateless_request(frame)
        job = self._translator.job(request, payloads)
        job.max_result_bytes = max_result_bytes
        return job

    def limits(self, frame: pb.SessionRequest) -> HealthRecord:
        """What is said of the health of a stateless op's model, as a request names it. Raises Fault."""
        request: Any = stateless_request(frame)
        return self._translator.signature(request.function.model, request.function.version).health

    def op(self, frame: pb.SessionRequest, payloads: Sequence[memoryview]) -> ops.Op:
        """Raises Fault or WireError."""
        reader = TensorReader(payloads)
        match frame.WhichOneof("frame"):
            case "put":
                found: ops.Op = self._put(frame.put, reader)
            case "call":
                found = self._call(frame.call, reader)
            case "grad":
                found = self._grad(frame.grad, reader)
            case "get":
                found = ops.Get(_handles(frame.get.handles, "get.handles"))
            case "parameters":
                found = self._parameters(frame.parameters)
            case _:
                found = ops.Release()
        reader.finish()
        return found

    def _put(self, put: pb.PutOp, reader: TensorReader) -> ops.Put:
        handles = _handles(put.handles, "put.handles")
        _same_length(len(put.tensors), len(handles), "put.tensors", "put.handles")
        flags = list(put.requires_grad) or [False] * len(handles)
        _same_length(len(put.tensors), len(flags), "put.tensors", "put.requires_grad")
        values = []
        for index, (tensor, handle, flag) in enumerate(zip(put.tensors, handles, flags, strict=True)):
            value = _claim(reader, tensor, f"put.tensors[{index}]")
            values.append(ops.Operand(tensor.name, 0, value, handle, flag))
        return ops.Put(values)

    def _parameters(self, op: pb.ParametersOp) -> ops.Parameters:
        view = self._catalogue.find(op.model.name, op.model.version, "parameters.model.")
        handles = _handles(op.handles, "parameters.handles")
        _same_length(len(op.names), len(handles), "parameters.names", "parameters.handles")
        return ops.Parameters(view.signature.name, view.signature.id, list(op.names), handles)

    def _call(self, call: pb.CallOp, reader: TensorReader) -> ops.Call:
        callee = self._callee(call)
        handles = _handles(call.handles, "call.handles")
        if not handles and not (isinstance(callee, ops.Operation) and _in_place(callee.name)):
            raise Fault(Reason.BAD_HANDLE, "call.handles is empty; at least the first output needs one", "call.handles")
        return ops.Call(
            callee=callee,
            inputs=_operands(call.inputs, reader, "call.inputs"),
            targets=_operands(call.targets, reader, "call.targets"),
            parameters=_operands(call.parameters, reader, "call.parameters"),
            handles=handles,
            fetch=list(call.fetch),
            fetch_below=max(call.fetch_below, 0),
            max_order=call.max_order if call.HasField("max_order") else None,
            no_grad=call.no_grad,
        )

    def _callee(self, call: pb.CallOp) -> ops.Model | ops.Loss | ops.Operation:
        kind = call.WhichOneof("callee")
        if kind == "function":
            function = call.function
            view = self._catalogue.find(function.model, function.version, "call.function.")
            return ops.Model(
                view.signature.name,
                view.signature.id,
                loss_of(function, view),
                train_of(function),
                function.seed if function.HasField("seed") else None,
                function.detect_anomaly,
            )
        if kind == "loss":
            return ops.Loss(LossCall(call.loss.name, loss_options(call.loss), dict(call.loss.bindings)))
        if kind == "operation":
            return ops.Operation(call.operation, _options(call.options_json))
        raise Fault(Reason.MALFORMED_REQUEST, "call has no function, loss or operation", "call")

    def _grad(self, grad: pb.GradOp, reader: TensorReader) -> ops.Grad:
        outputs = _handles(grad.outputs, "grad.outputs")
        cotangents: list[ops.Operand | None] = []
        for index, operand in enumerate(grad.grad_outputs):
            if operand.WhichOneof("source") is None:
                cotangents.append(None)
            else:
                cotangents.append(_operand(operand, reader, f"grad.grad_outputs[{index}]"))
        if cotangents:
            _same_length(len(cotangents), len(outputs), "grad.grad_outputs", "grad.outputs")
        inputs, handles = _handles(grad.inputs, "grad.inputs"), _handles(grad.handles, "grad.handles")
        _same_length(len(inputs), len(handles), "grad.inputs", "grad.handles")
        return ops.Grad(
            outputs=outputs,
            grad_outputs=cotangents or [None] * len(outputs),
            inputs=inputs,
            handles=handles,
            retain_graph=grad.retain_graph if grad.HasField("retain_graph") else None,
            create_graph=grad.create_graph,
            allow_unused=grad.allow_unused,
            batched=grad.is_grads_batched,
            fetch=list(grad.fetch),
            fetch_below=max(grad.fetch_below, 0),
            detect_anomaly=grad.detect_anomaly,
        )


def result_of(outcome: ops.SessionOutcome) -> pb.OpResult:
    """The answer to an op on handles; its tensors refer to payloads by the outcome's own indices."""
    result = pb.OpResult()
    for record in outcome.handles:
        info = result.handles.add(
            handle=record.handle,
            name=record.name,
            unused=record.unused,
            requires_grad=record.requires_grad,
            shares=record.shares,
        )
        if not record.unused:
            info.tensor.dtype = record.dtype  # type: ignore[assignment]
            info.tensor.shape.extend(record.shape)
        if record.value is not None:
            info.has_value = True
            info.tensor.payload = record.value.payload
    return result


def _in_place(name: str) -> bool:
    return name in OPERATIONS and OPERATIONS[name].in_place


def _handles(numbers: Iterable[int], field: str) -> list[int]:
    handles = list(numbers)
    for index, handle in enumerate(handles):
        if not 0 < handle < _LARGEST_HANDLE:
            raise Fault(
                Reason.BAD_HANDLE, f"{field}[{index}] is {handle}, expected 1 to 2**63 - 1", f"{field}[{index}]"
            )
    return handles


def _same_length(count: int, other: int, what: str, than: str) -> None:
    if count != other:
        raise Fault(Reason.MALFORMED_REQUEST, f"{what} has {count} elements and {than} {other}", what)


def _claim(reader: TensorReader, tensor: tensor_pb2.Tensor, field: str) -> TensorRef:
    reader.claim(tensor, field)
    return TensorRef(tensor.name, tensor.dtype, tuple(tensor.shape), tensor.payload)


def _operands(operands: Iterable[pb.Operand], reader: TensorReader, field: str) -> list[ops.Operand]:
    return [_operand(operand, reader, f"{field}[{index}]") for index, operand in enumerate(operands)]


def _operand(operand: pb.Operand, reader: TensorReader, field: str) -> ops.Operand:
    source = operand.WhichOneof("source")
    if source == "handle":
        if operand.keep:
            raise Fault(Reason.BAD_HANDLE, f"{field}.keep is set, but there is no tensor to store", f"{field}.keep")
        return ops.Operand(operand.name, _handles([operand.handle], f"{field}.handle")[0])
    if source is None:
        raise Fault(Reason.MALFORMED_REQUEST, f"{field} has neither a handle nor a tensor", field)
    if operand.keep:
        _handles([operand.keep], f"{field}.keep")
    value = _claim(reader, operand.tensor, f"{field}.tensor")
    return ops.Operand(operand.name, 0, value, operand.keep, operand.requires_grad)


def _options(text: str) -> dict[str, Any]:
    if not text:
        return {}
    if len(text) > LARGEST_OPTIONS:
        raise Fault(
            Reason.BAD_OPTION,
            f"call.options_json has {len(text)} characters, at most {LARGEST_OPTIONS} are allowed",
            "call.options_json",
        )
    try:
        options = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Fault(Reason.BAD_OPTION, f"call.options_json is no JSON: {error}", "call.options_json") from None
    if not isinstance(options, dict):
        raise Fault(
            Reason.BAD_OPTION,
            f"call.options_json holds a {type(options).__name__}, expected an object",
            "call.options_json",
        )
    _check_numbers(options)
    return options


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON; write it as {{'float': ...}}")


def _check_numbers(value: Any, depth: int = 0) -> None:
    """What crosses to the worker has integers of 64 bits, and does not nest until a stack is at its end."""
    if depth > _DEEPEST:
        raise Fault(Reason.BAD_OPTION, f"call.options_json nests deeper than {_DEEPEST} levels", "call.options_json")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            _check_numbers(one, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise Fault(Reason.BAD_OPTION, "call.options_json holds a number too large for a double", "call.options_json")
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise Fault(
            Reason.BAD_OPTION, f"call.options_json holds {value}, which has more than 64 bits", "call.options_json"
        )
