"""What a server's processes hold, from outside: memory, descriptors, threads; and what it says itself."""

import os
import re
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

#: What must be zero when nobody calls.
GAUGES = (
    "requests_in_flight",
    "queue_length",
    "bytes_in_flight",
    "sessions",
    "session_handles",
    "session_retained_bytes",
)


def metrics(url: str) -> dict[str, float]:
    """Every sample of /metrics, by its name with labels."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(\w+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)}


def total(samples: Mapping[str, float], family: str) -> float:
    """The sum over a metric's labels."""
    return sum(value for name, value in samples.items() if name.partition("{")[0] == family)


def gauges(url: str) -> dict[str, float]:
    """Those of `GAUGES` that are not zero."""
    samples = metrics(url)
    found = {name: total(samples, f"pullback_{name}") for name in GAUGES}
    return {name: value for name, value in found.items() if value}


def settled(url: str, seconds: float, meanwhile: Callable[[], object] = lambda: None) -> dict[str, float]:
    """Waits until all gauges are zero, at most so long. Returns those that are not."""
    end = time.monotonic() + seconds
    while (left := gauges(url)) and time.monotonic() < end:
        meanwhile()
        time.sleep(0.1)
    return left


def memory_files(process: psutil.Process) -> dict[int, int]:
    """Allocated bytes of the anonymous memory files that a process holds open, by inode."""
    sizes = {}
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            if "memfd:" in str(descriptor.readlink()):
                found = descriptor.stat()
                sizes[found.st_ino] = found.st_blocks * 512
        except FileNotFoundError:
            continue
    return sizes


def workers(front: psutil.Process) -> list[psutil.Process]:
    """The server's worker processes."""
    found = []
    for child in front.children():
        try:
            if "pullback_server.engine.worker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def family(front: psutil.Process) -> list[psutil.Process]:
    return [front, *front.children(recursive=True)]


def resident(processes: list[psutil.Process]) -> int:
    """Bytes in memory, of those that are still there."""
    size = 0
    for process in processes:
        try:
            size += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return size


class Peak:
    """The most that front and workers together had in memory."""

    def __init__(self, front: psutil.Process) -> None:
        self._front = front
        self.bytes = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.25):
                self.bytes = max(self.bytes, resident(family(self._front)))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.bytes = max(self.bytes, resident(family(self._front)))


class Figures:
    """Prints figures, and remembers those that are not as they should be."""

    def __init__(self, title: str) -> None:
        print(f"\n{title}", flush=True)
        self.failed: list[str] = []

    def tell(self, name: str, value: object, good: bool = True) -> None:
        """good: False for what makes the soak fail."""
        print(f"  {name:<46} {value}{'' if good else '   <-- FAILED'}", flush=True)
        if not good:
            self.failed.append(name)


@contextmanager
def log_of_server() -> Iterator[Callable[[], list[str]]]:
    """What is started in this context writes its log not to the terminal; gives the lines of it."""
    with tempfile.TemporaryFile("w+b") as log:
        terminal = os.dup(2)
        os.dup2(log.fileno(), 2)
        lines: list[str] = []
        try:
            yield lambda: lines
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            log.seek(0)
            lines += log.read().decode(errors="replace").splitlines()
