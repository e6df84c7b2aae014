"""What large calls cost: the front's own memory, and shared memory that does not grow from load to load."""

import itertools
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.serving import Served

import pullback as pb

MIB = 1 << 20
MODELS = """
from pullback_server import model

@model("identity")
def identity(x):
    return x.view(x.shape)
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "models.py").write_text(MODELS)
    server = Served(tmp_path, "models.py", "--max-message-bytes", str(160 * MIB))
    yield server
    server.process.terminate()
    server.process.wait(30)


def anonymous_peak(pid: int, work: threading.Thread) -> int:
    """Highest RssAnon of a process while `work` runs."""
    peak = 0
    work.start()
    while work.is_alive():
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        assert found
        peak = max(peak, int(found[1]) * 1024)
        work.join(0.005)
    return peak


def memfd_bytes(pid: int) -> int:
    """Allocated pages of the anonymous memory files that a process holds open."""
    sizes: dict[int, int] = {}
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if "memfd:" in str(descriptor.readlink()):
                found = descriptor.stat()
                sizes[found.st_ino] = found.st_blocks * 512
        except FileNotFoundError:
            continue
    return sum(sizes.values())


def big_calls(target: str, callers: int, calls: int, wrong: list[object]) -> threading.Thread:
    """64 MiB there and back, each with its own contents, each checked."""

    def call(caller: int) -> None:
        with pb.connect(target, timeout=60, max_message_bytes=160 * MIB) as client:
            for index in range(calls):
                x = np.full(16 * MIB, caller * 100 + index, dtype=np.float32)
                x[-1] = -1
                y = client.model("identity").evaluate({"x": x})
                if not np.array_equal(x, y):
                    wrong.append((caller, index))

    def everybody() -> None:
        threads = [threading.Thread(target=call, args=(caller,)) for caller in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return threading.Thread(target=everybody)


def test_64_mib_calls_in_bounded_memory_that_does_not_grow_from_load_to_load(served: Served) -> None:
    pid, target = served.process.pid, served.target
    wrong: list[object] = []
    peaks, shared = [], []
    for _ in range(4):
        peaks.append(anonymous_peak(pid, big_calls(target, 2, 3, wrong)))
        shared.append(sum(memfd_bytes(process) for process in (pid, *[worker.pid for worker in served.workers])))
    assert not wrong
    # README states it: 5 times the bytes of the messages being received or sent, plus a base. gRPC's own buffers are
    # most of that; a 64 MiB call holds its request, and then its answer twice while it is sent.
    assert max(peaks) < 2 * 5 * 64 * MIB + 150 * MIB
    # Memory is kept, so a load peaks higher than the last one where its callers happened to meet more closely. What
    # leaks grows with each load; what is kept stops growing.
    assert min(later - earlier for earlier, later in itertools.pairwise(peaks)) <= 32 * MIB
    assert min(later - earlier for earlier, later in itertools.pairwise(shared)) <= 16 * MIB
