"""A computed job, as the fleet hands it on."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import numpy as np

from pullback_server.fleet.seam import Buffer
from pullback_server.ipc.layout import place
from pullback_server.job import BatchOutcome, Outcome
from pullback_server.ops import SessionOutcome


class Lease:
    """The memory of one reply, and whether anything still looks at it when it is given back.

    on_return: called once with whether the memory may be used again.
    """

    def __init__(self, memory: memoryview, on_return: Callable[[bool], None]) -> None:
        # Every view of the payloads, whoever makes it and of what kind, keeps this object alive.
        base = np.frombuffer(memory, dtype=np.uint8)
        self.memory: memoryview | None = base.data
        self._alive = weakref.ref(base)
        self._on_return = on_return
        self._loop = asyncio.get_running_loop()

    def give_back(self, views: Sequence[memoryview], from_any_thread: bool = False) -> None:
        """Ends the lease; the views cannot be read any more."""
        self.memory = None
        for view in views:
            with contextlib.suppress(BufferError):
                view.release()
        reusable = self._alive() is None
        if from_any_thread:
            # The loop may be closed by then; so is the fleet.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._on_return, reusable)
        else:
            self._on_return(reusable)


class LocalReply:
    """See `seam.Reply`. lease: on shared memory; None when the payloads own theirs."""

    def __init__(
        self,
        outcome: Outcome | BatchOutcome | SessionOutcome,
        lengths: Sequence[int],
        memory: memoryview | Lease,
        timings: Mapping[str, float],
    ) -> None:
        self.outcome = outcome
        self.timings = timings
        self._lease = memory if isinstance(memory, Lease) else None
        base = memory.memory if isinstance(memory, Lease) else memory
        assert base is not None
        offsets, _ = place(lengths)
        self._views = [base[offset : offset + length] for offset, length in zip(offsets, lengths, strict=True)]
        self.payloads: Sequence[Buffer] = self._views

    def __enter__(self) -> LocalReply:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """Gives shared memory back; the payloads cannot be read any more."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.give_back(self._views)

    def __del__(self) -> None:
        # A reply that nobody left, because its caller went away: the memory must come back all the same. The garbage
        # collector may be running in any thread.
        if self._lease is not None:
            self._lease.give_back(self._views, from_any_thread=True)
