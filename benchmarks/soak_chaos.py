"""Everything that can go wrong at once, beside callers that check every answer: no wrong one, and nothing left over.

Two workers. Killed ones, calls that kill, loops that never end, lost memory, callers that raise, leave, come too late
or vanish; and 32 callers that compare what they get with the closed form.
Run: python benchmarks/soak_chaos.py --seconds 300
"""

import argparse
import gc
import random
import subprocess
import sys
import time

import numpy as np
import psutil
from serving import HERE, Running, pullback_server
from soak_callers import processes
from soak_checking import WORKS, Checked, check
from soak_holdings import Figures, family, log_of_server, memory_files, metrics, resident, settled, total, workers

import pullback as pb

PROCESSES = 4
#: Seconds of the same chaos before, after which what is held is counted for the first time.
WARM_UP = 30.0
#: What callers may be told that were disturbed.
DOCUMENTED = frozenset(
    (
        "OK",
        "WORKER_LOST",
        "SESSION_LOST",
        "DEADLINE_EXCEEDED",
        "DeadlineExceeded, by the client",
        "OVERLOADED",
        "NOT_READY",
        "OUT_OF_MEMORY",
    )
)
#: Besides those, who does the harm.
DESERVED = DOCUMENTED | {"HARD_TIMEOUT", "QUARANTINED"}
#: Seconds between a worker's death and the next, and that a client lives which vanishes.
KILLS, VANISHINGS = (2.0, 8.0), (3.0, 6.0)
#: Descriptors, threads and bytes that may come and go.
SLACK, GROWTH = 8, 96 << 20


def _chaos(running: Running, front: psutil.Process, seconds: float, seed: int) -> tuple[Checked, Checked, int, int]:
    """What the callers were told; how many workers and clients were killed."""
    found = Checked(), Checked()
    killed = vanished = 0
    with processes(PROCESSES) as pool:
        until = time.monotonic() + seconds
        callers = [
            pool.submit(check, running.target, 1000 * (seed + number), until, number == 0)
            for number in range(PROCESSES)
        ]
        next_kill = time.monotonic() + random.uniform(*KILLS)
        child = _vanishing(running)
        next_vanishing = time.monotonic() + random.uniform(*VANISHINGS)
        while time.monotonic() < until:
            time.sleep(0.2)
            if time.monotonic() >= next_vanishing:
                child.kill()
                child.wait()
                vanished += 1
                child = _vanishing(running)
                next_vanishing = time.monotonic() + random.uniform(*VANISHINGS)
            # Where one is killed that loads, its replacement waits longer and longer.
            if time.monotonic() >= next_kill and _ready(running) == 2 and (victims := workers(front)):
                random.choice(victims).kill()
                killed += 1
                next_kill = time.monotonic() + random.uniform(*KILLS)
        child.kill()
        child.wait()
        for caller in callers:
            for mine, theirs in zip(found, caller.result(seconds + 300), strict=True):
                mine.add(theirs)
    return *found, killed, vanished


def _vanishing(running: Running) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(HERE / "soak_checking.py"), running.target], stderr=subprocess.DEVNULL)


def _ready(running: Running) -> float:
    return metrics(running.metrics).get('pullback_workers{state="ready"}', 0.0)


def _quiet(running: Running, front: psutil.Process) -> tuple[dict[str, int], dict[str, float]]:
    """What the front holds when both workers are back and nobody calls; and the gauges that are not zero."""
    end = time.monotonic() + 120
    while _ready(running) < 2 and time.monotonic() < end:
        time.sleep(0.2)
    gc.collect()
    left = settled(running.metrics, 30)
    # Both workers compute something, so that both have begun with what they keep.
    x = np.ones((4000, 3))
    with pb.connect(running.target) as client:
        for _ in range(20):
            client.model("cube").vjp(x.reshape(-1), x.reshape(-1))
    time.sleep(1)
    files = memory_files(front)
    return {
        "descriptors": front.num_fds() - len(files),
        "threads": front.num_threads(),
        "children": len(front.children(recursive=True)),
        "memory files": len(files),
        "memory files' bytes": sum(files.values()),
        "resident, front": resident([front]),
        "resident, all": resident(family(front)),
    }, left


def chaos(seconds: float) -> list[str]:
    """Prints the figures. Returns the names of those that are not as they should be."""
    figures = Figures(f"Chaos: {PROCESSES * len(WORKS)} checking callers for {seconds:g} s")
    options = ("--devices", "cpu:2", "--threads", "1", "--worker-memory-bytes", str(256 << 20))
    with log_of_server() as log, pullback_server(str(HERE / "soak_moody.py"), *options) as running:
        front = psutil.Process(running.process.pid)
        _chaos(running, front, min(WARM_UP, seconds), 100)
        before, _ = _quiet(running, front)
        counted = metrics(running.metrics)
        told, harmful, killed, vanished = _chaos(running, front, seconds, 0)
        after, left = _quiet(running, front)
        now = metrics(running.metrics)
        everybody = family(front)
    _, alive = psutil.wait_procs(everybody, timeout=10)
    figures.tell("workers killed, clients killed", f"{killed}, {vanished}")
    figures.tell("those that check were told", dict(told.told.most_common()), set(told.told) <= DOCUMENTED)
    figures.tell("those that do harm were told", dict(harmful.told.most_common()), set(harmful.told) <= DESERVED)
    wrong, late = told.wrong + harmful.wrong, told.late + harmful.late
    figures.tell("wrong answers", f"{len(wrong)} {wrong[:3] or ''}", not wrong)
    figures.tell("calls that came back too late", f"{len(late)} {late[:3] or ''}", not late)
    figures.tell("the slowest call, s", f"{max(told.slowest, harmful.slowest):.1f}")
    for name in (
        "merged_calls",
        "unmerged_calls",
        "memory_splits",
        "dropped_calls",
        "worker_deaths",
        "worker_restarts",
    ):
        family_name = f"pullback_{name}_total"
        figures.tell(name.replace("_", " "), f"{total(now, family_name) - total(counted, family_name):.0f}")
    for name, value in after.items():
        bound = before[name] + (GROWTH if value > 1 << 20 else 0 if name == "children" else SLACK)
        scale = 20 if name.startswith("resident") or name.endswith("bytes") else 0
        unit = ", MiB" if scale else ""
        figures.tell(f"{name}{unit}", f"{before[name] >> scale} before, {value >> scale} after", value <= bound)
    figures.tell("gauges that are not zero", left or "none", not left)
    complaints = [line for line in log() if "inside the server" in line or "on_change failed" in line]
    figures.tell("complaints in the log", f"{len(complaints)} {complaints[:2] or ''}", not complaints)
    figures.tell("processes that outlive the server", len(alive), not alive)
    return figures.failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    if chaos(parser.parse_args().seconds):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
