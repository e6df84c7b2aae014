"""What a thread does for a task of an event loop, which may give it up meanwhile.

A thread cannot be stopped, but what it waits for can be ended, or waited for without a limit. `pullback.aio` starts
errands; all others know of none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class GivenUp(BaseException):
    """Nobody wants the result any more. No Exception, so that nobody tries again."""


class Errand:
    """One errand. gentle: giving it up ends nothing that others use too; the thread goes on for nobody."""

    def __init__(self, gentle: bool = False) -> None:
        self.gentle = gentle
        self._lock = threading.Lock()
        self._ends: list[Callable[[], None]] = []
        self.given_up = False

    def give_up(self) -> None:
        """Ends what is waited for, and whatever else would be."""
        with self._lock:
            self.given_up = True
            ends, self._ends = self._ends, []
        for end in ends:
            end()

    @contextmanager
    def ending(self, end: Callable[[], None]) -> Iterator[None]:
        """While this lasts, giving up calls `end`.

        Raises GivenUp where it was given up, before or meanwhile, unless it is gentle.
        """
        with self._lock:
            if not self.given_up:
                self._ends.append(end)
        if self.given_up and not self.gentle:
            end()
            raise GivenUp
        try:
            yield
        finally:
            with self._lock:
                if end in self._ends:
                    self._ends.remove(end)
            if self.given_up and not self.gentle:
                raise GivenUp


#: What this thread is on; None: nothing that can be given up.
errand: ContextVar[Errand | None] = ContextVar("pullback_errand", default=None)
