"""A tensor on its way in, piece by piece, straight into memory that its worker will read."""

from __future__ import annotations

import os
from collections.abc import Callable

from pullback_server.ipc.segments import Segment


class Upload:
    """See `seam.Upload`. on_drop: takes a segment back that no job will use."""

    def __init__(self, segment: Segment, size: int, on_drop: Callable[[Segment], None]) -> None:
        self.size = size
        self.received = 0
        self._segment: Segment | None = segment
        self._on_drop = on_drop

    @property
    def complete(self) -> bool:
        return self.received == self.size

    @property
    def view(self) -> memoryview:
        return self._held().mapping()[: self.size]

    def write(self, data: memoryview) -> None:
        # pwrite reports that there is no memory; touching a mapping would be fatal.
        done = 0
        while done < len(data):
            done += os.pwrite(self._held().fd, data[done:], self.received + done)
        self.received += len(data)

    def take(self) -> Segment:
        """The segment, which whoever calls this has to give back."""
        segment, self._segment = self._held(), None
        return segment

    def drop(self) -> None:
        segment, self._segment = self._segment, None
        if segment is not None:
            self._on_drop(segment)

    def _held(self) -> Segment:
        if self._segment is None:
            raise ValueError("this upload was given up, or belongs to a job by now")
        return self._segment
