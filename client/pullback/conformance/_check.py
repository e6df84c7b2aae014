"""What a check is, how it ends, and the list of all of them."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pullback.conformance._subject import House, Subject


class Verdict(enum.Enum):
    """How a check ended. ABSENT: the server lacks something that the contract leaves to it."""

    PASS = "pass"
    FAIL = "fail"
    SKIPPED = "skipped"
    ABSENT = "absent"


class Skip(Exception):
    """The check says nothing here; the message says why."""


class Absent(Exception):
    """The server does not have what is optional; the message says what."""


class Mismatch(Exception):
    """The contract is not kept. asked: the request, in words; empty: the last one."""

    def __init__(self, expected: str, received: str, asked: str = "") -> None:
        super().__init__(f"expected {expected}; received {received}")
        self.expected = expected
        self.received = received
        self.asked = asked


@dataclass(frozen=True)
class Outcome:
    """How a check ended for the server, or for one model.

    model: empty for what is asked of the server as a whole. why: of a skip or an absence.
    expected, received, asked: of a failure; asked is the request in words.
    """

    verdict: Verdict
    model: str = ""
    why: str = ""
    expected: str = ""
    received: str = ""
    asked: str = ""


@dataclass(frozen=True)
class Check:
    """One property that the contract promises.

    says: the promise, in a sentence. for_each_model: it is asked of every model rather than once of the server.
    """

    id: str
    says: str
    run: Callable[..., None]
    for_each_model: bool


@dataclass
class Finding:
    """A check and all its outcomes."""

    check: Check
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """FAIL when it failed anywhere, else PASS when it held anywhere, else ABSENT or SKIPPED."""
        found = {outcome.verdict for outcome in self.outcomes}
        for verdict in (Verdict.FAIL, Verdict.PASS, Verdict.ABSENT):
            if verdict in found:
                return verdict
        return Verdict.SKIPPED


CHECKS: dict[str, Check] = {}
F = TypeVar("F", bound=Callable[..., None])


def _register(id: str, says: str, for_each_model: bool) -> Callable[[F], F]:
    def register(run: F) -> F:
        assert id not in CHECKS, id
        CHECKS[id] = Check(id, says, run, for_each_model)
        return run

    return register


def of_server(id: str, says: str) -> Callable[[Callable[[House], None]], Callable[[House], None]]:
    """Registers a check that is made once."""
    return _register(id, says, False)


def of_model(id: str, says: str) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Registers a check that is made of every model."""
    return _register(id, says, True)


def expect(held: bool, expected: str, received: Any) -> None:
    """Raises Mismatch unless `held`."""
    if not held:
        raise Mismatch(expected, _short(received))


def expect_equal(received: Any, expected: Any, what: str) -> None:
    """Raises Mismatch unless the two are equal. what: they are, e.g. "names of outputs"."""
    if received != expected:
        raise Mismatch(f"{what} {_short(expected)}", _short(received))


def _short(value: Any, most: int = 400) -> str:
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= most else f"{text[:most]} ..."
