"""The transport of an asyncio client: the same calls, during which the event loop goes on.

Calls are made through gRPC's futures on the same kind of channel as the sync client's, not through grpc.aio: so a
client may be used in any event loop, survives a fork and shares one connection with its sessions, and messages are
taken apart in gRPC's own thread instead of the loop's.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, ParamSpec, TypeVar, cast

from pullback._calls import Metadata
from pullback._channel import bearer
from pullback._fork import gate
from pullback._transport import LONGEST, Trailers, Transport
from pullback.aio._threads import finished, in_thread, on_errand
from pullback_wire.framing import Buffer

P = ParamSpec("P")
R = TypeVar("R")

#: What `token` may be: a str, or a function, be it an async one.
AnyToken = str | Callable[[], str] | Callable[[], Awaitable[str]]

#: Copies of at least so many bytes are left to a thread.
_LARGE = 4 << 20


class LoopTransport(Transport):
    """A transport whose coroutines wait in an event loop, in any. Blocking ones are for its `line`."""

    everyone: ClassVar[weakref.WeakSet[Transport]] = weakref.WeakSet()
    has_own_session = False
    # It is entered for each call, until that is over and not until its task has noticed.
    gate: ClassVar[AbstractContextManager[None]] = contextlib.nullcontext()

    def line(self) -> Transport:
        """For threads; see `Transport.line`."""
        return self._share(Line)

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """For threads. Raises RuntimeError in an event loop."""
        return cast(R, finished(coroutine))

    def where(self) -> object:
        """See `Transport.where`."""
        return gate.generation, asyncio.get_running_loop()

    def event(self) -> Any:
        """See `Transport.event`."""
        return asyncio.Event()

    async def until(self, event: Any, deadline: float) -> bool:
        """See `Transport.until`."""
        left = deadline - time.monotonic()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), None if left > LONGEST else max(left, 0.0))
        return bool(event.is_set())

    async def unary(
        self, path: str, data: bytes, timeout: float | None, metadata: Metadata, told: bool
    ) -> tuple[bytes, Trailers]:
        """See `Transport.unary`. Cancelling the task cancels the call."""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[None] = loop.create_future()

        def over(_: Any) -> None:
            gate.__exit__()
            # The loop may be closed by now.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(lambda: None if answered.done() else answered.set_result(None))

        gate.__enter__()
        try:
            call = self._channel.unary(path).future(data, timeout=timeout, metadata=metadata)
        except BaseException:
            gate.__exit__()
            raise
        call.add_done_callback(over)
        try:
            await answered
        except BaseException:
            # A cancelled task, or one whose loop was closed over it.
            call.cancel()
            raise
        answer: bytes = call.result()
        return answer, call.trailing_metadata() if told else None

    async def authorization(self) -> Metadata:
        """See `Address.authorization`; the function may be an async one."""
        return await _authorization(self.address.token)

    async def sleep(self, seconds: float) -> None:
        """Lets time pass."""
        await asyncio.sleep(seconds)

    async def aside(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What a function returns that blocks; cancelling the task ends what it waits for."""
        return await on_errand(function, *args, **kwargs)

    async def copying(self, buffers: Sequence[Buffer], function: Callable[[], R]) -> R:
        """What a function returns that copies these."""
        return await in_thread(function) if sum(map(len, buffers)) >= _LARGE else function()


class Line(Transport):
    """The same connection for threads: what they do blocks. Tokens are still got in the event loop."""

    everyone: ClassVar[weakref.WeakSet[Transport]] = weakref.WeakSet()

    async def authorization(self) -> Metadata:
        """See `Address.authorization`."""
        token = self.address.token
        if token is None or isinstance(token, str):
            return self.address.authorization()
        return cast(Metadata, finished(_authorization(token)))


async def _authorization(token: Any) -> Metadata:
    if token is None:
        return ()
    if isinstance(token, str):
        return bearer(token)
    found = token()
    return bearer(await found if inspect.isawaitable(found) else found)
