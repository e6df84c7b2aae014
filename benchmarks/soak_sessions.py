"""Workers killed under stateless calls; then thousands of cycles in sessions, while clients die. Nothing may be left.

Run: python benchmarks/soak_sessions.py --seconds 120 --cycles 10000
"""

import argparse
import gc
import random
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import psutil
from serving import HERE, pullback_server
from soak_holdings import Figures, family, memory_files, resident, settled

import pullback as pb


class Load:
    """Callers whose every input is unique and whose every answer is checked."""

    def __init__(self, target: str, callers: int) -> None:
        self.target = target
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._call, args=(caller,)) for caller in range(callers)]

    def _call(self, caller: int) -> None:
        rng = np.random.default_rng(caller)
        with pb.connect(self.target, timeout=30) as client:
            cube = client.model("cube")
            while not self.over.is_set():
                # On both sides of what travels inline, up to 8 MiB.
                x = rng.normal(size=(int(rng.choice([3, 1000, 20_000, 1 << 20])),))
                v = rng.normal(size=x.shape)
                try:
                    y, gradient = cube.vjp(x, v)
                except pb.errors.PullbackError as error:
                    self.counts[type(error).__name__] += 1
                    continue
                self.counts["OK"] += 1
                if not (np.allclose(y, x**3, rtol=1e-12) and np.allclose(gradient, 3 * x**2 * v, rtol=1e-12)):
                    self.wrong.append(f"caller {caller}, {x.size} elements")

    def run(self, seconds: float, every: float, front: psutil.Process) -> int:
        """Loads for `seconds`, killing a worker `every` so many of them; returns how many were killed."""
        for thread in self.threads:
            thread.start()
        until = time.monotonic() + seconds
        killed = 0
        while time.monotonic() < until:
            time.sleep(every)
            victims = front.children()
            if victims:
                random.choice(victims).kill()
                killed += 1
        self.over.set()
        for thread in self.threads:
            thread.join(120)
            if thread.is_alive():
                self.wrong.append("a call hangs past its deadline")
        return killed


CHILD = """
import sys, numpy as np, pullback as pb
client = pb.connect(sys.argv[1])
held = []
while True:
    x = client.tensor(np.random.default_rng(0).normal(size=50_000), requires_grad=True)
    held = [*held[-20:], client.model("cube")(x)]
    held[-1].sum().backward(retain_graph=True)
"""


class Sessions:
    """Forward and backward, again and again, in sessions that are opened, closed, dropped and killed."""

    def __init__(self, target: str, cycles: int, callers: int) -> None:
        self.target = target
        self.left = cycles
        self.done = 0
        self.wrong: list[str] = []
        self.threads = [threading.Thread(target=self._call, args=(caller,)) for caller in range(callers)]
        self._lock = threading.Lock()

    def _take(self) -> bool:
        with self._lock:
            self.left -= 1
            return self.left >= 0

    def _call(self, caller: int) -> None:
        rng = np.random.default_rng(caller)
        model: pb.RemoteModel | None = None
        count = 0
        while self._take():
            if count % 100 == 0:
                # A new connection now and then; the old one goes without a goodbye.
                client = pb.connect(self.target, timeout=60)
                model = client.model("cube")
            count += 1
            x = rng.normal(size=(int(rng.choice([3, 1000, 20_000])),))
            try:
                assert model is not None
                leaf = client.tensor(x, requires_grad=True)
                y = model(leaf)
                (first,) = pb.autograd.grad(y.sum(), leaf, create_graph=True)
                assert first is not None
                (first * leaf).sum().backward()
                assert leaf.grad is not None
                # d/dx (3 x^2) x = 9 x^2
                if not np.allclose(leaf.grad.numpy(), 9 * x**2, rtol=1e-11):
                    self.wrong.append(f"caller {caller}, {x.size} elements")
            except pb.errors.PullbackError as error:
                self.wrong.append(f"caller {caller}: {error}")
            self.done += 1

    def run(self) -> int:
        """Until all cycles are done; returns how many clients were killed meanwhile."""
        for thread in self.threads:
            thread.start()
        killed = 0
        while any(thread.is_alive() for thread in self.threads):
            child = subprocess.Popen([sys.executable, "-c", CHILD, self.target], stderr=subprocess.DEVNULL)
            time.sleep(2)
            child.kill()
            child.wait()
            killed += 1
        return killed


def sessions(figures: Figures, target: str, metrics: str, front: psutil.Process, cycles: int, callers: int) -> None:
    """Tells what cycles in sessions leave."""
    Sessions(target, cycles // 5, callers).run()
    gc.collect()
    time.sleep(2)
    processes = family(front)
    before = resident(processes), sum(process.num_fds() for process in processes)
    load = Sessions(target, cycles, callers)
    killed = load.run()
    # Clients that were dropped, not closed: gRPC's channels wait for the garbage collector.
    gc.collect()
    time.sleep(2)
    left = settled(metrics, 30, gc.collect)
    after = resident(processes), sum(process.num_fds() for process in processes)
    figures.tell("cycles in sessions", load.done)
    figures.tell("clients killed", killed)
    figures.tell("wrong or failed", f"{len(load.wrong)} {load.wrong[:3] or ''}", not load.wrong)
    figures.tell("held at the end", left or "nothing", not left)
    figures.tell("descriptors, all", f"{before[1]} before, {after[1]} after", after[1] <= before[1] + 8)
    figures.tell(
        "resident, all, MiB",
        f"{before[0] >> 20} before, {after[0] >> 20} after",
        after[0] <= before[0] * 1.1 + (32 << 20),
    )


def workers_and_sessions(seconds: float, cycles: int, callers: int = 8, kill_every: float = 4.0) -> list[str]:
    """Prints the figures. Returns the names of those that are not as they should be."""
    figures = Figures(f"Killed workers for {seconds:g} s, then {cycles} cycles in sessions")
    with pullback_server(str(HERE / "models.py"), "--devices", "cpu:2", "--threads", "1") as (target, process, metrics):
        front = psutil.Process(process.pid)

        def held() -> tuple[int, int, int]:
            return front.num_fds(), front.num_threads(), sum(memory_files(front).values()) >> 20

        # Warm: what the first load leaves is what the second is judged by.
        Load(target, callers).run(min(10, seconds), 11, front)
        time.sleep(1)
        before = held()
        load = Load(target, callers)
        killed = load.run(seconds, kill_every, front)
        time.sleep(5)
        after = held()
        workers = len(front.children())
        figures.tell("told", dict(load.counts.most_common()))
        figures.tell("workers killed", killed)
        figures.tell("wrong or hanging", f"{len(load.wrong)} {load.wrong[:3] or ''}", not load.wrong)
        figures.tell("workers at the end", workers, workers == 2)
        figures.tell("descriptors", f"{before[0]} before, {after[0]} after", after[0] <= before[0] + 8)
        figures.tell("threads", f"{before[1]} before, {after[1]} after")
        figures.tell("shared memory, MiB", f"{before[2]} before, {after[2]} after")
        sessions(figures, target, metrics, front, cycles, callers)
    return figures.failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--cycles", type=int, default=10_000, help="forward and backward cycles in sessions")
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--kill-every", type=float, default=4, help="seconds between kills")
    found = parser.parse_args()
    if workers_and_sessions(found.seconds, found.cycles, found.callers, found.kill_every):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
