"""Work in threads that must not be left half-way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


async def to_end(function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Runs it in a thread. Whoever is cancelled meanwhile learns of that when the thread has ended, not before."""
    task = asyncio.create_task(asyncio.to_thread(function, *arguments, **named))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _ended(task)
        raise


async def to_end_or_undone(function: Callable[[], T], undo: Callable[[T], None]) -> T:
    """As `to_end`; for whoever is cancelled meanwhile, what came of it is undone."""
    task = asyncio.create_task(asyncio.to_thread(function))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _ended(task)
        if task.exception() is None:
            await _ended(asyncio.create_task(asyncio.to_thread(undo, task.result())))
        raise


async def _ended(task: asyncio.Task[Any]) -> None:
    # A thread cannot be interrupted, however often its task is cancelled.
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    # Nobody else asks for it.
    task.exception()
