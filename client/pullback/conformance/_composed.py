"""Checks of what a call adds to a model: losses, and parameters given with it."""

from __future__ import annotations

from typing import Any

import numpy as np

from pullback.conformance._arrays import drawn, rng
from pullback.conformance._check import Skip, expect_equal, of_model
from pullback.conformance._numbers import agrees, epsilon, inner, is_floating, moved, norm, same, slope
from pullback.conformance._subject import Subject
from pullback.conformance._wire import Refused
from pullback_wire import DTYPES

#: Most elements of a parameter that is given.
_MOST = 1 << 17


def _one_output(subject: Subject) -> tuple[str, np.ndarray]:
    subject.differentiates()
    for name in subject.cotangents:
        array = subject.outputs[name]
        if is_floating(array.dtype) and array.size:
            return name, array
    raise Skip("it has no real floating output")


def _has(subject: Subject, loss: str) -> None:
    if loss not in {one.name for one in subject.model.losses}:
        raise Skip(f"the server has no {loss} for it")


@of_model(
    "loss.mse",
    "A loss follows the model: mse_loss in each reduction, its value, and its gradient by inputs and target.",
)
def mse(subject: Subject) -> None:
    name, output = _one_output(subject)
    _has(subject, "mse_loss")
    target = drawn(rng(subject.name, "target"), output.dtype, output.shape)
    bindings = {} if len(subject.outputs) == 1 else {"input": name}
    off = output.astype(np.float64) - target.astype(np.float64)
    for reduction, factor in (("mean", 1 / off.size), ("sum", 1.0)):
        more: dict[str, Any] = {
            "loss": "mse_loss",
            "loss_options": {"reduction": reduction},
            "bindings": bindings,
            "targets": {"target": target},
        }
        wrt = [*subject.wrt, "target:target"]
        answer = subject.wire.ask(subject.draft("ComputeVjp", wrt=wrt, allow_unused=True, **more))
        value = np.asarray(factor * (off**2).sum()).astype(output.dtype)
        same(answer.outputs(), {"loss": value}, subject.tolerance, f"{reduction} loss")
        slope_ = (2 * factor * off).astype(output.dtype)
        right = subject.vjp(cotangents={name: slope_}, allow_unused=True)
        found = answer.gradients()
        same({key: found[key] for key in subject.wrt}, right, subject.tolerance, f"gradient of the {reduction} loss")
        (by_target,) = (
            found[key] for key in found if key.removeprefix("target:") == "target" and key not in subject.wrt
        )
        same({"target": by_target}, {"target": -slope_}, subject.tolerance, "gradient by the target")
    more["loss_options"] = {"reduction": "none"}
    each = subject.wire.ask(subject.draft("Evaluate", **more)).outputs()
    same(each, {"loss": (off**2).astype(output.dtype)}, subject.tolerance, "unreduced loss")


@of_model(
    "loss.cross_entropy", "cross_entropy of class indices: the value, options of torch's names, and the gradient."
)
def cross_entropy(subject: Subject) -> None:
    name, output = _one_output(subject)
    _has(subject, "cross_entropy")
    if output.ndim != 2 or len(subject.outputs) > 1:
        raise Skip("its output is not one matrix of logits")
    labels = np.arange(output.shape[0]) % output.shape[1]
    logits = output.astype(np.float64)
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = shifted / shifted.sum(1, keepdims=True)
    wanted = np.eye(output.shape[1])[labels]
    more: dict[str, Any] = {
        "loss": "cross_entropy",
        "loss_options": {"reduction": "sum", "label_smoothing": 0.25},
        "targets": {"target": labels},
    }
    smooth = 0.75 * wanted + 0.25 / output.shape[1]
    answer = subject.wire.ask(subject.draft("ComputeVjp", wrt=subject.wrt, **more))
    value = np.asarray(-(smooth * np.log(probabilities)).sum()).astype(output.dtype)
    same(answer.outputs(), {"loss": value}, 10 * subject.tolerance, "loss")
    right = subject.vjp(cotangents={name: (probabilities - smooth).astype(output.dtype)})
    same(answer.gradients(), right, 10 * subject.tolerance, "gradient", norm(right))


def _given(subject: Subject) -> dict[str, np.ndarray]:
    """A value for the smallest real floating parameter."""
    subject.computes()
    specs = [
        spec
        for spec in subject.model.parameters
        if spec.dtype and is_floating(DTYPES[spec.dtype]) and not spec.any_shape
    ]
    found = [(int(np.prod([dim.size for dim in spec.shape], dtype=np.int64)), spec) for spec in specs]
    found = [(size, spec) for size, spec in found if 0 < size <= _MOST]
    if not found:
        raise Skip("it has no parameters of a size to be given" if specs else "it has no floating-point parameters")
    _, spec = min(found, key=lambda one: (one[0], one[1].name))
    shape = [dim.size for dim in spec.shape]
    values = 0.5 * drawn(rng(subject.name, spec.name), np.dtype(np.float64), shape) + 0.1
    return {spec.name: np.asarray(values).astype(DTYPES[spec.dtype])}


@of_model(
    "parameters.given",
    "Parameters given with a call are used and differentiated in it, and the hosted ones stay as they are.",
)
def given(subject: Subject) -> None:
    parameters = _given(subject)
    ((name, values),) = parameters.items()
    outputs = {key: array for key, array in subject.outputs.items() if is_floating(array.dtype)}
    if not outputs:
        raise Skip("it has no real floating output")
    cotangents = {key: drawn(rng(subject.name, key), array.dtype, array.shape) for key, array in outputs.items()}
    try:
        found = subject.vjp(cotangents=cotangents, parameters=parameters, wrt=[f"param:{name}"], allow_unused=True)
    except Refused as refused:
        if refused.reason in ("UNSUPPORTED_BY_MODEL", "NOT_DIFFERENTIABLE", "MODEL_ERROR"):
            raise Skip(f"it takes none, or not this one ({refused.reason})") from None
        raise
    (gradient,) = found.values()
    same(subject.evaluate(), subject.outputs, 20 * subject.eps, "output without them")
    if gradient is None:
        raise Skip(f"its outputs do not depend on {name!r}")
    expect_equal((gradient.shape, gradient.dtype), (values.shape, values.dtype), f"gradient of {name!r} as")
    if intended := subject.declared("gradient"):
        raise Skip(intended)
    along = drawn(rng(subject.name, "along"), values.dtype, values.shape)
    unit = {name: np.asarray(along / np.linalg.norm(along)).astype(values.dtype)}

    def value(step: float) -> float:
        return inner(cotangents, subject.evaluate(parameters=moved(parameters, unit, step)))

    slope_, error = slope(value, max(subject.eps, epsilon(values.dtype)), norm(cotangents) * norm(outputs))
    agrees(inner({name: gradient}, unit), slope_, error, norm({name: gradient}), "<g, t> of the parameter =")
