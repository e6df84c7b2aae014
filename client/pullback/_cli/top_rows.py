"""What `pullback top` shows, as cells of text."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pullback._cli.tables import columns, duration, short, sized, visible

#: Seconds over which rates of models go, where that is known.
_WINDOW = 10.0
#: Kinds of errors that are listed.
_ERRORS = 5


class Rates:
    """Calls and errors per second of late, by model, from the numbers since the start of several documents."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, dict[str, tuple[int, int]]]] = deque()

    def add(self, time: float, models: Sequence[Mapping[str, Any]]) -> None:
        """Takes a reading of the server's. time: its own, by which a reading that is seen twice is known."""
        if self._seen and time <= self._seen[-1][0]:
            # A server that was started anew has no past.
            if time == self._seen[-1][0]:
                return
            self._seen.clear()
        self._seen.append((time, {one["name"]: (one["total"], one["errors"]) for one in models}))
        while len(self._seen) > 2 and time - self._seen[1][0] >= _WINDOW:
            self._seen.popleft()

    def of(self, model: Mapping[str, Any]) -> tuple[float, float]:
        """Of one model. Before there are two readings: the server's own rates, of the last minute."""
        if len(self._seen) < 2:
            return model["per_second"], model["errors_per_second"]
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        (calls, errors), (before, errors_before) = last.get(model["name"], (0, 0)), first.get(model["name"], (0, 0))
        if calls < before:
            return model["per_second"], model["errors_per_second"]
        return (calls - before) / (ended - began), (errors - errors_before) / (ended - began)


@dataclass(frozen=True)
class Table:
    """title; sides: "l" or "r" for each column."""

    title: str
    sides: str
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class View:
    """Lines about the server as a whole, and tables."""

    lines: list[str]
    tables: list[Table]

    def text(self) -> str:
        """All of it, plain."""
        parts = list(self.lines)
        for table in self.tables:
            parts += ["", columns(table.rows, right=table.sides)]
        return "\n".join(parts)


def view(target: str, now: Mapping[str, Any], point: Mapping[str, Any] | None, rates: Rates) -> View:
    """What a document says. point: the latest of the charts; None: there is none yet."""
    tables = [_models(now, rates), _workers(now)]
    errors = [one for one in now["traffic"]["errors"] if one["last_minute"]][:_ERRORS]
    if errors:
        rows: list[tuple[str, ...]] = [("ERRORS OF THE LAST MINUTE", "CODE", "NUMBER")]
        rows += [(one["name"], one["code"], f"{one['last_minute']:,}") for one in errors]
        tables.append(Table("errors", "llr", rows))
    return View([visible(line) for line in _head(target, now, point)], [_visible(table) for table in tables])


def _visible(table: Table) -> Table:
    return Table(table.title, table.sides, [tuple(map(visible, row)) for row in table.rows])


def _head(target: str, now: Mapping[str, Any], point: Mapping[str, Any] | None) -> list[str]:
    server, gauges = now["server"], now["gauges"]
    state = "ready" if server["ready"] else f"NOT READY: {server['state']}"
    calls = sum(point["calls"].values()) if point else now["traffic"]["calls"]["per_second"]
    errors = point["errors"] if point else now["traffic"]["calls"]["errors_per_second"]
    took = point or now["traffic"]["calls"]
    return [
        f"{target}  Pullback {server['version']}  {state}  up {duration(server['uptime_seconds'])}",
        f"calls {_rate(calls)}/s  errors {_rate(errors)}/s  p50 {duration(took['p50'])}  p95 {duration(took['p95'])}  "
        f"p99 {duration(took['p99'])}",
        f"queue {gauges['queued']:,}  oldest {duration(gauges['oldest_seconds'])}  in flight {gauges['in_flight']:,} "
        f"({sized(gauges['bytes_in_flight'])})  sessions {gauges['sessions']:,} holding {gauges['handles']:,} tensors "
        f"({sized(gauges['retained_bytes'])})",
    ]


def _models(now: Mapping[str, Any], rates: Rates) -> Table:
    """Busiest first; then those that nobody has called."""
    rows: list[tuple[str, ...]] = [
        ("MODEL", "STATE", "CALLS/S", "ERRORS/S", "P50", "P95", "GRAD NORM", "NAN+INF", "CALLS", "IN FLIGHT")
    ]
    hosted = {one["name"]: one for one in now["models"]}
    traffic = {one["name"]: one for one in now["traffic"]["models"]}
    for name in sorted({*hosted, *traffic}, key=lambda name: (-traffic.get(name, {"total": 0})["total"], name)):
        model, called = hosted.get(name), traffic.get(name)
        versions = model["versions"] if model else []
        state = _state(versions, model["fault"] if model else "") if model else "gone"
        in_flight = f"{sum(one['calls_in_flight'] for one in versions):,}"
        if called is None:
            rows.append((name, state, "0", "0", "-", "-", "-", "0", "0", in_flight))
            continue
        calls, errors = rates.of(called)
        odd = sum(called[key] for key in ("output_nans", "output_infs", "gradient_nans", "gradient_infs"))
        norm = "-" if called["norm_p50"] is None else f"{called['norm_p50']:.2g}"
        times = (duration(called["p50"]), duration(called["p95"]))
        rows.append(
            (name, state, _rate(calls), _rate(errors), *times, norm, f"{odd:,}", f"{called['total']:,}", in_flight)
        )
    return Table("models", "llrrrrrrrr", rows)


def _state(versions: Sequence[Mapping[str, Any]], fault: str) -> str:
    """ "1 ready" of one version, "2,3 ready, 4 failed" of several."""
    states: dict[str, list[str]] = {}
    for one in versions:
        states.setdefault(one["state"], []).append(one["version"])
    told = ", ".join(f"{','.join(numbers)} {state}" for state, numbers in states.items())
    return ", ".join(filter(None, (told, "faulty" if fault else ""))) or "-"


def _workers(now: Mapping[str, Any]) -> Table:
    rows: list[tuple[str, ...]] = [
        ("WORKER", "DEVICE", "STATE", "JOBS", "SESSIONS", "RESTARTS", "MEMORY", "DEVICE MEMORY", "BUSY")
    ]
    for one in now["workers"]:
        used, whole, busy = (one[f"device_{key}"] for key in ("used_bytes", "total_bytes", "utilization"))
        device = "-" if used is None else sized(used) + ("" if whole is None else f" of {sized(whole)}")
        memory = "-" if one["memory_bytes"] is None else sized(one["memory_bytes"])
        counts = (str(one["outstanding"]), str(one["sessions"]), str(one["restarts"]))
        share = "-" if busy is None else f"{busy:.0%}"
        rows.append((one["name"], one["device"], one["state"], *counts, memory, device, share))
    return Table("workers", "lllrrrrrr", rows)


def _rate(per_second: float) -> str:
    return short(per_second) if per_second else "0"
