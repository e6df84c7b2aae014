"""From a ModelInferRequest to the request of GradientService that asks for the same, and back to its words in faults.

So both become jobs in the same place, and there is nothing that only one of them can ask for, or is held to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pullback_server.faults import Fault
from pullback_server.rpc.inference.parameters import MARK, Transform, Wishes, split_name, wishes
from pullback_server.rpc.request import Request
from pullback_server.rpc.signature import SignatureView
from pullback_wire import Reason
from pullback_wire.inference import DATATYPES
from pullback_wire.inference import open_inference_pb2 as pb
from pullback_wire.v1 import function_pb2, tensor_pb2
from pullback_wire.v1 import gradient_service_pb2 as gradient

#: Before the names of outputs.
GRAD, HVP, JVP = "grad:", "hvp:", "jvp:"
#: Before the names of inputs, and what they are.
PREFIXES = {"grad_output:": "cotangents", "target:": "targets", "param:": "parameters", "tangent:": "tangents"}
#: What only derivatives have.
_ONLY: Mapping[str, tuple[Transform, ...]] = {"cotangents": ("vjp", "hvp"), "tangents": ("hvp",)}
_DERIVED: Mapping[Transform, tuple[str, ...]] = {"": (), "vjp": (GRAD,), "hvp": (GRAD, HVP, JVP)}
_REQUESTS: Mapping[
    Transform, type[gradient.EvaluateRequest | gradient.ComputeVjpRequest | gradient.ComputeHvpRequest]
] = {"": gradient.EvaluateRequest, "vjp": gradient.ComputeVjpRequest, "hvp": gradient.ComputeHvpRequest}


@dataclass(frozen=True)
class Asked:
    """What of a request concerns its answer, and the words in which faults are told.

    name, id: as in the request. transform: the derivative that is computed. outputs: that are wanted, in order; none:
    all. places: of the tensors of our request's fields, their indices among the inputs. seconds, urgent: see Wishes.
    wrt_by_outputs: the outputs that are wanted say what is differentiated by.
    """

    name: str
    id: str
    transform: Transform
    outputs: tuple[str, ...]
    places: Mapping[str, Sequence[int]]
    seconds: float | None
    urgent: bool
    wrt_by_outputs: bool


def translate(request: pb.ModelInferRequest, view: SignatureView) -> tuple[Request, Asked]:
    """Our request, whose tensors have the inputs' indices as those of their payloads.

    Raises Fault, in the words of the request.
    """
    asked = wishes(request.model_name, request.parameters)
    transform = asked.transform
    tensors: dict[str, list[tensor_pb2.Tensor]] = {name: [] for name in ("inputs", *PREFIXES.values())}
    places: dict[str, list[int]] = {name: [] for name in tensors}
    for index, given in enumerate(request.inputs):
        field, name = _place(given.name, view, asked)
        if transform not in _ONLY.get(field, (transform,)):
            raise Fault(
                Reason.BAD_NAME,
                f"inputs[{index}].name is {given.name!r}; that is for model "
                f"'{split_name(request.model_name)[0]}{MARK}{_ONLY[field][0]}'",
                f"inputs[{index}].name",
            )
        dtype = tensor_pb2.Dtype.ValueType(DATATYPES[given.datatype])
        tensors[field].append(tensor_pb2.Tensor(name=name, dtype=dtype, shape=given.shape, payload=index))
        places[field].append(index)
    outputs = _outputs(request)
    derived = [name for name in outputs if name.startswith(_DERIVED[transform])]
    by_outputs = bool(derived) and asked.wrt is None
    about = Asked(request.model_name, request.id, transform, outputs, places, asked.seconds, asked.urgent, by_outputs)
    ours: Request = _REQUESTS[transform](
        function=_function(request, asked),
        inputs=tensors["inputs"],
        targets=tensors["targets"],
        parameters=tensors["parameters"],
    )
    if not isinstance(ours, gradient.ComputeVjpRequest | gradient.ComputeHvpRequest):
        return ours, about
    ours.results.omit_outputs = bool(outputs) and len(derived) == len(outputs)
    moved = [tensor.name for tensor in tensors["tangents"]]
    ours.wrt.extend(asked.wrt if asked.wrt is not None else _wrt(derived, moved))
    ours.cotangents.extend(tensors["cotangents"])
    ours.allow_unused = asked.allow_unused
    if isinstance(ours, gradient.ComputeVjpRequest):
        ours.cotangents_batched = asked.is_grads_batched
        if asked.max_norm is not None:
            ours.max_norm = asked.max_norm
    else:
        ours.tangents.extend(tensors["tangents"])
        ours.return_cotangent_derivatives = any(name.startswith(JVP) for name in outputs)
    return ours, about


def _place(name: str, view: SignatureView, asked: Wishes) -> tuple[str, str]:
    """The field of our request that an input belongs to, and its name there."""
    if name in view.inputs:
        return "inputs", name
    for prefix, field in PREFIXES.items():
        if name.startswith(prefix):
            return field, name.removeprefix(prefix)
    if name == "target" and asked.loss:
        return "targets", name
    return "inputs", name


def _function(request: pb.ModelInferRequest, asked: Wishes) -> function_pb2.Function:
    function = function_pb2.Function(
        model=split_name(request.model_name)[0],
        version=request.model_version,
        mode=function_pb2.MODE_TRAIN if asked.train else function_pb2.MODE_EVAL,
        seed=asked.seed,
        detect_anomaly=asked.detect_anomaly,
    )
    if asked.loss:
        function.loss.name = asked.loss
        function.loss.bindings.update(asked.bindings)
        for name, value in asked.options.items():
            function.loss.options[name] = value
    return function


def _outputs(request: pb.ModelInferRequest) -> tuple[str, ...]:
    """Names of the outputs that are wanted, each once."""
    for index, output in enumerate(request.outputs):
        for key in ("classification", "shared_memory_region"):
            if key in output.parameters:
                raise Fault(
                    Reason.BAD_OPTION,
                    f"outputs[{index}].parameters[{key}] is set, which this server does not offer",
                    f"outputs[{index}].parameters[{key}]",
                )
    return tuple(dict.fromkeys(output.name for output in request.outputs))


def _wrt(wanted: Sequence[str], tangents: Sequence[str]) -> list[str]:
    """What to differentiate by, where no parameter says so: what is wanted, and what moves. None: all inputs."""
    names = [name.partition(":")[2] for name in wanted if not name.startswith(JVP)]
    for name in names:
        if any(mark in name for mark in "*?["):
            raise Fault(Reason.BAD_NAME, f"an output is called {name!r}; several are named by parameter wrt", "outputs")
    return list(dict.fromkeys((*names, *tangents))) if names else []


_PATH = re.compile(r"\b(inputs|targets|parameters|cotangents|tangents)\[(\d+)\]")
#: As a worker says it.
_NAMED = re.compile(r"\b(targets|parameters|cotangents|tangents)\[([^\]\d][^\]]*)\]")
_PREFIX_OF = {field: prefix for prefix, field in PREFIXES.items()}
_WORDS = (
    ("function.loss.options", "parameters[loss:...]"),
    ("function.loss.bindings", "parameters[bind:...]"),
    ("function.loss.name", "parameters[loss]"),
    ("function.loss", "parameters[loss]"),
    ("function.model", "model_name"),
    ("function.version", "model_version"),
    ("cotangents_batched", "parameters[is_grads_batched]"),
    ("max_norm", "parameters[max_norm]"),
)
_FIELDS = {"name": "model_name", "version": "model_version", **dict.fromkeys(PREFIXES.values(), "inputs")}
_HINTS = {Reason.MISSING_COTANGENT: "; a cotangent is an input called 'grad_output:NAME' here"}


def in_their_words(
    fault: Fault, places: Mapping[str, Sequence[int]] = MappingProxyType({}), wrt: str = "parameters[wrt]"
) -> Fault:
    """A fault of our request, as one of theirs. places: see Asked. wrt: where that says what is differentiated by."""

    def rename(found: re.Match[str]) -> str:
        where, index = places.get(found[1], ()), int(found[2])
        return f"inputs[{where[index]}]" if index < len(where) else found[0]

    field, message = _PATH.sub(rename, fault.field), _PATH.sub(rename, fault.message)
    message = _NAMED.sub(lambda found: f"inputs[{_PREFIX_OF[found[1]]}{found[2]}]", message)
    for ours, theirs in (*_WORDS, ("wrt", wrt)):
        if field.startswith(ours):
            field = theirs
        if ours.startswith("function."):
            message = message.replace(ours, theirs)
    field = _FIELDS.get(field, field)
    if field.endswith(".dtype"):
        field = field.removesuffix("dtype") + "datatype"
    # Their clients show the message alone.
    if field and field.partition(".")[0] not in message:
        message = f"{field}: {message}"
    return Fault(fault.reason, message + _HINTS.get(fault.reason, ""), field, fault.retry_after)
