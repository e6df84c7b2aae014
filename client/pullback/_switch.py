"""What a thread (or task) turns on and off for a while: the mechanism of `no_grad` and `detect_anomaly`."""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from types import TracebackType
from typing import Any, Self, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


class Switch:
    """A context manager and a decorator that sets a variable to a mode for what is inside.

    A function, an async one, or a generator (async or not) may be decorated. In a generator it holds while its own code
    runs, and not in between for whoever takes what it yields.
    """

    def __init__(self, variable: contextvars.ContextVar[bool], mode: bool) -> None:
        self._variable = variable
        self._mode = mode
        self._before: list[bool] = []

    def __enter__(self) -> Self:
        self._before.append(self._variable.get())
        self._variable.set(self._mode)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # No token, whose reset() fails where a generator is ended in another context than it was begun in.
        self._variable.set(self._before.pop())

    def __call__(self, function: F) -> F:
        if inspect.isasyncgenfunction(function):
            made: Any = self._async_generator(function)
        elif inspect.isgeneratorfunction(function):
            made = self._generator(function)
        elif inspect.iscoroutinefunction(function):
            made = self._coroutine(function)
        else:
            made = self._function(function)
        return cast(F, made)

    def _fresh(self) -> Switch:
        # One for each call of a decorated function, which may recurse or run in several threads.
        return Switch(self._variable, self._mode)

    def _function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._fresh():
                return function(*args, **kwargs)

        return call

    def _coroutine(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        async def call(*args: Any, **kwargs: Any) -> Any:
            with self._fresh():
                return await function(*args, **kwargs)

        return call

    def _generator(self, function: Callable[..., Generator[Any, Any, Any]]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            mode = self._fresh()
            with mode:
                inner = function(*args, **kwargs)
            step: Callable[[], Any] = functools.partial(next, inner)
            while True:
                try:
                    with mode:
                        given = step()
                except StopIteration as done:
                    return done.value
                try:
                    step = functools.partial(inner.send, (yield given))
                except GeneratorExit:
                    with mode:
                        inner.close()
                    raise
                except BaseException as error:
                    step = functools.partial(inner.throw, error)

        return call

    def _async_generator(self, function: Callable[..., AsyncGenerator[Any, Any]]) -> Callable[..., Any]:
        @functools.wraps(function)
        async def call(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            mode = self._fresh()
            with mode:
                inner = function(*args, **kwargs)
            step: Callable[[], Any] = functools.partial(anext, inner)
            while True:
                try:
                    with mode:
                        given = await step()
                except StopAsyncIteration:
                    return
                try:
                    step = functools.partial(inner.asend, (yield given))
                except GeneratorExit:
                    with mode:
                        await inner.aclose()
                    raise
                except BaseException as error:
                    step = functools.partial(inner.athrow, error)

        return call
