"""A polite caller, one call at a time, alone and beside one that floods: how much longer its calls take.

One worker; the flood is 64 calls in flight of one caller. Alone and beside take turns, so that both see the same
machine. Run: python benchmarks/soak_fairness.py --seconds 20
"""

import argparse
import functools
import time
from collections import Counter

import numpy as np
from serving import HERE, pullback_server
from soak_callers import Call, closed_loop, processes, quantile, vjp_request
from soak_holdings import Figures, metrics, settled, total

FLOOD = 64
ROUNDS = 4
#: How many times as long the polite caller's p95 may take.
GROWTH = 3.0
#: What is let pass, of the aim. A merged computation takes several times as long as one row, and a caller waits for the
#: rest of one and then for its own: benchmarks/RESULTS.md has the figures.
SLACK = {"work": 1.0, "wide": 2.0}


def fairness(seconds: float) -> list[str]:
    """Prints the figures for `seconds` of each measurement. Returns the names of those not as they should be."""
    figures = Figures(f"Fairness: one call at a time beside {FLOOD} in flight, {seconds:g} s")
    rng = np.random.default_rng(0)
    x = rng.normal(size=8)
    row = rng.normal(size=(1, 1024)).astype(np.float32)
    requests = {
        "work": vjp_request("work", "x", x, np.ones_like(x)),
        "wide": vjp_request("wide", "input", row, np.ones((1, 16), np.float32)),
    }
    with (
        pullback_server(str(HERE / "soak_models.py"), "--devices", "cpu", "--threads", "1") as running,
        processes(2) as pool,
    ):
        part = seconds / ROUNDS
        for model, request in requests.items():
            calls = functools.partial(closed_loop, running.target, request)
            alone: list[Call] = []
            beside: list[Call] = []
            flood: list[Call] = []
            for number in range(ROUNDS + 1):
                begin = time.monotonic() + 0.2
                first = pool.submit(calls, begin, part, 1, 30.0, "polite").result()
                begin = time.monotonic() + 0.2
                flooding = pool.submit(calls, begin, part + 1, FLOOD, 30.0, "flood")
                second = pool.submit(calls, begin + 1, part, 1, 30.0, "polite").result()
                third = [call for call in flooding.result() if begin + 1 <= call.at + call.seconds < begin + 1 + part]
                if number:
                    # What came before warmed both up.
                    alone += first
                    beside += second
                    flood += third
            _tell(figures, model, alone, beside, flood, part * ROUNDS)
            settled(running.metrics, 10)
        merged = total(metrics(running.metrics), "pullback_merged_calls_total")
        figures.tell("calls merged", f"{merged:.0f}", merged > 0)
    return figures.failed


def _tell(
    figures: Figures, model: str, alone: list[Call], beside: list[Call], flood: list[Call], seconds: float
) -> None:
    quiet, loud = [[call.seconds for call in calls if call.outcome == "OK"] for calls in (alone, beside)]
    for name, values in (("alone", quiet), ("beside the flood", loud)):
        figures.tell(
            f"{model}, {name}: median and p95, ms",
            f"{1e3 * quantile(values, 0.5):.2f}, {1e3 * quantile(values, 0.95):.2f} ({len(values) / seconds:.0f}/s)",
        )
    growth = quantile(loud, 0.95) / quantile(quiet, 0.95)
    figures.tell(f"{model}: p95 grew", f"{growth:.2f} x (aim {GROWTH:g})", growth <= GROWTH * SLACK[model])
    failed = Counter(call.outcome for call in [*alone, *beside, *flood] if call.outcome != "OK")
    answered = sum(call.outcome == "OK" for call in flood) / seconds
    figures.tell(
        f"{model}: the flood's answers, calls/s", f"{answered:.0f}, failed: {dict(failed) or 'none'}", not failed
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    if fairness(parser.parse_args().seconds):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
