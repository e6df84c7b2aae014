"""What is served under which name and version."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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


class Table:
    """Names, versions and their states.

    A version that is ready can be called as long as a worker holds it.

    signatures: of everything that workers hold, by name and id; another mapping whenever that has changed.
    on_change: called when what can be called has changed, or what is known of versions.
    """

    def __init__(self, signatures: Callable[[], Mapping[str, Mapping[str, Signature]]]) -> None:
        self._signatures = signatures
        self._versions: dict[str, dict[str, Version]] = {}
        self._revisions: dict[tuple[str, str], int] = {}
        self._holds: Counter[tuple[str, str]] = Counter()
        #: What is wrong with whole models in the repository.
        self.faults: Mapping[str, str] = {}
        self.on_change: Callable[[], None] = lambda: None
        #: As `versions` and `callable` tell, until anything changes; the latter for what workers held then.
        self._sorted: dict[str, Sequence[Version]] = {}
        self._callable: dict[str, Sequence[str]] = {}
        self._held: Mapping[str, Mapping[str, Signature]] = {}
        #: What workers held when `refresh` last looked.
        self._looked: Mapping[str, Mapping[str, Signature]] = {}

    def names(self) -> list[str]:
        """Of all models of which anything is known, sorted."""
        return sorted({*self._versions, *self.faults})

    def versions(self, name: str) -> Sequence[Version]:
        """What is known of a model, oldest version first."""
        known = self._versions.get(name)
        if not known:
            return ()
        found = self._sorted.get(name)
        if found is None:
            found = self._sorted[name] = tuple(known[number] for number in sorted(known, key=int))
        return found

    def find(self, name: str, version: str) -> Version | None:
        return self._versions.get(name, {}).get(version)

    def callable(self, name: str) -> Sequence[str]:
        """Versions of a model that can be called, oldest first."""
        if name not in self._versions:
            return ()
        held = self._signatures()
        if held is not self._held:
            self._callable.clear()
            self._held = held
        found = self._callable.get(name)
        if found is None:
            ready = (one for one in self.versions(name) if one.state is VersionState.READY)
            found = self._callable[name] = tuple(one.number for one in ready if not self.lost(name, one))
        return found

    def signature(self, name: str, version: str) -> Signature | None:
        """Of a version that can be called."""
        found = self.find(name, version)
        if found is None or found.state is not VersionState.READY:
            return None
        return self.held(name, found.id)

    def held(self, name: str, id: str) -> Signature | None:
        """Of what workers hold, whether it can still be called or not."""
        return self._signatures().get(name, {}).get(id)

    def lost(self, name: str, version: Version) -> bool:
        """Whether it was ready, but no worker holds it any more."""
        return version.state is VersionState.READY and self.held(name, version.id) is None

    def serves(self, name: str, number: str, digest: str) -> bool:
        """Whether a version with these contents can be called."""
        found = self.find(name, number)
        return found is not None and found.digest == digest and self.signature(name, number) is not None

    # Changes.

    def refresh(self) -> None:
        """To be called now and then: tells of a change where workers hold something else by now."""
        if self._signatures() is not self._looked:
            self._looked = self._signatures()
            self._changed()

    def next_revision(self, name: str, version: str) -> int:
        """The number of a revision that is about to be loaded."""
        return self._revisions.get((name, version), -1) + 1

    def publish(self, name: str, version: Version) -> None:
        """From now on calls find it; what bore its number before is not found any more."""
        self._versions.setdefault(name, {})[version.number] = version
        self._revisions[name, version.number] = version.revision
        self._changed()

    def note(self, name: str, number: str, state: VersionState, reason: str, origin: Origin = "repository") -> None:
        """Says how a version is that cannot be called; a ready one stays ready, and gets the reason."""
        known = self._versions.setdefault(name, {})
        found = known.get(number)
        if found is None or found.state is VersionState.UNLOADING:
            # What is on its way out is forgotten later, and what is noted now is not to go with it.
            known[number] = Version(number, state, reason, origin=origin)
        else:
            kept = found.state if found.state is VersionState.READY else state
            if (found.reason, found.state) == (reason, kept):
                return
            found.reason, found.state = reason, kept
            if kept is not VersionState.READY:
                found.origin = origin
        self._changed()

    def blame(self, faults: Mapping[str, str]) -> None:
        """Says what is wrong with whole models."""
        if faults != self.faults:
            self.faults = faults
            self._changed()

    def forgive(self, name: str, number: str, reason: str) -> None:
        """What was wrong is so no more: forgets the reason, and the version if there was nothing else to it."""
        found = self.find(name, number)
        if found is not None and found.reason == reason:
            found.reason = ""
            if found.state is VersionState.FAILED:
                self.forget(name, number)

    def counts(self) -> Counter[tuple[str, str]]:
        """How many versions there are, by model and state; those that no worker holds any more have failed."""
        failed = VersionState.FAILED
        return Counter(
            (name, (failed if self.lost(name, one) else one.state).value)
            for name, known in self._versions.items()
            for one in known.values()
        )

    def withdraw(self, name: str, number: str, reason: str) -> Version | None:
        """From now on no call finds a version. Returns it if it could be called until now."""
        found = self.find(name, number)
        if found is None or found.state is not VersionState.READY:
            return None
        found.state, found.reason = VersionState.UNLOADING, reason
        self._changed()
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
        self._changed()

    def _changed(self) -> None:
        self._sorted.clear()
        self._callable.clear()
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
