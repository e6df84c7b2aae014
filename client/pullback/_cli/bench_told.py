"""What `pullback bench` prints: a table for people, row by row, and the same for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pullback._cli.load import Tally
from pullback._cli.tables import columns, short, sized

#: In the order in which a call goes through them.
_STAGES = ("decode", "queue", "transfer", "forward", "backward", "encode")
_BETWEEN, _OUTSIDE = "between", "client+network"
_HEADS = ("CALLERS", "CALLS/S", "ROWS/S", "P50 ms", "P90 ms", "P95 ms", "P99 ms", "MERGED ROWS", "ERRORS")


@dataclass(frozen=True)
class Facts:
    """What is called, with what. inputs: dtype and shape, by name. rows: of one call; None: it has no batch axis."""

    model: str
    version: str
    target: str
    method: str
    inputs: dict[str, tuple[str, tuple[int, ...]]]
    rows: int | None
    sent: int
    received: int

    def text(self) -> str:
        """What stands above the table, and its head."""
        given = ", ".join(f"{name} {dtype}{list(shape)}" for name, (dtype, shape) in self.inputs.items())
        return (
            f"{self.model} version {self.version} at {self.target}: {self.method} of {given}; tensors of "
            f"{sized(self.sent)} there and {sized(self.received)} back\n" + _line(_HEADS)
        )


def _line(cells: Sequence[str]) -> str:
    return "  ".join(cell.rjust(max(len(head), 7)) for cell, head in zip(cells, _HEADS, strict=True))


@dataclass(frozen=True)
class Level:
    """What became of the calls of so many callers. warmup: calls before, which do not count."""

    callers: int
    tally: Tally
    warmup: int

    def rate(self) -> float:
        """Calls answered per second."""
        return len(self.tally.latencies) / self.tally.seconds if self.tally.seconds else 0.0

    def quantiles(self) -> dict[str, float | None]:
        """Milliseconds; None: no call was answered."""
        names = ("p50", "p90", "p95", "p99")
        if not self.tally.latencies:
            return dict.fromkeys((*names, "mean", "max"))
        took = np.array(self.tally.latencies) * 1e3
        found = np.percentile(took, [float(name[1:]) for name in names])
        return {
            **dict(zip(names, map(float, found), strict=True)),
            "mean": float(took.mean()),
            "max": float(took.max()),
        }

    def merged_rows(self) -> float | None:
        """Mean number of rows of computations, as their calls saw it; None: none was merged."""
        return self.tally.merged_rows / self.tally.merged if self.tally.merged else None

    def row(self, rows: int | None) -> str:
        """Its line of the table. rows: of one call."""
        quantiles, merged = self.quantiles(), self.merged_rows()
        cells = [str(self.callers), short(self.rate()), "-" if rows is None else short(self.rate() * rows)]
        for name in ("p50", "p90", "p95", "p99"):
            value = quantiles[name]
            cells.append("-" if value is None else short(value))
        errors = self.tally.errors
        cells += ["-" if merged is None else short(merged), str(errors.total())]
        told = ", ".join(f"{number} {reason}" for reason, number in errors.most_common())
        return _line(cells) + (f"  {told}" if told else "")

    def shares(self) -> dict[str, float]:
        """Of the time of all answered calls: each stage in the server, what lies between them, and all that is outside.

        Empty where the server told nothing.
        """
        tally = self.tally
        if not tally.round_trips:
            return {}
        names = [*_STAGES, *sorted(set(tally.stages) - set(_STAGES))]
        seconds = {name: float(tally.stages[name]) for name in names if name in tally.stages}
        # A merged call's forward and backward may have begun before it came.
        seconds[_BETWEEN] = max(tally.served - sum(seconds.values()), 0.0)
        seconds[_OUTSIDE] = max(tally.round_trips - tally.served, 0.0)
        return {name: spent / tally.round_trips for name, spent in seconds.items()}


def stages(levels: Sequence[Level]) -> str:
    """Where the time of calls went, level by level."""
    told = [(level, level.shares()) for level in levels]
    names = list(dict.fromkeys(name for _, shares in told for name in shares))
    if not names:
        return "the server told no timings"
    # The last two last, also where only a later level has a stage.
    names = [name for name in names if name not in (_BETWEEN, _OUTSIDE)] + [_BETWEEN, _OUTSIDE]
    rows = [["CALLERS", *names]]
    rows += [[str(level.callers), *(f"{shares.get(name, 0.0):.1%}" for name in names)] for level, shares in told]
    return "where the time went:\n" + columns(rows, right="r" * len(rows[0]))


def document(facts: Facts, levels: Sequence[Level], interrupted: bool) -> dict[str, Any]:
    """For programs."""
    return {
        "model": facts.model,
        "version": facts.version,
        "target": facts.target,
        "method": facts.method,
        "inputs": {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in facts.inputs.items()},
        "rows": facts.rows,
        "request_bytes": facts.sent,
        "response_bytes": facts.received,
        "interrupted": interrupted,
        "levels": [_level(level, facts.rows) for level in levels],
    }


def _level(level: Level, rows: int | None) -> dict[str, Any]:
    tally = level.tally
    return {
        "callers": level.callers,
        "seconds": tally.seconds,
        "warmup_calls": level.warmup,
        "calls": tally.calls,
        "answered": len(tally.latencies),
        "errors": dict(tally.errors),
        "calls_per_second": level.rate(),
        "rows_per_second": None if rows is None else level.rate() * rows,
        "latency_ms": level.quantiles(),
        "shares": level.shares(),
        "merged_calls": tally.merged,
        "merged_rows": level.merged_rows(),
    }
