"""Calls, ops, models, stages and errors as the page shows them: in the last minute, and since the start."""

from __future__ import annotations

from collections.abc import Mapping

from pullback_server.telemetry.page_history import History, Window
from pullback_server.telemetry.page_readings import Counts, total
from pullback_server.telemetry.page_shapes import ErrorRow, MethodRow, ModelTraffic, StageRow, Traffic

#: Stages in the order in which a call goes through them.
_STAGES = ("decode", "queue", "transfer", "forward", "backward", "encode")


def traffic(history: History) -> Traffic:
    """Rows with most calls first."""
    window = history.last_minute()
    later, earlier = window.later, window.earlier
    took = window.between(later.call_seconds, earlier.call_seconds)
    op_took = window.between(later.op_seconds, earlier.op_seconds)
    stages = window.between(later.stage_seconds, earlier.stage_seconds)
    return Traffic(
        seconds=window.seconds,
        calls=_row(history, window, "all calls", later.calls, earlier.calls, None, total(took)),
        ops=_row(history, window, "all ops", later.ops, earlier.ops, None, total(op_took)),
        methods=_rows(history, window, later.calls, earlier.calls, took),
        op_kinds=_rows(history, window, later.ops, earlier.ops, op_took),
        models=_models(history, window),
        stages=[
            StageRow(name, *history.seconds(stages[name]))
            for name in sorted(stages, key=lambda name: _STAGES.index(name) if name in _STAGES else len(_STAGES))
        ],
        errors=_errors(later.calls, earlier.calls) + _errors(later.ops, earlier.ops),
    )


def _row(
    history: History,
    window: Window,
    name: str,
    later: Mapping[tuple[str, str], float],
    earlier: Mapping[tuple[str, str], float],
    key: str | None,
    took: Counts,
) -> MethodRow:
    """Of the calls of one method; key None: of all."""
    numbers = {"total": 0.0, "errors": 0.0, "before": 0.0, "errors before": 0.0}
    for (method, code), number in later.items():
        if key is None or method == key:
            before = earlier.get((method, code), 0.0)
            numbers["total"] += number
            numbers["before"] += before
            if code != "OK":
                numbers["errors"] += number
                numbers["errors before"] += before
    return MethodRow(
        name,
        int(numbers["total"]),
        int(numbers["errors"]),
        window.per_second(numbers["total"], numbers["before"]),
        window.per_second(numbers["errors"], numbers["errors before"]),
        *history.seconds(took),
    )


def _rows(
    history: History,
    window: Window,
    later: Mapping[tuple[str, str], float],
    earlier: Mapping[tuple[str, str], float],
    took: Mapping[str, Counts],
) -> list[MethodRow]:
    names = {name for name, _ in later}
    rows = [_row(history, window, name, later, earlier, name, took.get(name, ())) for name in names]
    return sorted(rows, key=lambda row: (-row.total, row.name))


def _models(history: History, window: Window) -> list[ModelTraffic]:
    later, earlier = window.later, window.earlier

    def nonfinite(where: str, kind: str) -> int:
        return int(later.nonfinite.get((name, where, kind), 0.0))

    took = window.between(later.model_seconds, earlier.model_seconds)
    norms = window.between(later.norms, earlier.norms)
    rows = []
    for name in {name for name, _ in later.models} | set(later.norms):
        if not name:
            # Calls that name no hosted model are among those of their method.
            continue
        good, bad = later.models.get((name, True), 0.0), later.models.get((name, False), 0.0)
        before = [earlier.models.get((name, ok), 0.0) for ok in (True, False)]
        rows.append(
            ModelTraffic(
                name,
                int(good + bad),
                int(bad),
                window.per_second(good + bad, sum(before)),
                window.per_second(bad, before[1]),
                *history.seconds(took.get(name, ())),
                *history.norms(norms.get(name, ())),
                history.norm_buckets(later.norms.get(name, ())),
                nonfinite("outputs", "nan"),
                nonfinite("outputs", "inf"),
                nonfinite("gradients", "nan"),
                nonfinite("gradients", "inf"),
                int(later.beyond.get((name, "vanishing"), 0.0)),
                int(later.beyond.get((name, "exploding"), 0.0)),
            )
        )
    return sorted(rows, key=lambda row: (-row.total, row.name))


def _errors(later: Mapping[tuple[str, str], float], earlier: Mapping[tuple[str, str], float]) -> list[ErrorRow]:
    found = [
        ErrorRow(name, code, int(number), int(number - earlier.get((name, code), 0.0)))
        for (name, code), number in later.items()
        if code != "OK" and number
    ]
    return sorted(found, key=lambda row: (-row.last_minute, -row.total, row.name))
