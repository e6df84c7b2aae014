"""What a thread (or task) turns on and off for a while: the mechanism of `no_grad` and `detect_anomaly`."""

from __future__ import annotations

import contextvars
import copy
from contextlib import ContextDecorator
from types import TracebackType
from typing import Self


class Switch(ContextDecorator):
    """A context manager and a decorator that sets a variable to a mode for what is inside."""

    def __init__(self, variable: contextvars.ContextVar[bool], mode: bool) -> None:
        self._variable = variable
        self._mode = mode
        self._tokens: list[contextvars.Token[bool]] = []

    def _recreate_cm(self) -> Self:
        # A fresh one for each call of a decorated function, which may recurse or run in several threads.
        fresh = copy.copy(self)
        fresh._tokens = []
        return fresh

    def __enter__(self) -> Self:
        self._tokens.append(self._variable.set(self._mode))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._variable.reset(self._tokens.pop())
