"""evaluate, grad, jvp, hvp, jacobian, hessian."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pullback
from pullback._arrays import Array
from pullback._cli.connecting import connected
from pullback._cli.function import Call
from pullback._cli.outcome import Outcome, Section
from pullback._cli.tables import say
from pullback._cli.usage import UsageError
from pullback._cli.writing import check_place, write


def run(arguments: argparse.Namespace) -> None:
    """One call, told to whom it is meant for."""
    if arguments.output is not None:
        check_place(arguments.output)
    if not (arguments.input or arguments.inputs):
        raise UsageError("the following arguments are required: --input or --inputs")
    with connected(arguments) as client:
        model = client.model(arguments.model, arguments.version)
        outcome = _METHODS[arguments.command](model, Call(model, arguments), arguments)
    if arguments.output is not None:
        # One array is what a .npy file holds.
        write(arguments.output, outcome.arrays(asked_for=arguments.output.suffix.lower() == ".npy"))
    if arguments.json:
        print(json.dumps(outcome.document(), allow_nan=False))
    else:
        say(outcome.text())


def _evaluate(model: pullback.RemoteModel, call: Call, arguments: argparse.Namespace) -> Outcome:
    found = model.evaluate(call.inputs, **call.function())
    return Outcome(model.name, "evaluate", "", 0, [Section("outputs", "", call.by_output(found))])


def _grad(model: pullback.RemoteModel, call: Call, arguments: argparse.Namespace) -> Outcome:
    found = model.vjp(
        call.inputs,
        call.cotangents(),
        wrt=call.wrt(),
        allow_unused=arguments.allow_unused,
        batched=arguments.batched,
        max_norm=arguments.max_norm,
        return_outputs=not arguments.no_outputs,
        **call.function(),
    )
    sections = [*_outputs(call, found.outputs), Section("gradients", "grad:", found.gradients)]
    return Outcome(model.name, "vjp", found.model_version, found.model_revision, sections, found.norm)


def _jvp(model: pullback.RemoteModel, call: Call, arguments: argparse.Namespace) -> Outcome:
    found = model.jvp(call.inputs, call.tangents(), return_outputs=not arguments.no_outputs, **call.function())
    sections = [*_outputs(call, found.outputs), Section("tangents", "jvp:", call.by_output(found.tangents))]
    return Outcome(model.name, "jvp", found.model_version, found.model_revision, sections)


def _hvp(model: pullback.RemoteModel, call: Call, arguments: argparse.Namespace) -> Outcome:
    found = model.hvp(
        call.inputs,
        call.tangents(),
        call.cotangents(),
        wrt=call.wrt(),
        allow_unused=arguments.allow_unused,
        return_outputs=not arguments.no_outputs,
        **call.function(),
    )
    sections = [
        *_outputs(call, found.outputs),
        Section("gradients", "grad:", found.gradients),
        Section("hvps", "hvp:", found.hvps),
    ]
    return Outcome(model.name, "hvp", found.model_version, found.model_revision, sections)


def _jacobian(model: pullback.RemoteModel, call: Call, arguments: argparse.Namespace) -> Outcome:
    found = model.jacobian(
        call.inputs, wrt=call.wrt(), allow_unused=arguments.allow_unused, return_outputs=True, **call.function()
    )
    outputs = [] if arguments.no_outputs else _outputs(call, found.outputs)
    sections = [*outputs, Section("jacobian", "jacobian:", _blocks(found.jacobian))]
    return Outcome(model.name, "jacobian", found.model_version, found.model_revision, sections)


def _hessian(model: pullback.RemoteModel, call: Call, arguments: argparse.Namespace) -> Outcome:
    found = model.hessian(
        call.inputs, wrt=call.wrt(), allow_unused=arguments.allow_unused, return_outputs=True, **call.function()
    )
    outputs = [] if arguments.no_outputs else _outputs(call, found.outputs)
    sections = [
        *outputs,
        Section("gradients", "grad:", found.gradients),
        Section("hessian", "hessian:", _blocks(found.hessian)),
    ]
    return Outcome(model.name, "hessian", found.model_version, found.model_revision, sections)


def _outputs(call: Call, outputs: Any) -> list[Section]:
    return [] if outputs is None else [Section("outputs", "", call.by_output(outputs))]


def _blocks(blocks: dict[tuple[str, str], Array | None]) -> dict[str, Array | None]:
    return {f"{row}:{column}": block for (row, column), block in blocks.items()}


_METHODS = {
    "evaluate": _evaluate,
    "grad": _grad,
    "jvp": _jvp,
    "hvp": _hvp,
    "jacobian": _jacobian,
    "hessian": _hessian,
}
