"""What is served under which name and version."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pullback_server.job import Signature, version_id

Origin = Literal["start", "repository", "upload"]


class VersionState(enum.Enum):
    """Whether a version can be called."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    UNLOADING = "unloading"


@dataclass
class Version:
    """A version as its callers know it.

    reason: why it is in that state; for a ready one, why newer contents could not be loaded.
    revision: how often it was loaded anew. digest: of what it was loaded from.
    origin: where it came from: what the server was started with (then it stays), a repository, an upload.
    architecture: of an upload, the version whose code it runs.
    """

    number: str
    state: VersionState
    reason: str = ""
    revision: int = 0
    digest: str = ""
    origin: Origin = "repository"
    architecture: str = ""

    @property
    def id(self) -> str:
        """See `Signature.id`."""
        return version_id(self.number, self.revision)

    def serves(self, digest: str) -> bool:
        """Whether these contents can be called."""
        return self.state is VersionState.READY and self.digest == digest


class Table:
    """Names, versions and their states.

    signatures: of everything that workers hold, by name and id. on_change: called when what can be called has changed.
    """

    def __init__(self, signatures: Callable[[], Mapping[str, Mapping[str, Signature]]]) -> None:
        self._signatures = signatures
        self._versions: dict[str, dict[str, Version]] = {}
        self._revisions: dict[tuple[str, str], int] = {}
        self._holds: Counter[tuple[str, str]] = Counter()
        #: What is wrong with whole models in the repository.
        self.faults: dict[str, str] = {}
        self.on_change: Callable[[], None] = lambda: None

    def names(self) -> list[str]:
        """Of all models of which anything is known, sorted."""
        return sorted({*self._versions, *self.faults})

    def versions(self, name: str) -> list[Version]:
        """What is known of a model, oldest version first."""
        return [self._versions[name][number] for number in sorted(self._versions.get(name, ()), key=int)]

    def find(self, name: str, version: str) -> Version | None:
        return self._versions.get(name, {}).get(version)

    def callable(self, name: str) -> list[str]:
        """Versions of a model that can be called, oldest first."""
        return [one.number for one in self.versions(name) if one.state is VersionState.READY]

    def signature(self, name: str, version: str) -> Signature | None:
        """Of a version that can be called."""
        found = self.find(name, version)
        if found is None or found.state is not VersionState.READY:
            return None
        return self.held(name, found.id)

    def held(self, name: str, id: str) -> Signature | None:
        """Of what workers hold, whether it can still be called or not."""
        return self._signatures().get(name, {}).get(id)

    # Changes.

    def next_revision(self, name: str, version: str) -> int:
        """The number of a revision that is about to be loaded."""
        return self._revisions.get((name, version), -1) + 1

    def publish(self, name: str, version: Version) -> None:
        """From now on calls find it; what bore its number before is not found any more."""
        self._versions.setdefault(name, {})[version.number] = version
        self._revisions[name, version.number] = version.revision
        self.on_change()

    def note(self, name: str, number: str, state: VersionState, reason: str, origin: Origin = "repository") -> None:
        """Says how a version is that cannot be called; a ready one stays ready, and gets the reason."""
        known = self._versions.setdefault(name, {})
        found = known.get(number)
        if found is None:
            known[number] = Version(number, state, reason, origin=origin)
        else:
            found.reason = reason
            if found.state is not VersionState.READY:
                found.state = state
        self.on_change()

    def forgive(self, name: str, number: str, reason: str) -> None:
        """What was wrong is so no more: forgets the reason, and the version if there was nothing else to it."""
        found = self.find(name, number)
        if found is not None and found.reason == reason:
            found.reason = ""
            if found.state is VersionState.FAILED:
                self.forget(name, number)

    def counts(self) -> Counter[tuple[str, str]]:
        """How many versions there are, by model and state."""
        return Counter((name, one.state.value) for name, known in self._versions.items() for one in known.values())

    def withdraw(self, name: str, number: str, reason: str) -> Version | None:
        """From now on no call finds a version. Returns it if it could be called until now."""
        found = self.find(name, number)
        if found is None or found.state is not VersionState.READY:
            return None
        found.state, found.reason = VersionState.UNLOADING, reason
        self.on_change()
        return found

    def drop(self, name: str, version: Version) -> None:
        """Forgets a version, unless it is another one by now."""
        known = self._versions.get(name, {})
        if known.get(version.number) is version:
            self.forget(name, version.number)

    def forget(self, name: str, number: str) -> None:
        """Forgets a version, whatever its state."""
        known = self._versions.get(name, {})
        known.pop(number, None)
        if not known:
            self._versions.pop(name, None)
        self.on_change()

    # Who uses what.

    def hold(self, name: str, id: str) -> None:
        """A session uses it, and will as long as it lasts."""
        self._holds[name, id] += 1

    def release(self, name: str, id: str) -> None:
        """What `hold` held."""
        self._holds[name, id] -= 1
        if not self._holds[name, id]:
            del self._holds[name, id]

    def holders(self, name: str, id: str) -> int:
        """Sessions that use it."""
        return self._holds[name, id]
