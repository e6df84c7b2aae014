"""Weights that callers uploaded: received, checked, kept."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from pullback_server.faults import Fault
from pullback_server.hosting.manifest_paths import is_version
from pullback_server.hosting.spec import is_name
from pullback_server.registry.incoming import WEIGHTS, Incoming, storing
from pullback_wire import Reason

_INCOMING = ".incoming"
_RECORD = "upload.json"


class Record(msgspec.Struct, frozen=True):
    """What is kept of an upload beside its weights. architecture: the version whose code they belong to."""

    architecture: str
    sha256: str
    bytes: int
    uploaded: str


class UploadStore:
    """Uploads under a folder, as NAME/VERSION/weights.safetensors with a record beside it. For threads.

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
        self._counting = threading.Lock()
        #: Bytes of each upload that is kept, and of those on their way in.
        self._sizes = {file.parent: file.stat().st_size for file in self._root.rglob(WEIGHTS)}
        self._coming = 0
        self._kept = sum(self._sizes.values())

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
        with self._counting:
            present = self._kept + self._coming
            if present + size > self._most_in_all:
                raise Fault(
                    Reason.STORAGE_FULL,
                    f"uploads hold {present} bytes and this one brings {size}, the limit is {self._most_in_all}",
                )
            self._coming += size
        try:
            with storing(size):
                folder = Path(tempfile.mkdtemp(dir=self._root / _INCOMING))
                incoming = Incoming(folder, size, sha256, lambda: self._gone(size))
        except BaseException:
            self._gone(size)
            raise
        try:
            incoming.reserve()
        except BaseException:
            incoming.discard()
            raise
        return incoming

    def _gone(self, size: int) -> None:
        with self._counting:
            self._coming -= size

    def keep(self, incoming: Incoming, name: str, number: str, architecture: str) -> Path:
        """Puts a finished upload in its place, in one step. Raises Fault (STORAGE_FULL, VERSION_EXISTS)."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = Record(architecture, incoming.sha256.hex(), incoming.size, now)
        place = self._root / name / number
        with storing(incoming.size):
            (incoming.folder / _RECORD).write_bytes(msgspec.json.encode(record))
            try:
                _put(incoming.folder, place)
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                    raise Fault(
                        Reason.VERSION_EXISTS, f"version {number} of {name!r} was uploaded before", "header.version"
                    ) from None
                raise
        incoming.over = True
        with self._counting:
            self._coming -= incoming.size
            self._kept += incoming.size
            self._sizes[place] = incoming.size
        return place

    def remove(self, place: Path) -> None:
        """Removes an upload that was kept."""
        shutil.rmtree(place, ignore_errors=True)
        with self._counting:
            self._kept -= self._sizes.pop(place, 0)
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
        return place / WEIGHTS


def _put(folder: Path, place: Path) -> None:
    for last in (False, True):
        place.parent.mkdir(exist_ok=True)
        try:
            folder.rename(place)
            return
        except FileNotFoundError:
            # Whoever removed another of its model's uploads meanwhile took the directory along.
            if last:
                raise
