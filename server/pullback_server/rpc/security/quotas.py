"""What a principal has used, and what is left of its quotas."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from pullback_server.faults import Fault
from pullback_server.rpc.security.principals import Quota
from pullback_wire import Reason

#: Told of the kind of quota that refused something.
Refused = Callable[[str], None]
#: Ops after which a session holds more than before.
_MAKING = frozenset(("put", "call", "grad", "parameters"))


class Bucket:
    """Fills by `rate` a second, up to `most`. What is taken may be more than there is; it is owed then."""

    def __init__(self, rate: float, most: float) -> None:
        self.rate = rate
        self.most = self._level = most
        self._at = time.monotonic()

    def wait(self, least: float) -> float:
        """Seconds until there is at least so much; 0: there is."""
        now = time.monotonic()
        self._level = min(self.most, self._level + (now - self._at) * self.rate)
        self._at = now
        # A level that is short by rounding alone would have callers wait for nothing at all.
        return 0.0 if self._level >= least * (1 - 1e-9) else (least - self._level) / self.rate

    def take(self, amount: float) -> None:
        self._level -= amount


class Usage:
    """One principal's use, over all its connections. On the event loop only."""

    def __init__(self, name: str, quota: Quota, refused: Refused) -> None:
        self._name = name
        self._refused = refused
        self._calls: Bucket | None = None
        self._bytes: Bucket | None = None
        self._sessions: set[SessionUse] = set()
        self.quota = Quota()
        self.set(quota)

    def set(self, quota: Quota) -> None:
        """Goes by another quota from now on. What is owed by one that stays the same stays owed."""
        if quota.calls_per_second != self.quota.calls_per_second:
            rate = quota.calls_per_second
            self._calls = None if rate is None else Bucket(rate, max(rate, 1.0))
        if quota.bytes_per_second != self.quota.bytes_per_second:
            rate = quota.bytes_per_second
            self._bytes = None if rate is None else Bucket(rate, rate)
        self.quota = quota

    def call(self, size: int) -> None:
        """A call, or an op of a session, has come with so many bytes. Raises Fault (QUOTA_EXCEEDED)."""
        calls = self._calls
        if calls is not None and (seconds := calls.wait(1.0)):
            raise self._spent("calls", f"{self.quota.calls_per_second:g} calls and ops per second", seconds)
        self.bring(size)
        if calls is not None:
            calls.take(1.0)

    def bring(self, size: int) -> None:
        """So many bytes have come, or are about to. Raises Fault (QUOTA_EXCEEDED) where bytes are owed."""
        if self._bytes is not None:
            if seconds := self._bytes.wait(0.0):
                raise self._spent("bytes", f"{self.quota.bytes_per_second:,.0f} bytes per second", seconds)
            self._bytes.take(size)

    def sent(self, size: int) -> None:
        """So many bytes were sent: they count, and later ones wait for them."""
        if self._bytes is not None:
            self._bytes.take(size)

    def open(self, use: SessionUse) -> None:
        """A session begins. Raises Fault (QUOTA_EXCEEDED)."""
        most = self.quota.sessions
        if most is not None and len(self._sessions) >= most:
            raise self._spent("sessions", f"{most} open sessions")
        self._sessions.add(use)

    def close(self, use: SessionUse) -> None:
        """It has ended. Closing one that was never opened is harmless."""
        self._sessions.discard(use)

    @property
    def idle(self) -> bool:
        """Whether nothing is open."""
        return not self._sessions

    def left(self, apart_from: SessionUse | None = None) -> int | None:
        """Bytes that may still be retained, besides what one session holds; None: no limit."""
        most = self.quota.retained_bytes
        return None if most is None else most - sum(use.held for use in self._sessions if use is not apart_from)

    def exceeded(self) -> bool:
        """Whether sessions retain more than they may, as ops of several that ran at the same time can make it."""
        most = self.quota.retained_bytes
        return most is not None and sum(use.retained() for use in self._sessions) > most

    def retained(self) -> Fault:
        """How a refusal is told for what would be retained."""
        return self._spent("retained", f"{self.quota.retained_bytes:,} bytes retained by its sessions")

    def _spent(self, quota: str, what: str, seconds: float | None = None) -> Fault:
        self._refused(quota)
        return Fault(Reason.QUOTA_EXCEEDED, f"principal {self._name!r} has used up its quota of {what}", "", seconds)


class Admission(Protocol):
    """Counts all bytes that come in; see Scheduler."""

    def admit_upload(self, size: int) -> None: ...
    def forget_upload(self, size: int) -> None: ...


class SessionUse:
    """One session's part, while inside. Admits what comes as `admission` does, within the quotas.

    retained: reads what the session holds on its worker.
    """

    def __init__(self, usage: Usage, admission: Admission) -> None:
        self.usage = usage
        self.retained: Callable[[], int] = lambda: 0
        self._admission = admission
        # Bytes that have come, or were announced, and are not with the worker.
        self._coming = 0
        self._before = 0

    @property
    def held(self) -> int:
        """Bytes."""
        return self.retained() + self._coming

    def admit_op(self, kind: str, size: int) -> None:
        """An op has come, with so many bytes of its own. Raises Fault."""
        # Letting go is always possible.
        if kind != "release_only":
            self.usage.call(size)
        if kind in _MAKING:
            self._check_room(size)
        self._admit(size)

    def admit_upload(self, size: int) -> None:
        """A tensor is about to come in chunks. Raises Fault."""
        self._check_room(size)
        self.usage.bring(size)
        self._admit(size)

    def forget_upload(self, size: int) -> None:
        """What was admitted is with the worker, or will not get there."""
        self._coming -= size
        self._admission.forget_upload(size)

    def _admit(self, size: int) -> None:
        self._admission.admit_upload(size)
        self._coming += size

    def __enter__(self) -> SessionUse:
        """Raises Fault (QUOTA_EXCEEDED)."""
        self.usage.open(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.usage.close(self)

    @property
    def limited(self) -> bool:
        """Whether there is a limit of what may be retained."""
        return self.usage.quota.retained_bytes is not None

    def exceeded(self) -> Fault | None:
        """To be asked after each op: why the session has to end. None: what it made is within the quota.

        Each op of several sessions that run at the same time may make what is left when it is sent. Whoever ends last
        has then made too much, and on a worker it cannot be unmade.
        """
        before, self._before = self._before, self.retained()
        return self.usage.retained() if self._before > before and self.usage.exceeded() else None

    def budget(self, own: int) -> int:
        """What the session may hold, of its own budget and of what its principal's other sessions leave."""
        left = self.usage.left(apart_from=self)
        return own if left is None else max(min(own, left), 0)

    def _check_room(self, size: int) -> None:
        left = self.usage.left()
        if left is not None and (left <= 0 or size > left):
            raise self.usage.retained()
