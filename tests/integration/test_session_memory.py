"""What sessions leave behind: nothing, however many there were and however they ended; and what large tensors cost."""

from __future__ import annotations

import gc
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from tests.serving import Served

import pullback as pb

MIB = 1 << 20
MODELS = """
import torch
from torch import nn

from pullback_server import model


@model("mlp")
def mlp():
    return nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 3)).double()


@model("identity")
def identity(x):
    return x.view(x.shape)
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "models.py").write_text(MODELS)
    server = Served(tmp_path, "models.py", "--max-message-bytes", str(64 * MIB))
    yield server
    server.process.terminate()
    server.process.wait(30)


def gauge(served: Served, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", served.get("/metrics"), re.MULTILINE)
    assert found, name
    return float(found[1])


def anonymous(pid: int) -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def settled(served: Served) -> None:
    end = time.monotonic() + 20
    while gauge(served, "pullback_sessions"):
        assert time.monotonic() < end, "sessions that nobody holds are still open"
        time.sleep(0.05)
    assert gauge(served, "pullback_session_handles") == 0
    assert gauge(served, "pullback_session_retained_bytes") == 0
    assert gauge(served, "pullback_bytes_in_flight") == 0


def cycles(target: str, count: int) -> None:
    """Forward and backward, again and again, in one session; each gradient checked against the first."""
    x = np.random.default_rng(0).normal(size=(8, 20))
    expected = None
    with pb.connect(target, timeout=60) as client:
        model = client.model("mlp")
        for _ in range(count):
            leaf = client.tensor(x, requires_grad=True)
            model(leaf).pow(2).sum().backward()
            assert leaf.grad is not None
            found = leaf.grad.numpy()
            expected = found if expected is None else expected
            np.testing.assert_array_equal(found, expected)


CHILD = """
import sys, time
import numpy as np
import pullback as pb

client = pb.connect(sys.argv[1])
leaves = [client.tensor(np.ones((64, 20)), requires_grad=True) for _ in range(5)]
outputs = [client.model("mlp")(leaf) for leaf in leaves]
print("ready", flush=True)
time.sleep(60)
"""


def test_cycles_killed_clients_and_cut_connections_leave_nothing(served: Served) -> None:
    front, worker = served.process.pid, served.workers[0].pid

    def load(count: int) -> None:
        threads = [threading.Thread(target=cycles, args=(served.target, count)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        children = [
            subprocess.Popen([sys.executable, "-c", CHILD, served.target], stdout=subprocess.PIPE) for _ in range(3)
        ]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
        assert gauge(served, "pullback_sessions") == 3
        assert gauge(served, "pullback_session_handles") >= 30
        for child in children:
            child.send_signal(signal.SIGKILL)
            child.communicate()
        settled(served)

    load(60)
    before = anonymous(worker), anonymous(front), psutil.Process(worker).num_fds(), psutil.Process(front).num_fds()
    load(150)
    assert anonymous(worker) <= before[0] + 8 * MIB
    assert anonymous(front) <= before[1] + 8 * MIB
    assert psutil.Process(worker).num_fds() <= before[2] + 4
    assert psutil.Process(front).num_fds() <= before[3] + 4


def test_garbage_lets_go_of_what_it_held(served: Served) -> None:
    with pb.connect(served.target) as client:
        x = client.tensor(np.ones((1000, 20)), requires_grad=True)
        for _ in range(20):
            y = client.model("mlp")(x).sum()
        held = gauge(served, "pullback_session_retained_bytes")
        del y
        gc.collect()
        # Nothing is sent when a tensor is collected; the next op takes the news along.
        float(x.sum().item())
        assert gauge(served, "pullback_session_handles") <= 3
        assert gauge(served, "pullback_session_retained_bytes") < held
    settled(served)


def test_clients_that_are_dropped_hang_up(served: Served) -> None:
    front = psutil.Process(served.process.pid)

    def connections() -> int:
        return sum(one.status == psutil.CONN_ESTABLISHED for one in front.net_connections("tcp"))

    for _ in range(5):
        client = pb.connect(served.target)
        client.model("identity").evaluate(np.ones(3))
        leaf = client.tensor(np.ones(3), requires_grad=True)
        leaf.sum().backward()
    assert connections() <= 3
    del client, leaf
    gc.collect()
    # Whoever next uses a channel sees to those that were left.
    with pb.connect(served.target) as other:
        other.model("identity").evaluate(np.ones(3))
        end = time.monotonic() + 10
        while connections() > 1:
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.mark.big
@pytest.mark.timeout(600)
def test_2_gib_and_more_there_and_back_in_a_bounded_front(served: Served) -> None:
    pid = served.process.pid
    size = (2252 << 20) // 8
    x = np.arange(size, dtype=np.float64)
    base = anonymous(pid)
    peak = base
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.01):
            peak = max(peak, anonymous(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with pb.connect(served.target, timeout=300) as client, client.session() as session:
            held = session.tensor(x)
            # It goes there with the first op that uses it.
            total = held.sum()
            assert total.item() == pytest.approx(float(size) * (size - 1) / 2, rel=1e-9)
            back = held.clone().numpy()
            np.testing.assert_array_equal(back, x)
    finally:
        over.set()
        watcher.join()
    # A window of chunks each way, and gRPC's buffers for them; the tensor has 2252 MiB.
    assert peak - base < 200 * MIB
    settled(served)
