"""From what an operator names (a file, a module, an object) to its registrations. Runs in workers."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

from pullback_server.hosting.spec import Registration, collecting, first_line, registrations_of

#: Where installed packages announce their models.
ENTRY_POINTS = "pullback.models"
_ENTRY_POINT = "entry-point:"


class LoadError(Exception):
    """A model source that cannot be loaded; the message names the source and the cause."""


def _import_file(path: Path) -> ModuleType:
    # A name of its own for each path, so that two files called models.py do not replace one another.
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    name = f"_pullback_models_{digest}_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise LoadError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    # A model file may import its neighbours, as a script may.
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def importing(source: str) -> Iterator[list[Registration]]:
    """Around the import of a model's code: collects what it registers. Raises LoadError where it fails."""
    collected: list[Registration] = []
    token = collecting.set(collected)
    try:
        yield collected
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"{source}: import failed: {type(error).__name__}: {error}") from error
    except SystemExit as error:
        raise LoadError(f"{source}: called exit({error.code!r}) while it was imported") from error
    finally:
        collecting.reset(token)


def load_source(source: str) -> list[Registration]:
    """Registrations made by a Python file ("models.py", "dir/models.py"), an importable module ("package.models"), or
    what installed packages announce in the group pullback.models ("entry-point:NAME"; "entry-point:*" is all of them).

    Raises LoadError when the source is missing, registers nothing, or fails to import (with that error as its cause).
    """
    if source.startswith(_ENTRY_POINT):
        return _load_entry_points(source.removeprefix(_ENTRY_POINT))
    path = Path(source)
    is_file = source.endswith(".py") or path.exists()
    if is_file and not path.is_file():
        raise LoadError(f"{source}: no such file")
    with importing(source) as collected:
        module = _import_file(path.resolve()) if is_file else importlib.import_module(source)
    registrations = list(collected)
    # A module that was imported before, or that re-exports models, registers nothing while it is imported here.
    for value in vars(module).values():
        registrations += [found for found in registrations_of(value) if found not in registrations]
    if not registrations:
        raise LoadError(f'{source}: no model is registered in it; decorate a factory or function with @model("name")')
    return registrations


def entry_point(name: str) -> Any:
    """What an entry point of the group pullback.models leads to. Raises LoadError."""
    there = importlib.metadata.entry_points(group=ENTRY_POINTS)
    found = {one.value: one for one in there if one.name == name}
    if not found:
        names = ", ".join(sorted({one.name for one in there})) or "none"
        raise LoadError(
            f"{_ENTRY_POINT}{name}: no installed package has an entry point of this name in the group {ENTRY_POINTS}; "
            f"there are {names}"
        )
    if len(found) > 1:
        raise LoadError(f"{_ENTRY_POINT}{name}: several packages have it: {', '.join(sorted(found))}")
    (one,) = found.values()
    with importing(f"{_ENTRY_POINT}{name} ({one.value})"):
        return one.load()


def _load_entry_points(name: str) -> list[Registration]:
    names = [name]
    if name == "*":
        names = sorted({one.name for one in importlib.metadata.entry_points(group=ENTRY_POINTS)})
        if not names:
            raise LoadError(f"{_ENTRY_POINT}*: no installed package has entry points in the group {ENTRY_POINTS}")
    registrations: list[Registration] = []
    for one in names:
        value = entry_point(one)
        own = list(registrations_of(value))
        # A whole module may be named: all that is registered in it.
        for inner in vars(value).values() if isinstance(value, ModuleType) else ():
            own += [found for found in registrations_of(inner) if found not in own]
        if not own and (isinstance(value, ModuleType) or not callable(value)):
            raise LoadError(f"{_ENTRY_POINT}{one}: no model is registered in it, and it is no factory or function")
        try:
            registrations += own or [Registration(one, value, description=first_line(value))]
        except ValueError as error:
            raise LoadError(f"{_ENTRY_POINT}{one}: {error}") from None
    return registrations


def place(registrations: Sequence[Registration], workers: Sequence[str]) -> dict[str, list[Registration]]:
    """Which worker holds which models, by the workers' names; every worker comes to the same.

    A model with fewer replicas than workers that may hold it goes where the fewest models are.

    Raises LoadError for a model that no worker may hold.
    """
    placed: dict[str, list[Registration]] = {name: [] for name in workers}
    for registration in registrations:
        options = registration.options
        may = [name for name in workers if not options.devices or any(fnmatchcase(name, p) for p in options.devices)]
        if not may:
            raise LoadError(
                f"model {registration.name!r}: devices={list(options.devices)} matches none of the workers "
                f"{', '.join(workers)}"
            )
        # Sorting is stable: the first of those that hold equally many.
        for name in sorted(may, key=lambda name: len(placed[name]))[: options.replicas]:
            placed[name].append(registration)
    return placed


def check_unique(registrations: Iterable[Registration]) -> None:
    """Raises LoadError when two registrations claim one name and version."""
    seen: set[tuple[str, str]] = set()
    for registration in registrations:
        key = (registration.name, registration.version)
        if key in seen:
            raise LoadError(f"two models are called {registration.name!r} version {registration.version}")
        seen.add(key)
