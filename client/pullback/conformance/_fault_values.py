"""Checks of errors: options and values that cannot be, and what cannot be differentiated."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pullback.conformance._arrays import drawn, rng
from pullback.conformance._check import Skip, expect, of_model, of_server
from pullback.conformance._numbers import is_complex, is_differentiable, is_floating, largest
from pullback.conformance._refusal import refused, refuses, vjp_of
from pullback.conformance._subject import House, Subject
from pullback.conformance._wire import Refused
from pullback_wire import DTYPES, Reason
from pullback_wire.v1 import tensor_pb2


@of_model("errors.range", "An integer outside its declared range is VALUE_OUT_OF_RANGE before the model runs.")
def ranges(subject: Subject) -> None:
    subject.computes()
    for spec in subject.model.inputs:
        array = subject.inputs.get(spec.name)
        bounds = [spec.minimum - 1] if spec.HasField("minimum") else []
        bounds += [spec.maximum + 1] if spec.HasField("maximum") else []
        if array is None or not array.size or is_complex(array.dtype) or not bounds:
            continue
        for bound in bounds:
            if not is_floating(array.dtype) and not np.iinfo(array.dtype).min <= bound <= np.iinfo(array.dtype).max:
                continue
            bad = array.copy()
            bad.reshape(-1)[-1] = bound
            what = subject.draft("Evaluate", {**subject.inputs, spec.name: bad}, note=f"with {bound:g} in {spec.name}")
            refuses(
                lambda what=what: subject.wire.ask(what),  # type: ignore[misc]
                Reason.VALUE_OUT_OF_RANGE,
                asked=what.words,
                field="inputs",
                says=[spec.name],
            )
        return
    raise Skip("no input declares a range")


@of_server("errors.classes", "A class index outside the classes of a loss is VALUE_OUT_OF_RANGE.")
def classes(house: House) -> None:
    def fits(one: Subject) -> bool:
        arrays = list(one.outputs.values())
        has = "cross_entropy" in {loss.name for loss in one.model.losses}
        return has and len(arrays) == 1 and arrays[0].ndim == 2 and is_floating(arrays[0].dtype) and bool(one.wrt)

    subject = house.among(fits, "gives one matrix of logits and has cross_entropy")
    (output,) = subject.outputs.values()
    labels = np.zeros(output.shape[0], np.int64)
    for wrong in (output.shape[1], -1, 2**62):
        labels[-1] = wrong
        what = vjp_of(
            subject, loss="cross_entropy", cotangents=None, targets={"target": labels}, note=f"with class {wrong}"
        )
        refused(house, what, Reason.VALUE_OUT_OF_RANGE, says=["target", str(wrong)])


@of_server("errors.options", "An option that cannot be is BAD_OPTION, which names it.")
def options(house: House) -> None:
    subject = house.plain
    refused(house, subject.draft("Evaluate", omit_outputs=True), Reason.BAD_OPTION, field="results.omit_outputs")
    for number in (tensor_pb2.DTYPE_INT64, tensor_pb2.DTYPE_COMPLEX64, 77):
        what = vjp_of(subject, result_dtype=number)
        refused(house, what, Reason.BAD_OPTION, field="results.dtype")
    for value in (0.0, -1.0, math.nan):
        refused(house, vjp_of(subject, max_norm=value), Reason.BAD_OPTION, field="max_norm")
    what = vjp_of(subject, note="with mode 9")
    what.message.function.mode = 9
    refused(house, what, Reason.BAD_OPTION, field="function.mode")
    if "mse_loss" in {loss.name for loss in subject.model.losses} and len(subject.outputs) == 1:
        more: dict[str, Any] = {"loss": "mse_loss", "cotangents": None, "targets": {"target": _only(subject)}}
        what = vjp_of(subject, loss_options={"reduction": "average"}, **more)
        refused(house, what, Reason.BAD_OPTION, says=["reduction", "average"])
        what = vjp_of(subject, loss_options={"no_such_option": 1.0}, **more)
        refused(house, what, Reason.BAD_OPTION, says=["no_such_option"])


def _only(subject: Subject) -> np.ndarray:
    return next(iter(subject.outputs.values()))


@of_server("errors.not_differentiable", "A wrt that is neither floating-point nor complex is NOT_DIFFERENTIABLE.")
def not_differentiable(house: House) -> None:
    def fits(one: Subject) -> bool:
        kinds = [{is_differentiable(array.dtype) for array in of.values()} for of in (one.inputs, one.outputs)]
        return False in kinds[0] and True in kinds[1]

    subject = house.among(fits, "has an integer input, and an output that could be differentiated")
    name = next(key for key, array in subject.inputs.items() if not is_differentiable(array.dtype))
    output = {key: array for key, array in subject.outputs.items() if is_differentiable(array.dtype)}
    cotangents = {key: drawn(rng(key), array.dtype, array.shape) for key, array in output.items()}
    what = subject.draft("ComputeVjp", cotangents=cotangents, wrt=[name])
    refused(house, what, Reason.NOT_DIFFERENTIABLE, says=[name])


@of_server("errors.complex", "Dense derivatives of complex tensors are refused with COMPLEX_UNSUPPORTED.")
def complex_dense(house: House) -> None:
    subject = house.among(
        lambda one: any(is_complex(one.inputs[name].dtype) for name in one.wrt), "is differentiable by a complex input"
    )
    refused(house, subject.draft("ComputeJacobian", wrt=subject.wrt), Reason.COMPLEX_UNSUPPORTED)


@of_server(
    "errors.too_many_cotangents", "The number of cotangents at once is bounded, of no bytes too: RESULT_TOO_LARGE."
)
def too_many(house: House) -> None:
    def empty(one: Subject) -> dict[str, np.ndarray]:
        return {
            spec.name: np.zeros(
                [0 if dim.WhichOneof("extent") == "symbol" else dim.size for dim in spec.shape] or [0]
            ).astype(DTYPES[spec.dtype or tensor_pb2.DTYPE_FLOAT64])
            for spec in one.model.inputs
            if not spec.optional
        }

    for subject in house.subjects:
        if not subject.problem and subject.wrt:
            try:
                outputs = subject.evaluate(empty(subject))
            except Refused:
                continue
            if any(outputs[name].size for name in subject.cotangents):
                continue
            cotangents = {name: outputs[name][None] for name in subject.cotangents}
            what = subject.draft("ComputeVjp", empty(subject), cotangents=cotangents, cotangents_batched=True)
            what.note = "with 2 ** 40 cotangents of no bytes each"
            for tensor in what.message.cotangents:
                tensor.shape[0] = 2**40
            refused(house, what, Reason.RESULT_TOO_LARGE, says=[str(2**40)])
            return
    raise Skip("no hosted model takes inputs of no elements")


@of_server(
    "errors.not_finite", "With detect_anomaly, NaN or infinity made of finite numbers is NON_FINITE; without, a value."
)
def not_finite(house: House) -> None:
    subject = house.plain
    if "mse_loss" not in {loss.name for loss in subject.model.losses} or len(subject.outputs) > 1:
        raise Skip("the plainest model has no mse_loss")
    output = _only(subject)
    target = np.full(output.shape, 0.5 * largest(output.dtype), output.dtype)
    more: dict[str, Any] = {"loss": "mse_loss", "cotangents": None, "targets": {"target": target}}
    answer = house.wire.ask(vjp_of(subject, **more)).outputs()
    expect(not np.isfinite(answer["loss"]).any(), "an infinite loss, which is a value", answer)
    what = vjp_of(subject, note="with detect_anomaly", **more)
    what.message.function.detect_anomaly = True
    refused(house, what, Reason.NON_FINITE)
