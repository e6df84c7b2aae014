"""Whether ops record graphs: `no_grad`, `enable_grad`, `is_grad_enabled`."""

from __future__ import annotations

import contextvars

from pullback._switch import Switch

_enabled: contextvars.ContextVar[bool] = contextvars.ContextVar("pullback_grad_enabled", default=True)


def is_grad_enabled() -> bool:
    """Whether ops of this thread (or task) record graphs."""
    return _enabled.get()


class no_grad(Switch):
    """Ops inside record no graph, as torch.no_grad(). A context manager and a decorator; of this thread alone.

    with pb.no_grad():
        p -= 0.1 * p.grad
    """

    def __init__(self) -> None:
        super().__init__(_enabled, False)


class enable_grad(Switch):
    """Ops inside record graphs though a `no_grad` is around, as torch.enable_grad()."""

    def __init__(self) -> None:
        super().__init__(_enabled, True)
