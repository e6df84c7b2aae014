"""Calls that have killed workers are not tried again for a while."""

from __future__ import annotations

import asyncio
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
#: Bytes that are digested on the event loop.
_AT_ONCE = 1 << 20

# In one order, whatever order a caller's options come in.
_encode = msgspec.msgpack.Encoder(order="deterministic").encode


class Quarantine:
    """Remembers calls by what they ask and bring. seconds: for how long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        #: By contents: victims, and when that is forgotten.
        self._known: dict[tuple[bytes, bytes], tuple[int, float]] = {}

    def __len__(self) -> int:
        return sum(victims >= VICTIMS for victims, _ in self._known.values())

    async def check(self, job: Job, payloads: Sequence[Buffer]) -> None:
        """Raises Fault (QUARANTINED)."""
        if not self._known:
            return
        now = time.monotonic()
        for key in [key for key, (_, until) in self._known.items() if until <= now]:
            del self._known[key]
        # Bytes are digested only where all else is that of a call that is held back.
        asked = _asked(job, payloads)
        if not any(key[0] == asked and victims >= VICTIMS for key, (victims, _) in self._known.items()):
            return
        victims, until = self._known.get((asked, await _brought(payloads)), (0, now))
        if victims >= VICTIMS:
            raise Fault(
                Reason.QUARANTINED,
                f"this very call has cost {victims} workers; it is not tried again for {until - now:.0f} s",
            )

    async def victim(self, job: Job, payloads: Sequence[Buffer], count: int = 1) -> None:
        """A worker died of this call, as far as can be told."""
        key = (_asked(job, payloads), await _brought(payloads))
        victims, _ = self._known.pop(key, (0, 0.0))
        self._known[key] = (victims + count, time.monotonic() + self._seconds)
        while len(self._known) > _MOST:
            del self._known[next(iter(self._known))]


def _asked(job: Job, payloads: Sequence[Buffer]) -> bytes:
    """What a call says of itself, and how much it brings."""
    return hashlib.blake2b(_encode((job, [len(payload) for payload in payloads])), digest_size=16).digest()


async def _brought(payloads: Sequence[Buffer]) -> bytes:
    if sum(map(len, payloads)) <= _AT_ONCE:
        return _digest(payloads)
    return await asyncio.get_running_loop().run_in_executor(None, _digest, payloads)


def _digest(payloads: Sequence[Buffer]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for payload in payloads:
        found.update(payload)
    return found.digest()
