"""`Memory`: which handles of a session share memory, as its answers tell."""

from __future__ import annotations

from collections.abc import Iterable

from pullback_wire.v1 import session_service_pb2 as pb


class Memory:
    """Handles that share memory with earlier ones.

    It is kept in the order of the answers by whoever reads them, whether or not anybody looks at these answers: a view
    of a view is one of the first tensor, even if the view between them was never looked at and is gone.
    """

    def __init__(self) -> None:
        #: What stands for the memory: the first handle in it, which may be released by now; numbers are not used again.
        self._roots: dict[int, int] = {}

    def note(self, infos: Iterable[pb.HandleInfo]) -> None:
        """What an op made."""
        for info in infos:
            if info.shares:
                self._roots[info.handle] = self.root(info.shares)

    def forget(self, handles: Iterable[int]) -> None:
        """Handles that an op let go which is answered now, and so all before it."""
        for handle in handles:
            self._roots.pop(handle, None)

    def root(self, handle: int) -> int:
        """What stands for the memory of a handle."""
        return self._roots.get(handle, handle)

    def same(self, one: int | None, other: int | None) -> bool:
        """Whether two handles lie in the same memory."""
        return one is not None and other is not None and self.root(one) == self.root(other)

    def beside(self, handle: int) -> list[int]:
        """The other handles in its memory; one that was released may be among them."""
        root = self.root(handle)
        found = [root, *(one for one, its_root in self._roots.copy().items() if its_root == root)]
        return [one for one in found if one != handle]
