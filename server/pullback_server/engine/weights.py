"""Weights from a file into a module: all of them, of the very shapes and types that the module has.

A safetensors file is mapped, not read: workers on one machine share its pages until somebody writes into a tensor, and
what is written is the writer's own. Parameters stay the objects that the factory made, with their hooks, ties and
whether they require grad; only their memory is another, or filled where views of it are kept. Modules' own hooks for
load_state_dict are not run.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from pullback_server.engine._dtypes import describe
from pullback_server.hosting.loading import LoadError

Tensors = dict[str, torch.Tensor]

#: Names of a kind that an error tells.
_MOST = 10
#: How files begin that torch.save wrote: a zip archive; before torch 1.6, a pickle.
_PICKLES = (b"PK\x03\x04", b"\x80")
#: Bytes of JSON that safetensors reads at most.
_LONGEST_HEADER = 100_000_000
_WRAPPED = ("state_dict", "model_state_dict", "model", "module")


def load_weights(module: nn.Module, path: Path, owner: str, *, allow_pickle: bool = False) -> None:
    """Gives a module's parameters and persistent buffers the values in a file.

    The file must hold each of them and nothing else; of tied parameters, one name is enough. What was built on the meta
    device is on the CPU afterwards. allow_pickle: whether it may be what torch.save wrote, read with weights_only.

    Raises LoadError naming the file, and the keys that are missing, unexpected, or of another shape or type.
    """
    where = f"{owner}: {path.name}"
    tensors = _read(path, where, allow_pickle)
    places = _places(module)
    wanted = {name: getattr(place, key) for name, (place, key) in places.items()}
    _check(tensors, wanted, _extra_state(module), where)
    done: dict[int, str] = {}
    for name, own in wanted.items():
        if name not in tensors:
            continue
        first = done.setdefault(id(own), name)
        if first != name:
            if not _equal(tensors[name], tensors[first]):
                raise LoadError(f"{where}: {first!r} and {name!r} are one parameter in the model, and differ here")
            continue
        _give(own, tensors[name], [places[other] for other, one in wanted.items() if one is own])
    _check_nothing_is_meta(module, where)


def _read(path: Path, where: str, allow_pickle: bool) -> Tensors:
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise LoadError(f"{where}: cannot be read: {error.strerror}") from error
    # A safetensors file begins with the length of its header, whose first byte may be that of a pickle, and then JSON.
    is_header = start.endswith(b"{") and len(start) == 9 and int.from_bytes(start[:8], "little") <= _LONGEST_HEADER
    if start.startswith(_PICKLES) and not is_header:
        if allow_pickle:
            return _read_pickle(path, where)
        raise LoadError(
            f"{where}: it is a pickle (torch.save), expected safetensors; convert it "
            "(safetensors.torch.save_file(model.state_dict(), 'weights.safetensors'))"
        )
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: _aligned(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
    # Of tensors of a type that torch does not know, safetensors raises what its own code does.
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise LoadError(f"{where}: not a whole safetensors file: {error}") from error


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    # Files are aligned to 8 bytes at most, and some not at all. Kernels are as fast at any multiple of an element's
    # size; at others they are outside of what C++ defines.
    return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()


def _read_pickle(path: Path, where: str) -> Tensors:
    found: Any = None
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            # What was written before torch 1.6 cannot be mapped.
            if "mmap can only be used with files saved with" not in str(error):
                raise
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not torch's own words, which recommend to switch the protection off.
        why = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0]
        raise LoadError(
            f"{where}: it holds more than tensors, which is not loaded whatever the settings"
            f"{': ' + why if why else ''}; save model.state_dict() alone"
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise LoadError(f"{where}: not a whole file of torch.save: {error}") from error
    if not isinstance(found, Mapping):
        raise LoadError(f"{where}: it holds a {type(found).__name__}, expected a state dict")
    for key in _WRAPPED:
        if isinstance(found.get(key), Mapping):
            raise LoadError(
                f"{where}: it is a checkpoint whose state dict is under {key!r}, besides "
                f"{_some(name for name in found if name != key) or 'nothing'}; save that alone: "
                f"safetensors.torch.save_file(checkpoint[{key!r}], 'weights.safetensors')"
            )
    others = [str(name) for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise LoadError(f"{where}: {_some(others)} are no tensors, expected a state dict")
    return {str(name): tensor.detach() for name, tensor in found.items()}


def _places(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where a module has its parameters and persistent buffers, by their names in a state dict; tied ones by each."""
    found = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        transient = getattr(child, "_non_persistent_buffers_set", ())
        for key, tensor in itertools.chain(child._parameters.items(), child._buffers.items()):
            if tensor is not None and key not in transient:
                found[f"{prefix}.{key}".removeprefix(".")] = (child, key)
    return found


def _extra_state(module: nn.Module) -> list[str]:
    """What a state dict has besides tensors, which no file of tensors can hold."""
    return [
        f"{prefix}._extra_state".removeprefix(".")
        for prefix, child in module.named_modules()
        if type(child).get_extra_state is not nn.Module.get_extra_state
    ]


def _check(tensors: Tensors, wanted: Mapping[str, torch.Tensor], extra: list[str], where: str) -> None:
    """Raises LoadError, in one sentence for each kind of difference."""
    given = {id(wanted[name]) for name in tensors if name in wanted}
    absent: dict[int, str] = {}
    for name, own in wanted.items():
        if id(own) not in given:
            absent.setdefault(id(own), name)
    missing = list(absent.values())
    unexpected = [name for name in tensors if name not in wanted]
    shapes, dtypes = [], []
    for name, own in wanted.items():
        if isinstance(own, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            raise LoadError(f"{where}: the model's {name!r} is not initialised; run the lazy module once first")
        if name in tensors and tensors[name].shape != own.shape:
            shapes.append(f"{name!r} is {describe(tensors[name])}, expected {describe(own)}")
        elif name in tensors and tensors[name].dtype != own.dtype:
            dtypes.append(f"{name!r} is {tensors[name].dtype}, expected {own.dtype}")
    problems = [
        f"{len(found)} {what}: {_some(found)}"
        for what, found in (
            ("missing", list(map(repr, missing))),
            ("unexpected", list(map(repr, unexpected))),
            ("of another shape", shapes),
            ("of another type", dtypes),
            ("that are no tensors and cannot be loaded", list(map(repr, extra))),
        )
        if found
    ]
    if problems:
        hint = "; nothing is cast: build the model in the file's type, or convert the file" if dtypes else ""
        raise LoadError(f"{where}: it does not fit the model: {'; '.join(problems)}{hint}")


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the values are the same; NaN is NaN."""
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _some(names: Iterable[object]) -> str:
    listed = [str(name) for name in names]
    more = f" and {len(listed) - _MOST} more" if len(listed) > _MOST else ""
    return ", ".join(listed[:_MOST]) + more


def _give(own: torch.Tensor, tensor: torch.Tensor, places: list[tuple[nn.Module, str]]) -> None:
    """Lets a parameter or buffer lie where a tensor does."""
    if not own.is_meta:
        if _is_looked_at(own):
            # A view that the model keeps (a transposed weight, say) must see the new values.
            own.data.copy_(tensor)
        else:
            own.data = tensor
        return
    # What is on the meta device stays there, so another takes its place, wherever it is.
    made = nn.Parameter(tensor, requires_grad=own.requires_grad) if isinstance(own, nn.Parameter) else tensor
    for place, key in places:
        # Not into the dictionary: recurrent modules also keep a list of their weights.
        setattr(place, key, made)


def _is_looked_at(own: torch.Tensor) -> bool:
    """Whether other tensors lie in the same memory."""
    storage: Any = own.untyped_storage()
    count: Any = torch._C._storage_Use_Count
    # One user is the tensor, one is `storage`.
    return bool(count(storage._cdata) > 2)


def _check_nothing_is_meta(module: nn.Module, where: str) -> None:
    left = [
        name for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()) if tensor.is_meta
    ]
    if left:
        raise LoadError(
            f"{where}: {len(left)} stay on the meta device, for no file holds them: {_some(map(repr, left))}; the "
            "factory must make them (non-persistent buffers, say) elsewhere"
        )
