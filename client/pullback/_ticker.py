"""One thread for the whole process that watches the clock for streams: heartbeats, silence, waits that run out.

A thread that reads a gRPC stream cannot be given a time limit; it is ended from here, by cancelling the call.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

from pullback._fork import gate


class Watched(Protocol):
    """What a ticker watches."""

    def tick(self, now: float) -> float | None:
        """Does what is due at `now` (time.monotonic). Returns when to be asked again; None: never."""


class Ticker:
    """Asks each watched object when it is due. Its thread lives while there is something to watch."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watched: list[weakref.ref[Watched]] = []
        self._thread: threading.Thread | None = None
        #: When the thread wakes next; read without the lock on the way of every op.
        self._wakes = 0.0
        #: What finalizers leave to be done outside of them.
        self._chores: deque[Callable[[], None]] = deque()

    def watch(self, watched: Watched) -> None:
        """Watches for as long as `watched` lives and wants to be asked."""
        with self._changed:
            self._watched.append(weakref.ref(watched))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pullback-ticker", daemon=True)
                self._thread.start()
            self._wakes = 0.0
            self._changed.notify()

    def by(self, when: float) -> None:
        """Makes sure that the thread is awake at `when`."""
        if when < self._wakes:
            with self._changed:
                self._wakes = 0.0
                self._changed.notify()

    def later(self, chore: Callable[[], None]) -> None:
        """Has something done soon, by the ticker's thread. Takes no lock, so that finalizers may call it."""
        self._chores.append(chore)

    def _run(self) -> None:
        while True:
            while self._chores:
                self._chores.popleft()()
            with self._changed:
                watched = list(self._watched)
            now = time.monotonic()
            wakes = now + 60.0
            gone = []
            for reference in watched:
                one = reference()
                due = None if one is None else one.tick(now)
                # Not held until the next round: it may be the last reference.
                del one
                if due is None:
                    gone.append(reference)
                else:
                    wakes = min(wakes, due)
            with self._changed:
                self._watched = [reference for reference in self._watched if reference not in gone]
                if not self._watched:
                    while self._chores:
                        self._chores.popleft()()
                    self._thread = None
                    return
                if len(self._watched) + len(gone) > len(watched):
                    continue
                self._wakes = wakes
                self._changed.wait(max(wakes - time.monotonic(), 0.0))


#: By generation, as a forked child has no threads of its parent.
_tickers: dict[int, Ticker] = {}


def ticker() -> Ticker:
    """The ticker of this process."""
    generation = gate.generation
    return _tickers.get(generation) or _tickers.setdefault(generation, Ticker())
