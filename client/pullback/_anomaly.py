"""Whether calls and backwards look for the operation that makes NaN: `autograd.detect_anomaly`."""

from __future__ import annotations

import contextvars

from pullback._switch import Switch

_enabled: contextvars.ContextVar[bool] = contextvars.ContextVar("pullback_detect_anomaly", default=False)


def is_anomaly_enabled() -> bool:
    """Whether calls and backwards of this thread (or task) look for anomalies."""
    return _enabled.get()


class detect_anomaly(Switch):
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
        super().__init__(_enabled, bool(enabled))
