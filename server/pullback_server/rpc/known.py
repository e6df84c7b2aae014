"""Requests that came before: callers ask for the same thing again and again, with other numbers in the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pullback_server.job import Job, Signature

#: Requests remembered, the latest; and bytes of one, without its tensors, that are worth remembering.
_MOST, _LARGEST = 1024, 4096

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Known(Generic[T]):
    job: Job
    model: str
    version: str
    signature: Signature
    more: T


class KnownRequests(Generic[T]):
    """Jobs by the bytes that asked for them: all of a request but the contents of its tensors, whose lengths count.

    What is checked of a request does not depend on more than that, and on the model's signature. Jobs are shared, and
    so must not be changed, nor what a handler keeps beside them.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, bytes, tuple[int, ...]], _Known[T]] = {}

    def find(self, method: str, header: bytes, payloads: Sequence[memoryview]) -> _Known[T] | None:
        """What a request asked for when it came before."""
        return self._known.get((method, header, tuple(map(len, payloads))))

    def add(
        self, method: str, header: bytes, payloads: Sequence[memoryview], job: Job, model: str, version: str,
        signature: Signature, more: T,
    ) -> None:  # fmt: skip
        """model, version: as the request names them. A seeded request never comes twice."""
        if len(header) > _LARGEST or job.seed is not None:
            return
        self._known[method, header, tuple(map(len, payloads))] = _Known(job, model, version, signature, more)
        if len(self._known) > _MOST:
            del self._known[next(iter(self._known))]
