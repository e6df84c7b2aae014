"""Weights that callers uploaded: received, checked, kept."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import msgspec
from safetensors import SafetensorError, safe_open

from pullback_server.faults import Fault
from pullback_server.hosting.manifest_paths import is_version
from pullback_server.hosting.spec import is_name
from pullback_wire import Reason

_INCOMING = ".incoming"
_WEIGHTS = "weights.safetensors"
_RECORD = "upload.json"


class Record(msgspec.Struct, frozen=True):
    """What is kept of an upload beside its weights. architecture: the version whose code they belong to."""

    architecture: str
    sha256: str
    bytes: int
    uploaded: str


class Incoming:
    """A file on its way in. Its `discard` must be called when it was not kept."""

    def __init__(self, folder: Path, size: int, sha256: bytes) -> None:
        self.folder = folder
        self.weights = folder / _WEIGHTS
        self.size = size
        self.sha256 = sha256
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
        shutil.rmtree(self.folder, ignore_errors=True)


class UploadStore:
    """Uploads under a folder, as NAME/VERSION/weights.safetensors with a record beside it.

    most: bytes of one upload. most_in_all: bytes of all that are kept.

    Raises OSError where the folder cannot be used, or another server uses it.
    """

    def __init__(self, folder: str, most: int, most_in_all: int) -> None:
        self._root = Path(folder)
        self._most = most
        self._most_in_all = most_in_all
        self._root.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._root / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise OSError(f"uploads {folder!r} is in use by another server") from error
        # What a server that was killed had not finished.
        shutil.rmtree(self._root / _INCOMING, ignore_errors=True)
        (self._root / _INCOMING).mkdir()

    def close(self) -> None:
        shutil.rmtree(self._root / _INCOMING, ignore_errors=True)
        os.close(self._lock)

    def begin(self, size: int, sha256: bytes) -> Incoming:
        """Room for an upload. Raises Fault (BAD_UPLOAD: too large; STORAGE_FULL)."""
        if size > self._most:
            raise Fault(
                Reason.BAD_UPLOAD,
                f"{size} bytes are announced, the limit is {self._most}",
                "header.size_bytes",
            )
        present = sum(file.stat().st_size for file in self._root.rglob(_WEIGHTS))
        if present + size > self._most_in_all:
            raise Fault(
                Reason.STORAGE_FULL,
                f"uploads hold {present} bytes and this one brings {size}, the limit is {self._most_in_all}",
            )
        with storing(size):
            folder = Path(tempfile.mkdtemp(dir=self._root / _INCOMING))
            incoming = Incoming(folder, size, sha256)
        try:
            incoming.reserve()
        except BaseException:
            incoming.discard()
            raise
        return incoming

    def keep(self, incoming: Incoming, name: str, number: str, architecture: str) -> Path:
        """Puts a finished upload in its place, in one step. Raises Fault (STORAGE_FULL, VERSION_EXISTS)."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = Record(architecture, incoming.sha256.hex(), incoming.size, now)
        place = self._root / name / number
        with storing(incoming.size):
            (incoming.folder / _RECORD).write_bytes(msgspec.json.encode(record))
            place.parent.mkdir(exist_ok=True)
            try:
                incoming.folder.rename(place)
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                    raise Fault(
                        Reason.VERSION_EXISTS, f"version {number} of {name!r} was uploaded before", "header.version"
                    ) from None
                raise
        return place

    def remove(self, place: Path) -> None:
        """Removes an upload that was kept."""
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):
            place.parent.rmdir()

    def find(self, name: str, number: str) -> Path | None:
        """Where an upload is kept. Name and number may be any caller's words."""
        if not (is_name(name) and is_version(number)):
            return None
        place = self._root / name / number
        return place if (place / _RECORD).is_file() else None

    def all(self) -> list[tuple[str, str]]:
        """Names and versions of what is kept."""
        found = [place.parent for place in self._root.glob(f"*/*/{_RECORD}")]
        return sorted((place.parent.name, place.name) for place in found if self.find(place.parent.name, place.name))

    def record(self, place: Path) -> Record:
        """What is known of an upload. Raises OSError or msgspec.DecodeError for one that was damaged."""
        return msgspec.json.decode((place / _RECORD).read_bytes(), type=Record)

    def weights(self, place: Path) -> Path:
        """Its safetensors file."""
        return place / _WEIGHTS


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
