"""Whether this process is alive and ready, as the probes tell."""

from __future__ import annotations

import time

#: Seconds without a beat of the event loop after which the front counts as stuck.
STUCK_AFTER = 10.0


class Vitals:
    """What the probes read. `beat` is called by the event loop; `ready` is set and unset by the application."""

    def __init__(self) -> None:
        self.ready = False
        self.reason = "starting"
        self._beaten = time.monotonic()

    def beat(self) -> None:
        self._beaten = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since the event loop last said that it runs."""
        return time.monotonic() - self._beaten
