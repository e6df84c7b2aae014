"""Ten times as many calls as one worker can answer: what is answered in time, how soon the others are refused.

Calls come at random times whatever becomes of those before, with deadlines of one to two seconds and no retries; the
capacity is what callers get who wait for their answers. All share the cores of one machine.
Run: python benchmarks/soak_overload.py --seconds 60
"""

import argparse
import time
from collections import Counter

import numpy as np
import psutil
from serving import HERE, pullback_server
from soak_callers import closed_loop, open_loop, probe, processes, quantile, vjp_request
from soak_holdings import Figures, Peak, family, metrics, resident, settled, total

import pullback as pb

TIMES = 10
CALLERS = 3
DEADLINES = (1.0, 2.0)
#: Seconds in which the capacity is measured, and the probes of an idle server.
MEASURED = 10.0
#: Share of the capacity that must still be answered; seconds in which a call is refused, a probe answered, and a call
#: after it all answered; bytes of memory that the load may cost.
GOODPUT, REFUSED, PROBED, RECOVERED, GROWTH = 0.8, 0.05, 0.1, 1.0, 128 << 20


def _mean(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Seconds of each of those that came between two readings of their sum and count."""
    return (after[0] - before[0]) / (after[1] - before[1])


def overload(seconds: float) -> list[str]:
    """Prints the figures. Returns the names of those that are not as they should be."""
    figures = Figures(f"Overload: {TIMES} x capacity for {seconds:g} s")
    with (
        pullback_server(str(HERE / "soak_models.py"), "--devices", "cpu", "--threads", "1") as running,
        processes(CALLERS + 1) as pool,
    ):
        front = psutil.Process(running.process.pid)
        x = np.ones(8)
        request = vjp_request("work", "x", x, x)
        http = running.metrics.removesuffix("/metrics")
        begin = time.monotonic() + 0.5
        pool.submit(closed_loop, running.target, request, begin, 3.0, 4, 30.0, "warm").result()
        idle = pool.submit(probe, running.target, http, time.monotonic() + 0.5, MEASURED, 0.1).result()
        warm = running.mean_seconds()["compute"]
        begin = time.monotonic() + 0.5
        calls = pool.submit(closed_loop, running.target, request, begin, MEASURED, 4, 30.0, "capacity").result()
        capacity = sum(begin <= call.at + call.seconds < begin + MEASURED for call in calls) / MEASURED
        figures.tell("capacity, calls/s", f"{capacity:.1f}")
        calm = running.mean_seconds()["compute"]
        before = resident(family(front))
        peak = Peak(front)
        with peak.watched():
            begin = time.monotonic() + 1.0
            probing = pool.submit(probe, running.target, http, begin, seconds, 0.1)
            loads = [
                pool.submit(
                    open_loop,
                    running.target,
                    request,
                    begin,
                    seconds,
                    TIMES * capacity / CALLERS,
                    DEADLINES,
                    f"caller {number}",
                )
                for number in range(CALLERS)
            ]
            time.sleep(max(begin + seconds - time.monotonic(), 0))
            with pb.connect(running.target, timeout=10, retry=pb.RetryPolicy(attempts=1)) as client:
                after = time.monotonic()
                outcome = "OK"
                try:
                    client.model("work").vjp(x, x)
                except pb.errors.PullbackError as error:
                    outcome = error.reason or type(error).__name__
                recovered = time.monotonic() - after
            found = [call for load in loads for call in load.result()]
        probed = probing.result()
        left = settled(running.metrics, 5)
        counted = metrics(running.metrics)
        busy = running.mean_seconds()["compute"]
        end = resident(family(front))
    outcomes = Counter(call.outcome for call in found)
    # Those that came while the queue filled, and those that were answered when the load was over, do not count.
    goodput = sum(call.outcome == "OK" and call.at + call.seconds < begin + seconds for call in found) / seconds
    refused = [call.seconds for call in found if call.outcome == "OVERLOADED"]
    answered = [call.seconds for call in found if call.outcome == "OK"]
    figures.tell("offered, calls/s", f"{len(found) / seconds:.1f}")
    share = goodput / capacity
    quick, slow = _mean(warm, calm), _mean(calm, busy)
    figures.tell("answered in time, calls/s", f"{goodput:.1f}, {share:.2f} of the capacity", share >= GOODPUT)
    figures.tell("computing, ms a call (for the capacity)", f"{1e3 * slow:.1f} ({1e3 * quick:.1f})")
    # Callers and front take time of the worker's cores where there are few, which is not the server's waste.
    figures.tell("share of what can be computed meanwhile", f"{share * slow / quick:.2f}")
    figures.tell("outcomes", dict(outcomes.most_common()))
    figures.tell(
        "answered after, median and p95, ms",
        f"{1e3 * quantile(answered, 0.5):.0f}, {1e3 * quantile(answered, 0.95):.0f}",
    )
    figures.tell(
        "refused after, median and p95, ms",
        f"{1e3 * quantile(refused, 0.5):.1f}, {1e3 * quantile(refused, 0.95):.1f}",
        quantile(refused, 0.5) < REFUSED,
    )
    figures.tell(
        "given up before they were computed",
        f"{total(counted, 'pullback_dropped_calls_total'):.0f} in the queue, "
        f"{total(counted, 'pullback_worker_passed_over_total'):.0f} at the worker",
    )
    for name, quiet, loud in (("/livez", idle.livez, probed.livez), ("health", idle.health, probed.health)):
        figures.tell(
            f"{name}, p99 and max, ms (idle)",
            f"{1e3 * quantile(loud, 0.99):.1f}, {1e3 * max(loud):.1f} "
            f"({1e3 * quantile(quiet, 0.99):.1f}, {1e3 * max(quiet):.1f})",
            max(loud) <= PROBED,
        )
    figures.tell(
        "the prober itself late, p99 and max, ms (idle)",
        f"{1e3 * quantile(probed.late, 0.99):.1f}, {1e3 * max(probed.late):.1f} "
        f"({1e3 * quantile(idle.late, 0.99):.1f}, {1e3 * max(idle.late):.1f})",
    )
    figures.tell(
        "resident, all, MiB",
        f"{before >> 20} before, {peak.bytes >> 20} at most, {end >> 20} after",
        max(peak.bytes, end) <= before + GROWTH,
    )
    figures.tell(
        "first call after it all, s", f"{outcome} after {recovered:.3f}", outcome == "OK" and recovered < RECOVERED
    )
    figures.tell("held at the end", left or "nothing", not left)
    return figures.failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    if overload(parser.parse_args().seconds):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
