"""A folder of this server's own, for what it has copied from a repository."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "pullback-state-"


class StateDir:
    """A fresh folder under `parent` (the system's folder for temporary files where it is None).

    It is locked as long as this process lives; what servers that are no more left there is removed.

    Raises OSError where there can be none.
    """

    def __init__(self, parent: str | None = None) -> None:
        root = Path(parent) if parent is not None else Path(tempfile.gettempdir())
        root.mkdir(parents=True, exist_ok=True)
        # Else another server's sweep might find the folder before its lock.
        with _alone_in(root):
            _sweep(root)
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
            self._lock = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


@contextlib.contextmanager
def _alone_in(root: Path) -> Iterator[None]:
    # By user: in a folder that all may write to, none may open another's file.
    lock = os.open(root / f".pullback-lock-{os.getuid()}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _sweep(root: Path) -> None:
    for left in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if left.is_symlink() or left.stat().st_uid != os.getuid():
                continue
            # Made where it is missing: its server ended before it had made one, or while it removed the folder.
            lock = os.open(left / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                # Raises where its server lives.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)
