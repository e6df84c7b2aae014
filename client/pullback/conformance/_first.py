"""Checks of first derivatives: VJP and JVP."""

from __future__ import annotations

import math

import numpy as np

from pullback.conformance._arrays import drawn, like, rng
from pullback.conformance._check import Mismatch, Skip, expect, expect_equal, of_model
from pullback.conformance._numbers import (
    agrees,
    inner,
    is_complex,
    moved,
    norm,
    same,
    scaled,
    slope,
)
from pullback.conformance._subject import Subject
from pullback.conformance._wire import Refused
from pullback_wire.v1 import model_service_pb2 as pb


def _along(subject: Subject, tangents: dict[str, np.ndarray]) -> tuple[float, float]:
    """d Re<v, f(x + s t)> / ds at 0, and its error. Raises Skip."""
    scale = norm(subject.cotangents) * norm({name: subject.outputs[name] for name in subject.cotangents})

    def value(step: float) -> float:
        return inner(subject.cotangents, subject.evaluate(moved(subject.inputs, tangents, step)))

    try:
        return slope(value, subject.eps, scale)
    except Refused as refused:
        if refused.reason == "VALUE_OUT_OF_RANGE":
            raise Skip("its inputs are at the edge of their declared range") from None
        raise


@of_model("vjp.answers", "A model that can be evaluated, and whose outputs depend on an input, has a VJP.")
def answers(subject: Subject) -> None:
    subject.computes()
    # Whatever else refuses its VJP is raised there.
    subject.differentiates()


@of_model("vjp.differences", "ComputeVjp returns J^H v: <J^H v, t> is the slope of Re<v, f> along t.")
def differences(subject: Subject) -> None:
    subject.differentiates()
    if intended := subject.declared("gradient"):
        raise Skip(intended)
    gradients = subject.vjp()
    for word in ("one", "other"):
        tangents = subject.tangents(word)
        # Of a length that keeps the steps small beside the values.
        length = norm(tangents)
        unit = {name: np.asarray(array / length).astype(array.dtype) for name, array in tangents.items()}
        found, error = _along(subject, unit)
        agrees(inner(gradients, unit), found, error, norm(gradients), "<J^H v, t> =")


@of_model("vjp.each", "Each gradient is the slope along its own input alone.")
def each(subject: Subject) -> None:
    subject.differentiates()
    if intended := subject.declared("gradient"):
        raise Skip(intended)
    if len(subject.wrt) < 2:
        raise Skip("it has one differentiable input")
    gradients = subject.vjp()
    for name in subject.wrt:
        unit = {
            name: np.asarray(drawn(rng(subject.name, name), subject.inputs[name].dtype, subject.inputs[name].shape))
        }
        length = norm(unit)
        unit = {name: np.asarray(unit[name] / length).astype(unit[name].dtype)}
        found, error = _along(subject, unit)
        agrees(
            inner({name: gradients[name]}, unit), found, error, norm({name: gradients[name]}), f"<g, t> of {name!r} ="
        )


@of_model("vjp.linear", "J^H v is linear in v (in real multiples, for complex outputs).")
def linear(subject: Subject) -> None:
    subject.differentiates()
    other = like(rng(subject.name, "other cotangents"), subject.cotangents)
    both = {name: (2 * v - 3 * other[name]).astype(v.dtype) for name, v in subject.cotangents.items()}
    one, two, sum_ = subject.vjp(), subject.vjp(cotangents=other), subject.vjp(cotangents=both)
    floor = 2 * norm(one) + 3 * norm(two)
    right = {
        name: None if a is None else (2 * a - 3 * np.asarray(two[name])).astype(a.dtype) for name, a in one.items()
    }
    same(sum_, right, subject.tolerance, "gradient by 2v - 3w", floor)


@of_model("vjp.batched", "K cotangents at once give what each gives alone, along a leading axis.")
def batched(subject: Subject) -> None:
    subject.differentiates()
    more = [like(rng(subject.name, k), subject.cotangents) for k in range(3)]
    stacked = {name: np.stack([one[name] for one in more]) for name in subject.cotangents}
    found = subject.vjp(cotangents=stacked, cotangents_batched=True)
    alone = [subject.vjp(cotangents=one) for one in more]
    right = {name: np.stack([np.asarray(one[name]) for one in alone]) for name in subject.wrt}
    same(found, right, subject.tolerance, "gradients")


@of_model("vjp.partial", "A cotangent that is left out counts as zero.")
def partial(subject: Subject) -> None:
    subject.differentiates()
    if len(subject.cotangents) < 2:
        raise Skip("it has one differentiable output")
    name = next(iter(subject.cotangents))
    some = {name: subject.cotangents[name]}
    zeros = {key: v if key == name else np.zeros_like(v) for key, v in subject.cotangents.items()}
    right = subject.vjp(cotangents=zeros, allow_unused=True)
    found = subject.vjp(cotangents=some, allow_unused=True)
    found = {key: np.zeros_like(subject.inputs[key]) if array is None else array for key, array in found.items()}
    same(found, right, subject.tolerance, "gradient", norm(right))


@of_model("vjp.scalar", "For one real scalar output no cotangent means 1.")
def scalar(subject: Subject) -> None:
    subject.differentiates()
    name = subject.scalar
    if not name:
        raise Skip("its output is not one real scalar")
    others = [key for key in subject.outputs if key != name]
    if others:
        raise Skip("it has other outputs")
    one = {name: np.ones((), subject.outputs[name].dtype)}
    same(subject.vjp(cotangents={}), subject.vjp(cotangents=one), subject.tolerance, "gradient")


@of_model(
    "vjp.max_norm", "max_norm scales gradients by min(1, max_norm / (norm + 1e-6)) and reports the norm before it."
)
def max_norm(subject: Subject) -> None:
    subject.differentiates()
    plain = subject.vjp()
    length = norm(plain)
    if not math.isfinite(length) or length < 1e-6:
        raise Skip("its gradient is zero or not finite")
    for most in (length / 2, length * 4):
        answer = subject.wire.ask(
            subject.draft("ComputeVjp", cotangents=subject.cotangents, wrt=subject.wrt, max_norm=most)
        )
        norms = list(answer.message.norms)
        expect(len(norms) == 1 and abs(norms[0] - length) <= 1e-4 * length, f"norms [{length:.6g}]", norms)
        right = scaled(plain, min(1.0, most / (length + 1e-6)))
        same(answer.gradients(), right, max(subject.tolerance, 1e-6), "clipped gradient")


def _forward(subject: Subject) -> dict[str, np.ndarray | None]:
    try:
        return subject.jvp(subject.tangents())
    except Refused as refused:
        allowed = ("ORDER_UNAVAILABLE", "UNSUPPORTED_BY_MODEL")
        if subject.model.orders.forward or refused.reason not in allowed:
            raise
        raise Skip(f"it has no JVP, and promises none ({refused.reason})") from None


@of_model("jvp.adjoint", "ComputeJvp is the adjoint of ComputeVjp: Re<u, J t> = Re<J^H u, t>.")
def adjoint(subject: Subject) -> None:
    subject.differentiates()
    pushed = _forward(subject)
    expect_equal(list(pushed), list(subject.outputs), "tangents of")
    for name, array in pushed.items():
        expect((array is not None) == (name in subject.cotangents), f"{name!r} unused unless differentiable", array)
    gradients = subject.vjp()
    tangents = subject.tangents()
    one, other = inner(subject.cotangents, pushed), inner(gradients, tangents)
    scale = norm(subject.cotangents) * norm(pushed) + norm(gradients) * norm(tangents)
    if not abs(one - other) <= subject.tolerance * max(scale, 1e-30):
        raise Mismatch(f"Re<u, J t> = Re<J^H u, t> = {other:.12g}", f"{one:.12g}")


@of_model("jvp.subset", "A JVP is linear in t; what has no tangent stands still.")
def subset(subject: Subject) -> None:
    subject.differentiates()
    whole = _forward(subject)
    tangents = subject.tangents()
    if len(tangents) < 2:
        twice = {name: (2 * array).astype(array.dtype) for name, array in tangents.items()}
        same(subject.jvp(twice), scaled(whole, 2), subject.tolerance, "tangent by 2t")
        return
    parts = [subject.jvp({name: tangent}) for name, tangent in tangents.items()]
    total: dict[str, np.ndarray | None] = {}
    for name, array in whole.items():
        found = [part[name] for part in parts if part.get(name) is not None]
        total[name] = None if array is None else np.asarray(sum(np.asarray(one) for one in found), array.dtype)
    same(whole, total, subject.tolerance, "tangent by all", sum(norm(part) for part in parts))


@of_model(
    "vjp.complex", "Complex numbers are torch's way: minus the gradient of a real loss is downhill, to second order."
)
def complex_way(subject: Subject) -> None:
    subject.differentiates()
    chosen = [name for name in subject.wrt if is_complex(subject.inputs[name].dtype)]
    if not chosen:
        raise Skip("it has no complex input")
    if intended := subject.declared("gradient"):
        raise Skip(intended)
    gradients = subject.vjp()
    for turn, word in ((1, "real"), (1j, "imaginary")):
        for name in chosen:
            values = rng(subject.name, word).normal(size=subject.inputs[name].shape) * turn
            unit = {name: np.asarray(values / np.linalg.norm(values)).astype(subject.inputs[name].dtype)}
            found, error = _along(subject, unit)
            agrees(inner(gradients, unit), found, error, norm(gradients), f"slope along a {word} t")


@of_model(
    "rows.independent", "Of a model with a batch axis each row is computed as if it were alone, and so is its gradient."
)
def rows(subject: Subject) -> None:
    subject.differentiates()
    if not subject.model.HasField("batch_axis"):
        raise Skip("it declares no batch axis")
    axis = subject.model.batch_axis
    if not all(array.ndim > axis for array in subject.inputs.values()):
        raise Skip("not every input has the batch axis")
    count = {array.shape[axis] for array in subject.inputs.values()}
    if len(count) != 1 or not all(
        array.ndim > axis and {array.shape[axis]} == count for array in subject.outputs.values()
    ):
        raise Skip("not every input and output has the rows")
    if any(check.name == "rows" and check.outcome == pb.CHECK_OUTCOME_NOTED for check in subject.model.checks):
        raise Skip("the server says that its rows are not independent")
    together = {**subject.outputs, **{f"gradient of {name}": array for name, array in subject.vjp().items()}}
    parts: list[dict[str, np.ndarray | None]] = []
    for row in range(count.pop()):
        one = {name: np.take(array, [row], axis) for name, array in subject.inputs.items()}
        cotangents = {name: np.take(array, [row], axis) for name, array in subject.cotangents.items()}
        found = subject.vjp(one, cotangents=cotangents)
        parts.append({**subject.evaluate(one), **{f"gradient of {name}": array for name, array in found.items()}})
    joined = {name: np.concatenate([np.asarray(part[name]) for part in parts], axis) for name in together}
    same(together, joined, subject.tolerance, "")
