"""From what users pass to named tensors, and back from named results to the structure that was passed.

There is one convention for inputs, cotangents and tangents: a single array, a tuple (or a list that holds arrays) by
position, or a mapping by name. None in a tuple or mapping leaves that one out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pullback import errors
from pullback._arrays import Array, as_array, is_array, is_differentiable
from pullback._info import ModelInfo

#: A derivative by name; None: unused.
Named = Sequence[tuple[str, Array | None]]

#: What the server calls outputs that nobody has named: the only one, and the elements of a tuple.
_ONLY_OUTPUT = "output"
_TUPLE_OUTPUT = "output_{}"


@dataclass(frozen=True)
class Inputs:
    """The inputs of a call: arrays by name, and how they were passed; names: by position, left-out ones included."""

    arrays: dict[str, Array]
    passed: Literal["one", "tuple", "mapping"]
    names: tuple[str, ...]

    def differentiable(self) -> list[str]:
        """Names of the floating-point and complex ones: what an empty wrt means."""
        return [name for name, array in self.arrays.items() if is_differentiable(array)]


def _several(value: Any) -> bool:
    """Whether `value` is several tensors by position: a tuple, or a list that holds arrays."""
    return isinstance(value, tuple) or (isinstance(value, list) and any(map(is_array, value)))


def by_name(values: Mapping[str, Any] | None, field: str) -> dict[str, Array]:
    """A mapping of tensors; what is None in it is left out. Raises TypeError as `as_array` does."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(f"{field} is a {type(values).__name__}, expected a mapping from names to arrays")
    for name in values:
        if not isinstance(name, str):
            raise TypeError(f"{field} has a key {name!r}, expected names")
    return {name: as_array(value, f"{field}[{name!r}]") for name, value in values.items() if value is not None}


def _by_position(values: Sequence[Any], names: Sequence[str], field: str) -> dict[str, Array]:
    return by_name(dict(zip(names, values, strict=True)), field)


async def name_inputs(value: Any, info: Callable[[], Awaitable[ModelInfo]]) -> Inputs:
    """Names the inputs of a call; `info` is asked only where they are not named already.

    Raises BadName where positions do not tell the names, TypeError and ValueError as `as_array` does.
    """
    if isinstance(value, Mapping):
        arrays = by_name(value, "inputs")
        return Inputs(arrays, "mapping", tuple(arrays))
    signature = await info()
    specs = signature.inputs
    names = tuple(spec.name for spec in specs)
    if _several(value):
        if len(value) > len(names):
            hint = "; pass one array, stacked, if you mean one" if isinstance(value, list) else ""
            raise errors.BadName(f"{len(value)} inputs are given, {_takes(signature)}{hint}")
        names = names[: len(value)]
        return Inputs(_by_position(value, names, "inputs"), "tuple", names)
    required = [spec.name for spec in specs if not spec.optional]
    if not names or len(required) > 1 or (required and required[0] != names[0]):
        raise errors.BadName(f"one input is given, {_takes(signature)}; pass a tuple or a mapping by name")
    return Inputs({names[0]: as_array(value, f"inputs[{names[0]!r}]")}, "one", names[:1])


def _takes(info: ModelInfo) -> str:
    inputs = ", ".join(f"{spec.name!r}{' (optional)' if spec.optional else ''}" for spec in info.inputs)
    return f"model {info.name!r} takes {len(info.inputs)}: {inputs or 'none'}"


async def name_cotangents(value: Any, has_loss: bool, info: Callable[[], Awaitable[ModelInfo]]) -> dict[str, Array]:
    """Names the cotangents of a call; None: there are none.

    Raises BadName where positions do not tell the names, TypeError and ValueError as `as_array` does.
    """
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return by_name(value, "cotangents")
    several = _several(value)
    known = ("loss",) if has_loss else tuple(spec.name for spec in (await info()).outputs)
    # The server does not know the outputs of a model it could not try; these are the names it would give.
    if several:
        names = known or tuple(_TUPLE_OUTPUT.format(index) for index in range(len(value)))
        if len(value) > len(names):
            raise errors.BadName(f"{len(value)} cotangents are given, the outputs are {_listed(names)}")
        return _by_position(value, names[: len(value)], "cotangents")
    names = known or (_ONLY_OUTPUT,)
    if len(names) > 1:
        raise errors.BadName(
            f"one cotangent is given, the outputs are {_listed(names)}; pass a tuple or a mapping by name"
        )
    return {names[0]: as_array(value, f"cotangents[{names[0]!r}]")}


def name_tangents(value: Any, inputs: Inputs) -> dict[str, Array]:
    """Names tangents by the inputs they move, or as a mapping does (which may name parameters).

    Raises BadName where positions do not tell the names, TypeError and ValueError as `as_array` does.
    """
    if isinstance(value, Mapping):
        return by_name(value, "tangents")
    if _several(value):
        if inputs.passed == "mapping" or len(value) > len(inputs.names):
            raise errors.BadName(
                f"{len(value)} tangents are given by position for the inputs {_listed(inputs.names)}; "
                "pass them as the inputs are passed"
            )
        return _by_position(value, inputs.names[: len(value)], "tangents")
    if len(inputs.names) != 1:
        raise errors.BadName(
            f"one tangent is given for the inputs {_listed(inputs.names)}; pass a tuple or a mapping by name"
        )
    return {inputs.names[0]: as_array(value, f"tangents[{inputs.names[0]!r}]")}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def wrt_names(wrt: str | Sequence[str] | None) -> list[str]:
    """The request's wrt. Raises TypeError for what is no name and no sequence of names."""
    if wrt is None:
        return []
    names = [wrt] if isinstance(wrt, str) else list(wrt)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"wrt holds {name!r}, expected names or globs")
    if not names:
        raise ValueError("wrt is empty; None means every floating-point input")
    return names


def wants_one(wrt: str | Sequence[str] | None, inputs: Inputs) -> bool:
    """Whether there is one derivative, which comes back bare: wrt is one name, or left out with one array passed."""
    return inputs.passed == "one" if wrt is None else isinstance(wrt, str) and not any(mark in wrt for mark in "*?[")


def structured(named: Named, wrt: str | Sequence[str] | None, inputs: Inputs) -> Any:
    """Derivatives in the structure of what they belong to.

    Without wrt as the inputs were passed: one array, a tuple (None for what is not floating-point), or a dict. With
    wrt one name: one array. Else a dict by name.

    Raises ProtocolError when the server's names are not those that were asked for.
    """
    if wants_one(wrt, inputs):
        if len(named) != 1:
            raise errors.ProtocolError(f"one derivative was asked for, the server sent {_listed(n for n, _ in named)}")
        return named[0][1]
    if wrt is not None:
        return dict(named)
    found = {bare_input(name): array for name, array in named}
    if set(found) - set(inputs.arrays):
        raise errors.ProtocolError(
            f"derivatives by {_listed(inputs.arrays)} were asked for, the server sent {_listed(found)}"
        )
    return tuple(found.get(name) for name in inputs.names) if inputs.passed == "tuple" else found


def bare_input(name: str) -> str:
    """The server prefixes an input only where a parameter has the same name."""
    return name.removeprefix("input:")
