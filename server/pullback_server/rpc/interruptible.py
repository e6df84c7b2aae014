"""Work for callers that a server which stops does not wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from pullback_server.faults import Fault
from pullback_wire import Reason

T = TypeVar("T")


class Interruptible:
    """Runs work until `close`, whose callers are then told that the server is stopping."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def result(self, work: Coroutine[Any, Any, T], *, goes_on: bool = False) -> T:
        """What work comes to. goes_on: even where its caller leaves.

        Raises Fault (NOT_READY) where it was interrupted, or what the work raises.
        """
        if self._closed:
            work.close()
            raise _stopping()
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        try:
            return await (asyncio.shield(task) if goes_on else task)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self._closed and caller is not None and not caller.cancelling():
                # The caller has not left: gRPC waits for an answer.
                raise _stopping() from None
            raise

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Where the caller has left nobody else asks.
            task.exception()

    async def close(self) -> None:
        """Interrupts what is under way; there is no more after it."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _stopping() -> Fault:
    return Fault(Reason.NOT_READY, "the server is stopping", retry_after=1.0)
