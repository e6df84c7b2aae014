"""Threads for what blocks: as many as are needed at once, used again while they are warm.

Not the event loop's own executor: that has few, which calls that wait for minutes would take from everybody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

from pullback._errand import Errand, errand
from pullback._fork import gate

P = ParamSpec("P")
R = TypeVar("R")

#: Seconds that an idle thread waits for more to do.
_IDLE = 10.0

_Work = Callable[[], None]
#: Of idle threads, by generation, as a forked child has none of its parent.
_idle: dict[int, deque[SimpleQueue[_Work]]] = {}
#: The event loop whose task this thread works for.
_home: contextvars.ContextVar[asyncio.AbstractEventLoop | None] = contextvars.ContextVar(
    "pullback_home_loop", default=None
)


def in_event_loop() -> bool:
    """Whether this thread runs an event loop just now, which must not be made to wait."""
    return asyncio._get_running_loop() is not None


def works_for_a_task() -> bool:
    """Whether this is a thread in which a task of an event loop has something done that blocks."""
    return not in_event_loop() and _home.get() is not None


async def in_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What a function returns, called in a thread with this task's context. Cancelled, it runs on for nobody."""
    return await _started(contextvars.copy_context(), lambda: function(*args, **kwargs))


async def on_errand(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """As `in_thread`; cancelled, what it waits for on the server is ended too."""
    return await _sent(Errand(), lambda: function(*args, **kwargs))


async def gently(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """As `in_thread`; cancelled, it ends no session by being late, and sends no more of a large tensor."""
    return await _sent(Errand(gentle=True), lambda: function(*args, **kwargs))


async def _sent(mine: Errand, call: Callable[[], R]) -> R:
    context = contextvars.copy_context()
    context.run(errand.set, mine)
    try:
        return await _started(context, call)
    except (asyncio.CancelledError, GeneratorExit):
        mine.give_up()
        raise


def finished(coroutine: Any) -> Any:
    """What a coroutine returns, for a thread without an event loop: it runs in that of the task it works for."""
    if in_event_loop():
        coroutine.close()
        raise RuntimeError("this would block the event loop; await what does it")
    home = _home.get()
    if home is None or home.is_closed():
        return asyncio.run(coroutine)
    return asyncio.run_coroutine_threadsafe(coroutine, home).result()


def _started(context: contextvars.Context, call: Callable[[], R]) -> asyncio.Future[R]:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[R] = loop.create_future()
    context.run(_home.set, loop)

    def work() -> None:
        try:
            result = context.run(call)
        except BaseException as error:
            # A future takes no StopIteration.
            deliver(
                future.set_exception,
                RuntimeError("StopIteration was raised") if isinstance(error, StopIteration) else error,
            )
        else:
            deliver(future.set_result, result)

    def deliver(put: Callable[[Any], None], value: Any) -> None:
        # The loop may be closed by now.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: None if future.done() else put(value))

    start(work)
    return future


def start(work: _Work) -> None:
    """Has a thread do something that raises nothing."""
    idle = _idle.setdefault(gate.generation, deque())
    try:
        inbox = idle.pop()
    except IndexError:
        inbox = SimpleQueue()
        threading.Thread(target=_serve, args=(inbox, idle), name="pullback-aio", daemon=True).start()
    inbox.put(work)


def _serve(inbox: SimpleQueue[_Work], idle: deque[SimpleQueue[_Work]]) -> None:
    while True:
        try:
            work = inbox.get(timeout=_IDLE)
        except Empty:
            try:
                idle.remove(inbox)
            except ValueError:
                # Somebody has just taken it, and something to do is on its way.
                continue
            return
        work()
        # What it returned, and its arrays, are not ours to keep.
        del work
        idle.append(inbox)
