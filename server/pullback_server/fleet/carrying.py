"""Models defined in the front's process (a notebook, a test), on their way to a worker."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from pullback_server.fleet.seam import StartError
from pullback_server.hosting.spec import Registration


def carry(registrations: Sequence[Registration]) -> bytes:
    """A pickle of the registrations that a worker can load.

    What a worker could not import is carried by value, as what is defined in `__main__` is anyway.

    Raises StartError for what cannot be carried.
    """
    import cloudpickle

    try:
        with _by_value(registrations):
            carried: bytes = cloudpickle.dumps(list(registrations))
    # Pickling runs code of whatever is pickled.
    except Exception as error:
        names = ", ".join(repr(registration.name) for registration in registrations)
        raise StartError(
            f"the models {names} cannot be carried to a worker process: {type(error).__name__}: {error}; "
            "put them into a file and name the file"
        ) from error
    return carried


@contextmanager
def _by_value(registrations: Sequence[Registration]) -> Iterator[None]:
    import cloudpickle

    modules = {id(module): module for r in registrations if (module := _unimportable(r)) is not None}
    for module in modules.values():
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules.values():
            cloudpickle.unregister_pickle_by_value(module)


def _unimportable(registration: Registration) -> ModuleType | None:
    """The module that a model was defined in, if only this process has it (as pytest and runpy make them)."""
    name = getattr(registration.target, "__module__", None)
    module = sys.modules.get(name) if isinstance(name, str) else None
    if module is None or module.__name__ == "__main__":
        return None
    try:
        found = importlib.machinery.PathFinder.find_spec(module.__name__.partition(".")[0])
    except (ImportError, ValueError):
        found = None
    return module if found is None and module.__name__ not in sys.builtin_module_names else None
