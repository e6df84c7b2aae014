"""What to do about a repository that changes: pure, told of every scan and of the time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pullback_server.hosting.manifest import Manifest
from pullback_server.hosting.repository_contents import Scan

Key = tuple[str, str]


@dataclass(frozen=True)
class Change:
    """Something to be done. fingerprint: of what is to be loaded (`Found.versions`); empty: nothing."""

    kind: Literal["add", "replace", "remove"]
    name: str
    version: str
    fingerprint: str = ""


class Watch:
    """Follows a repository: tells what to load and unload, each thing once.

    Of each model those versions should be served that its manifest picks from the ones that could be: whose files have
    been the same for `settle` seconds, and that have not failed to load as they are. A version that gives way to
    another is removed only once nothing of its model is to be loaded any more, so in a later call: what cannot be
    loaded replaces nothing. What was told of stays while its files change, while they or the manifest are broken, and
    for `settle` seconds after they are gone.

    Call `see` again after what it told of was tried, and `failed` or `retry` for what did not succeed.
    """

    def __init__(self, settle: float = 2.0) -> None:
        self._settle = settle
        #: Fingerprint of each version as it was last seen ("": gone), and since when.
        self._seen: dict[Key, tuple[str, float]] = {}
        #: Fingerprint of what is served, as far as was told.
        self._served: dict[Key, str] = {}
        #: What was served before that.
        self._before: dict[Key, str] = {}
        self._failed: dict[Key, str] = {}
        #: Whether something is not yet settled: worth another scan after `settle` seconds.
        self.unsettled = False

    def see(self, scan: Scan, now: float, at_once: bool = False) -> list[Change]:
        """What is to be done after a scan at `now` (seconds of any clock that only goes forward), in this order.

        at_once: take what is there as settled, as at the start.
        """
        self._note(scan, now)
        settled = {key for key, (_, since) in self._seen.items() if at_once or now - since >= self._settle}
        self.unsettled = len(settled) < len(self._seen)
        changes = []
        for name in sorted({name for name, _ in self._seen}):
            found = scan.models.get(name)
            if found is None or found.error is None:
                changes += self._of_model(name, found.manifest if found else None, settled)
        told = {(change.name, change.version) for change in changes}
        for key in [key for key in settled - told if self._seen[key][0] == "" and key not in self._served]:
            del self._seen[key]
            self._failed.pop(key, None)
            self._before.pop(key, None)
        return changes

    def _note(self, scan: Scan, now: float) -> None:
        present: dict[Key, str] = {}
        for name, found in scan.models.items():
            present |= {(name, version): fingerprint for version, fingerprint in found.versions.items()}
        for name, version in {*self._seen, *present}:
            now_found = scan.models.get(name)
            broken = now_found is not None and (now_found.error is not None or version in now_found.problems)
            fingerprint = present.get((name, version), "")
            last = self._seen.get((name, version))
            if not broken and (last is None or last[0] != fingerprint):
                self._seen[name, version] = (fingerprint, now)

    def _of_model(self, name: str, manifest: Manifest | None, settled: set[Key]) -> list[Change]:
        can: dict[str, str] = {}
        for key, (fingerprint, _) in self._seen.items():
            if key[0] != name:
                continue
            if key in settled and fingerprint != self._failed.get(key):
                can[key[1]] = fingerprint
            elif key in self._served:
                can[key[1]] = self._served[key]
        can = {version: fingerprint for version, fingerprint in can.items() if fingerprint}
        wanted = manifest.picked(can) if manifest is not None else []
        told = []
        for version in wanted:
            key = (name, version)
            if self._served.get(key) == can[version]:
                continue
            told.append(Change("replace" if key in self._served else "add", name, version, can[version]))
            self._before[key] = self._served.get(key, "")
            self._served[key] = can[version]
        if told:
            return told
        for key in sorted(key for key in self._served if key[0] == name and key[1] not in wanted):
            # A manifest that picks others now is part of the fingerprint, and may not be the last word.
            if key in settled:
                told.append(Change("remove", *key))
                self._before[key] = self._served.pop(key)
        return told

    def failed(self, change: Change) -> None:
        """It could not be loaded, and will not be tried again before its files change."""
        if change.fingerprint:
            self._failed[change.name, change.version] = change.fingerprint
        self.retry(change)

    def retry(self, change: Change) -> None:
        """It could not be done for now: told again in the next call of `see`."""
        key = (change.name, change.version)
        before = self._before.pop(key, "")
        if before:
            self._served[key] = before
        else:
            self._served.pop(key, None)
