"""Where a module's code may find parameters and buffers other than by their names in a module.

A list, a closure or a default argument that holds the very tensor goes on holding it when another one takes its place
in the module: what a caller gives would silently not be used there.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: Most objects that are looked at; who builds more of them by hand, for a model, hides nothing by accident.
_MOST = 50_000
_ATOMS = (int, float, complex, str, bytes, type(None), types.ModuleType, types.BuiltinFunctionType)
_REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})
#: What torch's recurrent modules keep, and make anew when their parameters are others.
_FLAT = frozenset({"_flat_weights", "_flat_weight_refs"})


@dataclass(frozen=True, slots=True)
class Reference:
    """place: the attribute that leads to a tensor. copied: whether a deep copy of the module has its own."""

    place: str
    copied: bool


def _within(value: Any) -> Iterator[tuple[Any, bool]]:
    """What an object holds, and whether its deep copy holds copies of that."""
    if isinstance(value, dict):
        yield from ((item, True) for pair in value.items() for item in pair)
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from ((item, True) for item in value)
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents, False
            # Nothing was assigned yet.
            except ValueError:
                continue
        yield value.__defaults__, False
        yield value.__kwdefaults__, False
        yield vars(value), False
    elif isinstance(value, types.MethodType):
        yield value.__self__, True
        yield value.__func__, True
    elif isinstance(value, functools.partial):
        yield from ((item, True) for item in (value.func, value.args, value.keywords, vars(value)))
    elif isinstance(value, weakref.ref):
        yield value(), False
    elif isinstance(value, (staticmethod, classmethod)):
        yield value.__func__, False
    elif isinstance(value, property):
        yield from ((code, False) for code in (value.fget, value.fset))
    elif isinstance(value, type):
        return
    else:
        yield getattr(value, "__dict__", None), True


def tensors_from(
    value: Any, copied: bool = True, known: frozenset[int] = frozenset(), seen: set[tuple[int, bool]] | None = None
) -> Iterator[tuple[torch.Tensor, bool]]:
    """The tensors that an object leads to, but for those behind what is known (by id)."""
    seen = set() if seen is None else seen
    stack = [(value, copied)]
    while stack and len(seen) < _MOST:
        value, copied = stack.pop()
        if isinstance(value, _ATOMS) or (id(value), copied) in seen or id(value) in known:
            continue
        seen.add((id(value), copied))
        if isinstance(value, torch.Tensor):
            yield value, copied
        else:
            stack.extend((item, copied and still) for item, still in _within(value))


def references(module: nn.Module, wanted: Mapping[int, str]) -> dict[str, Reference]:
    """The wanted tensors (id -> name) that attributes lead to; where several do, one that no copy has a copy of."""
    originals = frozenset(map(id, module.modules()))
    found: dict[str, Reference] = {}
    seen: set[tuple[int, bool]] = set()

    def note(place: str, value: Any, copied: bool) -> None:
        for tensor, still in tensors_from(value, copied, originals, seen):
            name = wanted.get(id(tensor))
            if name is not None and (name not in found or not still):
                found[name] = Reference(place, still)
            # A tensor may be an attribute in several places.
            seen.discard((id(tensor), still))

    for prefix, child in module.named_modules():
        skipped = _REGISTERED | _FLAT if isinstance(child, nn.RNNBase) else _REGISTERED
        for name, value in list(vars(child).items()):
            if name not in skipped:
                note(f"{prefix}.{name}".removeprefix("."), value, True)
        for kind in type(child).__mro__:
            if kind.__module__.partition(".")[0] not in ("torch", "builtins", "typing", "abc"):
                for name, value in list(vars(kind).items()):
                    note(f"{kind.__qualname__}.{name}", value, False)
    return found
