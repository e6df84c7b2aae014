"""Whether calls and backwards look for the operation that makes NaN: `autograd.detect_anomaly`."""

from __future__ import annotations

import contextvars
from contextlib import ContextDecorator
from types import TracebackType
from typing import Self

_enabled: contextvars.ContextVar[bool] = contextvars.ContextVar("pullback_detect_anomaly", default=False)


def is_anomaly_enabled() -> bool:
    """Whether calls and backwards of this thread (or task) look for anomalies."""
    return _enabled.get()


class detect_anomaly(ContextDecorator):
    """Calls and backwards inside fail with NonFinite where what they return is not finite, and name what made it.

        with pb.autograd.detect_anomaly():
            loss = pb.functional.mse_loss(model(x), target)
            loss.backward()

    The message names the operation, or the backward's node, the module that ran it, and how much of its result is not
    finite. A backward knows modules where the call that made its graph was inside as well. As torch's, but that
    infinities which reach no result are passed over. A context manager and a decorator; of this thread alone. It is
    slow: for finding out.

    enabled: False turns it off for what is inside.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._mode = bool(enabled)
        self._tokens: list[contextvars.Token[bool]] = []

    def _recreate_cm(self) -> Self:
        # A fresh one for each call of a decorated function, which may recurse or run in several threads.
        return type(self)(self._mode)

    def __enter__(self) -> Self:
        self._tokens.append(_enabled.set(self._mode))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _enabled.reset(self._tokens.pop())
