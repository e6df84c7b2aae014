"""What a worker is told to load besides the sources of its start."""

from __future__ import annotations

import msgspec

from pullback_server.job import version_id


class Item(msgspec.Struct, array_like=True, frozen=True):
    """One version of one model, as it lies on this machine's disk. Nobody changes it while it is used.

    directory: holds the version's files, and with them those that all versions of the model share.
    manifest: the model's `Manifest` as JSON; empty for an upload to a model that a source of the start registers.
    digest: SHA-256 over the files, in hex.
    weights: a safetensors file to be loaded instead of the manifest's; empty: none.
    base: whose architecture an upload has, where no manifest tells: name and version of a registration of the start.
    """

    name: str
    version: str
    revision: int
    directory: str
    manifest: str
    digest: str
    weights: str = ""
    base: tuple[str, str] | None = None

    @property
    def id(self) -> str:
        """See `Signature.id`."""
        return version_id(self.version, self.revision)

    @property
    def owner(self) -> str:
        """What messages about it begin with."""
        return f"model {self.name!r} version {self.version}"
