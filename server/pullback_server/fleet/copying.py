"""Writing payloads into segments without holding up the event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pullback_server.ipc.layout import place
from pullback_server.ipc.segments import Segment

#: Up to this many bytes a copy takes less time than the way to another thread and back: where the pages are there,
#: and where the kernel has to find and clear them first.
_AT_ONCE = 1 << 20
_AT_ONCE_COLD = 256 << 10


def write(segment: Segment, views: Sequence[memoryview], offsets: Sequence[int]) -> None:
    """Writes each view at its offset. Raises OSError where the system has no memory for it."""
    if segment.written:
        # Twice as fast as pwrite where the pages are there; and numpy, unlike a memoryview, lets go of the GIL.
        memory = np.frombuffer(segment.mapping(), dtype=np.uint8)
        for view, offset in zip(views, offsets, strict=True):
            if len(view):
                np.copyto(memory[offset : offset + len(view)], np.frombuffer(view, dtype=np.uint8))
        return
    # pwrite reports that there is no memory; touching a mapping would be fatal.
    for view, offset in zip(views, offsets, strict=True):
        written = 0
        # The kernel takes at most 2 GiB at a time.
        while written < len(view):
            written += os.pwrite(segment.fd, view[written:], offset + written)
    segment.written = True


class Copier:
    """A few threads for the large copies of all workers."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, "pullback-copier")

    async def write(
        self, segment: Segment, views: Sequence[memoryview], size: int, on_abandoned: Callable[[], None]
    ) -> None:
        """`write` of views that lie as `layout.place` says, in `size` bytes. Raises OSError.

        If the awaiting task is cancelled, a thread may still be writing; `on_abandoned` is then called when it is not
        any more, and not before.
        """
        offsets, _ = place(len(view) for view in views)
        if size <= (_AT_ONCE if segment.written else _AT_ONCE_COLD):
            write(segment, views, offsets)
            return
        writing = asyncio.get_running_loop().run_in_executor(self._threads, write, segment, views, offsets)
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            writing.add_done_callback(lambda _: on_abandoned())
            raise

    def close(self) -> None:
        self._threads.shutdown(wait=False)
