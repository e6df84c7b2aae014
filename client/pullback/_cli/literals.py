"""Arrays as JSON, both ways, without loss.

An array is `{"dtype": "float32", "shape": [2], "data": [1.5, "NaN"]}`; where dtype and shape are known otherwise, its
data alone. JSON has neither NaN nor infinities: they are "NaN", "Infinity" and "-Infinity", as in protobuf's JSON (what
Python's json writes, bare NaN, is read too). A complex number is a pair [real, imaginary].
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pullback._arrays import Array, tensor_dtype
from pullback_wire.dtypes import COMPLEX, FLOATING, wire_dtype

#: Axes that numpy's arrays have at most.
_AXES = 64
_WORDS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def is_described(value: Any) -> bool:
    """Whether a JSON value is an array with its dtype."""
    return isinstance(value, dict) and {"dtype", "data"} <= set(value) <= {"dtype", "shape", "data"}


def described_dtype(value: Any, field: str) -> np.dtype[Any]:
    """Its dtype. Raises ValueError."""
    try:
        return tensor_dtype(str(value["dtype"]))
    except ValueError:
        raise ValueError(f"{field}: {value['dtype']!r} is no dtype of a tensor") from None


def from_json(value: Any, dtype: np.dtype[Any], field: str) -> Array:
    """The array of a JSON value, each element exactly or, of floating-point dtypes, to its nearest.

    Raises ValueError naming `field` for what is no array of this dtype.
    """
    shape: Any = None
    if is_described(value):
        value, shape = value["data"], value.get("shape")
    seen = _Seen()
    array = _array(_plain(value, seen, field), seen, dtype, field)
    if shape is None:
        return array
    if not isinstance(shape, list) or not all(type(extent) is int and extent >= 0 for extent in shape):
        raise ValueError(f"{field}: shape is {shape!r}, expected a list of extents")
    # Nested lists cannot say what is behind an extent of 0.
    if list(array.shape) != shape and (array.size or math.prod(shape)):
        raise ValueError(f"{field}: data has shape {list(array.shape)}, but shape says {shape}")
    try:
        return array.reshape(shape)
    except ValueError as error:
        raise ValueError(f"{field}: shape {shape} cannot be: {error}") from None


@dataclass
class _Seen:
    """Types of the elements, and the bounds of the integers among them."""

    kinds: set[type] = field(default_factory=set)
    low: int = 0
    high: int = 0


def _plain(value: Any, seen: _Seen, field: str, depth: int = 0) -> Any:
    """The same with numbers for words."""
    if isinstance(value, list):
        if depth == _AXES:
            raise ValueError(f"{field}: lists are nested more than {_AXES} deep")
        return [_plain(element, seen, field, depth + 1) for element in value]
    if isinstance(value, str) and value in _WORDS:
        value = _WORDS[value]
    if not isinstance(value, bool | int | float):
        raise ValueError(f"{field}: {json.dumps(value)[:80]} is no number; expected numbers, or nested lists of them")
    seen.kinds.add(type(value))
    if isinstance(value, int):
        seen.low, seen.high = min(seen.low, value), max(seen.high, value)
    return value


def _array(plain: Any, seen: _Seen, dtype: np.dtype[Any], field: str) -> Array:
    number = wire_dtype(dtype)
    fits = {bool} if dtype == np.bool_ else {int, float} if number in FLOATING | COMPLEX else {int}
    if not seen.kinds <= fits:
        came = ", ".join(sorted(kind.__name__ for kind in seen.kinds - fits))
        raise ValueError(f"{field} is {dtype.name}, and the JSON given has elements that are {came}")
    if fits == {int}:
        # By Python's own integers: numpy makes floats of some, and old ones wrap around.
        bounds = np.iinfo(dtype)
        if seen.low < bounds.min or seen.high > bounds.max:
            raise ValueError(f"{field} holds an integer outside {bounds.min}..{bounds.max}, which is {dtype.name}")
    try:
        array = np.asarray(plain, np.float64 if number in FLOATING | COMPLEX else dtype)
    except OverflowError:
        raise ValueError(f"{field} holds a number that {dtype.name} cannot") from None
    except ValueError:
        raise ValueError(f"{field} is a list that makes no array: its lists are of different lengths") from None
    if number in COMPLEX:
        if array.ndim == 0 or (array.shape[-1] != 2 and array.size):
            raise ValueError(f"{field} is {dtype.name}: in JSON each number is a pair [real, imaginary]")
        # Not by arithmetic, which makes NaN beside infinities. An empty list is one without pairs.
        array = np.ascontiguousarray(array).view(np.complex128)[..., 0] if array.size else array
    with np.errstate(all="ignore"):
        cast: Array = array.astype(dtype)
    if number in FLOATING | COMPLEX and not np.array_equal(np.isfinite(array), np.isfinite(cast)):
        raise ValueError(f"{field} holds a number that {dtype.name} cannot")
    return cast


def to_json(array: Array | None) -> dict[str, Any] | None:
    """What `from_json` makes the same array of, bit for bit but for the signs and payloads of NaN; None stays None."""
    if array is None:
        return None
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": _data(array)}


def _data(array: Array) -> Any:
    number = wire_dtype(array.dtype)
    if number in COMPLEX:
        array = np.stack([array.real, array.imag], -1)
    elif number not in FLOATING:
        return array.tolist()
    wide = array.astype(np.float64)
    return wide.tolist() if np.isfinite(wide).all() else _words(wide.tolist())


def _words(value: Any) -> Any:
    """Nested lists with words for what is no finite number."""
    if isinstance(value, list):
        return [_words(element) for element in value]
    if value != value:
        return "NaN"
    return value if abs(value) != float("inf") else "Infinity" if value > 0 else "-Infinity"
