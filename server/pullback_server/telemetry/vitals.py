"""Whether this process is alive and ready, as the probes tell."""

from __future__ import annotations

import time

#: Seconds without a beat of the event loop after which the front counts as stuck.
STUCK_AFTER = 10.0


class Vitals:
    """What the probes read. `beat` is called by the event loop; all else is set by the application.

    serving: whether calls are taken; reason: why not. computing: whether a worker could compute one.
    """

    def __init__(self) -> None:
        self.serving = False
        self.reason = "starting"
        self.computing = True
        self._beaten = time.monotonic()

    def beat(self) -> None:
        self._beaten = time.monotonic()

    @property
    def ready(self) -> bool:
        """Whether calls should come here."""
        return self.serving and self.computing

    @property
    def hindrance(self) -> str:
        """Why they should not."""
        return "no worker is ready" if self.serving else self.reason

    @property
    def silence(self) -> float:
        """Seconds since the event loop last said that it runs."""
        return time.monotonic() - self._beaten
