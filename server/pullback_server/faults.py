"""`Fault`: how any floor says what went wrong, in the terms of the contract's error table."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pullback_wire import Reason


class Fault(Exception):
    """A failure with its documented cause.

    reason: the cause, which fixes the status code.
    message: one sentence that names the field, what was expected and what came.
    field: the request field at fault, as a path ("inputs[x].shape"); empty when no field is.
    retry_after: seconds after which a retry may succeed; None: a retry is pointless or not of the server's choosing.
    """

    def __init__(self, reason: Reason, message: str, field: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after = retry_after

    def __repr__(self) -> str:
        return f"Fault({self.reason.value}, {self.message!r}, field={self.field!r})"


#: More names than this would drown the sentence.
_LISTED = 12
#: A longer name is like none that there is, and to compare it would take long.
_LONGEST = 256


def listed(names: Iterable[str]) -> str:
    """Names for a sentence, cut where there are many; "none" where there are none."""
    found = list(names)
    text = ", ".join(repr(name) for name in found[:_LISTED])
    return (text + (f" and {len(found) - _LISTED} more" if len(found) > _LISTED else "")) or "none"


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a "no such name" sentence: the nearest known names, else what names there are."""
    names = list(known)
    if len(name) > _LONGEST:
        return f"known: {listed(names)}"
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    close += [found for found in names if name and name in found and found not in close][:3]
    if close:
        return f"did you mean {' or '.join(repr(found) for found in close)}?"
    return f"known: {listed(names)}"
