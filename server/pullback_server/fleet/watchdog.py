"""Whether a worker has been at one job for longer than it may."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pullback_server.job import Batch, Job
from pullback_server.ops import SessionJob

Work = Job | Batch | SessionJob

#: Seconds between looks; a look costs next to nothing, and a timer for each job would cost more than most jobs.
_LOOK = 0.1
#: A look that comes so many seconds late was not late for want of a turn.
_SUSPENDED = 1.0


class Watchdog:
    """Looks at what a worker computes, as long as it computes anything.

    computing: the number of the job that it is at, and the job. limit_of: seconds that a job may compute.
    on_overdue: called once, with the seconds, when a job has computed for longer.
    """

    def __init__(
        self,
        computing: Callable[[], tuple[int, Work] | None],
        limit_of: Callable[[Work], float],
        on_overdue: Callable[[float], None],
    ) -> None:
        self._computing = computing
        self._limit_of = limit_of
        self._on_overdue = on_overdue
        self._loop = asyncio.get_running_loop()
        self._since = self._expected = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    def begin(self) -> None:
        """The worker begins with another job."""
        self._since = self._loop.time()
        if self._timer is None and not self._ended:
            self._look_later()

    def end(self) -> None:
        """There is nothing to watch any more."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        found = self._computing()
        if found is None or self._ended:
            return
        now = self._loop.time()
        if now - self._expected > _SUSPENDED:
            # The machine slept, or everything was stopped: the worker did not compute meanwhile either.
            self._since += now - self._expected
        seconds = now - self._since
        if seconds > self._limit_of(found[1]):
            self._ended = True
            self._on_overdue(seconds)
        else:
            self._look_later()

    def _look_later(self) -> None:
        self._expected = self._loop.time() + _LOOK
        self._timer = self._loop.call_later(_LOOK, self._look)
