"""Where versions come from: the repository, and what was uploaded."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from pullback_server.fleet.seam import LoadFailure, Transient
from pullback_server.hosting.digests import copy
from pullback_server.hosting.items import Item
from pullback_server.hosting.manifest import RepositoryError
from pullback_server.hosting.repository import NoSuchModel, NotSettled, Repository, Unavailable
from pullback_server.registry.incoming import storing
from pullback_server.registry.threads import to_end
from pullback_server.registry.uploads import UploadStore


class NotYet(Transient):
    """A version that is being changed just now."""


class Versions:
    """Stages versions: makes items of them, whose files are this server's own.

    registered: whether the server's start registers a model of this name and version.
    """

    def __init__(
        self, repository: Repository | None, uploads: UploadStore | None, registered: Callable[[str, str], bool]
    ) -> None:
        self._repository = repository
        self._uploads = uploads
        self._registered = registered
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Interrupts the copies under way; there are no more after it."""
        self._stopped.set()
        if self._repository is not None:
            self._repository.stop()

    def shown(self, text: str) -> str:
        """A message as any caller may read it, without the server's own paths."""
        return text if self._repository is None else self._repository.shown(text)

    async def stage_kept(self, name: str, number: str, revision: int, folder: Path) -> tuple[Item, str]:
        """The item of a version that was uploaded, and its architecture. Raises LoadFailure."""
        kept = None if self._uploads is None else self._uploads.find(name, number)
        if kept is None or self._uploads is None:
            raise LoadFailure(f"model {name!r} has no uploaded version {number}")
        try:
            record = await asyncio.to_thread(self._uploads.record, kept)
        except (OSError, msgspec.MsgspecError) as error:
            raise LoadFailure(f"model {name!r} version {number}: its record cannot be read: {error}") from error
        item = await self.stage_upload(
            name,
            number,
            revision,
            record.architecture,
            self._uploads.weights(kept),
            bytes.fromhex(record.sha256),
            folder,
        )
        return item, record.architecture

    async def stage(self, name: str, number: str, revision: int, folder: Path) -> Item:
        """The item of a version in the repository, with its files in a folder that this makes.

        Raises LoadFailure; Transient where another try may succeed, NotYet while it is being changed.
        """
        if self._repository is None:
            raise LoadFailure(f"model {name!r} has no version {number}: there is no repository")
        try:
            staged = await to_end(self._repository.stage, name, number, folder)
        except (NotSettled, NoSuchModel) as error:
            raise NotYet(str(error)) from error
        except Unavailable as error:
            raise Transient(str(error)) from error
        except RepositoryError as error:
            raise LoadFailure(str(error)) from error
        return Item(name, number, revision, str(staged.directory), staged.manifest.model_dump_json(), staged.digest)

    async def stage_upload(
        self,
        name: str,
        number: str,
        revision: int,
        architecture: str,
        weights: Path,
        sha256: bytes,
        folder: Path,
    ) -> Item:
        """The item of uploaded weights, which are copied: whoever can write to uploads must not reach what is loaded.

        architecture: the version whose code it has. sha256: that the weights must have.

        Raises LoadFailure, Fault (STORAGE_FULL).
        """
        if self._registered(name, architecture):
            copied = await to_end(self._copied, weights, folder, sha256, f"model {name!r} version {number}")
            return Item(name, number, revision, "", "", sha256.hex(), str(copied), (name, architecture))
        if self._repository is None:
            raise LoadFailure(
                f"model {name!r} version {number}: its architecture, version {architecture}, is not there"
            )
        try:
            staged = await to_end(self._repository.stage, name, architecture, folder)
        except Unavailable as error:
            raise Transient(f"model {name!r} version {number}: its architecture: {error}") from error
        except RepositoryError as error:
            raise LoadFailure(f"model {name!r} version {number}: its architecture: {error}") from error
        copied = await to_end(self._copied, weights, folder, sha256, f"model {name!r} version {number}")
        digest = hashlib.sha256(f"{staged.digest} {sha256.hex()}".encode()).hexdigest()
        manifest = staged.manifest.model_dump_json()
        return Item(name, number, revision, str(staged.directory), manifest, digest, str(copied))

    def _copied(self, weights: Path, folder: Path, sha256: bytes, owner: str) -> Path:
        """Copies uploaded weights.

        Raises LoadFailure where they are not what was uploaded, Transient, Fault (STORAGE_FULL).
        """
        # A name that no file of a version has.
        to = folder / ".uploaded.safetensors"
        try:
            with weights.open("rb") as source, storing(weights.stat().st_size):
                digest, _ = copy(source, to, self._stopped.is_set)
        except OSError as error:
            raise Transient(f"{owner}: its uploaded weights cannot be copied: {error}") from error
        if digest != sha256.hex():
            raise LoadFailure(
                f"{owner}: its uploaded weights were changed: their SHA-256 is {digest}, uploaded was {sha256.hex()}"
            )
        return to
