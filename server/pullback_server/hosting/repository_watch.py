"""What to do about a repository that changes: pure, told of every scan and of the time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pullback_server.hosting.manifest import Manifest
from pullback_server.hosting.repository_contents import Found, Scan

#: Seconds until another try of what could not be done for now: the first, doubled each time, up to the longest.
_FIRST, _LONGEST = 1.0, 60.0


@dataclass(frozen=True)
class Change:
    """Something to be done. fingerprint: of what is to be loaded (`Found.versions`); empty: nothing."""

    kind: Literal["add", "replace", "remove"]
    name: str
    version: str
    fingerprint: str = ""


@dataclass
class _Later:
    """Of what could not be done for now: whose contents, seconds from one try to the next, and when that is."""

    fingerprint: str
    pause: float
    at: float


@dataclass
class _Model:
    """What is known of a model's versions, by number.

    seen: fingerprint as it was last seen ("": gone), and since when. served: fingerprint of what is served, as far as
    was told. before: what was served before that. failed: fingerprint of what cannot be loaded.
    """

    seen: dict[str, tuple[str, float]] = field(default_factory=dict)
    served: dict[str, str] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    later: dict[str, _Later] = field(default_factory=dict)

    def refused(self, version: str, fingerprint: str, now: float) -> bool:
        """Whether it is not to be tried, or not yet."""
        later = self.later.get(version)
        waits = later is not None and later.fingerprint == fingerprint and now < later.at
        return waits or fingerprint == self.failed.get(version)


class Watch:
    """Follows a repository: tells what to load and unload, each thing once.

    Of each model those versions should be served that its manifest picks from the ones that could be: whose files have
    been the same for `settle` seconds, and that have not failed to load as they are. A version that gives way to
    another is removed only once nothing of its model is to be loaded any more, so in a later call: what cannot be
    loaded replaces nothing. What was told of stays while its files change, while they or the manifest are broken, and
    for `settle` seconds after they are gone.

    Call `see` again after what it told of was tried, and `failed`, `later` or `retry` for what did not succeed.
    """

    def __init__(self, settle: float = 2.0) -> None:
        self._settle = settle
        self._models: dict[str, _Model] = {}
        #: Whether something is not yet settled: worth another scan after `settle` seconds.
        self.unsettled = False

    def see(self, scan: Scan, now: float, at_once: bool = False) -> list[Change]:
        """What is to be done after a scan at `now` (seconds of any clock that only goes forward), in this order.

        at_once: take what is there as settled, and wait for nothing, as at the start.
        """
        changes = []
        self.unsettled = False
        for name in sorted({*self._models, *scan.models}):
            model = self._models.setdefault(name, _Model())
            found = scan.models.get(name)
            _note(model, found, now)
            settled = {number for number, (_, since) in model.seen.items() if at_once or now - since >= self._settle}
            self.unsettled |= len(settled) < len(model.seen)
            told: list[Change] = []
            if found is None or found.error is None:
                told = _told(name, model, found.manifest if found else None, settled, float("inf") if at_once else now)
            changes += told
            for number in settled - {change.version for change in told}:
                if model.seen[number][0] == "" and number not in model.served:
                    for known in (model.seen, model.failed, model.before, model.later):
                        known.pop(number, None)
            if not model.seen and not model.served:
                del self._models[name]
        return changes

    def failed(self, change: Change) -> None:
        """It could not be loaded, and will not be tried again before its files change."""
        if change.fingerprint:
            self._models[change.name].failed[change.version] = change.fingerprint
        self.retry(change)

    def later(self, change: Change, now: float) -> None:
        """It could not be done for now: told again after a while, which is longer each time."""
        known = self._models[change.name].later
        last = known.get(change.version)
        again = last is not None and last.fingerprint == change.fingerprint
        pause = min(2 * last.pause, _LONGEST) if last is not None and again else _FIRST
        known[change.version] = _Later(change.fingerprint, pause, now + pause)
        self.retry(change)

    def retry(self, change: Change) -> None:
        """It could not be done for now: told again in the next call of `see`."""
        model = self._models.setdefault(change.name, _Model())
        before = model.before.pop(change.version, "")
        if before:
            model.served[change.version] = before
        else:
            model.served.pop(change.version, None)


def _note(model: _Model, found: Found | None, now: float) -> None:
    if found is not None and found.error is not None:
        return
    present = found.versions if found is not None else {}
    problems = found.problems if found is not None else {}
    for number in {*model.seen, *present}:
        fingerprint = present.get(number, "")
        last = model.seen.get(number)
        if number not in problems and (last is None or last[0] != fingerprint):
            model.seen[number] = (fingerprint, now)


def _told(name: str, model: _Model, manifest: Manifest | None, settled: set[str], now: float) -> list[Change]:
    can: dict[str, str] = {}
    for number, (fingerprint, _) in model.seen.items():
        if number in settled and not model.refused(number, fingerprint, now):
            can[number] = fingerprint
        elif number in model.served:
            can[number] = model.served[number]
    can = {number: fingerprint for number, fingerprint in can.items() if fingerprint}
    wanted = manifest.picked(can) if manifest is not None else []
    told = []
    for number in wanted:
        if model.served.get(number) == can[number]:
            continue
        told.append(Change("replace" if number in model.served else "add", name, number, can[number]))
        model.before[number] = model.served.get(number, "")
        model.served[number] = can[number]
    if told:
        return told
    for number in sorted(model.served.keys() - set(wanted), key=int):
        # A manifest that picks others now is part of the fingerprint, and may not be the last word.
        if number in settled:
            told.append(Change("remove", name, number))
            model.before[number] = model.served.pop(number)
    return told
