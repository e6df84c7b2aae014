"""Operators that the code of models registers with torch: each belongs to the item or file that defined it.

torch has one table of operators for the process, and overwrites what is in it without a word: a second version that
defines the same custom_op would change what the first one computes. So every road into that table is watched, and who
takes it is told by the stack: the innermost file of a model, unless a module of somebody else is being imported by it.
An installed package's operators belong to nobody, and nobody else may change them.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch._library import custom_ops

from pullback_server.hosting.loading import LoadError

#: How the names of modules begin that hold models: an item's, a file's of the start.
ITEMS = "_pullback_items_"
OWNERS = (ITEMS, "_pullback_models_")

_owners: dict[str, str] = {}
_libraries: dict[str, list[torch.library.Library]] = {}
_refused: dict[str, LoadError] = {}
_titles: dict[str, str] = {}


def own(package: str, title: str) -> None:
    """From now on, what a package of an item registers is its own."""
    watch()
    _titles[package] = title


def check(package: str = "") -> None:
    """Raises LoadError where the package (none: any) was refused an operator, also if its code went on."""
    for one in [package] if package else list(_refused):
        if error := _refused.pop(one, None):
            raise error


def release(package: str) -> None:
    """Removes a package's operators. Code that still calls one meets an error."""
    _titles.pop(package, None)
    _refused.pop(package, None)
    names = [name for name, owner in _owners.items() if owner == package]
    for name in names:
        del _owners[name]
        _disable(name)
    libraries = _libraries.pop(package, [])
    for library in libraries:
        library._destroy()  # type: ignore[no-untyped-call]
    kept: Any = torch.library
    kept._keep_alive[:] = [one for one in kept._keep_alive if not any(one is other for other in libraries)]
    for name in names:
        custom_ops.OPDEFS.pop(name, None)
        custom_ops.OPDEF_TO_LIB.pop(name, None)
        kept._defs.discard(name)


def _disable(name: str) -> None:
    # torch's own handles point to what is no more, and calling one would end the process.
    def gone(*_: object, **__: object) -> None:
        raise RuntimeError(f"the operator {name} is gone: the model that defined it is unloaded")

    bare, _, overload = name.partition(".")
    space, _, short = bare.partition("::")
    packet: Any = vars(getattr(torch.ops, space)).get(short)
    definition: Any = custom_ops.OPDEFS.get(name)
    for one in (packet, getattr(packet, overload or "default", None), getattr(definition, "_opoverload", None)):
        if one is not None:
            one._op = gone
    if definition is not None:
        definition._opoverload = gone


@functools.cache
def watch() -> None:
    """Puts the watch on torch's functions, once."""
    library: Any = torch.library.Library
    definition: Any = custom_ops.CustomOpDef
    for function in ("define", "impl", "fallback"):
        _wrap(library, function, functools.partial(_by_library, function == "define"))
    _wrap(definition, "__init__", _by_definition)
    # Not register_fake, which gives no numbers.
    for function in ("register_kernel", "register_autograd", "register_vmap", "register_autocast"):
        _wrap(definition, function, lambda op, *_, **__: _claim(op._qualname, False, None))
    _wrap(definition, "register_torch_dispatch", lambda op, *_, **__: _claim(op._qualname, False, None))


def _wrap(kind: Any, name: str, before: Callable[..., None]) -> None:
    original = getattr(kind, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **keywords: Any) -> Any:
        # What a refused name was to be must not be.
        before(*args, **keywords)
        return original(*args, **keywords)

    setattr(kind, name, wrapped)


def _by_library(defines: bool, library: Any, what: Any, *args: Any, **keywords: Any) -> None:
    if defines:
        name = str(what).partition("(")[0].strip()
    elif callable(what) and not hasattr(what, "_schema"):
        name = f"{args[0] if args else keywords.get('dispatch_key', '')} (a fallback)"
    else:
        name = str(getattr(what, "_name", what))
    qualified = name if "::" in name else f"{library.ns}::{name}"
    _claim(qualified, defines, library)


def _by_definition(_: Any, namespace: str, name: str, *__: Any, **___: Any) -> None:
    _claim(f"{namespace}::{name}", True, None)


def _claim(name: str, defines: bool, library: Any) -> None:
    """Raises LoadError where the code that runs must not register this."""
    code, who = _registrant()
    name = name.removesuffix(".default")
    owner = _owners.get(name)
    if owner == who or (owner is None and not who):
        pass
    elif owner is not None:
        raise _refusal(who, code, name, f"which {_title(owner)} has defined")
    elif not defines or _exists(name):
        raise _refusal(who, code, name, "which is torch's or an installed package's, and would change for every model")
    else:
        _owners[name] = who
    if who and library is not None and not any(one is library for one in _libraries.setdefault(who, [])):
        _libraries[who].append(library)


def _exists(name: str) -> bool:
    bare, _, overload = name.partition(".")
    try:
        there: Any = torch._C._jit_get_operation(bare)[1]
    except RuntimeError:
        return False
    return overload in (there or ())


def _registrant() -> tuple[str, str]:
    """Where the code is that registers, and to whom it belongs; empty: to no model."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(OWNERS):
            place = f"{frame.f_code.co_filename.rpartition('/')[2]}, line {frame.f_lineno}"
            return place, module.partition(".")[0]
        if frame.f_code.co_name == "<module>" and module != "__main__":
            return module, ""
        frame = frame.f_back
    return "", ""


def _title(owner: str) -> str:
    module = sys.modules.get(owner)
    return _titles.get(owner) or str(getattr(module, "__file__", None) or owner)


def _refusal(who: str, code: str, name: str, why: str) -> LoadError:
    error = LoadError(
        f"{_title(who) if who else code}: it registers the operator {name} ({code}), {why}; a process has one of each "
        f"name: give it another, with the version in it ({name.partition('.')[0]}_v2), or define it in an installed "
        "package that all models import"
    )
    _refused.setdefault(who, error)
    return error
