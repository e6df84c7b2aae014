"""The files of a repository, on a local path or whatever fsspec reaches: listed, never read but on demand."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from pullback_server.hosting.manifest_paths import ignored, unfit

#: What stores tell of a file that changes with its contents, under the names they have for it.
_SUMS = ("ETag", "etag", "md5Hash", "content_md5", "checksum", "generation", "VersionId")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")


@dataclass(frozen=True)
class Listed:
    """A file. stamp: differs when its contents do, as far as can be known without reading them."""

    size: int
    stamp: str


@dataclass
class Tree:
    """What is in the directory of one model, by path relative to it; names to be ignored are left out.

    directories: those directly in it, empty ones as well, where the store has such.
    problems: why a path cannot be used; "": the directory itself.
    """

    files: dict[str, Listed] = field(default_factory=dict)
    directories: set[str] = field(default_factory=set)
    problems: dict[str, str] = field(default_factory=dict)


class Files(Protocol):
    """Where a repository lies. Every method may raise what the store raises; OSError if it is a local path."""

    def check(self) -> None:
        """Raises FileNotFoundError, NotADirectoryError or what the store raises when there is no such directory."""

    def models(self) -> dict[str, Tree]:
        """Every model's tree, by the name of its directory."""

    def model(self, name: str) -> Tree:
        """One model's tree; raises FileNotFoundError when there is no such directory."""

    def open(self, path: str) -> BinaryIO:
        """A file, by its path relative to the repository."""


def reach(url: str, storage_options: dict[str, Any]) -> Files:
    """The files at a local path or an fsspec URL. Raises ImportError or ValueError for an URL nothing here can read."""
    # A listing that was kept would hide what has changed.
    options = {"use_listings_cache": False, "skip_instance_cache": True, **storage_options}
    store, root = url_to_fs(url, **options)
    if isinstance(store, LocalFileSystem):
        return LocalFiles(root)
    return StoredFiles(store, root)


def shown_url(url: str) -> str:
    """An URL without the password that may be in it."""
    return re.sub(r"//([^/@:]*):[^/@]*@", r"//\1:***@", url)


class LocalFiles:
    """On this machine's file systems. Symbolic links are followed unless they lead out of the root."""

    def __init__(self, root: str) -> None:
        self._root = root

    def check(self) -> None:
        os.scandir(self._root).close()

    def models(self) -> dict[str, Tree]:
        found = {}
        with os.scandir(self._root) as entries:
            # Path's answers no, where the entry's raises, of a link to itself.
            names = sorted(one.name for one in entries if not ignored(one.name) and Path(one.path).is_dir())
        for name in names:
            try:
                found[name] = self.model(name)
            except FileNotFoundError:
                # Removed since it was listed.
                continue
            except OSError as error:
                found[name] = Tree(problems={"": f"cannot be read: {error.strerror}"})
        return found

    def model(self, name: str) -> Tree:
        root = os.path.realpath(self._root)
        tree = Tree()
        top = os.path.realpath(f"{root}/{name}")
        if not _within(top, root):
            tree.problems[""] = f"is a symbolic link to {top}, which is outside of the repository"
            return tree
        self._walk(top, "", root, (top,), tree)
        return tree

    def _walk(self, directory: str, prefix: str, root: str, above: tuple[str, ...], tree: Tree) -> None:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            path = prefix + name
            if ignored(name):
                continue
            if reason := unfit(name):
                tree.problems[path] = reason
                continue
            target = os.path.realpath(f"{directory}/{name}")
            try:
                found = Path(target).stat()
                if not _within(target, root):
                    tree.problems[path] = f"is a symbolic link to {target}, which is outside of the repository"
                elif stat.S_ISDIR(found.st_mode):
                    self._directory(target, path, root, above, tree)
                elif not stat.S_ISREG(found.st_mode):
                    # Opening a pipe would wait for its writer.
                    tree.problems[path] = "is neither a file nor a directory"
                elif not os.access(target, os.R_OK):
                    tree.problems[path] = "cannot be read: Permission denied"
                else:
                    # The second time tells of what keeps the first (cp -p, rsync -t).
                    tree.files[path] = Listed(found.st_size, f"{found.st_mtime_ns} {found.st_ctime_ns}")
            except FileNotFoundError:
                if Path(f"{directory}/{name}").is_symlink():
                    tree.problems[path] = f"is a symbolic link to {target}, which is not there"
            except OSError as error:
                tree.problems[path] = f"cannot be read: {error.strerror}"

    def _directory(self, target: str, path: str, root: str, above: tuple[str, ...], tree: Tree) -> None:
        if target in above:
            tree.problems[path] = f"is a symbolic link to {target}, which it is in"
            return
        if "/" not in path:
            tree.directories.add(path)
        self._walk(target, f"{path}/", root, (*above, target), tree)

    def open(self, path: str) -> BinaryIO:
        return Path(self._root, path).open("rb")


class StoredFiles:
    """In what fsspec reaches. The root is listed in one go, which object stores answer a thousand names at a time."""

    def __init__(self, store: Any, root: str) -> None:
        self._store = store
        self._root = root.rstrip("/")

    def check(self) -> None:
        self._refresh(self._root)
        # The root of a store in memory is called "", and there without having been made.
        if self._root and not self._store.isdir(self._root):
            raise FileNotFoundError("no such directory")

    def models(self) -> dict[str, Tree]:
        found: dict[str, Tree] = {}
        for path, details in self._listed(self._root):
            name, _, inner = path.partition("/")
            if ignored(name) or not (inner or details["type"] == "directory"):
                continue
            tree = found.setdefault(name, Tree())
            if inner:
                _add(tree, inner, details)
        if not found:
            self.check()
        return found

    def model(self, name: str) -> Tree:
        tree = Tree()
        there = False
        for inner, details in self._listed(f"{self._root}/{name}"):
            there = True
            _add(tree, inner, details)
        if not there:
            raise FileNotFoundError("no such directory")
        return tree

    def _listed(self, directory: str) -> Iterator[tuple[str, dict[str, Any]]]:
        self._refresh(directory)
        # Some stores begin what they list with "/", whatever they were asked for.
        start = f"{directory}/".lstrip("/")
        for path, details in self._store.find(directory, detail=True, withdirs=True).items():
            inner = path.lstrip("/")
            if inner.startswith(start) and inner != start:
                yield inner.removeprefix(start), details

    def _refresh(self, directory: str) -> None:
        self._store.invalidate_cache(directory)

    def open(self, path: str) -> BinaryIO:
        return cast(BinaryIO, self._store.open(f"{self._root}/{path}", "rb"))


def _add(tree: Tree, path: str, details: dict[str, Any]) -> None:
    # An object that stands for a directory ends in "/".
    path = path.removesuffix("/") if details["type"] == "directory" else path
    if ignored(path) and not unfit(path):
        return
    if reason := unfit(path):
        tree.problems[path] = reason
    elif details["type"] == "directory":
        if "/" not in path:
            tree.directories.add(path)
    elif not (path.endswith("/") and not details.get("size")):
        first, _, rest = path.partition("/")
        if rest:
            tree.directories.add(first)
        stamp = " ".join(f"{key}={details[key]}" for key in (*_SUMS, *_TIMES) if details.get(key) is not None)
        tree.files[path] = Listed(int(details.get("size") or 0), stamp)


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")
