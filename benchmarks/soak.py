"""Minutes of load against one server while its workers are killed: answers are checked, leftovers counted.

Run: python benchmarks/soak.py --seconds 120. Ends with status 1 when an answer was wrong or something was left over.
"""

import argparse
import random
import threading
import time
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--kill-every", type=float, default=4, help="seconds between kills")
    arguments = parser.parse_args()
    with pullback_server(str(HERE / "models.py"), "--devices", "cpu:2", "--threads", "1") as (target, process, _):
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
    for outcome, count in load.counts.most_common():
        print(f"{outcome:<20} {count}")
    print(f"workers killed       {killed}")
    print(f"wrong or hanging     {len(load.wrong)}")
    print(f"workers at the end   {workers}")
    print(f"descriptors          {before[0]} before, {after[0]} after")
    print(f"threads              {before[1]} before, {after[1]} after")
    print(f"shared memory, MiB   {before[2]} before, {after[2]} after")
    if load.wrong or after[0] > before[0] + 8 or workers != 2:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
