"""Faults about names, always with the nearest name that would have been right."""

from __future__ import annotations

from collections.abc import Collection

from pullback_server.faults import Fault, listed, nearest
from pullback_wire import Reason


def unknown_name(
    what: str, name: str, known: Collection[str], field: str, owner: str, reason: Reason = Reason.BAD_NAME
) -> Fault:
    """The fault for `name`, which is no `what` of `owner`."""
    hint = nearest(name, known)
    hint = f"; {hint}" if hint.startswith("did") else ""
    return Fault(reason, f"{owner} has no {what} {name!r}, it has {listed(known)}{hint}", field)
