"""The last minutes, kept in the server, so that whoever opens the page sees at once how it has been."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

from pullback_server.telemetry.metrics import Metrics
from pullback_server.telemetry.page_readings import Counted, Counts, bounds, minus, quantile, read, total
from pullback_server.telemetry.page_shapes import Gauges, Point

#: Seconds between points, and over how many of them a chart goes: ten minutes.
INTERVAL = 2.0
_POINTS = 300
#: Readings over which the tables tell rates and quantiles (a minute), and those of a point in a chart (ten seconds).
_WINDOW = 30
_SMOOTH = 5
#: Models of which a point has the gradients' norm at most: those with the most calls.
_NAMED = 6


Three = tuple[float | None, float | None, float | None]


class Window:
    """Two readings, and what happened between them."""

    def __init__(self, earlier: Counted, later: Counted) -> None:
        self.earlier = earlier
        self.later = later
        self.seconds = max(later.at - earlier.at, 1e-3)

    def per_second(self, later: float, earlier: float) -> float:
        return (later - earlier) / self.seconds

    @staticmethod
    def between(later: Mapping[str, Counts], earlier: Mapping[str, Counts]) -> dict[str, Counts]:
        return {key: minus(counts, earlier.get(key)) for key, counts in later.items()}


class History:
    """Filled by `beat`, on the event loop; read in any thread. Its size is bounded, whatever is hosted and called."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._seconds = bounds(metrics.request_seconds)
        self._norms = bounds(metrics.gradient_norm)
        self._lock = threading.Lock()
        self._readings: deque[Counted] = deque([read(metrics)], maxlen=_WINDOW + 1)
        self._points: deque[Point] = deque(maxlen=_POINTS)

    def beat(self, gauges: Gauges) -> None:
        """To be called every second or so; takes a reading when it is time."""
        # A beat comes a little more than a second after the other, and is not to be waited for once more.
        if time.monotonic() - self._readings[-1].at < INTERVAL - 0.5:
            return
        reading = read(self._metrics)
        with self._lock:
            self._readings.append(reading)
            last, smooth = self._readings[-2], self._readings[-min(len(self._readings), _SMOOTH + 1)]
            self._points.append(self._point(Window(last, reading), Window(smooth, reading), gauges))

    def points(self, since: float) -> list[Point]:
        """Those after a time, oldest first. since: seconds since 1970."""
        with self._lock:
            return [point for point in self._points if point.time > since]

    def last_minute(self) -> Window:
        """What happened in the last minute, up to the last reading."""
        with self._lock:
            return Window(self._readings[0], self._readings[-1])

    def seconds(self, counts: Counts) -> Three:
        """Median, 95 % and 99 % quantile of a histogram of times."""
        return _three(self._seconds, counts, 0.5, 0.95, 0.99)

    def norms(self, counts: Counts) -> Three:
        """5 % quantile, median and 95 % quantile of a histogram of gradients' norms."""
        return _three(self._norms, counts, 0.05, 0.5, 0.95)

    def norm_buckets(self, counts: Counts) -> list[tuple[float | None, int]]:
        """Upper bound (None: there is none) and number of each bucket."""
        return [
            (None if bound == float("inf") else bound, int(number))
            for bound, number in zip(self._norms, counts, strict=False)
        ]

    def _point(self, now: Window, smooth: Window, gauges: Gauges) -> Point:
        calls: dict[str, float] = {}
        errors = 0.0
        for later, earlier, named in (
            (now.later.calls, now.earlier.calls, True),
            (now.later.ops, now.earlier.ops, False),
        ):
            for (name, code), number in later.items():
                rate = now.per_second(number, earlier.get((name, code), 0.0))
                key = name if named else "session ops"
                calls[key] = calls.get(key, 0.0) + rate
                if code != "OK":
                    errors += rate
        took = self.seconds(total(smooth.between(smooth.later.call_seconds, smooth.earlier.call_seconds)))
        norms = smooth.between(smooth.later.norms, smooth.earlier.norms)
        busiest = sorted(norms, key=lambda model: -sum(norms[model]))[:_NAMED]
        medians = {model: quantile(self._norms, norms[model], 0.5) for model in busiest}
        return Point(
            time=round(time.time(), 3),
            calls={name: round(rate, 3) for name, rate in calls.items()},
            errors=round(errors, 3),
            p50=_rounded(took[0]),
            p95=_rounded(took[1]),
            p99=_rounded(took[2]),
            gradient_norms={model: float(f"{norm:.4g}") for model, norm in medians.items() if norm is not None},
            gauges=gauges,
        )


def _three(bounds: Sequence[float], counts: Counts, low: float, middle: float, high: float) -> Three:
    return quantile(bounds, counts, low), quantile(bounds, counts, middle), quantile(bounds, counts, high)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else float(f"{seconds:.4g}")
