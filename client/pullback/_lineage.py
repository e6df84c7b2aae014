"""What a client must know of a graph it does not hold: which leaves a tensor depends on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pullback._session import Session

if TYPE_CHECKING:
    from pullback._tensor import Tensor

#: Operations that may return their input's own memory; whether one did, its answer says.
VIEWS = frozenset(
    {
        *("detach", "reshape", "expand", "permute", "transpose", "flatten", "squeeze", "unsqueeze", "index"),
        *("real", "imag", "conj", "to"),
    }
)


class Ref:
    """A handle that the client holds; when it is collected, the handle is released with the next op."""

    __slots__ = ("__weakref__", "handle", "session")

    def __init__(self, session: Session, handle: int) -> None:
        self.session = session
        self.handle = handle

    def __del__(self) -> None:
        self.session.release(self.handle)


#: Leaves by what stands for them on the server: a leaf that was put into several sessions has several.
Leaves = dict[Ref, "Tensor"]


def merged(groups: list[Leaves]) -> Leaves:
    """The union; the same object where one covers all, as chains of ops mostly have it."""
    largest: Leaves = max(groups, key=len, default={})
    if all(one is largest or one.keys() <= largest.keys() for one in groups):
        return largest
    found: Leaves = {}
    for one in groups:
        found.update(one)
    return found
