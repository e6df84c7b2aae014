"""Calls that have killed workers are not tried again for a while."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import msgspec

from pullback_server.faults import Fault
from pullback_server.fleet.seam import Buffer
from pullback_server.job import Job
from pullback_wire import Reason

#: Workers that calls with the same contents may take down with them.
VICTIMS = 2
#: Calls remembered; the oldest is forgotten first.
_MOST = 256

_encode = msgspec.msgpack.Encoder().encode


class Quarantine:
    """Remembers calls by what they ask and bring. seconds: for how long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        #: By contents: victims, and when that is forgotten.
        self._known: dict[tuple[str, bytes], tuple[int, float]] = {}

    def __len__(self) -> int:
        return sum(victims >= VICTIMS for victims, _ in self._known.values())

    def check(self, job: Job, payloads: Sequence[Buffer]) -> None:
        """Raises Fault (QUARANTINED)."""
        if not self._known:
            return
        self._forget()
        # Contents are digested only where something is held against the model.
        if any(model == job.model for model, _ in self._known):
            victims, until = self._known.get(_contents(job, payloads), (0, 0.0))
            if victims >= VICTIMS:
                raise Fault(
                    Reason.QUARANTINED,
                    f"this very call has cost {victims} workers; it is not tried again for "
                    f"{until - time.monotonic():.0f} s",
                )

    def victim(self, job: Job, payloads: Sequence[Buffer], count: int = 1) -> None:
        """A worker died of this call, as far as can be told."""
        key = _contents(job, payloads)
        victims, _ = self._known.pop(key, (0, 0.0))
        self._known[key] = (victims + count, time.monotonic() + self._seconds)
        while len(self._known) > _MOST:
            del self._known[next(iter(self._known))]

    def _forget(self) -> None:
        now = time.monotonic()
        for key in [key for key, (_, until) in self._known.items() if until <= now]:
            del self._known[key]


def _contents(job: Job, payloads: Sequence[Buffer]) -> tuple[str, bytes]:
    digest = hashlib.blake2b(_encode(job), digest_size=16)
    for payload in payloads:
        digest.update(payload)
    return job.model, digest.digest()
