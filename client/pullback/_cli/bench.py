"""`pullback bench`: how many calls a second, and how long each takes, at several numbers of callers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import pullback
from pullback._arrays import Array, is_differentiable
from pullback._cli import bench_told
from pullback._cli.connecting import connected
from pullback._cli.function import Call
from pullback._cli.load import Load, Tally
from pullback._cli.progress import shown
from pullback._cli.samples import inputs, normal
from pullback._cli.tables import print_json, say, short

_SEED = 20240607


@dataclass(frozen=True)
class Plan:
    """One call, to be made again and again. sent, received: bytes of its tensors. rows: None: it has no batch axis."""

    ask: Callable[[], Any]
    inputs: dict[str, Array]
    sent: int
    received: int
    rows: int | None


def run(arguments: argparse.Namespace) -> None:
    """Makes the calls and prints what came of them, also after Ctrl-C."""
    # What fails is to be counted, not made again behind the table's back.
    with connected(arguments, pullback.RetryPolicy(attempts=1)) as client:
        model = client.model(arguments.model, arguments.version)
        call = Call(model, arguments)
        plan = _plan(model, call, arguments)
        facts = bench_told.Facts(
            model=model.name,
            version=call.info.version,
            target=client.target,
            method=arguments.method,
            inputs={name: (array.dtype.name, array.shape) for name, array in plan.inputs.items()},
            rows=plan.rows,
            sent=plan.sent,
            received=plan.received,
        )
        if not arguments.json:
            say(facts.text())
        levels: list[bench_told.Level] = []
        for callers in arguments.concurrency:
            level, interrupted = _level(plan, callers, arguments)
            if level.tally.calls:
                levels.append(level)
                if not arguments.json:
                    say(level.row(plan.rows))
            if interrupted:
                break
        else:
            interrupted = False
    if arguments.json:
        print_json(bench_told.document(facts, levels, interrupted))
    else:
        print(bench_told.stages(levels))
    if interrupted:
        raise KeyboardInterrupt


def _level(plan: Plan, callers: int, arguments: argparse.Namespace) -> tuple[bench_told.Level, bool]:
    title = f"{callers} caller{'s' if callers > 1 else ''}"
    warm, interrupted = Tally(), False
    if arguments.warmup:
        with shown(title) as show:
            warm, interrupted = Load(plan.ask, callers, lambda calls, passed: show(0.0, "warming up")).run(
                arguments.warmup
            )
    if interrupted:
        return bench_told.Level(callers, Tally(), warm.calls), True
    with shown(title) as show:

        def progress(calls: int, passed: float) -> None:
            show(passed / arguments.seconds, f"{calls:,} calls, {short(calls / max(passed, 1e-9))}/s")

        tally, interrupted = Load(plan.ask, callers, progress).run(arguments.seconds)
    return bench_told.Level(callers, tally, warm.calls), interrupted


def _plan(model: pullback.RemoteModel, call: Call, arguments: argparse.Namespace) -> Plan:
    """Fills in what is not given, and makes the call once, so that one that cannot work fails at once."""
    random = np.random.default_rng(_SEED)
    call.inputs = inputs(call.info, call.inputs, dict(arguments.shape or ()), arguments.rows, arguments.dtype, random)
    function = call.function()
    tensors = [*call.inputs.values(), *function["targets"].values(), *function["parameters"].values()]
    method: str = arguments.method
    options: dict[str, Any] = {}
    cotangents: dict[str, Array] | None = None
    if method in ("vjp", "hvp"):
        cotangents = call.cotangents() or _cotangents(call.sample(), random)
        options["wrt"] = call.wrt()
        tensors += (cotangents or {}).values()
    tangents: dict[str, Array] = {}
    if method in ("jvp", "hvp"):
        tangents = call.tangents() or {
            name: normal(array.shape, array.dtype, random)
            for name, array in call.inputs.items()
            if is_differentiable(array)
        }
        tensors += tangents.values()

    def ask() -> Any:
        if method == "evaluate":
            return model.evaluate(call.inputs, **function)
        if method == "jvp":
            return model.jvp(call.inputs, tangents, **function)
        if method == "hvp":
            return model.hvp(call.inputs, tangents, cotangents, **options, **function)
        return model.vjp(call.inputs, cotangents, **options, **function)

    found = ask()
    # Not a dict's: tuples of results, of which any may be a dict.
    received = sum(map(_bytes, found)) if isinstance(found, tuple) else _bytes(found)
    return Plan(ask, call.inputs, sum(array.nbytes for array in tensors), received, _rows(call))


def _cotangents(outputs: dict[str, Array], random: np.random.Generator) -> dict[str, Array] | None:
    """Normal ones of the outputs' shapes and dtypes; None for one real scalar, which needs none."""
    floating = {name: array for name, array in outputs.items() if is_differentiable(array)}
    if all(array.ndim == 0 and array.dtype.kind != "c" for array in floating.values()) and len(floating) == 1:
        return None
    return {name: normal(array.shape, array.dtype, random) for name, array in floating.items()}


def _bytes(found: Any) -> int:
    if isinstance(found, dict):
        return sum(map(_bytes, found.values()))
    return found.nbytes if isinstance(found, np.ndarray) else 0


def _rows(call: Call) -> int | None:
    """The extent of the batch axis, of the first input that has it."""
    axis = call.info.batch_axis
    if axis is None:
        return None
    return next((array.shape[axis] for array in call.inputs.values() if array.ndim > axis), None)
