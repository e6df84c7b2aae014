"""The session behind an asyncio session: a pipelined one that refuses to block an event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

from pullback import errors
from pullback._session import Session, current
from pullback._stream import Stream
from pullback._tensor import Tensor as SyncTensor
from pullback._transport import Transport
from pullback.aio._threads import gently, in_event_loop, in_thread, start

P = ParamSpec("P")
R = TypeVar("R")

#: Ops in flight from which on a thread reads their answers, how many it leaves, and how many there may be.
_MANY, _FEW, _MOST = 128, 64, 8192


class HeldStream(Stream):
    """A stream that never waits in an event loop."""

    def wait(self, done: Callable[[], bool], what: str, deadline: float) -> None:
        """See Stream. Raises RuntimeError where it would have to wait."""
        if in_event_loop() and not self.is_over():
            if done():
                return
            raise RuntimeError(
                f"{what}: the answer has not come yet, and waiting for it would block the event loop: await what needs "
                "it, as in `await tensor.ready()`, after which shape and dtype are known"
            )
        super().wait(done, what, deadline)

    def upload(self, data: memoryview, what: str, deadline: float) -> int:
        """See Stream. Raises RuntimeError in an event loop."""
        if in_event_loop():
            raise RuntimeError(
                f"{what}: sending {len(data):,} bytes would block the event loop: `await session.tensor(array)` and "
                "use what that returns"
            )
        return super().upload(data, what, deadline)


class Held(Session):
    """A session whose tensors are `pullback.aio.Tensor`s. To be made in a thread.

    Threads may use it as any session. In an event loop its ops are sent without waiting.
    """

    stream_type = HeldStream
    # `tensor_type` is set where that class is made, which needs this one.

    def __init__(
        self,
        transport: Transport,
        models: Sequence[tuple[str, str]],
        timeout: float | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.loop = loop
        #: What waits does so one after the other: answers come in order anyway.
        self.turn = asyncio.Lock()
        self._reading = False
        super().__init__(transport, models, pipelined=True, timeout=timeout)

    def is_alive(self) -> bool:
        """See Session. In an event loop nobody is asked."""
        return self.usable if in_event_loop() else super().is_alive()

    def must_wait(self, what: str, instead: str) -> None:
        """Raises RuntimeError in an event loop."""
        if in_event_loop():
            raise RuntimeError(f"{what} waits for the server, which would block the event loop: {instead}")

    def make_room(self, what: str) -> None:
        """See Session. In an event loop a thread reads answers meanwhile. Raises RuntimeError for far too many ops."""
        if not in_event_loop():
            super().make_room(what)
            return
        count = self._stream.in_flight
        if count >= _MOST:
            raise RuntimeError(f"{what}: {count} ops are in flight; `await session.synchronize()` now and then")
        if count >= _MANY and not self._reading:
            self._reading = True
            start(self._read)

    def _read(self) -> None:
        try:
            # What ended the session is told to whoever asks for something next.
            with contextlib.suppress(errors.PullbackError):
                self._stream.wait(lambda: self._stream.in_flight <= _FEW, "session", self.deadline(None))
        finally:
            self._reading = False

    async def wait_for(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What a function returns that waits for this session. Raises RuntimeError in another event loop."""
        if asyncio.get_running_loop() is not self.loop:
            raise RuntimeError(f"{self!r} belongs to another event loop, in which it was opened; open one here")
        async with self.turn:
            return await gently(function, *args, **kwargs)


async def in_turn(tensors: Iterable[Any], function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What a function returns that waits for the session of these tensors, or else for the current one."""
    sessions = (one.bound_session for one in tensors if isinstance(one, SyncTensor))
    session: Session | None = next((one for one in sessions if isinstance(one, Held)), current.get())
    if not isinstance(session, Held):
        return await in_thread(function, *args, **kwargs)
    return await session.wait_for(function, *args, **kwargs)
