"""Both clients behind one face, so that what they share is tested once: the asyncio client called as the sync one is.

Each call runs in an event loop of another thread, with the caller's context variables.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import pullback as pb

#: `pullback.connect`, or what looks like it.
Connect = Callable[..., Any]


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a function returns in the loop, awaited if need be."""

        async def called() -> Any:
            found = function(*args, **kwargs)
            return await found if inspect.isawaitable(found) else found

        return asyncio.run_coroutine_threadsafe(called(), self.loop).result()

    def connect(self, *args: Any, **kwargs: Any) -> Any:
        return Awaited(self.call(pb.aio.connect, *args, **kwargs), self)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class Awaited:
    """A client of `pullback.aio`, or a model of one, whose coroutines are awaited by whoever calls them."""

    def __init__(self, it: Any, loop: Loop) -> None:
        self._it = it
        self._loop = loop

    def __repr__(self) -> str:
        return repr(self._it)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._it, name)
        if name == "info":
            # A property of the sync client's.
            return self._loop.call(found)
        if not inspect.ismethod(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            result = self._loop.call(found, *args, **kwargs)
            return Awaited(result, self._loop) if isinstance(result, pb.aio.RemoteModel) else result

        return call

    def __enter__(self) -> Awaited:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def connecting(kind: str) -> Iterator[Connect]:
    """`connect` of the sync client, or of the asyncio client with its face."""
    if kind == "sync":
        yield pb.connect
        return
    loop = Loop()
    try:
        yield loop.connect
    finally:
        loop.stop()
