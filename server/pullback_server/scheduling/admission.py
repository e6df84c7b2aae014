"""What may be in the house at once, and when those who are refused should come back."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

from pullback_server.faults import Fault
from pullback_wire import Reason

#: Bounds of what a refused caller is told to wait, in seconds.
_SOONEST, _LATEST = 0.05, 30.0
#: What it is told while nothing has been measured.
_UNMEASURED = 0.5
#: Seconds over which the drain rate is measured.
_WINDOW = 2.0


@dataclass(frozen=True)
class Limits:
    """What may be in the house at once; what comes on top is refused with OVERLOADED.

    calls, bytes: in flight (waiting or being computed), and the bytes of their tensors; in all, of one model, of one
    caller. None: no limit besides that on all.
    queue_seconds: that a call may wait for a worker; None: as long as its deadline allows.
    """

    calls: int = 1024
    bytes: int = 4 << 30
    model_calls: int | None = None
    model_bytes: int | None = None
    caller_calls: int | None = None
    caller_bytes: int | None = None
    queue_seconds: float | None = None


class DrainRate:
    """Calls answered per second, over the last few seconds."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._count = 0
        self._rate = 0.0

    def answered(self) -> None:
        """One more."""
        self._roll()
        self._count += 1

    def measured(self) -> float:
        """Calls per second; 0 while nothing was answered."""
        elapsed = self._roll()
        # At the beginning, as far as it goes.
        return self._rate or (self._count / elapsed if elapsed > 0 else 0.0)

    def _roll(self) -> float:
        """Begins another window when one is over. Returns the seconds of the present one."""
        now = time.monotonic()
        elapsed = now - self._since
        if elapsed < _WINDOW:
            return elapsed
        # A window in which nothing was asked says nothing of how fast it could have been.
        self._rate = self._count / elapsed if elapsed < 2 * _WINDOW else 0.0
        self._since, self._count = now, 0
        return 0.0

    def seconds_for(self, calls: int) -> float:
        """Seconds in which so many calls will have been answered."""
        rate = self.measured()
        return min(max(calls / rate, _SOONEST), _LATEST) if rate else _UNMEASURED


class Admission:
    """Counts what is in flight, and refuses what is too much."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.calls = 0
        self.bytes = 0
        self.by_caller: Counter[str] = Counter()
        self._caller_bytes: Counter[str] = Counter()
        self._model_calls: Counter[str] = Counter()
        self._model_bytes: Counter[str] = Counter()
        self.rate = DrainRate()

    @property
    def full(self) -> bool:
        """Whether there are as many calls as there may be."""
        return self.calls >= self.limits.calls

    def check(self, caller: str, model: str, size: int) -> None:
        """Whether a call may come in.

        Raises Fault (OVERLOADED; RESULT_TOO_LARGE for more bytes than ever fit).
        """
        limits = self.limits
        if self.full:
            raise self._too_many("", self.calls, limits.calls)
        if limits.caller_calls is not None and self.by_caller[caller] >= limits.caller_calls:
            raise self._too_many(" of this caller", self.by_caller[caller], limits.caller_calls)
        if limits.model_calls is not None and self._model_calls[model] >= limits.model_calls:
            raise self._too_many(f" for model {model!r}", self._model_calls[model], limits.model_calls)
        self.check_bytes(size)
        if limits.caller_bytes is not None and self._caller_bytes[caller] + size > limits.caller_bytes:
            raise self._too_large(" of this caller", self._caller_bytes[caller], size, limits.caller_bytes)
        if limits.model_bytes is not None and self._model_bytes[model] + size > limits.model_bytes:
            raise self._too_large(f" for model {model!r}", self._model_bytes[model], size, limits.model_bytes)

    def check_bytes(self, size: int) -> None:
        """Whether so many bytes may come in. Raises Fault as `check`."""
        if self.bytes + size > self.limits.bytes:
            raise self._too_large("", self.bytes, size, self.limits.bytes)

    def enter(self, caller: str, model: str, size: int) -> None:
        """A call came in."""
        self.calls += 1
        self.bytes += size
        self.by_caller[caller] += 1
        self._model_calls[model] += 1
        self._caller_bytes[caller] += size
        self._model_bytes[model] += size

    def largest(self, caller: str) -> str | None:
        """The caller with the most calls in flight, if it has more than this one would have."""
        most = max(self.by_caller, key=self.by_caller.__getitem__, default=None)
        return most if most is not None and self.by_caller[most] > self.by_caller[caller] + 1 else None

    def heaviest(self, caller: str, size: int) -> str | None:
        """The caller with the most bytes in flight, if it has more than this one would have."""
        most = max(self._caller_bytes, key=self._caller_bytes.__getitem__, default=None)
        return most if most is not None and self._caller_bytes[most] > self._caller_bytes[caller] + size else None

    def leave(self, caller: str, model: str, size: int) -> None:
        """A call has left."""
        self.calls -= 1
        self.bytes -= size
        self._model_calls[model] -= 1
        self._model_bytes[model] -= size
        self.by_caller[caller] -= 1
        self._caller_bytes[caller] -= size
        if not self.by_caller[caller]:
            # Callers come and go; nothing must be left of one that went.
            del self.by_caller[caller], self._caller_bytes[caller]

    def overloaded(self, message: str, calls: int) -> Fault:
        """A refusal that says when `calls` calls will have been answered."""
        return Fault(Reason.OVERLOADED, message, "", self.rate.seconds_for(calls))

    def _too_many(self, whose: str, count: int, limit: int) -> Fault:
        # Half of those that are there: by then there is room for many of those who were refused meanwhile.
        return self.overloaded(f"{count} calls{whose} are in flight, the limit is {limit}", (count + 1) // 2)

    def _too_large(self, whose: str, present: int, size: int, limit: int) -> Fault:
        # A call that could never fit must not be retried; one that can, may.
        message = f"{present} bytes{whose} are in flight and this call brings {size}, the limit is {limit}"
        if size > limit:
            return Fault(Reason.RESULT_TOO_LARGE, message, "payloads")
        fault = self.overloaded(message, (self.calls + 1) // 2)
        fault.field = "payloads"
        return fault
