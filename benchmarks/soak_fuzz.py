"""Hostile bytes for minutes: requests and sessions that were valid once, peers that speak no gRPC, and, guided by
coverage, what reads bytes in this process. Nothing may crash, hang, be told what the contract does not know, or stay.

Run: python benchmarks/soak_fuzz.py --seconds 600
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from serving import HERE
from soak_holdings import Figures

ROOT = HERE.parent
# The attacks are the tests' own.
sys.path.insert(0, str(ROOT))

from tests.fuzz import garbage  # noqa: E402
from tests.fuzz.bombarding import Bombardment  # noqa: E402
from tests.fuzz.house import Findings, House  # noqa: E402
from tests.fuzz.recording import Recording, record  # noqa: E402
from tests.fuzz.targets import TARGETS, seeds  # noqa: E402
from tests.serving import Served  # noqa: E402

#: Share of the time for what is fuzzed in a process of its own; of the rest, for warming up.
GUIDED, WARM_UP = 0.25, 0.2
#: Calls in a burst, and bursts between two volleys of garbage.
CALLS, BURSTS = 200, 5
#: Bytes, descriptors and threads that may come and go.
GROWTH, SLACK = 32 << 20, 8
OPTIONS = ("--devices", "cpu", "--session-bytes", str(64 << 20), "--max-message-bytes", str(16 << 20))


class _Attack:
    """What is done again and again. seed: of everything."""

    def __init__(self, served: Served, house: House, recording: Recording, findings: Findings, seed: int) -> None:
        self._ports = int(served.target.rpartition(":")[2]), int(served.http.rpartition(":")[2])
        self._house = house
        self._findings = findings
        self._rng = random.Random(seed)
        self._bombardment = Bombardment(served.target, recording, findings, seed)
        self.connections = 0

    @property
    def calls(self) -> int:
        return self._bombardment.sent

    def until(self, end: float) -> None:
        while time.monotonic() < end:
            for _ in range(BURSTS):
                self._bombardment.burst(CALLS)
                self._house.check(self._findings)
            self.connections += garbage.volley(*self._ports, self._rng)
            self._house.check(self._findings)


def _guided(recording: Recording, seconds: float, figures: Figures) -> None:
    """Each target for its share of the time."""
    for name in TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            for index, data in enumerate(seeds(name, recording.unary, recording.sessions)):
                (Path(folder) / str(index)).write_bytes(data)
            share = max(round(seconds / len(TARGETS)), 1)
            command = [sys.executable, "-m", "tests.fuzz", name, folder, f"-max_total_time={share}"]
            command += ["-print_final_stats=1", f"-artifact_prefix={folder}/"]
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
        told = dict(line.split(maxsplit=1) for line in ran.stderr.splitlines() if line.startswith("stat::"))
        runs = told.get("stat::number_of_executed_units:", "?")
        good = ran.returncode == 0
        figures.tell(f"inputs of {name}, guided by coverage", f"{runs} in {share} s", good)
        if not good:
            print(ran.stdout[-3000:], ran.stderr[-3000:])


def fuzz(seconds: float, seed: int = 0) -> list[str]:
    """Prints the figures. Returns the names of those that are not as they should be."""
    figures = Figures(f"Fuzz: hostile bytes for {seconds:g} s")
    findings = Findings()
    over_sockets = seconds * (1 - GUIDED)
    with tempfile.TemporaryDirectory() as folder:
        served = Served(Path(folder), str(ROOT / "tests" / "zoo.py"), *OPTIONS)
        try:
            house = House(served.process.pid, served.target, served.http, served.log)
            recording = record(served.target)
            attack = _Attack(served, house, recording, findings, seed)
            attack.until(time.monotonic() + over_sockets * WARM_UP)
            before, calls, connections = house.holds(), attack.calls, attack.connections
            began = time.monotonic()
            attack.until(began + over_sockets * (1 - WARM_UP))
            took = time.monotonic() - began
            after, samples = house.holds(), house.samples()
        finally:
            served.process.terminate()
            status = served.process.wait(60)
    figures.tell("calls and sessions, a second", f"{attack.calls - calls}, {(attack.calls - calls) / took:.0f}")
    figures.tell("connections of others", attack.connections - connections)
    figures.tell("told", dict(findings.told.most_common()))
    figures.tell("findings", len(findings.wrong), not findings.wrong)
    for wrong in findings.wrong[:10]:
        print(f"    {wrong}")
    restarts = samples.get("worker_restarts_total", 0.0)
    figures.tell("workers restarted", f"{restarts:.0f}", not restarts)
    for name, value in after.items():
        scale, slack = (20, GROWTH) if value > 1 << 20 else (0, SLACK)
        unit = ", MiB" if scale else ""
        figures.tell(
            f"{name}{unit}", f"{before[name] >> scale} before, {value >> scale} after", value <= before[name] + slack
        )
    figures.tell("the server ended with status", status, status == 0)
    _guided(recording, seconds * GUIDED, figures)
    return figures.failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if fuzz(arguments.seconds, arguments.seed):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
