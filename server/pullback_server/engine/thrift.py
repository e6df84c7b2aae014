"""How often there is time to look at the health of calls."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

#: What is looked at is sent and counted too, which takes about as long again.
_WHOLE = 2.0
#: Seconds after which a model is looked at, whatever the others have used up.
_AT_THE_LATEST = 1.0


class Thrift:
    """Has looking take at most a share of a worker's time: of small models' calls in quick succession only some are
    looked at, of large ones' each.

    share: of the time; 0: there is no limit.
    """

    def __init__(self, share: float = 0.0) -> None:
        self.share = share
        self._next = -math.inf
        self._seen: dict[str, float] = {}
        self._decided: bool | None = None

    def affords(self, model: str) -> bool:
        """Whether a call of a model may be looked at now."""
        if not self.share:
            return True
        if self._decided is not None:
            return self._decided
        now = time.perf_counter()
        return now >= self._next or now - self._seen.get(model, -math.inf) >= _AT_THE_LATEST

    def look(self, model: str, work: Callable[[], T]) -> T | None:
        """What `work` finds when it looks at a call; None: it cannot be afforded."""
        if not self.affords(model):
            return None
        began = time.perf_counter()
        found = work()
        self.looked(model, began)
        return found

    def looked(self, model: str, began: float) -> None:
        """A call was looked at, from `began` on the time.perf_counter clock until now."""
        if self.share:
            now = self._seen[model] = time.perf_counter()
            self._next = now + _WHOLE * (now - began) / self.share

    @contextlib.contextmanager
    def for_all_pieces(self, model: str) -> Iterator[None]:
        """Looks at all or none of what is computed meanwhile: it is one call."""
        self._decided = self.affords(model)
        try:
            yield
        finally:
            self._decided = None


#: That of this process, which computes one job at a time.
thrift = Thrift()
