"""A file of weights on its way in."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from pullback_server.faults import Fault
from pullback_wire import Reason

#: What it is called in its folder.
WEIGHTS = "weights.safetensors"


class Incoming:
    """A file on its way in. Its `discard` must be called in the end. on_discard: called when it was not kept."""

    def __init__(self, folder: Path, size: int, sha256: bytes, on_discard: Callable[[], None]) -> None:
        self.folder = folder
        self.weights = folder / WEIGHTS
        self.size = size
        self.sha256 = sha256
        #: Whether it was kept, or discarded.
        self.over = False
        self._on_discard = on_discard
        self._received = 0
        self._digest = hashlib.sha256()
        self._file: BinaryIO = self.weights.open("wb")

    def reserve(self) -> None:
        """Takes the room on the disk before the first byte comes. Raises Fault (STORAGE_FULL)."""
        with storing(self.size), contextlib.suppress(_NotHere):
            _allocate(self._file.fileno(), self.size)

    async def write(self, data: bytes) -> None:
        """Appends bytes. Raises Fault (BAD_UPLOAD: more than announced; STORAGE_FULL)."""
        self._received += len(data)
        if self._received > self.size:
            raise Fault(
                Reason.BAD_UPLOAD,
                f"more than the announced {self.size} bytes came",
                "header.size_bytes",
            )
        await asyncio.to_thread(self._write, data)

    def _write(self, data: bytes) -> None:
        with storing(self.size):
            self._file.write(data)
        self._digest.update(data)

    async def finish(self) -> None:
        """All bytes have come. Raises Fault (BAD_UPLOAD: they are not what was announced, or no safetensors file)."""
        if self._received != self.size:
            raise Fault(
                Reason.BAD_UPLOAD,
                f"{self._received} bytes came, {self.size} were announced",
                "header.size_bytes",
            )
        if (found := self._digest.digest()) != self.sha256:
            raise Fault(
                Reason.BAD_UPLOAD,
                f"the SHA-256 of what came is {found.hex()}, announced was {self.sha256.hex()}",
                "header.sha256",
            )
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        with storing(self.size):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        try:
            # Opening checks the whole header against the file's length.
            with safe_open(self.weights, framework="numpy") as opened:
                opened.keys()
        except SafetensorError as error:
            raise Fault(
                Reason.BAD_UPLOAD, f"it is no safetensors file: {error}; nothing else is accepted here", "data"
            ) from None

    def discard(self) -> None:
        """Removes what came. Does nothing where it was kept."""
        with contextlib.suppress(OSError):
            self._file.close()
        if not self.over:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._on_discard()
            self.over = True


class _NotHere(Exception):
    pass


def _allocate(descriptor: int, size: int) -> None:
    try:
        if size:
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise _NotHere from None
        raise


@contextlib.contextmanager
def storing(size: int) -> Iterator[None]:
    """Around writing so many bytes. Raises Fault (STORAGE_FULL) where the disk has no room for them."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Fault(
                Reason.STORAGE_FULL, f"the server's disk has no room for {size} bytes: {error.strerror}"
            ) from error
        raise
