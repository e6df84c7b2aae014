"""What a model returns, as named tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from pullback_server.faults import Fault
from pullback_wire import Reason


def flatten(value: Any, declared: Sequence[str] | None, owner: str) -> dict[str, torch.Tensor]:
    """Tensors of a model's result by name.

    A tensor is "output"; a tuple's or list's elements are "output_0", ... unless `declared` names them; mappings,
    dataclasses and named tuples give their own names; what is nested is joined by dots; None is passed over.

    Raises Fault (MODEL_ERROR) for what is no tensor, for no tensor at all, and for one name given twice.
    """
    if isinstance(value, torch.Tensor):
        _check_data(value, "output", owner)
        if declared is None:
            return {"output": value}
        if len(declared) == 1:
            return {declared[0]: value}
        raise Fault(
            Reason.MODEL_ERROR, f"{owner} returned one tensor, {len(declared)} outputs are declared: {declared}"
        )
    found: dict[str, torch.Tensor] = {}
    for name, tensor in _walked(value, declared, owner):
        if name in found:
            raise Fault(Reason.MODEL_ERROR, f"{owner} returned two outputs called {name!r}")
        found[name] = tensor
    if not found:
        raise Fault(Reason.MODEL_ERROR, f"{owner} returned no tensor but {_shown(value)}")
    return found


def _walked(value: Any, declared: Sequence[str] | None, owner: str) -> list[tuple[str, torch.Tensor]]:
    try:
        return list(_named(value, declared, owner))
    except RecursionError:
        raise Fault(Reason.MODEL_ERROR, f"{owner} returned a {type(value).__name__} nested without end") from None


def _named(value: Any, declared: Sequence[str] | None, owner: str) -> Iterator[tuple[str, torch.Tensor]]:
    fields = _children(value)
    if fields is None:
        yield from _leaves("output", value, owner)
        return
    if isinstance(value, (tuple, list)):
        if declared is not None:
            if len(declared) != len(value):
                raise Fault(
                    Reason.MODEL_ERROR,
                    f"{owner} returned {len(value)} outputs, {len(declared)} are declared: {', '.join(declared)}",
                )
            fields = list(zip(declared, value, strict=True))
        elif not hasattr(value, "_fields"):
            fields = [(f"output_{key}", child) for key, child in fields]
    for name, child in fields:
        yield from _leaves(name, child, owner)


def _leaves(name: str, value: Any, owner: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        _check_data(value, name, owner)
        yield name, value
    elif value is not None:
        fields = _children(value)
        if fields is None:
            raise Fault(
                Reason.MODEL_ERROR,
                f"{owner} returned {_shown(value)} as {name!r}; outputs must be tensors, or tuples, lists, mappings "
                "and dataclasses of them",
            )
        for key, child in fields:
            yield from _leaves(f"{name}.{key}", child, owner)


def _check_data(tensor: torch.Tensor, name: str, owner: str) -> None:
    if tensor.is_meta:
        raise Fault(Reason.MODEL_ERROR, f"{owner} returned a meta tensor as {name!r}, which has no data")


def _children(value: Any) -> list[tuple[str, Any]] | None:
    if isinstance(value, Mapping):
        return [(str(key), child) for key, child in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return [(str(index), child) for index, child in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def _shown(value: Any) -> str:
    if value is None:
        return "None"
    kind = type(value).__name__
    return f"an empty {kind}" if isinstance(value, (tuple, list, Mapping)) and not value else f"a {kind}"
