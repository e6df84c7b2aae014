"""What the parameters of a ModelInferRequest ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from pullback_server.faults import Fault, nearest
from pullback_wire import Reason
from pullback_wire.inference import open_inference_pb2 as pb

Transform: TypeAlias = Literal["", "vjp", "hvp"]
Value: TypeAlias = bool | int | float | str

#: Between a model's name and that of a derivative; no model's name has it.
MARK = "@"
TRANSFORMS: tuple[Transform, ...] = ("vjp", "hvp")
_SWITCHES: dict[str, Transform] = {"pullback_vjp": "vjp", "pullback_hvp": "hvp"}
_OPTION, _BINDING = "loss:", "bind:"
#: Of a function, and so of every request; of derivatives.
_FUNCTION = ("loss", "seed", "train", "detect_anomaly")
_DERIVATIVE: dict[Transform, tuple[str, ...]] = {
    "": (),
    "vjp": ("wrt", "allow_unused", "max_norm", "is_grads_batched"),
    "hvp": ("wrt", "allow_unused"),
}
_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")
#: Said to other servers, or to their HTTP side, and without a meaning here.
_MEANINGLESS = ("binary_data", "binary_data_output", "headers", "triton_enable_empty_final_response")


@dataclass
class Wishes:
    """The parameters of one request. Defaults: as when there are none.

    seconds: that it may take. urgent: it goes before the same caller's others. loss, options, bindings, train, seed,
    detect_anomaly: of the function. wrt: None where none was named. The others as in ComputeVjpRequest.
    """

    transform: Transform = ""
    seconds: float | None = None
    urgent: bool = False
    loss: str = ""
    options: dict[str, Value] = field(default_factory=dict)
    bindings: dict[str, str] = field(default_factory=dict)
    train: bool = False
    seed: int | None = None
    detect_anomaly: bool = False
    wrt: list[str] | None = None
    allow_unused: bool = False
    max_norm: float | None = None
    is_grads_batched: bool = False


def split_name(name: str) -> tuple[str, str]:
    """A model's name and what stands behind it, which may be no derivative's name."""
    model, _, transform = name.partition(MARK)
    return model, transform


def transform_of(name: str, field: str) -> Transform:
    """The derivative that a name asks for. Raises Fault (MODEL_NOT_FOUND) for one that there is not."""
    model, transform = split_name(name)
    if name == model:
        return ""
    for known in TRANSFORMS:
        if transform == known:
            return known
    raise Fault(
        Reason.MODEL_NOT_FOUND,
        f"no model is called {name!r}; behind {MARK!r} comes one of {', '.join(TRANSFORMS)}",
        field,
    )


def wishes(name: str, parameters: Mapping[str, pb.InferParameter]) -> Wishes:
    """What a request for a model of this name asks for.

    A forward pass ignores what it does not know, as Triton does. A derivative does not: an option that is spelled
    wrongly would make it another number.

    Raises Fault.
    """
    found = Wishes(_transform(name, parameters))
    known = _FUNCTION + _DERIVATIVE[found.transform]
    for key, parameter in parameters.items():
        if key in _SWITCHES or key in _MEANINGLESS:
            continue
        if key in _SEQUENCE:
            _no_sequence(key, parameter)
        elif key == "timeout":
            found.seconds = _whole(key, parameter) / 1e6 or None
        elif key == "priority":
            # Of Triton's levels the first is the most urgent, and 0 is that of the model.
            found.urgent = _whole(key, parameter) == 1
        elif key.startswith(_OPTION):
            found.options[key.removeprefix(_OPTION)] = _value(key, parameter)
        elif key.startswith(_BINDING):
            found.bindings[key.removeprefix(_BINDING)] = _text(key, parameter)
        elif key in known:
            _take(found, key, parameter)
        else:
            _check_unknown(name, found.transform, key, known)
    if not found.loss and (found.options or found.bindings):
        key = _OPTION if found.options else _BINDING
        raise Fault(Reason.BAD_OPTION, f"parameters has '{key}...', but no loss is named", "parameters[loss]")
    return found


def _transform(name: str, parameters: Mapping[str, pb.InferParameter]) -> Transform:
    asked: dict[Transform, str] = {}
    if (by_name := transform_of(name, "model_name")) != "":
        asked[by_name] = f"model_name {name!r}"
    for key, transform in _SWITCHES.items():
        if key in parameters and _truth(key, parameters[key]):
            asked.setdefault(transform, f"parameters[{key}]")
    if len(asked) > 1:
        raise Fault(Reason.BAD_OPTION, f"{' and '.join(asked.values())} ask for two derivatives", "parameters")
    return next(iter(asked), "")


def _take(found: Wishes, key: str, parameter: pb.InferParameter) -> None:
    if key == "loss":
        found.loss = _text(key, parameter)
    elif key == "wrt":
        found.wrt = [name for part in _text(key, parameter).split(",") if (name := part.strip())]
        if not found.wrt:
            raise _bad(key, parameter, "names with commas between")
    elif key == "seed":
        found.seed = _whole(key, parameter)
    elif key == "max_norm":
        found.max_norm = _number(key, parameter)
    else:
        setattr(found, key, _truth(key, parameter))


def _no_sequence(key: str, parameter: pb.InferParameter) -> None:
    if _value(key, parameter):
        raise Fault(
            Reason.BAD_OPTION,
            f"parameters[{key}] is set, but models here keep nothing between requests: there are no sequences",
            f"parameters[{key}]",
        )


def _check_unknown(name: str, transform: Transform, key: str, known: tuple[str, ...]) -> None:
    where = f"parameters[{key}]"
    if key.startswith("triton_"):
        raise Fault(Reason.BAD_OPTION, f"{where}: of the names that begin with 'triton_' there is none such", where)
    if transform or key.startswith("pullback_"):
        names = (*known, *_SWITCHES, "timeout", "priority", f"{_OPTION}OPTION", f"{_BINDING}ARGUMENT")
        raise Fault(Reason.BAD_OPTION, f"{where} is not known; {nearest(key, names)}", where)
    if any(key in names for names in _DERIVATIVE.values()):
        raise Fault(
            Reason.BAD_OPTION,
            f"{where} belongs to a derivative; ask model '{name}{MARK}vjp' for one, or set pullback_vjp",
            where,
        )


def _value(key: str, parameter: pb.InferParameter) -> Value:
    kind = parameter.WhichOneof("parameter_choice")
    if kind is None:
        raise _bad(key, parameter, "a value")
    found: Value = getattr(parameter, kind)
    return found


def _truth(key: str, parameter: pb.InferParameter) -> bool:
    """Clients that know strings alone can say it too."""
    value = _value(key, parameter)
    if isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
    if value not in (True, False):
        raise _bad(key, parameter, "true or false")
    return bool(value)


def _text(key: str, parameter: pb.InferParameter) -> str:
    value = _value(key, parameter)
    if not isinstance(value, str):
        raise _bad(key, parameter, "a string")
    return value


def _number(key: str, parameter: pb.InferParameter) -> float:
    value = _value(key, parameter)
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except ValueError:
        raise _bad(key, parameter, "a number") from None


def _whole(key: str, parameter: pb.InferParameter) -> int:
    value = _value(key, parameter)
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise _bad(key, parameter, "a whole number, 0 or more")
    return value


def _bad(key: str, parameter: pb.InferParameter, expected: str) -> Fault:
    kind = parameter.WhichOneof("parameter_choice")
    shown = "nothing" if kind is None else ascii(getattr(parameter, kind))[:100]
    return Fault(Reason.BAD_OPTION, f"parameters[{key}] is {shown}, expected {expected}", f"parameters[{key}]")
