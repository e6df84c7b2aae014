"""A model repository: directories of models and their versions, on a local path or what fsspec reaches."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from pullback_server.hosting.manifest import LONGEST, Manifest, RepositoryError, check_length, read_manifest
from pullback_server.hosting.repository_contents import (
    MANIFEST,
    Contents,
    Found,
    Scan,
    check_model,
    contents_of,
    found_in,
)
from pullback_server.hosting.repository_files import Listed, Tree, reach, shown_url
from pullback_server.hosting.snapshot import NotSettled, Staged, Unavailable, stage, text_of

__all__ = ["Found", "NoSuchModel", "NotSettled", "Repository", "RepositoryError", "Scan", "Staged", "Unavailable"]

_log = logging.getLogger(__name__)


class NoSuchModel(RepositoryError):
    """There is no directory of a model's name."""


class Repository:
    """Models at `url`: a local path, or what fsspec knows (s3://, gs://, memory://, ...). Methods block.

    `storage_options` go to fsspec. Raises RepositoryError for an URL that nothing installed can read.
    """

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None) -> None:
        self.url = shown_url(url).rstrip("/")
        try:
            self._files = reach(url, storage_options or {})
        except Exception as error:
            raise RepositoryError(f"{self.url}: no model repository: {error}") from error
        #: Manifests that were read, or what is wrong with them, and the file's size and stamp then.
        self._read: dict[str, tuple[Listed, Manifest | str]] = {}
        self._stopped = threading.Event()

    def check(self) -> None:
        """Raises RepositoryError when the root is missing, no directory, or cannot be read. Warns when it is empty."""
        try:
            self._files.check()
        except Exception as error:
            raise self._unreadable(error) from error
        if not self.scan().models:
            _log.warning("%s: the model repository is empty", self.url)

    def stop(self) -> None:
        """Interrupts the copies under way; there are no more after it. Does not block."""
        self._stopped.set()

    def shown(self, text: str) -> str:
        """A message without where the repository lies, which is not everybody's business."""
        return text.replace(f"{self.url}/", "").replace(self.url, "the repository")

    def scan(self) -> Scan:
        """What is there now. Of files, only new or changed manifests are read.

        What is wrong with one model or version is told in the result. Raises RepositoryError when the repository
        cannot be listed, which says nothing about its models.
        """
        try:
            trees = self._files.models()
        except Exception as error:
            raise self._unreadable(error) from error
        for name in [*self._read]:
            if name not in trees:
                self._read.pop(name, None)
        return Scan({name: self._found(name, tree) for name, tree in sorted(trees.items())})

    def look(self, name: str) -> Found:
        """One model, as `scan` would tell of it. Raises NoSuchModel; RepositoryError when it cannot be listed."""
        return self._look(name)[0]

    def stage(self, name: str, version: str, into: Path) -> Staged:
        """Copies a version, with what it shares with others, to the new directory `into`.

        Raises RepositoryError for what cannot be used or copied (Unavailable: for now; NotSettled: because it is being
        changed or not complete), FileExistsError when there is something at `into`. No directory is then left behind.
        """
        # A manifest that was changed twice within one tick of the clock may not be the one that was read.
        self._read.pop(name, None)
        where = f"{self.url}/{name}"
        return stage(self._files, lambda: self._look(name), where, name, version, into, self._stopped.is_set)

    def _look(self, name: str) -> tuple[Found, Contents]:
        # The name may be a caller's.
        check_model(f"{self.url}/{name}", name, Tree(files={MANIFEST: Listed(0, "")}))
        try:
            tree = self._files.model(name)
        except FileNotFoundError:
            raise NoSuchModel(f"{self.url} has no model {name!r}") from None
        except Exception as error:
            raise Unavailable(f"{self.url}/{name}: cannot be read: {error}") from error
        return self._found(name, tree), contents_of(tree)

    def _found(self, name: str, tree: Tree) -> Found:
        where = f"{self.url}/{name}"
        try:
            check_model(where, name, tree)
            return found_in(where, name, tree, self._manifest(name, tree.files[MANIFEST]))
        except RepositoryError as error:
            # Kept for as long as the model is broken: without the frames that it came through.
            return Found(name, error=error.with_traceback(None))

    def _manifest(self, name: str, listed: Listed) -> Manifest:
        before, kept = self._read.get(name, (None, ""))
        if before != listed:
            where = f"{self.url}/{name}/{MANIFEST}"
            try:
                with self._files.open(f"{name}/{MANIFEST}") as file:
                    raw = file.read(LONGEST + 1)
            except Exception as error:
                # Not kept: the next scan may have better luck.
                raise Unavailable(f"{where}: cannot be read: {error}") from error
            try:
                check_length(raw, where)
                kept = read_manifest(text_of(raw, where), where, name)
            except RepositoryError as error:
                kept = str(error)
            self._read[name] = (listed, kept)
        if isinstance(kept, str):
            raise RepositoryError(kept)
        return kept

    def _unreadable(self, error: Exception) -> RepositoryError:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, FileNotFoundError):
            reason = "no such directory"
        elif isinstance(error, NotADirectoryError):
            reason = "not a directory"
        return RepositoryError(f"{self.url}: the model repository cannot be read: {reason}")
