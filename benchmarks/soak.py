"""Minutes of load against one server while its workers and clients are killed: answers checked, leftovers counted.

First stateless calls under killed workers; then thousands of forward and backward cycles in sessions, while clients
are killed and connections cut. Ends with status 1 when an answer was wrong or something was left over.
Run: python benchmarks/soak.py --seconds 120 --cycles 10000
"""

import argparse
import gc
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
from serving import HERE, pullback_server

import pullback as pb


def memory_files(process: psutil.Process) -> int:
    """Allocated bytes of the anonymous memory files that a process holds open."""
    sizes = {}
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            if "memfd:" in str(descriptor.readlink()):
                found = descriptor.stat()
                sizes[found.st_ino] = found.st_blocks * 512
        except FileNotFoundError:
            continue
    return sum(sizes.values())


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


def gauges(url: str) -> dict[str, float]:
    """What sessions hold, as the server says."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(r"^(pullback_session\w*|pullback_bytes_in_flight) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def resident(processes: list[psutil.Process]) -> int:
    return sum(process.memory_info().rss for process in processes)


def sessions(target: str, metrics: str, front: psutil.Process, cycles: int, callers: int) -> bool:
    """Prints what cycles in sessions leave. Whether that is nothing."""
    Sessions(target, cycles // 5, callers).run()
    gc.collect()
    time.sleep(2)
    family = [front, *front.children()]
    before = resident(family), sum(process.num_fds() for process in family)
    load = Sessions(target, cycles, callers)
    killed = load.run()
    end = time.monotonic() + 30
    # Clients that were dropped, not closed: gRPC's channels wait for the garbage collector.
    gc.collect()
    time.sleep(2)
    while any(gauges(metrics).values()) and time.monotonic() < end:
        gc.collect()
        time.sleep(0.2)
    left = {name: value for name, value in gauges(metrics).items() if value}
    after = resident(family), sum(process.num_fds() for process in family)
    print(f"cycles in sessions   {load.done}")
    print(f"clients killed       {killed}")
    print(f"wrong or failed      {len(load.wrong)} {load.wrong[:3] or ''}")
    print(f"held at the end      {left or 'nothing'}")
    print(f"descriptors, all     {before[1]} before, {after[1]} after")
    print(f"resident, all, MiB   {before[0] >> 20} before, {after[0] >> 20} after")
    return not load.wrong and not left and after[1] <= before[1] + 8 and after[0] <= before[0] * 1.1 + (32 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--kill-every", type=float, default=4, help="seconds between kills")
    parser.add_argument("--cycles", type=int, default=10_000, help="forward and backward cycles in sessions")
    arguments = parser.parse_args()
    with pullback_server(str(HERE / "models.py"), "--devices", "cpu:2", "--threads", "1") as (target, process, metrics):
        front = psutil.Process(process.pid)
        # Warm: what the first load leaves is what the second is judged by.
        Load(target, arguments.callers).run(10, 11, front)
        time.sleep(1)
        before = (front.num_fds(), front.num_threads(), memory_files(front) >> 20)
        load = Load(target, arguments.callers)
        killed = load.run(arguments.seconds, arguments.kill_every, front)
        time.sleep(5)
        after = (front.num_fds(), front.num_threads(), memory_files(front) >> 20)
        workers = len(front.children())
        clean = sessions(target, metrics, front, arguments.cycles, arguments.callers)
    for outcome, count in load.counts.most_common():
        print(f"{outcome:<20} {count}")
    print(f"workers killed       {killed}")
    print(f"wrong or hanging     {len(load.wrong)}")
    print(f"workers at the end   {workers}")
    print(f"descriptors          {before[0]} before, {after[0]} after")
    print(f"threads              {before[1]} before, {after[1]} after")
    print(f"shared memory, MiB   {before[2]} before, {after[2]} after")
    if not clean or load.wrong or after[0] > before[0] + 8 or workers != 2:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
