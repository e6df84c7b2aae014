"""Checks of errors: names, cotangents, tangents, wrt."""

from __future__ import annotations

from typing import Any

import numpy as np

from pullback.conformance._check import Skip, of_server
from pullback.conformance._draft import Draft, draft
from pullback.conformance._refusal import refused, refuses, vjp_of, well
from pullback.conformance._subject import House, Subject
from pullback_wire import MODEL_METHODS, Reason

_NOBODY = "no-such-name-conformance"


@of_server(
    "errors.models",
    "A model, version or loss that is not there is NOT_FOUND with a reason of its own; the message names it.",
)
def models(house: House) -> None:
    subject = house.plain
    unknown = (Reason.MODEL_NOT_FOUND, Reason.PERMISSION_DENIED)
    for name in (_NOBODY, "", subject.name + "x"):
        refused(house, draft("Evaluate", name, tensors={"inputs": subject.inputs}), *unknown, says=[name])
    refused(house, vjp_of(subject, version="no-such-version"), Reason.VERSION_NOT_FOUND, says=["no-such-version"])
    refused(house, vjp_of(subject, loss=_NOBODY, cotangents=None), Reason.LOSS_NOT_FOUND, says=[_NOBODY])
    get = MODEL_METHODS["GetModel"].request
    refuses(lambda: house.wire.model("GetModel", get(name=_NOBODY)), *unknown, asked="GetModel of nobody")
    refuses(
        lambda: house.wire.model("GetModel", get(name=subject.name, version="no-such-version")),
        Reason.VERSION_NOT_FOUND,
        asked="GetModel of no version",
    )
    well(house)


@of_server("errors.long_names", "However long a name is, the error's details stay under 4 KiB.")
def long_names(house: House) -> None:
    for name in ("m" * 60_000, "\u00e9\n%" * 20_000):
        what = draft("Evaluate", name, note=f"a name of {len(name)} characters")
        words = f"Evaluate of a model with a name of {len(name)} characters"
        refuses(
            lambda what=what: house.wire.ask(what),  # type: ignore[misc]
            Reason.MODEL_NOT_FOUND,
            Reason.PERMISSION_DENIED,
            asked=words,
        )
    subject = house.plain
    refused(house, vjp_of(subject, wrt=["w" * 60_000]), Reason.BAD_NAME)


@of_server("errors.inputs", "An input that is missing, unknown or given twice is BAD_NAME, which names it.")
def inputs(house: House) -> None:
    subject = house.plain
    first = next(iter(subject.inputs))
    needed = [spec.name for spec in subject.model.inputs if not spec.optional and spec.name in subject.inputs]
    for name in needed[:2]:
        less = {key: array for key, array in subject.inputs.items() if key != name}
        refused(house, subject.draft("Evaluate", less), Reason.BAD_NAME, field="inputs", says=[name])
    more = {**subject.inputs, _NOBODY: subject.inputs[first]}
    refused(house, subject.draft("Evaluate", more), Reason.BAD_NAME, field="inputs", says=[_NOBODY])
    twice = [*subject.inputs.items(), (first, subject.inputs[first])]
    what = draft("Evaluate", subject.name, tensors={"inputs": twice})
    refused(house, what, Reason.BAD_NAME, field="inputs", says=[first])
    parameters = {_NOBODY: subject.inputs[first]}
    refused(house, vjp_of(subject, parameters=parameters), Reason.BAD_NAME, field="parameters", says=[_NOBODY])


@of_server("errors.wrt", "A wrt that is unknown, matches nothing or is named twice is BAD_NAME, which names it.")
def wrt(house: House) -> None:
    subject = house.plain
    name = subject.wrt[0]
    for wrong in (_NOBODY, "", f"{_NOBODY}*", f"param:{_NOBODY}", next(iter(subject.cotangents)) + "?" * 40):
        says = [wrong] if wrong == _NOBODY else []
        refused(house, vjp_of(subject, wrt=[wrong]), Reason.BAD_NAME, field="wrt", says=says)
    refused(house, vjp_of(subject, wrt=[name, name]), Reason.BAD_NAME, field="wrt", says=[name])


@of_server("errors.targets", "A loss's argument that is missing, unknown or has no loss is BAD_NAME.")
def targets(house: House) -> None:
    subject = house.plain
    output = next(iter(subject.outputs.values()))
    if "mse_loss" not in {loss.name for loss in subject.model.losses} or len(subject.outputs) > 1:
        raise Skip("the plainest model has no mse_loss")
    more: dict[str, Any] = {"loss": "mse_loss", "cotangents": None}
    refused(house, vjp_of(subject, **more), Reason.BAD_NAME, field="targets", says=["target"])
    refused(
        house, vjp_of(subject, targets={"target": output, _NOBODY: output}, **more), Reason.BAD_NAME, says=[_NOBODY]
    )
    refused(house, vjp_of(subject, targets={"target": output}), Reason.BAD_NAME, Reason.BAD_OPTION, says=["target"])


@of_server(
    "errors.cotangents",
    "A cotangent of another shape or dtype than its output is BAD_COTANGENT, also where it would broadcast.",
)
def cotangents(house: House) -> None:
    subject = house.plain
    name, v = next(iter(subject.cotangents.items()))
    wrong = {
        "of one axis more": np.zeros((1, *v.shape), v.dtype),
        "that is 0-d": np.zeros((), v.dtype),
        "of another dtype": v.astype(np.float32 if v.dtype != np.float32 else np.float64),
    }
    for note, array in wrong.items():
        if array.shape == v.shape and array.dtype == v.dtype:
            continue
        what = vjp_of(subject, cotangents={**subject.cotangents, name: array}, note=f"with a cotangent {note}")
        refused(house, what, Reason.BAD_COTANGENT, field="cotangents[0]", says=[name])
    if v.shape != ():
        what = vjp_of(subject, cotangents_batched=True, note="with batched cotangents that have no such axis")
        refused(house, what, Reason.BAD_COTANGENT, field="cotangents", says=[name])
    what = vjp_of(subject, cotangents={_NOBODY: v})
    refused(house, what, Reason.BAD_NAME, field="cotangents[0]", says=[_NOBODY])
    twice = [*subject.cotangents.items(), (name, v)]
    refused(house, vjp_of(subject, cotangents=twice), Reason.BAD_NAME, field="cotangents", says=[name])


@of_server("errors.missing_cotangent", "No cotangent, where the output is not one real scalar, is MISSING_COTANGENT.")
def missing(house: House) -> None:
    subject = house.plain
    if subject.scalar:
        raise Skip("every hosted model gives one real scalar")
    refused(house, vjp_of(subject, cotangents=None), Reason.MISSING_COTANGENT)


@of_server(
    "errors.tangents",
    "A tangent of another shape or dtype is BAD_COTANGENT; one that is unknown, a glob, or not in wrt, BAD_NAME.",
)
def tangents(house: House) -> None:
    subject = house.among(
        lambda one: bool(one.wrt) and one.model.orders.forward and _second(one), "promises JVPs and second derivatives"
    )
    name = subject.wrt[0]
    x = subject.inputs[name]
    for method in ("ComputeJvp", "ComputeHvp"):
        more: dict[str, Any] = {}
        if method == "ComputeHvp":
            more = {"cotangents": subject.cotangents, "wrt": subject.wrt}

        def asks(pairs: Any, method: str = method, more: dict[str, Any] = more, **others: Any) -> Draft:
            return subject.draft(method, tangents=pairs, **{**more, **others})

        bad = {name: np.zeros((2, *x.shape), x.dtype)}
        refused(house, asks(bad), Reason.BAD_COTANGENT, field="tangents", says=[name])
        bad = {name: x.astype(np.float32 if x.dtype != np.float32 else np.float64)}
        refused(house, asks(bad), Reason.BAD_COTANGENT, field="tangents", says=[name])
        for wrong in (_NOBODY, "*"):
            refused(house, asks({wrong: x}), Reason.BAD_NAME, field="tangents", says=[wrong])
        refused(house, asks([(name, x), (name, x)]), Reason.BAD_NAME, field="tangents", says=[name])
    others = [one for one in subject.wrt if one != name]
    if others:
        what = subject.draft(
            "ComputeHvp", cotangents=subject.cotangents, wrt=[name], tangents={others[0]: subject.inputs[others[0]]}
        )
        refused(house, what, Reason.BAD_NAME, field="tangents", says=[others[0]])


def _second(one: Subject) -> bool:
    return one.model.orders.reverse < 0 or one.model.orders.reverse > 1
