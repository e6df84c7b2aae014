"""Coroutines that never wait for an event loop, run as ordinary calls.

What both clients do, this one and `pullback.aio`, is written once, as coroutines. They differ in the transport: what
`Transport` does blocks, so that a coroutine over it runs to its end at the first step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


def run(coroutine: Coroutine[Any, Any, R]) -> R:
    """What a coroutine returns that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return cast(R, done.value)
    coroutine.close()
    raise RuntimeError(f"{coroutine!r} waits for an event loop, and there is none")


class _Blocking:
    """In a class's body; becomes a function, and that the class's own."""

    def __init__(self, method: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self._method = method

    def __set_name__(self, owner: type, name: str) -> None:
        method = self._method

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return run(method(self, *args, **kwargs))

        call.__module__, call.__qualname__ = owner.__module__, f"{owner.__qualname__}.{name}"
        setattr(owner, name, call)


def blocking(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[Any, P], R]:
    """A method that runs a coroutine of another class on its own `self`, to its end. For class bodies."""
    return cast("Callable[Concatenate[Any, P], R]", _Blocking(method))
