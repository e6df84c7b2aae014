"""From an item of a repository, or an upload, to the registration of what it makes."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from pullback_server.engine import operators
from pullback_server.engine.exported import load_exported
from pullback_server.engine.hosted import copied, takes_arguments
from pullback_server.engine.modules import Package, forget, name_of, package_of
from pullback_server.engine.scripted import load_scripted
from pullback_server.engine.surroundings import kept
from pullback_server.engine.weights import load_weights
from pullback_server.faults import listed
from pullback_server.hosting.items import Item
from pullback_server.hosting.loading import LoadError, entry_point, importing
from pullback_server.hosting.manifest import Manifest
from pullback_server.hosting.manifest_source import Source
from pullback_server.hosting.spec import Registration, TensorSpec, first_line, registrations_of

__all__ = ["forget", "name_of", "registration_of"]

T = TypeVar("T")
_CPU = torch.device("cpu")


def registration_of(
    item: Item, known: Mapping[tuple[str, str], Registration], device: torch.device = _CPU
) -> Registration:
    """What an item registers.

    known: registrations of the start by name and version; an upload may have the architecture of one.
    device: where it will run; exported graphs name the device of what they create.

    Nothing of it remains in the process after `forget`. Raises LoadError naming the model and the cause.
    """
    owner = item.owner
    try:
        if item.base is not None:
            found = _base(item, known)
            if item.weights:
                found = _with_weights(found, Path(item.weights), False, owner)
        elif not item.manifest:
            raise LoadError(f"{owner}: it has neither a manifest nor a model whose architecture it has")
        else:
            found = _of_manifest(item, Manifest.model_validate_json(item.manifest), owner, device)
        return replace(found, name=item.name, version=item.version, revision=item.revision, digest=item.digest)
    except LoadError:
        forget(item)
        raise
    # What the manifest adds may not fit what the file says: a micro_batch without a batch_axis.
    except (TypeError, ValueError) as error:
        forget(item)
        raise LoadError(f"{owner}: {error}") from error


def _base(item: Item, known: Mapping[tuple[str, str], Registration]) -> Registration:
    assert item.base is not None
    name, version = item.base
    found = known.get(item.base)
    if found is None:
        there = [f"{name} version {version}" for name, version in known]
        raise LoadError(
            f"{item.owner}: no model {name!r} version {version} was registered at the "
            f"start, whose architecture it could have; there are {listed(there) or 'none'}"
        )
    return found


def _of_manifest(item: Item, manifest: Manifest, owner: str, device: torch.device) -> Registration:
    source, directory = manifest.source, Path(item.directory)
    match source.kind:
        case "pt2":
            found = load_exported(item.name, directory / str(source.file), owner, device)
        case "torchscript":
            found = load_scripted(item.name, directory / str(source.file), owner, device)
        case "entry-point":
            with kept(owner):
                found = _chosen(entry_point(str(source.entry_point)), item, source, owner)
        case _:
            found = _of_python(item, source, owner)
    found = _overlaid(found, manifest)
    weights = Path(item.weights) if item.weights else manifest.source.weights_in(directory)
    if weights is None:
        return found
    return _with_weights(found, weights, source.allow_pickle and not item.weights, owner)


def _of_python(item: Item, source: Source, owner: str) -> Registration:
    package = package_of(item)
    name = source.module or str(source.file).removesuffix(".py").replace("/", ".")
    where = f"{owner}: {source.module or source.file}"
    if not source.module and not (Path(item.directory) / str(source.file)).is_file():
        raise LoadError(f"{where}: no such file")
    with importing(where) as collected, kept(where):
        module = _imported(package, name)
        operators.check(package.name)
    if source.object is not None:
        return _chosen(_attribute(module, source.object, where), item, source, where)
    found = list(collected)
    for value in vars(module).values():
        found += [one for one in registrations_of(value) if one not in found]
    if len(found) != 1:
        there = listed([f"{one.name} ({_title(one.target)})" for one in found])
        what = f"several models are registered in it: {there}" if found else "no model is registered in it"
        raise LoadError(f"{where}: {what}; name its factory or function as `object`")
    return _called(found[0], source, where)


def _imported(package: Package, name: str) -> ModuleType:
    return package.load(name) if package.has(name) else importlib.import_module(name)


def _attribute(module: ModuleType, path: str, where: str) -> Any:
    value: Any = module
    for name in path.split("."):
        try:
            value = getattr(value, name)
        except AttributeError:
            own = [key for key, one in vars(module).items() if callable(one) and not key.startswith("_")]
            raise LoadError(f"{where}: it has no {path!r}; it has {listed(own) or 'nothing to call'}") from None
    return value


def _chosen(value: Any, item: Item, source: Source, where: str) -> Registration:
    """The registration of an object, decorated or not."""
    decorated = registrations_of(value)
    if len(decorated) > 1:
        decorated = tuple(one for one in decorated if one.name == item.name) or decorated
    if len(decorated) > 1:
        raise LoadError(f"{where}: {_title(value)} is registered as {listed([one.name for one in decorated])}")
    if not decorated and not callable(value):
        raise LoadError(
            f"{where}: {source.object or source.entry_point} is a {type(value).__name__}, expected a factory of a "
            "module, or a function of tensors"
        )
    found = decorated[0] if decorated else Registration(item.name, value, description=first_line(value))
    return _called(found, source, where)


def _title(value: Any) -> str:
    return str(getattr(value, "__qualname__", type(value).__name__))


def _called(found: Registration, source: Source, where: str) -> Registration:
    """With the arguments of the manifest bound. Raises LoadError where they do not fit."""
    target = found.target
    is_class = isinstance(target, type)
    if isinstance(target, nn.Module):
        if source.arguments:
            raise LoadError(f"{where}: {_title(target)} is a module already, which takes no arguments")
        return found
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        try:
            # A class is a factory, whatever it needs; of a function, what is missing are tensors.
            (signature.bind if is_class else signature.bind_partial)(**source.arguments)
        except TypeError as error:
            raise LoadError(
                f"{where}: the arguments {source.arguments!r} do not fit {_title(target)}{signature}: {error}"
            ) from None
    if not source.arguments:
        return found
    bound = functools.partial(target, **source.arguments)
    return replace(found, target=bound, kind="factory" if is_class else found.kind)


def _overlaid(found: Registration, manifest: Manifest) -> Registration:
    """What the manifest says goes before what the source says, key by key; a key at its default says nothing."""
    inputs = dict(found.inputs)
    for name, spec in manifest.specs().items():
        inputs[name] = _over(inputs.get(name, TensorSpec()), spec, TensorSpec())
    return replace(
        found,
        description=manifest.description or found.description,
        inputs=inputs,
        outputs=manifest.outputs if manifest.outputs is not None else found.outputs,
        batch_axis=manifest.batch_axis if manifest.batch_axis is not None else found.batch_axis,
        options=_over(found.options, manifest.options(), type(found.options)()),
        gate=_over(found.gate, manifest.gate_of(), type(found.gate)()),
    )


def _over(under: T, above: T, default: T) -> T:
    """One dataclass over another, field by field."""
    changes: dict[str, Any] = {}
    for one in fields(above):  # type: ignore[arg-type]
        low, high, usual = (getattr(value, one.name) for value in (under, above, default))
        if high == usual:
            continue
        nested = is_dataclass(high) and is_dataclass(low) and is_dataclass(usual)
        changes[one.name] = _over(low, high, usual) if nested else high
    return replace(under, **changes)  # type: ignore[type-var]


@dataclass(frozen=True)
class _WithWeights:
    """A factory, and then weights from a file."""

    factory: Callable[..., Any]
    path: Path
    allow_pickle: bool
    owner: str

    def __call__(self) -> nn.Module:
        module = self.factory()
        if not isinstance(module, nn.Module):
            raise LoadError(
                f"{self.owner}: its factory returned a {type(module).__name__}, expected an nn.Module, into which "
                f"{self.path.name} could be loaded"
            )
        load_weights(module, self.path, self.owner, allow_pickle=self.allow_pickle)
        return module


def _with_weights(found: Registration, path: Path, allow_pickle: bool, owner: str) -> Registration:
    target = found.target
    if isinstance(target, nn.Module):
        module = target
        return replace(found, target=_WithWeights(lambda: copied(module), path, allow_pickle, owner), kind="factory")
    if found.kind == "function" or (found.kind == "auto" and takes_arguments(target)):
        raise LoadError(
            f"{owner}: {_title(target)} is a function of tensors, which has no weights that {path.name} could be "
            "loaded into"
        )
    return replace(found, target=_WithWeights(target, path, allow_pickle, owner), kind="factory")
