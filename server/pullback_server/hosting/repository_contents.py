"""What a listing of a model's directory means: its manifest, what its versions share, its versions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pullback_server.hosting.manifest import Manifest, RepositoryError
from pullback_server.hosting.manifest_paths import is_version
from pullback_server.hosting.repository_files import Listed, Tree
from pullback_server.hosting.spec import Registration

MANIFEST = "model.toml"
SUMS = "SHA256SUMS"

#: Directories that were meant as versions, not as files that versions share.
_MEANT = re.compile(r"[vV]?[0-9][0-9._-]*")


@dataclass(frozen=True)
class Found:
    """A model as it lies in the repository.

    manifest: None: there is an `error`, which concerns the whole model; its versions are then not told.
    versions: those that could be staged: fingerprints of what they are made of, by version, lowest first.
    problems: what is wrong with others, by version; "": that there is none.
    """

    name: str
    manifest: Manifest | None = None
    error: RepositoryError | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    problems: Mapping[str, RepositoryError] = field(default_factory=dict)


@dataclass(frozen=True)
class Scan:
    """What a repository held when it was listed: models by name."""

    models: Mapping[str, Found]

    def problems(self) -> dict[tuple[str, str], RepositoryError]:
        """What is wrong, by name and version; version "": with the whole model."""
        told: dict[tuple[str, str], RepositoryError] = {}
        for name, found in self.models.items():
            told |= {(name, version): problem for version, problem in found.problems.items()}
            if found.error is not None:
                told[name, ""] = found.error
        return told


@dataclass(frozen=True)
class Contents:
    """The files of a model, by path relative to its directory."""

    manifest: Mapping[str, Listed]
    shared: Mapping[str, Listed]
    versions: Mapping[str, Mapping[str, Listed]]

    def files(self, version: str) -> dict[str, str]:
        """What a version is staged from: paths relative to the model's directory, by the path they are staged to."""
        own = {path.partition("/")[2]: path for path in self.versions[version]}
        return {path: path for path in (*self.manifest, *self.shared)} | own

    def size(self, path: str) -> int:
        """Bytes of a file, by its path relative to the model's directory, as listed."""
        version = self.versions.get(path.partition("/")[0], {})
        return (version.get(path) or self.shared.get(path) or self.manifest[path]).size

    def fingerprint(self, version: str) -> str:
        """Differs when a file of a version, or one that it shares, has changed."""
        listed = {**self.manifest, **self.shared, **self.versions[version]}
        told = [[path, one.size, one.stamp] for path, one in sorted(listed.items())]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def contents_of(tree: Tree) -> Contents:
    """Which of a model's files are whose."""
    manifest: dict[str, Listed] = {}
    shared: dict[str, Listed] = {}
    numbers = sorted((one for one in tree.directories if is_version(one)), key=int)
    versions: dict[str, dict[str, Listed]] = {number: {} for number in numbers}
    for path, listed in tree.files.items():
        top, _, inner = path.partition("/")
        if path == MANIFEST:
            manifest[path] = listed
        elif inner and top in versions:
            versions[top][path] = listed
        elif not (inner and _MEANT.fullmatch(top)):
            shared[path] = listed
    return Contents(manifest, shared, versions)


def check_model(where: str, name: str, tree: Tree) -> None:
    """Raises RepositoryError for what is wrong with a model whatever its manifest says and its versions are."""
    try:
        Registration(name, print)
    except ValueError as error:
        raise RepositoryError(f"{where}: {error}") from None
    wrong = [path for path in tree.problems if not _MEANT.fullmatch(path.partition("/")[0])]
    if wrong:
        raise RepositoryError("\n".join(f"{_under(where, path)} {_said(tree.problems[path])}" for path in wrong))
    if MANIFEST not in tree.files:
        raise RepositoryError(f"{where}/{MANIFEST} is missing, expected one in the directory of each model")


def found_in(where: str, name: str, tree: Tree, manifest: Manifest) -> Found:
    """A model without errors of its own: which of its versions could be staged, and what is wrong with others."""
    contents = contents_of(tree)
    problems = {version: reason for version in contents.versions if (reason := _wrong(version, contents, manifest))}
    for one in sorted(tree.directories):
        if _MEANT.fullmatch(one) and not is_version(one):
            problems[one] = ": expected a version to be a positive number of at most 18 digits, without leading zeros"
    for path, reason in tree.problems.items():
        top, _, inner = path.partition("/")
        problems[top] = (f"/{inner} " if inner else " ") + _said(reason)
    versions = {version: contents.fingerprint(version) for version in contents.versions if version not in problems}
    if not versions and not problems:
        problems[""] = f" has no version, expected one in a directory such as {where}/1"
    told = {version: RepositoryError(f"{_under(where, version)}{text}") for version, text in problems.items()}
    return Found(name, manifest, None, versions, told)


def _wrong(version: str, contents: Contents, manifest: Manifest) -> str:
    """What keeps a version from being staged, to be read after its directory; empty: nothing."""
    own = [path.partition("/")[2] for path in contents.versions[version]]
    if MANIFEST in own:
        return f"/{MANIFEST}: expected none here: all versions of a model have one manifest, beside their directories"
    there = {*own, *contents.shared}
    for key, wanted in (("file", manifest.source.file), ("weights", manifest.source.weights)):
        if wanted is not None and wanted not in there:
            return f": {wanted} is missing (source.{key}), expected here or beside {MANIFEST}"
    for path in there:
        for end in (at for at, letter in enumerate(path) if letter == "/"):
            if path[:end] in there:
                return f": {path[:end]} is both a file and a directory"
    return ""


def _under(where: str, path: str) -> str:
    return f"{where}/{path}" if path else where


def _said(reason: str) -> str:
    return f"is refused: {reason}" if reason.startswith("expected") else reason
