"""The Python files of an item, imported apart from those of any other item or revision.

Each item is a package of its own in sys.modules, and its files are modules of that package: two items may each have a
helper.py, and a revision runs its own code with classes of its own. `import helper` means the neighbour in every file
of the item, whenever it is executed, for each of its modules has an `__import__` of its own among its builtins;
neighbours go before what is installed, as beside a script. No .pyc is read or written.

Not isolated: what the files import from elsewhere is shared, as in any process (`surroundings` and `operators` see to
what they do to torch); and code of others that imports by name for them (importlib.import_module("helper"), a pickle)
does not find neighbours.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import linecache
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from pullback_server.engine import operators
from pullback_server.hosting.items import Item


class _Loader(SourceFileLoader):
    """Runs a file of an item, from its source and with the item's `__import__`."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        code: CodeType = self.source_to_code(self.get_data(path), path)
        return code

    def exec_module(self, module: ModuleType) -> None:
        found = _packages[_package_in(module.__name__)]
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": found.import_}
        super().exec_module(module)


class _Finder:
    """Finds the modules of items. Nothing is cached: a listing may be younger than the directory's timestamp tells."""

    @staticmethod
    def find_spec(fullname: str, path: Sequence[str] | None, _: ModuleType | None = None) -> ModuleSpec | None:
        if _package_in(fullname) not in _packages or path is None:
            return None
        for directory in path:
            loaders = ((_Loader, [".py"]), (ExtensionFileLoader, EXTENSION_SUFFIXES))
            found = FileFinder(directory, *loaders).find_spec(fullname)
            if found is not None and found.loader is not None:
                return found
        return None


def _package_in(fullname: str) -> str:
    return fullname.partition(".")[0]


class Package:
    """The files of one item, as a package."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        #: The modules and packages in the directory, by their names; a directory needs an __init__.py to be one.
        self._neighbours = {
            entry.name.partition(".")[0]
            for entry in directory.iterdir()
            if entry.name.endswith((".py", *EXTENSION_SUFFIXES)) or (entry / "__init__.py").is_file()
        }

    def has(self, name: str) -> bool:
        """Whether a module of this name, or what holds it, lies in the directory."""
        return name.partition(".")[0] in self._neighbours

    def load(self, name: str) -> ModuleType:
        """Imports a neighbour by its dotted name. Raises what its code raises."""
        return importlib.import_module(f"{self.name}.{name}")

    def import_(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        """What an import statement means in a file of the item."""
        if level == 0 and self.has(name):
            if self.name not in _packages:
                raise ImportError(f"{name}: the model that this file belongs to is unloaded", name=name)
            leaf = self.load(name)
            if not fromlist:
                return self.load(name.partition(".")[0])
            for wanted in fromlist:
                # As the statement does: what is no attribute may be a module.
                if wanted != "*" and not hasattr(leaf, wanted) and hasattr(leaf, "__path__"):
                    try:
                        importlib.import_module(f"{leaf.__name__}.{wanted}")
                    except ModuleNotFoundError as error:
                        if error.name != f"{leaf.__name__}.{wanted}":
                            raise
            return leaf
        return builtins.__import__(name, globals, locals, fromlist or (), level)


_packages: dict[str, Package] = {}


def name_of(item: Item) -> str:
    """What the package of an item is called."""
    # No two items have one name: "a.b" is not "a-b".
    text = f"{item.name}/{item.version}/{item.revision}/{item.digest[:12]}"
    return operators.ITEMS + re.sub("[^A-Za-z0-9]", lambda found: f"_{ord(found[0]):x}_", text)


def package_of(item: Item) -> Package:
    """The package of an item, anew: nothing of it is imported yet."""
    forget(item)
    name = name_of(item)
    directory = Path(item.directory).resolve()
    package = Package(name, directory)
    root = ModuleType(name, f"The files of {item.name} version {item.id}.")
    root.__path__ = [str(directory)]
    root.__package__ = name
    _packages[name] = package
    sys.modules[name] = root
    operators.own(name, f"model {item.name!r} version {item.id}")
    if _Finder not in sys.meta_path:
        # Before torch's and pytest's own, which need not be asked.
        sys.meta_path.insert(0, _Finder)
    return package


def forget(item: Item) -> None:
    """Removes an item's modules from the process, so that they go when its models do; nothing where there are none.

    Code of the item that still runs keeps what it has imported, and can import no neighbour any more.
    """
    name = name_of(item)
    if _packages.pop(name, None) is None:
        return
    operators.release(name)
    for other in [other for other in sys.modules if other == name or other.startswith(f"{name}.")]:
        module = sys.modules.pop(other)
        # Else a traceback into the next revision would show the lines of this one.
        linecache.cache.pop(getattr(module, "__file__", None) or "", None)
