"""Whether ops record graphs: `no_grad`, `enable_grad`, `is_grad_enabled`."""

from __future__ import annotations

import contextvars
from contextlib import ContextDecorator
from types import TracebackType
from typing import Self

_enabled: contextvars.ContextVar[bool] = contextvars.ContextVar("pullback_grad_enabled", default=True)


def is_grad_enabled() -> bool:
    """Whether ops of this thread (or task) record graphs."""
    return _enabled.get()


class _GradMode(ContextDecorator):
    _mode = True

    def __init__(self) -> None:
        self._tokens: list[contextvars.Token[bool]] = []

    def _recreate_cm(self) -> Self:
        # A fresh one for each call of a decorated function, which may recurse or run in several threads.
        return type(self)()

    def __enter__(self) -> Self:
        self._tokens.append(_enabled.set(self._mode))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _enabled.reset(self._tokens.pop())


class no_grad(_GradMode):
    """Ops inside record no graph, as torch.no_grad(). A context manager and a decorator; of this thread alone.

    with pb.no_grad():
        p -= 0.1 * p.grad
    """

    _mode = False


class enable_grad(_GradMode):
    """Ops inside record graphs though a `no_grad` is around, as torch.enable_grad()."""
