"""Options of tensor operations: from JSON, as `pullback_wire.operations` says, to what torch takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from pullback_server.engine._names import unknown_name
from pullback_server.faults import Fault, listed
from pullback_wire import Reason
from pullback_wire.dtypes import dtype_number
from pullback_wire.operations import Operation

#: Dtypes of index tensors that choose elements by yes and no; torch takes uint8 so as well.
MASKS = (torch.bool, torch.uint8)
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
#: Elements of a list that is an option.
_LONGEST = 1024


def _bad(name: str, value: Any, expected: str) -> Fault:
    return Fault(Reason.BAD_OPTION, f"options[{name}] is {str(value)[:200]!r}, expected {expected}", f"options[{name}]")


def option_value(name: str, value: Any) -> Any:
    """The value that JSON stands for. Raises Fault (BAD_OPTION)."""
    if isinstance(value, dict):
        if len(value) == 1:
            ((kind, what),) = value.items()
            if kind == "float" and what in _FLOATS:
                return _FLOATS[what]
            if kind == "complex" and isinstance(what, list) and len(what) == 2:
                parts = [option_value(name, part) for part in what]
                if all(isinstance(part, (int, float)) for part in parts):
                    return complex(*parts)
        raise _bad(name, value, 'a number, {"float": "nan"} or {"complex": [re, im]}')
    if isinstance(value, list):
        if len(value) > _LONGEST:
            raise _bad(name, value, f"at most {_LONGEST} elements")
        return [option_value(name, item) for item in value]
    return value


def _dtype(value: Any) -> torch.dtype:
    try:
        dtype_number(value)
        found = getattr(torch, value)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _bad("dtype", value, "the name of a dtype, as 'float64'") from error
    if not isinstance(found, torch.dtype):
        raise _bad("dtype", value, "the name of a dtype, as 'float64'")
    return found


def options_of(operation: Operation, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one operation, and those of its tensor arguments that are numbers. Raises Fault."""
    if not given and not operation.required:
        return {}
    known = (*operation.options, *operation.scalars)
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise unknown_name("option", name, known, f"options[{name}]", operation.name, Reason.BAD_OPTION)
        if name == "items":
            found[name] = value
        elif name == "dtype":
            found[name] = _dtype(value)
        else:
            found[name] = option_value(name, value)
            nothing = found[name] is None and operation.name == "clamp"
            if name in operation.scalars and not nothing and not isinstance(found[name], (bool, int, float, complex)):
                raise _bad(name, value, "a number")
    for name in operation.required:
        if name not in found:
            raise Fault(
                Reason.BAD_OPTION,
                f"{operation.name} needs options[{name}]; it has {listed(found)}",
                f"options[{name}]",
            )
    return found


def index_of(items: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    """The index that `items` stand for. Raises Fault."""
    if not isinstance(items, list) or len(items) > _LONGEST:
        raise _bad("items", items, "a list with an item for each position")
    unused = set(tensors)
    found = [_item(item, tensors, unused) for item in items]
    if unused:
        raise Fault(
            Reason.BAD_OPERAND, f"index is given the tensors {listed(sorted(unused))}, which its items do not name"
        )
    return tuple(found)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _item(item: Any, tensors: Mapping[str, torch.Tensor], unused: set[str]) -> Any:
    if item is None or _is_int(item):
        return item
    if item == "...":
        return Ellipsis
    if isinstance(item, dict) and len(item) == 1:
        ((kind, what),) = item.items()
        if kind == "slice" and isinstance(what, list) and len(what) == 3:
            if all(part is None or _is_int(part) for part in what):
                return slice(*what)
        elif kind == "tensor" and isinstance(what, str):
            if what not in tensors:
                raise Fault(
                    Reason.BAD_OPERAND,
                    f"index names the tensor {what!r}, the request has {listed(tensors)}",
                    f"inputs[{what}]",
                )
            unused.discard(what)
            return tensors[what]
    raise _bad("items", item, 'an int, null, "...", {"slice": [start, stop, step]} or {"tensor": name}')


def check_index(tensor: torch.Tensor, items: tuple[Any, ...]) -> None:
    """Whether indices lie within their axes: on CUDA one that does not costs the worker. Raises Fault."""
    consumed = sum(
        item.ndim if isinstance(item, torch.Tensor) and item.dtype in MASKS else 1
        for item in items
        if item is not None and item is not Ellipsis
    )
    axis = 0
    for item in items:
        if item is None:
            continue
        if item is Ellipsis:
            axis += tensor.ndim - consumed
            continue
        if isinstance(item, torch.Tensor):
            if item.dtype in MASKS:
                axis += item.ndim
                continue
            if item.is_floating_point() or item.is_complex():
                raise Fault(
                    Reason.BAD_OPERAND, f"an index is {item.dtype}, expected integers or a mask of bool", "inputs"
                )
            if 0 <= axis < tensor.ndim and item.numel():
                size = tensor.shape[axis]
                low, high = int(item.min()), int(item.max())
                if low < -size or high >= size:
                    raise Fault(
                        Reason.VALUE_OUT_OF_RANGE,
                        f"an index holds {low if low < -size else high}, axis {axis} has {size} elements",
                        "inputs",
                    )
        axis += 1
