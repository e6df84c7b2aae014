"""What the page makes rates and quantiles of, read from the metrics now and then, and the arithmetic of histograms."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import add, sub
from typing import Any

from prometheus_client import Counter, Histogram

from pullback_server.telemetry.metrics import Metrics

#: Observations by bucket, not cumulative.
Counts = tuple[float, ...]


@dataclass(frozen=True)
class Counted:
    """What counters and histograms have counted at one moment, since the start of the server.

    at: on the time.monotonic clock.
    calls: by method and status code. models: by model and whether it was answered OK. ops: by kind and status code.
    call_seconds, model_seconds, op_seconds, stage_seconds: by method, model, kind and stage.
    norms: of gradients, by model. nonfinite: values, by model, where and kind.
    beyond: calls whose norm was beyond a threshold, by model and "vanishing" or "exploding".
    """

    at: float
    calls: Mapping[tuple[str, str], float]
    models: Mapping[tuple[str, bool], float]
    ops: Mapping[tuple[str, str], float]
    call_seconds: Mapping[str, Counts]
    model_seconds: Mapping[str, Counts]
    op_seconds: Mapping[str, Counts]
    stage_seconds: Mapping[str, Counts]
    norms: Mapping[str, Counts]
    nonfinite: Mapping[tuple[str, str, str], float]
    beyond: Mapping[tuple[str, str], float]


def read(metrics: Metrics) -> Counted:
    """Takes some microseconds for each pair of model and method that was ever called."""
    calls: dict[tuple[str, str], float] = {}
    models: dict[tuple[str, bool], float] = {}
    for (method, model, code), child in _children(metrics.requests):
        number = child._value.get()
        calls[method, code] = calls.get((method, code), 0.0) + number
        key = (model, code == "OK")
        models[key] = models.get(key, 0.0) + number
    call_seconds, model_seconds = _summed(metrics.request_seconds, 0, 1)
    return Counted(
        time.monotonic(),
        calls,
        models,
        {(op, code): child._value.get() for (op, code), child in _children(metrics.session_ops)},
        call_seconds,
        model_seconds,
        _summed(metrics.session_op_seconds, 0)[0],
        _summed(metrics.stage_seconds, 0)[0],
        _summed(metrics.gradient_norm, 0)[0],
        {(model, where, kind): child._value.get() for (model, where, kind), child in _children(metrics.nonfinite)},
        {
            (labels[0], which): child._value.get()
            for which, counter in (("vanishing", metrics.vanishing), ("exploding", metrics.exploding))
            for labels, child in _children(counter)
        },
    )


def _children(metric: Counter | Histogram) -> list[tuple[Sequence[str], Any]]:
    # Not `collect()`, which takes twenty times as long over a histogram's texts; this is read all the time.
    with metric._lock:
        return list(metric._metrics.items())


def _summed(metric: Histogram, *labels: int) -> list[dict[str, Counts]]:
    """For each of the labels: counts by its values, over all the others."""
    sums: list[dict[str, Counts]] = [{} for _ in labels]
    for values, child in _children(metric):
        # Not `get()`, whose lock guards nothing here: a float is read in one piece.
        counts = tuple([bucket._value for bucket in child._buckets])
        for label, found in zip(labels, sums, strict=True):
            before = found.get(values[label])
            found[values[label]] = counts if before is None else plus(before, counts)
    return sums


def bounds(metric: Histogram) -> Sequence[float]:
    """Upper bounds of a histogram's buckets; the last is infinite."""
    return tuple(metric._upper_bounds)


def plus(one: Counts, other: Counts) -> Counts:
    return tuple(map(add, one, other))


def minus(later: Counts, earlier: Counts | None) -> Counts:
    """What was observed between two readings."""
    return later if earlier is None else tuple(map(sub, later, earlier))


def total(every: Mapping[str, Counts]) -> Counts:
    """All of them in one."""
    found: Counts = ()
    for counts in every.values():
        found = plus(found, counts) if found else counts
    return found


def quantile(bounds: Sequence[float], counts: Counts, q: float) -> float | None:
    """The value that a share `q` of what was observed does not exceed, as far as the buckets tell; None: nothing was.

    Within a bucket values are taken to lie evenly on a logarithmic scale, as the bounds do. In the last bucket,
    which has no upper bound, its lower bound is told.
    """
    number = sum(counts)
    if number <= 0:
        return None
    rank = q * number
    below, index = 0.0, 0
    while below + counts[index] < rank or not counts[index]:
        below += counts[index]
        index += 1
    upper = bounds[index]
    lower = bounds[index - 1] if index else 0.0
    if upper == float("inf"):
        return lower
    share = (rank - below) / counts[index]
    if lower > 0:
        return float(lower * (upper / lower) ** share)
    # The first of the bounds above 0: there is no logarithm of the other.
    return upper * share
