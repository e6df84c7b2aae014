"""Checks of second derivatives, and of orders that are promised or refused."""

from __future__ import annotations

import numpy as np

from pullback.conformance._arrays import like, rng
from pullback.conformance._check import Mismatch, Skip, expect, expect_equal, of_model
from pullback.conformance._numbers import agrees, inner, moved, norm, same, slope
from pullback.conformance._subject import Subject
from pullback.conformance._wire import Answer, Refused

_NO_ORDER = ("ORDER_UNAVAILABLE", "UNSUPPORTED_BY_MODEL")
#: Orders.reverse where any order is promised.
_ANY = -1


def promises_second(subject: Subject) -> bool:
    """Whether the model's metadata promise second derivatives."""
    return subject.model.orders.reverse == _ANY or subject.model.orders.reverse >= 2


def second(subject: Subject, tangents: dict[str, np.ndarray] | None = None, **more: object) -> Answer:
    """An HVP. Raises Skip where the model promises none, and refuses it."""
    subject.differentiates()
    try:
        return subject.hvp(subject.tangents() if tangents is None else tangents, **more)
    except Refused as refused:
        if promises_second(subject) or refused.reason not in _NO_ORDER:
            raise
        raise Skip(f"it has no second derivative, and promises none ({refused.reason})") from None


@of_model("orders.kept", "Derivatives of the orders that a model's metadata promise are computed.")
def kept(subject: Subject) -> None:
    subject.differentiates()
    if subject.model.orders.forward:
        subject.jvp(subject.tangents())
    if promises_second(subject):
        subject.hvp(subject.tangents())
    if not (subject.model.orders.forward or promises_second(subject)):
        raise Skip("it promises no more than VJPs")


@of_model(
    "orders.beyond",
    "What is beyond them is refused with ORDER_UNAVAILABLE, or right all the same; never a wrong number.",
)
def beyond(subject: Subject) -> None:
    subject.differentiates()
    if promises_second(subject):
        raise Skip("it promises second derivatives")
    try:
        answer = subject.hvp(subject.tangents())
    except Refused as refused:
        expect(refused.reason in _NO_ORDER, "ORDER_UNAVAILABLE", refused.words)
        expect_equal(refused.code, "FAILED_PRECONDITION", "code")
        return
    if not (subject.declared("gradient", "second")):
        _holds(subject, answer)


@of_model("hvp.gradients", "ComputeHvp's gradients are ComputeVjp's.")
def gradients(subject: Subject) -> None:
    answer = second(subject)
    expect_equal(list(answer.gradients("hvps")), subject.wrt, "hvps of")
    same(answer.gradients(), subject.vjp(), subject.tolerance, "gradient")


@of_model("hvp.differences", "ComputeHvp returns d Re<J^H v, t> / dx: what central differences of VJPs give.")
def differences(subject: Subject) -> None:
    answer = second(subject)
    if intended := subject.declared("second"):
        raise Skip(intended)
    _holds(subject, answer)


def _holds(subject: Subject, answer: Answer) -> None:
    """An HVP along subject.tangents() is the slope of <VJP, t> in a random direction of all inputs."""
    tangents = subject.tangents()
    hvps = answer.gradients("hvps")
    direction = like(rng(subject.name, "direction"), {name: subject.inputs[name] for name in subject.wrt})
    length = norm(direction)
    direction = {name: np.asarray(array / length).astype(array.dtype) for name, array in direction.items()}
    scale = norm(tangents) * norm(subject.vjp())

    def value(step: float) -> float:
        return inner(tangents, subject.vjp(moved(subject.inputs, direction, step)))

    found, error = slope(value, subject.eps, scale)
    claimed = inner(direction, hvps)
    if abs(found) <= error and abs(claimed) <= error:
        return
    agrees(claimed, found, error, norm(hvps), "<H t, s> =")


@of_model(
    "hvp.mixed", "Mixed terms between different inputs are part of it, and a tangent that is left out counts as zero."
)
def mixed(subject: Subject) -> None:
    subject.differentiates()
    if len(subject.wrt) < 2:
        raise Skip("it has one differentiable input")
    tangents = subject.tangents()
    whole = second(subject, tangents).gradients("hvps")
    parts = [second(subject, {name: tangent}).gradients("hvps") for name, tangent in tangents.items()]
    total: dict[str, np.ndarray | None] = {}
    for name in subject.wrt:
        found = [np.zeros_like(subject.inputs[name]) if part[name] is None else part[name] for part in parts]
        total[name] = np.asarray(sum(np.asarray(one) for one in found), subject.inputs[name].dtype)
    filled = {name: np.zeros_like(subject.inputs[name]) if a is None else a for name, a in whole.items()}
    same(filled, total, subject.tolerance, "hvp", sum(norm(part) for part in parts))


@of_model("hvp.symmetric", "Where any order is promised, and no backward is declared to differ, <s, H t> = <t, H s>.")
def symmetric(subject: Subject) -> None:
    subject.differentiates()
    if subject.model.orders.reverse != _ANY:
        raise Skip("it does not promise any order")
    if intended := subject.declared("gradient", "second"):
        raise Skip(intended)
    one, other = subject.tangents(), subject.tangents("another tangent")
    left, right = second(subject, one).gradients("hvps"), second(subject, other).gradients("hvps")
    scale = norm(left) * norm(other) + norm(right) * norm(one)
    if not abs(inner(other, left) - inner(one, right)) <= subject.tolerance * max(scale, 1e-30):
        raise Mismatch(f"<s, H t> = <t, H s> = {inner(one, right):.12g}", f"{inner(other, left):.12g}")


@of_model("hvp.cotangents", "cotangent_derivatives are J t: of each cotangent, and only when asked for.")
def cotangents(subject: Subject) -> None:
    plain = second(subject)
    expect_equal(list(plain.gradients("cotangent_derivatives")), [], "cotangent derivatives")
    found = second(subject, return_cotangent_derivatives=True).gradients("cotangent_derivatives")
    expect_equal(list(found), list(subject.cotangents), "cotangent derivatives of")
    # <w, J t> = <J^H w, t> for another w, whatever forward mode can do.
    other = like(rng(subject.name, "w"), subject.cotangents)
    pulled = subject.vjp(cotangents=other)
    scale = norm(other) * norm(found) + norm(pulled) * norm(subject.tangents())
    one, two = inner(other, found), inner(pulled, subject.tangents())
    if not abs(one - two) <= subject.tolerance * max(scale, 1e-30):
        raise Mismatch(f"Re<w, J t> = Re<J^H w, t> = {two:.12g}", f"{one:.12g}")
