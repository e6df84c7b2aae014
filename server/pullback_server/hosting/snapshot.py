"""A version of a model, copied from its repository to this machine's disk, where nobody changes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pullback_server.hosting.digests import check_safetensors, compare, copy, digest_of
from pullback_server.hosting.manifest import Manifest, RepositoryError, check_length, read_manifest
from pullback_server.hosting.repository_contents import MANIFEST, SUMS, Contents, Found
from pullback_server.hosting.repository_files import Files

#: Bytes of a list of digests that are read at most.
_LONGEST = 16 << 20


class Unavailable(RepositoryError):
    """Something could not be read or written just now, whatever a version is like: worth another try later."""


class NotSettled(Unavailable):
    """What is to be copied is being changed, or not all there."""


@dataclass(frozen=True)
class Staged:
    """A version on this machine's disk.

    directory: the version's files, and with them those that all versions share, and model.toml.
    digest: SHA-256 over the sorted lines that sha256sum would write of these files, in hex.
    fingerprint: see `Found.versions`; of what was copied.
    bytes: of these files.
    """

    directory: Path
    manifest: Manifest
    digest: str
    fingerprint: str
    bytes: int


def stage(
    files: Files,
    look: Callable[[], tuple[Found, Contents]],
    where: str,
    name: str,
    version: str,
    into: Path,
    stopped: Callable[[], bool],
) -> Staged:
    """Copies a version to the new directory `into`; `look` lists the model, `where` is what it is called in messages.

    Raises RepositoryError for what cannot be used or copied (Unavailable: for now; NotSettled: because it is being
    changed), FileExistsError when there is something at `into`. No directory is then left behind.
    """
    found, contents = look()
    fingerprint = _fingerprint(found, where, version)
    try:
        into.mkdir(parents=True)
    except FileExistsError:
        raise
    except OSError as error:
        raise Unavailable(f"{where}/{version} cannot be copied to {into}: {error}") from None
    try:
        try:
            sums, size, listed = _copied(files, f"{name}/", contents, version, into, stopped)
        except InterruptedError as error:
            raise Unavailable(f"{where}/{version} was not copied: {error}") from None
        except Exception as error:
            # What vanished or changed while it was read fails in as many ways as there are stores.
            _check_unchanged(look, where, version, fingerprint)
            raise Unavailable(f"{where}/{version} cannot be copied to {into}: {error}") from error
        _check_unchanged(look, where, version, fingerprint)
        _check_whole(where, contents, version, into, sums, listed)
        # Read from what was copied: the listing may know the one before.
        raw = (into / MANIFEST).read_bytes()
        check_length(raw, f"{where}/{MANIFEST}")
        manifest = read_manifest(text_of(raw, f"{where}/{MANIFEST}"), f"{where}/{MANIFEST}", name)
    except BaseException:
        shutil.rmtree(into, ignore_errors=True)
        raise
    return Staged(into, manifest, digest_of(sums), fingerprint, size)


def _copied(
    files: Files, prefix: str, contents: Contents, version: str, into: Path, stopped: Callable[[], bool]
) -> tuple[dict[str, str], int, bytes | None]:
    """Digests of what was copied, by path in `into`; their bytes; and what SHA256SUMS says, if it is there."""
    sums: dict[str, str] = {}
    total = 0
    listed: bytes | None = None
    for to, path in contents.files(version).items():
        with files.open(prefix + path) as source:
            if path == f"{version}/{SUMS}":
                listed = source.read(_LONGEST)
                continue
            sums[to], size = copy(source, into / to, stopped)
        if size != contents.size(path):
            raise OSError(f"{path} has {size} bytes, it was listed with {contents.size(path)}")
        total += size
    return sums, total, listed


def _check_whole(
    where: str, contents: Contents, version: str, into: Path, sums: dict[str, str], listed: bytes | None
) -> None:
    sources = contents.files(version)
    if listed is not None:
        own = {to: sums[to] for to in sums if sources[to].startswith(f"{version}/")}
        try:
            compare(text_of(listed, f"{where}/{version}/{SUMS}"), own, SUMS)
        except ValueError as error:
            raise NotSettled(f"{where}/{version}{error}") from None
    for path in sorted(path for path in sources if path.endswith(".safetensors")):
        try:
            check_safetensors(into / path)
        except ValueError as error:
            raise RepositoryError(f"{where}/{sources[path]} {error}") from None


def _check_unchanged(look: Callable[[], tuple[Found, Contents]], where: str, version: str, fingerprint: str) -> None:
    try:
        unchanged = look()[0].versions.get(version) == fingerprint
    except RepositoryError:
        unchanged = False
    if not unchanged:
        raise NotSettled(f"{where}/{version} is being changed: it was not the same before and after it was copied")


def _fingerprint(found: Found, where: str, version: str) -> str:
    for problem in (found.error, found.problems.get(version)):
        if problem is not None:
            raise problem
    if version not in found.versions:
        there = ", ".join(sorted(found.versions, key=int)) or "none"
        raise NotSettled(f"{where} has no version {version!r}; there are: {there}")
    return found.versions[version]


def text_of(raw: bytes, where: str) -> str:
    """UTF-8 as text. Raises RepositoryError for what is not."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise RepositoryError(f"{where}: byte {error.start} is not UTF-8") from None
