"""Models that harm the workers that load them: others must not notice."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from tests.serving import EVERYBODY, Served

import pullback as pb
from pullback_server.rpc import new_key

SQUARE = """
import os
import time
import torch
from torch import nn
from pullback_server import model

{top}

class Square(nn.Module):
    def __init__(self, n=1):
        super().__init__()
        self.w = nn.Parameter(torch.ones(n, dtype=torch.float64))
    def forward(self, x):
        {forward}
        return x * x * self.w.mean()

@model("{name}", kind="factory", gate=False)
def made():
    {made}
    return Square()
"""

X = np.array([1.0, 2.0])


class Rig:
    """A server in mode explicit with a model "square" that is always there."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder = folder
        self.root = folder / "repository"
        self.write("square")
        key, entry = new_key("test", ["call", "session", "admin"], ["*"])
        (folder / "keys.toml").write_text(entry + EVERYBODY)
        self.served = Served(
            folder, "--repository", str(self.root), "--repository-mode", "explicit", "--load-model", "square",
            "--principals", str(folder / "keys.toml"), *flags,
        )  # fmt: skip
        self.client = pb.connect(self.served.target, token=key, timeout=60)

    def write(self, name: str, *, top: str = "", forward: str = "pass", made: str = "pass") -> None:
        place = self.root / name / "1"
        place.mkdir(parents=True)
        (place.parent / "model.toml").write_text("")
        (place / "model.py").write_text(SQUARE.format(name=name, top=top, forward=forward, made=made))

    def workers(self) -> set[int]:
        """Those that serve; what rehearses is nicer."""
        found = psutil.Process(self.served.process.pid).children()
        return {one.pid for one in found if one.is_running() and one.nice() == 0}

    def right(self, name: str = "square") -> bool:
        return bool(np.allclose(self.client.model(name).vjp(X, np.ones(2)).gradients, 2 * X))

    def stop(self) -> None:
        self.client.close()
        self.served.process.terminate()
        self.served.process.wait(30)


@pytest.fixture
def rigged(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(*flags: str) -> Rig:
        made.append(Rig(tmp_path, *flags))
        return made[-1]

    yield make
    for rig in made:
        rig.stop()


def test_what_is_built_differently_by_a_replacement_is_left_out_and_nothing_else(rigged: Callable[..., Rig]) -> None:
    rig = rigged()
    size = rig.folder / "size"
    size.write_text("2")
    rig.write("changing", made=f"return Square(int(open({str(size)!r}).read()))")
    rig.client.load_model("changing")
    assert rig.right("changing")
    size.write_text("3")
    (pid,) = rig.workers()
    os.kill(pid, signal.SIGKILL)
    assert rig.right()
    with pytest.raises(pb.PullbackError):
        rig.right("changing")
    assert "goes on without it" in rig.served.log.read_text()


def test_loading_waits_for_what_computes(rigged: Callable[..., Rig]) -> None:
    rig = rigged("--load-timeout", "9")
    rig.write("long", forward="time.sleep(11 if x.numel() == 3 else 0)")
    rig.client.load_model("long")
    before = rig.workers()
    found: list[object] = []

    def call() -> None:
        found.append(rig.client.model("long").vjp(np.ones(3), np.ones(3)).gradients)

    caller = threading.Thread(target=call)
    caller.start()
    time.sleep(0.5)
    rig.client.load_model("square")
    caller.join()
    assert np.allclose(found[0], 2.0)
    assert rig.workers() == before


# Rehearsals are nicer than workers, which is how these tell where they are.
HARM = {
    "dies": "os.nice(0) or os.kill(os.getpid(), 9)",
    "hangs": "os.nice(0) or time.sleep(100)",
    "exits": "os.nice(0) or os._exit(3)",
}


def test_what_harms_workers_harms_one_of_them(rigged: Callable[..., Rig]) -> None:
    rig = rigged("--devices", "cpu:2", "--load-timeout", "9")
    stop = threading.Event()
    wrong: list[object] = []

    def call() -> None:
        while not stop.is_set():
            try:
                if not rig.right():
                    wrong.append("wrong")
            except pb.PullbackError as error:
                wrong.append(error)

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for name, harm in HARM.items():
        before = rig.workers()
        rig.write(name, made=harm)
        with pytest.raises(pb.errors.LoadFailed, match=f"model '{name}' version 1"):
            rig.client.load_model(name)
        assert len(before & rig.workers()) >= 1, name
        until = time.monotonic() + 30
        while len(rig.workers()) < 2 and time.monotonic() < until:
            time.sleep(0.1)
    stop.set()
    for caller in callers:
        caller.join()
    assert not wrong, wrong[:3]
    assert all(rig.right() for _ in range(10))


def test_a_factory_that_forks_leaves_one_process(rigged: Callable[..., Rig]) -> None:
    rig = rigged()
    rig.write("forks", made="os.fork()")
    rig.client.load_model("forks")
    assert all(rig.right("forks") and rig.right() for _ in range(50))
    assert len(rig.workers()) == 1
