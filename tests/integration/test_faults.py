"""Workers that die under load, and what large calls leave behind: answers, processes, descriptors, memory."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

import pullback as pb
from pullback_server import Server, model, spec

MIB = 1 << 20


@model("cube", inputs={"x": spec("float64", ["n"])})
def cube(x):  # type: ignore[no-untyped-def]
    """Cubes, slowly enough to be hit while it computes."""
    import torch

    weights = torch.ones(200, 200, dtype=torch.float64)
    for _ in range(10):
        weights = weights @ weights / 200
    return x**3 * weights[0, 0]


@model("suicide")
def suicide(x):  # type: ignore[no-untyped-def]
    """Takes its worker with it."""
    import os as operating_system
    import signal

    operating_system.kill(operating_system.getpid(), signal.SIGKILL)
    return x


@model("deadly_once")
def deadly_once(x):  # type: ignore[no-untyped-def]
    """The first time, spoils its input and takes its worker with it; cubes afterwards."""
    import os as operating_system
    import pathlib
    import signal

    died = pathlib.Path(operating_system.environ["DEADLY_ONCE"])
    if not died.exists():
        died.touch()
        x.zero_()
        operating_system.kill(operating_system.getpid(), signal.SIGKILL)
    return x**3


@model("identity")
def identity(x):  # type: ignore[no-untyped-def]
    """A view of its input."""
    return x.view(x.shape)


#: Workers of servers that other tests of this process keep running.
_others: set[int] = set()


@pytest.fixture
def server() -> Iterator[Server]:
    _others.clear()
    _others.update(worker.pid for worker in workers())
    with Server(cube, suicide, identity, devices="cpu:2", threads=1, max_message_bytes=200 * MIB) as server:
        yield server


def workers() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if child.pid not in _others and "pullback_server.engine.worker" in " ".join(child.cmdline())
    ]


def load(target: str, callers: int, calls: int, failures: list[BaseException]) -> list[threading.Thread]:
    """Callers whose every input is unique and whose every answer is checked; sizes on both sides of inline."""

    def call(caller: int) -> None:
        rng = np.random.default_rng(caller)
        with pb.connect(target, timeout=60) as client:
            cube = client.model("cube")
            for index in range(calls):
                x = rng.normal(size=(40_000 if index % 2 else 5,))
                try:
                    y, grad = cube.vjp(x, np.ones_like(x))
                    np.testing.assert_allclose(y, x**3, rtol=1e-12)
                    np.testing.assert_allclose(grad, 3 * x**2, rtol=1e-12)
                except pb.errors.WorkerLost:
                    pass
                except BaseException as error:
                    failures.append(error)
                    return

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    return threads


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_killed_workers_under_load_leave_right_answers_and_nothing_else() -> None:
    _others.clear()
    _others.update(worker.pid for worker in workers())
    # What gRPC opens once for the process is open after this.
    with Server(identity, devices="cpu", threads=1) as server, pb.connect(server.target) as client:
        client.model("identity").evaluate(np.ones(3))
    descriptors = open_descriptors()
    with Server(cube, suicide, identity, devices="cpu:2", threads=1, max_message_bytes=200 * MIB) as server:
        kill_under_load(server)
    # Connections that other tests of this process left to the garbage collector may have gone meanwhile.
    assert open_descriptors() <= descriptors + 2
    assert not workers()
    assert not list(Path("/dev/shm").glob("*pullback*"))


def kill_under_load(server: Server) -> None:
    failures: list[BaseException] = []
    threads = load(server.target, 6, 40, failures)
    killed = 0
    while any(thread.is_alive() for thread in threads):
        alive = workers()
        # One at a time, so that a retry finds somebody; the next when its replacement has come.
        if len(alive) == 2 and killed < 4:
            victim = alive[killed % 2]
            victim.kill()
            killed += 1
            psutil.wait_procs([victim], timeout=10)
        threads[0].join(0.2)
    for thread in threads:
        thread.join()
    assert not failures
    assert killed >= 1
    # The service goes on, with no more workers than there were.
    with pb.connect(server.target) as client:
        x = np.arange(3.0)
        for _ in range(8):
            np.testing.assert_array_equal(client.model("identity").evaluate(x), x)
    assert len(workers()) <= 2


def test_a_job_that_kills_its_worker_is_refused_after_the_second_victim(server: Server) -> None:
    with pb.connect(server.target, timeout=60) as client:
        with pytest.raises(pb.errors.WorkerLost, match="so did the one that retried it"):
            client.model("suicide").evaluate(np.ones(3))
        np.testing.assert_array_equal(client.model("identity").evaluate(np.ones(3)), np.ones(3))


def test_a_worker_killed_mid_call_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The retry is computed from the caller's original bytes, not from what the dead worker left of them."""
    monkeypatch.setenv("DEADLY_ONCE", str(tmp_path / "died"))
    x = np.random.default_rng(0).normal(size=400_000)
    with Server(deadly_once, devices="cpu", threads=1) as server, pb.connect(server.target, timeout=60) as client:
        np.testing.assert_allclose(client.model("deadly_once").evaluate(x), x**3, rtol=1e-12)
    assert (tmp_path / "died").exists()
