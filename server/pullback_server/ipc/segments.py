"""Shared memory without names: memfd segments that one side owns and writes, and the other maps and reads.

An `Arena` is the owner's side, `Mappings` the reader's. Nothing stands in /dev/shm, so nothing outlives the processes,
however they end.

A mapping is never closed and never resized: it lives until the last view of it is gone. Closing one under a live
tensor is a SIGSEGV, and a segment that is used again under one changes numbers somebody still needs.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable

from pullback_server.ipc.layout import size_class

_SEALS = getattr(fcntl, "F_SEAL_SHRINK", 2) | getattr(fcntl, "F_SEAL_GROW", 4)
_ADD_SEALS = getattr(fcntl, "F_ADD_SEALS", 1033)
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Segment:
    """A piece of memory that this side owns.

    announced: whether the reader has its descriptor.
    written: whether it was written before, so that its pages are there.
    """

    __slots__ = ("_mapping", "announced", "fd", "id", "size", "written")

    def __init__(self, number: int, size: int) -> None:
        self.id = number
        self.size = size
        self.announced = False
        self.written = False
        self._mapping: memoryview | None = None
        self.fd = os.memfd_create("pullback", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            # A reader of a file that has shrunk dies of SIGBUS.
            fcntl.fcntl(self.fd, _ADD_SEALS, _SEALS)
        except BaseException:
            os.close(self.fd)
            raise

    def mapping(self) -> memoryview:
        """The segment's memory, writable; mapped once."""
        if self._mapping is None:
            self._mapping = memoryview(mmap.mmap(self.fd, self.size))
        return self._mapping

    def empty(self) -> None:
        """Gives the memory back now, even while the reader still has the segment mapped."""
        _fallocate(self.fd, _PUNCH_HOLE_KEEP_SIZE, 0, self.size)

    def close(self) -> None:
        os.close(self.fd)
        self.fd = -1
        self._mapping = None


class Arena:
    """The segments that this side owns.

    Holds at most max(budget, what is in use at once) bytes: a second load like the first peaks no higher.
    """

    def __init__(self, budget: int, on_forget: Callable[[Segment], None] | None = None) -> None:
        self._budget = budget
        self._on_forget = on_forget
        self._count = 0
        #: By the time they became idle, oldest first.
        self._idle: dict[int, Segment] = {}
        self._used: dict[int, Segment] = {}
        self._dropped: list[int] = []
        self._closed = False
        #: Bytes of all segments, idle ones included.
        self.bytes = 0

    def take(self, size: int) -> Segment:
        """A segment of at least `size` bytes, warm if there is one. Raises OSError where the system gives none."""
        fitting = size_class(size)
        best: Segment | None = None
        for segment in reversed(self._idle.values()):
            # Up to twice too large: its pages are there already.
            if fitting <= segment.size <= 2 * fitting and (best is None or segment.size < best.size):
                best = segment
                if best.size == fitting:
                    break
        if best is not None:
            del self._idle[best.id]
        else:
            self._shrink(fitting)
            self._count += 1
            best = Segment(self._count, fitting)
            self.bytes += fitting
        self._used[best.id] = best
        return best

    def free(self, segment: Segment) -> None:
        """Takes a segment back that nobody looks at any more."""
        if self._used.pop(segment.id, None) is None:
            raise ValueError(f"segment {segment.id} is not in use")
        if self._closed:
            self._forget(segment)
            return
        self._idle[segment.id] = segment
        self._shrink(0)

    def free_by_id(self, number: int) -> None:
        """`free`, by what the reader calls the segment."""
        self.free(self._used[number])

    def discard(self, segment: Segment) -> None:
        """Forgets a segment that somebody may look at for ever. Its memory goes when the last view of it does."""
        if self._used.pop(segment.id, None) is None:
            raise ValueError(f"segment {segment.id} is not in use")
        self._forget(segment)

    def discard_by_id(self, number: int) -> None:
        self.discard(self._used[number])

    def dropped(self) -> list[int]:
        """Segments given up since the last call whose mapping the reader should forget."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def close(self) -> None:
        """Gives up the idle segments now, and those in use when they are freed."""
        self._closed = True
        for segment in self._idle.values():
            self._forget(segment)
        self._idle.clear()

    def _shrink(self, wanted: int) -> None:
        """Gives up idle segments, longest idle first, until `wanted` more bytes fit the budget."""
        for number in list(self._idle):
            if self.bytes + wanted <= self._budget:
                break
            segment = self._idle.pop(number)
            if segment.announced:
                self._dropped.append(number)
            self._forget(segment, empty=True)

    def _forget(self, segment: Segment, empty: bool = False) -> None:
        self.bytes -= segment.size
        if self._on_forget is not None:
            self._on_forget(segment)
        if empty:
            segment.empty()
        segment.close()


class Mappings:
    """The other side's segments, each mapped once."""

    def __init__(self, writable: bool) -> None:
        self._protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._views: dict[int, memoryview] = {}

    def add(self, number: int, size: int, fd: int) -> memoryview:
        """Maps a segment whose descriptor has arrived, and closes the descriptor. Raises OSError, ValueError."""
        try:
            view = memoryview(mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=self._protection))
        finally:
            os.close(fd)
        self._views[number] = view
        return view

    def view(self, number: int) -> memoryview:
        """The memory of a segment. Raises KeyError."""
        return self._views[number]

    def drop(self, number: int) -> memoryview | None:
        """Forgets a segment; it stays mapped as long as there are views of it. Returns the view there was."""
        return self._views.pop(number, None)

    def clear(self) -> None:
        self._views.clear()
