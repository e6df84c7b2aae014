"""What every refusal must have: the one status code of its cause, ErrorInfo, a message that names what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pullback.conformance._check import Mismatch, expect_equal
from pullback.conformance._draft import Draft
from pullback.conformance._numbers import same
from pullback.conformance._subject import House, Subject
from pullback.conformance._wire import Refused
from pullback_wire import ERROR_DOMAIN, Reason

#: Bytes that the details of an error have at most.
LARGEST_DETAILS = 4096
#: Causes that come with RetryInfo always; with others it may come or not.
_RETRY = (Reason.OVERLOADED, Reason.NOT_READY)


def check_refusal(refused: Refused, *reasons: Reason, field: str = "", says: Sequence[str] = ()) -> None:
    """Raises Mismatch unless a refusal is for one of the reasons and as the contract has it.

    field: how the field of a BadRequest violation begins. says: what message or violations must contain.
    """
    wanted = " or ".join(reason.value for reason in reasons)
    found = next((reason for reason in reasons if reason.value == refused.reason), None)
    if found is None:
        raise Mismatch(f"ErrorInfo.reason {wanted}", refused.words, refused.asked)
    if refused.code != found.code.name:
        raise Mismatch(f"status code {found.code.name} with {found.value}", refused.words, refused.asked)
    if refused.domain != ERROR_DOMAIN:
        raise Mismatch(f"ErrorInfo.domain {ERROR_DOMAIN}", repr(refused.domain), refused.asked)
    if refused.size > LARGEST_DETAILS:
        raise Mismatch(f"details of at most {LARGEST_DETAILS} bytes", str(refused.size), refused.asked)
    if field and not any(name.startswith(field) for name, _ in refused.violations):
        violations = [name for name, _ in refused.violations]
        raise Mismatch(f"a BadRequest violation of the field {field}", f"{violations}", refused.asked)
    text = " ".join([refused.message, *(part for violation in refused.violations for part in violation)])
    for part in says:
        if part not in text:
            raise Mismatch(f"a message that contains {part!r}", refused.message, refused.asked)
    if found in _RETRY and refused.retry is None:
        raise Mismatch(f"RetryInfo with {found.value}", "none", refused.asked)


def refused(house: House, what: Draft, *reasons: Reason, data: bytes | None = None, **more: Any) -> None:
    """Sends a request that is wrong. data: instead of its bytes. Raises Mismatch unless it is refused as it should be.

    The server, and the connection, must be well afterwards.
    """
    refuses(lambda: house.wire.ask(what, data=data), *reasons, asked=what.words, **more)
    well(house)


def refuses(ask: Callable[[], Any], *reasons: Reason, asked: str = "", **more: Any) -> None:
    """The same of any call."""
    try:
        ask()
    except Refused as error:
        check_refusal(error, *reasons, **more)
        return
    raise Mismatch(" or ".join(reason.value for reason in reasons), "an answer", asked)


def vjp_of(subject: Subject, **more: Any) -> Draft:
    """A VJP that is answered, but for what `more` makes of it."""
    more = {"cotangents": subject.cotangents, "wrt": subject.wrt, **more}
    return subject.draft("ComputeVjp", **more)


def well(house: House) -> None:
    """Raises Mismatch unless a plain VJP on the same connection gets its right answer."""
    asked = house.wire.asked
    subject = house.plain
    found = subject.vjp()
    expect_equal(list(found), subject.wrt, "after it, gradients of")
    right = house.healthy
    if right is None:
        house.healthy = found
        return
    try:
        same(found, right, subject.tolerance, "after it, gradient")
    finally:
        house.wire.say(asked)
