"""Callers that call again and again, each in a thread, and what became of their calls."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pullback
from pullback import CallTimings

#: Seconds between looks at how far it is, and after a call that failed.
_LOOK, _AFTER_ERROR = 0.1, 0.05


@dataclass
class Tally:
    """What became of calls. seconds: from the first call's beginning to the last one's end.

    latencies: of calls that were answered, in seconds. errors: of the others, by reason.
    stages: seconds of all answered calls, by stage as the server names it; served: in the server; round_trips: as seen
    here. merged, merged_rows: calls computed together with others, and rows of these computations, once for each call.
    """

    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    stages: dict[str, float] = field(default_factory=dict)
    served: float = 0.0
    round_trips: float = 0.0
    merged: int = 0
    merged_rows: int = 0
    seconds: float = 0.0

    @property
    def calls(self) -> int:
        """Answered or not."""
        return len(self.latencies) + self.errors.total()

    def timed(self, timings: list[CallTimings]) -> None:
        """Takes over what the server said of calls."""
        for one in timings:
            self.round_trips += one.round_trip
            self.served += one.seconds
            self._staged(one.stages)
            if one.batch_rows:
                self.merged += 1
                self.merged_rows += one.batch_rows
        timings.clear()

    def add(self, other: Tally) -> None:
        """Counts another caller's calls too."""
        self.latencies += other.latencies
        self.errors += other.errors
        self.served += other.served
        self.round_trips += other.round_trips
        self.merged += other.merged
        self.merged_rows += other.merged_rows
        self._staged(other.stages)

    def _staged(self, stages: Mapping[str, float]) -> None:
        for stage, seconds in stages.items():
            self.stages[stage] = self.stages.get(stage, 0.0) + seconds


class Load:
    """So many callers at once, for so long.

    call: makes one call. progress: called ten times a second with the calls so far and the seconds passed.
    """

    def __init__(self, call: Callable[[], object], callers: int, progress: Callable[[int, float], None]) -> None:
        self._call = call
        self._progress = progress
        self._tallies = [Tally() for _ in range(callers)]
        self._stop = threading.Event()
        self._fault: BaseException | None = None

    def run(self, seconds: float) -> tuple[Tally, bool]:
        """What came of it, and whether Ctrl-C ended it early; calls under way end first.

        Raises what a call raised that is no PullbackError.
        """
        began = time.perf_counter()
        threads = [threading.Thread(target=self._work, args=(tally,), daemon=True) for tally in self._tallies]
        interrupted = False
        try:
            for thread in threads:
                thread.start()
            while (passed := time.perf_counter() - began) < seconds and not self._stop.wait(
                min(_LOOK, seconds - passed)
            ):
                self._progress(sum(tally.calls for tally in self._tallies), passed)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            self._stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        if self._fault is not None:
            raise self._fault
        whole = Tally(seconds=time.perf_counter() - began)
        for tally in self._tallies:
            whole.add(tally)
        return whole, interrupted

    def _work(self, tally: Tally) -> None:
        try:
            with pullback.record_timings() as timings:
                while not self._stop.is_set():
                    began = time.perf_counter()
                    try:
                        self._call()
                    except pullback.PullbackError as error:
                        tally.errors[error.reason or type(error).__name__] += 1
                        timings.clear()
                        # Whoever is refused at once would ask again at once.
                        self._stop.wait(min(error.retry_after or _AFTER_ERROR, 1.0))
                    else:
                        tally.latencies.append(time.perf_counter() - began)
                        tally.timed(timings)
        except BaseException as error:
            self._fault = error
            self._stop.set()
