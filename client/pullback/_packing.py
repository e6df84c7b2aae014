"""Named arrays as one flat vector, and which arrays of a call that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from pullback import errors
from pullback._arrays import Array, as_array
from pullback._function import INPUT, PARAMETER
from pullback._info import ModelInfo
from pullback._naming import wrt_names
from pullback_wire import numpy_dtype, wire_dtype
from pullback_wire.dtypes import COMPLEX, FLOATING, dtype_number

if TYPE_CHECKING:
    from pullback._model import RemoteModel


@dataclass(frozen=True)
class Variable:
    """An array that varies: `count` elements of the vector, beginning at `start`.

    key: its name for users, which has the prefix only where an input and a parameter share a name.
    """

    kind: str
    name: str
    key: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    count: int

    @property
    def wrt(self) -> str:
        """Its name in requests, which no other thing has."""
        return f"{self.kind}:{self.name}"


class Packing:
    """Which elements of a vector belong to which array."""

    def __init__(self, chosen: Sequence[tuple[str, str]], values: Sequence[Array]) -> None:
        names = [name for _, name in chosen]
        self.variables: list[Variable] = []
        start = 0
        for (kind, name), value in zip(chosen, values, strict=True):
            key = name if names.count(name) == 1 else f"{kind}:{name}"
            self.variables.append(Variable(kind, name, key, value.dtype, value.shape, start, value.size))
            start += value.size
        self.size = start
        self.wrt = [one.wrt for one in self.variables]

    def vector(self, x: Any, field: str = "x") -> Array:
        """A copy of x as the vector that it must be. Raises TypeError, ValueError."""
        if isinstance(x, Mapping):
            raise TypeError(f"{field} is a mapping; pack() makes a vector of it")
        found = np.asarray(x)
        if found.dtype.kind not in "fiub":
            raise TypeError(f"{field} has dtype {found.dtype}, expected real numbers")
        if found.shape != (self.size,):
            raise ValueError(f"{field} has shape {list(found.shape)}, expected [{self.size}]")
        return np.array(found, np.float64)

    def pack(self, named: Mapping[str, Any]) -> Array:
        """See Objective.pack."""
        if not isinstance(named, Mapping):
            raise TypeError(f"pack() takes a mapping from names to arrays, not a {type(named).__name__}")
        keys = [one.key for one in self.variables]
        if set(named) != set(keys):
            raise errors.BadName(f"arrays {_listed(map(str, named))} are given, what varies is {_listed(keys)}")
        return self.joined([as_array(named[key], key) for key in keys])

    def joined(self, arrays: Sequence[Array | None]) -> Array:
        """One vector of an array for each variable; None: zeros. Raises ValueError for another shape or complex."""
        vector = np.zeros(self.size)
        for one, array in zip(self.variables, arrays, strict=True):
            if array is None:
                continue
            if array.shape != one.shape:
                raise ValueError(f"{one.key} has shape {list(array.shape)}, expected {list(one.shape)}")
            if wire_dtype(array.dtype) in COMPLEX:
                raise errors.ComplexUnsupported(f"{one.key} is complex, and varies as real numbers")
            vector[one.start : one.start + one.count] = array.reshape(-1)
        return vector

    def split(self, vector: Array) -> list[Array]:
        """The arrays of a vector, each with its variable's dtype and shape, owning its memory."""
        # What a dtype cannot hold becomes infinite, which is a value.
        with np.errstate(over="ignore"):
            return [
                np.array(vector[one.start : one.start + one.count], one.dtype).reshape(one.shape)
                for one in self.variables
            ]

    def named(self, vector: Array) -> list[tuple[tuple[str, str], Array]]:
        """As `split`, each with its kind and name."""
        arrays = self.split(vector)
        return [((one.kind, one.name), array) for one, array in zip(self.variables, arrays, strict=True)]

    def tangents(self, p: Any) -> dict[str, Array]:
        """A direction as a request names it. Raises TypeError, ValueError."""
        return dict(zip(self.wrt, self.split(self.vector(p, "p")), strict=True))

    def bounds(self, info: ModelInfo) -> tuple[Array, Array]:
        """See Objective.bounds."""
        lower, upper = np.full(self.size, -math.inf), np.full(self.size, math.inf)
        declared = {spec.name: spec for spec in info.inputs}
        for one in self.variables:
            spec = declared.get(one.name) if one.kind == INPUT else None
            here = slice(one.start, one.start + one.count)
            if spec is not None and spec.minimum is not None:
                lower[here] = _inside(spec.minimum, one.dtype, math.inf)
            if spec is not None and spec.maximum is not None:
                upper[here] = _inside(spec.maximum, one.dtype, -math.inf)
        return lower, upper


def _inside(bound: float, dtype: np.dtype[Any], inwards: float) -> float:
    """The bound, or the number next to it that is still within it once it has the dtype."""
    cast = np.asarray(bound, dtype)
    if (float(cast) < bound) if inwards > 0 else (float(cast) > bound):
        cast = np.nextafter(cast, np.asarray(inwards, dtype))
    return float(cast)


def choose(
    info: ModelInfo, wrt: str | Sequence[str] | None, inputs: Mapping[str, Array], parameters: Mapping[str, Array]
) -> list[tuple[str, str]]:
    """What varies: pairs of kind and name, in the order of `wrt`. inputs, parameters: that are given.

    Raises BadName, ComplexUnsupported, ValueError.
    """
    dtypes = {(PARAMETER, spec.name): numpy_dtype(dtype_number(spec.dtype)) for spec in info.parameters if spec.dtype}
    dtypes |= {(PARAMETER, name): array.dtype for name, array in parameters.items()}
    dtypes = {(INPUT, name): array.dtype for name, array in inputs.items()} | dtypes
    if wrt is None:
        chosen = [one for one, dtype in dtypes.items() if one[0] == INPUT and _refusal(dtype) != _WHOLE]
        if not chosen:
            raise ValueError("no input is floating-point, so nothing varies; name parameters in wrt")
    else:
        chosen = []
        for pattern in wrt_names(wrt):
            chosen += [one for one in _matching(info, pattern, dtypes) if one not in chosen]
    for one in chosen:
        _check_dtype(one[1], dtypes[one])
    return chosen


def _matching(info: ModelInfo, pattern: str, dtypes: Mapping[tuple[str, str], np.dtype[Any]]) -> list[tuple[str, str]]:
    prefix, _, name = pattern.partition(":")
    if prefix == "target":
        raise ValueError(f"{pattern!r} cannot vary: inputs and parameters can, targets are fixed")
    if prefix not in (INPUT, PARAMETER):
        prefix, name = "", pattern
    found = [one for one in dtypes if prefix in ("", one[0]) and fnmatchcase(one[1], name)]
    if any(mark in name for mark in "*?["):
        # As on the server, a glob means those that can be differentiated by.
        found = [one for one in found if _refusal(dtypes[one]) != _WHOLE]
    elif len(found) > 1:
        raise errors.BadName(f"{pattern!r} is an input and a parameter; say 'input:{name}' or 'param:{name}'")
    if not found:
        have = _listed(list(dict.fromkeys(name for _, name in dtypes))[:20])
        raise errors.BadName(f"model {info.name!r} has nothing named {pattern!r} to vary; there is {have}")
    return found


_WHOLE, _COMPLEX = "it holds no floating-point numbers", "it is complex"


def _refusal(dtype: np.dtype[Any]) -> str:
    number = wire_dtype(dtype)
    return "" if number in FLOATING else _COMPLEX if number in COMPLEX else _WHOLE


def _check_dtype(name: str, dtype: np.dtype[Any]) -> None:
    """Raises for what cannot vary as real numbers: ComplexUnsupported, ValueError."""
    why = _refusal(dtype)
    if why == _COMPLEX:
        raise errors.ComplexUnsupported(
            f"{name!r} has dtype {dtype}, and an optimiser's vector is real: host a function of a real view of it "
            "(torch.view_as_complex of a last axis of 2)"
        )
    if why:
        raise ValueError(f"{name!r} has dtype {dtype} and cannot vary: {why}")


def hosted(model: RemoteModel, names: Sequence[str], timeout: float | None) -> dict[str, Array]:
    """The hosted values of parameters, read in a session of its own. Raises PullbackError."""
    from pullback._session import Session

    session = Session(model._caller.transport, [(model.name, model.version)], timeout=timeout)
    try:
        handles = session.parameters(model.name, model.version, names)
        return {name: session.get([handle])[0] for name, handle in zip(names, handles, strict=True)}
    finally:
        session.close()


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"
