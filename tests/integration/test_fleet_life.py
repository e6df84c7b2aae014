"""Workers' lives: starting, failing to, dying under their jobs, being replaced, ending; and that nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pullback_server.faults import Fault
from pullback_server.fleet import LocalFleet, StartError, WorkerLost, WorkerState
from pullback_server.hosting import Registration
from pullback_server.job import Job, TensorRef
from pullback_wire.dtypes import wire_dtype

MODELS = '''
import os, time
from pullback_server import model

@model("double", kind="function")
def double(x):
    return x + x

@model("waits", kind="function")
def waits(x):
    """Waits until the file that x spells exists."""
    path = bytes(x[:x.tolist().index(0)].tolist()).decode()
    open(path + ".began", "w").close()
    while not os.path.exists(path):
        time.sleep(0.001)
    return x
'''


@pytest.fixture
def models(tmp_path: Path) -> Path:
    source = tmp_path / "models.py"
    source.write_text(MODELS)
    return source


@asynccontextmanager
async def running(*sources: Path, **options: Any) -> AsyncIterator[LocalFleet]:
    fleet = LocalFleet([str(source) for source in sources], **{"devices": "cpu", "threads": 1, **options})
    await fleet.start()
    try:
        yield fleet
    finally:
        await fleet.close(5)


async def evaluate(fleet: LocalFleet, model: str, x: np.ndarray, worker: int = 0) -> bytes:
    job = Job(
        "evaluate", model, "1", None, False, None, [TensorRef("x", wire_dtype(x.dtype), x.shape, 0)], [], [], [], [],
        False, [], False, True, False, 0, None, 1 << 40, 64,
    )  # fmt: skip
    with await fleet.workers[worker].run(job, [x.tobytes()], float("inf")) as reply:
        return bytes(reply.payloads[0])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        # What is waited for happens in another process.
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


#: Workers of servers that other tests of this process keep running.
_others: set[int] = set()


@pytest.fixture(autouse=True)
def only_own_workers() -> None:
    _others.clear()
    _others.update(worker.pid for worker in workers())


def workers() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.pid not in _others
        if child.status() == psutil.STATUS_ZOMBIE or "pullback_server.engine.worker" in child.cmdline()
    ]


def descriptors() -> list[str]:
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        # The descriptor of this very listing is gone by now.
        with contextlib.suppress(FileNotFoundError):
            found.append(f"{entry.name} {entry.readlink()}")
    return sorted(found)


class Gate:
    """A file that the model `waits` waits for."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.began = Path(f"{path}.began")
        self.x = np.frombuffer(str(path).encode().ljust(size, b"\0"), dtype=np.uint8)


@pytest.mark.parametrize("size", [1000, 1_000_000])
def test_a_killed_worker_fails_its_jobs_at_once_and_is_replaced(models: Path, tmp_path: Path, size: int) -> None:
    async def work() -> None:
        changes: list[WorkerState] = []
        async with running(models) as fleet:
            worker = fleet.workers[0]
            fleet.on_change = lambda: changes.append(worker.state)
            # Warm: the memory that stays for the next job is there.
            x = np.random.default_rng(0).standard_normal(size)
            for _ in range(3):
                assert await evaluate(fleet, "double", x) == (2 * x).tobytes()
            before, first = descriptors(), worker.pid
            gate = Gate(tmp_path / "gate", size)
            jobs = [asyncio.create_task(evaluate(fleet, "waits", gate.x))]
            await until(gate.began.exists)
            jobs.append(asyncio.create_task(evaluate(fleet, "double", x)))
            await asyncio.sleep(0)
            assert worker.outstanding == 2
            abandoned = asyncio.create_task(evaluate(fleet, "double", x))
            await asyncio.sleep(0)
            assert worker.outstanding == 3
            abandoned.cancel()

            os.kill(first or 0, signal.SIGKILL)
            running_, staged = await asyncio.gather(*jobs, return_exceptions=True)
            assert isinstance(running_, WorkerLost)
            assert running_.suspect
            assert isinstance(staged, WorkerLost)
            assert not staged.suspect
            assert worker.outstanding == 0
            assert worker.state is not WorkerState.READY
            with pytest.raises(WorkerLost) as lost:
                await evaluate(fleet, "double", x)
            assert not lost.value.suspect

            await until(lambda: worker.state is WorkerState.READY)
            assert [state for state, _ in groupby(changes)][-3:] == [
                WorkerState.DEAD,
                WorkerState.STARTING,
                WorkerState.READY,
            ]
            assert fleet.restarts == 1
            assert worker.pid != first
            assert len(workers()) == 1
            for _ in range(3):
                assert await evaluate(fleet, "double", x) == (2 * x).tobytes()
            # Two more: servers of other tests in this process have connections of their own coming and going.
            assert len(descriptors()) <= len(before) + 2

    idle = descriptors()
    asyncio.run(work())
    assert workers() == []
    assert not set(descriptors()) - set(idle)


def test_workers_killed_under_load_cost_no_wrong_answer_and_leave_nothing(models: Path) -> None:
    async def work() -> None:
        async with running(models, devices="cpu:2") as fleet:
            answers: list[int] = []
            stop = asyncio.Event()

            async def caller(number: int) -> None:
                rng = np.random.default_rng(number)
                while not stop.is_set():
                    x = rng.standard_normal(int(rng.choice([100, 50_000, 300_000])))
                    try:
                        assert await evaluate(fleet, "double", x, number % 2) == (2 * x).tobytes()
                        answers.append(number)
                    except WorkerLost:
                        await asyncio.sleep(0.001)

            callers = [asyncio.create_task(caller(number)) for number in range(8)]
            for kill in range(3):
                done = len(answers)
                await until(lambda done=done: len(answers) > done + 50)  # type: ignore[misc]
                victim = fleet.workers[kill % 2]
                await until(lambda victim=victim: victim.state is WorkerState.READY)  # type: ignore[misc]
                os.kill(victim.pid or 0, signal.SIGKILL)
                await until(lambda kill=kill: fleet.restarts > kill)  # type: ignore[misc]
            await until(lambda: all(worker.state is WorkerState.READY for worker in fleet.workers))
            done = len(answers)
            await until(lambda: len(answers) > done + 50)
            stop.set()
            await asyncio.gather(*callers)
            assert len(workers()) == 2
            assert all(worker.outstanding == 0 for worker in fleet.workers)

    before = descriptors()
    asyncio.run(work())
    assert workers() == []
    assert not set(descriptors()) - set(before)


FAILURES = {
    "raises on import": ("import torch\nx = 1 / 0\n", ["models.py", "ZeroDivisionError", "line 2"]),
    "is no Python": ("def broken(:\n", ["models.py", "line 1"]),
    "exits on import": ("import sys\nsys.exit(4)\n", ["models.py", "exit"]),
    "registers nothing": ("x = 1\n", ["models.py", "no model"]),
    "has a factory that raises": (
        "from pullback_server import model\n@model('m')\ndef make():\n    raise OSError('no weights')\n",
        ["models.py", "'m'", "OSError", "no weights", "line 4"],
    ),
    "kills its process": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", ["cpu-", "SIGKILL"]),
    "never ends": ("import time\ntime.sleep(1000)\n", ["did not load", "1.5 s"]),
    "differs every time": (
        "import os, torch\nfrom pullback_server import model\n@model('m')\n"
        "def make():\n    return torch.nn.Linear(1 + os.getpid(), 1)\n",
        ["'m'", "not what the others hold"],
    ),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_source_that_does_not_load_is_a_start_error_and_leaves_nothing(tmp_path: Path, what: str) -> None:
    text, said = FAILURES[what]
    source = tmp_path / "models.py"
    source.write_text(text)

    async def work() -> None:
        timeout = 1.5 if what == "never ends" else 60
        fleet = LocalFleet([str(source)], devices="cpu:2", threads=1, load_timeout=timeout)
        with pytest.raises(StartError) as failed:
            await fleet.start()
        for part in said:
            assert part in str(failed.value)
        assert "Traceback" not in str(failed.value)
        await fleet.close(0)

    before = descriptors()
    asyncio.run(work())
    assert workers() == []
    assert not set(descriptors()) - set(before)


@pytest.mark.parametrize("devices", ["tpu", "cpu:0", "cpu:x", "cuda:0,cuda:0", "", "cpu,,cpu"])
def test_devices_that_cannot_be_are_start_errors(models: Path, devices: str) -> None:
    async def work() -> None:
        with pytest.raises(StartError, match="devices"):
            await LocalFleet([str(models)], devices=devices).start()

    asyncio.run(work())


def test_nothing_to_serve_is_a_start_error() -> None:
    with pytest.raises(StartError, match="no model"):
        asyncio.run(LocalFleet([]).start())


def test_a_start_that_is_cancelled_leaves_nothing(models: Path) -> None:
    async def work() -> None:
        fleet = LocalFleet([str(models)], devices="cpu:2", threads=1)
        start = asyncio.create_task(fleet.start())
        await until(lambda: len(workers()) == 2)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start

    before = descriptors()
    asyncio.run(work())
    assert workers() == []
    assert not set(descriptors()) - set(before)


def test_a_replacement_that_does_not_load_is_tried_again(models: Path) -> None:
    async def work() -> None:
        async with running(models) as fleet:
            worker = fleet.workers[0]
            models.write_text("import nothing_of_this_name\n")  # noqa: ASYNC240
            os.kill(worker.pid or 0, signal.SIGKILL)
            await until(lambda: worker.state is WorkerState.STARTING)
            await until(lambda: worker.state is WorkerState.DEAD)
            models.write_text(MODELS)  # noqa: ASYNC240
            await until(lambda: worker.state is WorkerState.READY)
            x = np.ones(3)
            assert await evaluate(fleet, "double", x) == (2 * x).tobytes()
            assert fleet.restarts >= 2

    asyncio.run(work())


def test_closing_lets_a_job_finish_within_its_grace_and_no_longer(models: Path, tmp_path: Path) -> None:
    async def close(fleet: LocalFleet, path: Path, grace: float, finish: bool) -> Any:
        gate = Gate(path, 100)
        job = asyncio.create_task(evaluate(fleet, "waits", gate.x))
        await until(gate.began.exists)
        closing = asyncio.create_task(fleet.close(grace))
        await until(lambda: fleet.workers[0].state is WorkerState.DEAD)
        with pytest.raises(WorkerLost):
            await evaluate(fleet, "double", np.ones(2))
        if finish:
            gate.path.touch()
        await closing
        (answer,) = await asyncio.gather(job, return_exceptions=True)
        return answer if not finish else answer == gate.x.tobytes()

    async def work() -> None:
        async with running(models) as patient, running(models) as hasty:
            assert await close(patient, tmp_path / "a", 60, finish=True) is True
            lost = await close(hasty, tmp_path / "b", 0.05, finish=False)
            assert isinstance(lost, WorkerLost)
            assert not lost.suspect

    asyncio.run(work())
    assert workers() == []


def test_a_worker_heeds_no_signal_meant_for_its_front(models: Path) -> None:
    async def work() -> None:
        async with running(models) as fleet:
            worker = fleet.workers[0]
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(worker.pid or 0, number)
            assert os.getpgid(worker.pid or 0) != os.getpgid(0)
            assert await evaluate(fleet, "double", np.ones(2)) == (2 * np.ones(2)).tobytes()
            assert fleet.restarts == 0

    asyncio.run(work())


FRONT = """
import asyncio, sys
from pullback_server.fleet import LocalFleet

async def main():
    fleet = LocalFleet([sys.argv[1]], devices="cpu:2", threads=1)
    await fleet.start()
    print(*(worker.pid for worker in fleet.workers), flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


def test_workers_do_not_outlive_a_killed_front(models: Path) -> None:
    front = subprocess.Popen([sys.executable, "-c", FRONT, str(models)], stdout=subprocess.PIPE, text=True)
    with front:
        assert front.stdout is not None
        orphans = [psutil.Process(int(pid)) for pid in front.stdout.readline().split()]
        assert len(orphans) == 2
        front.kill()
    deadline = time.monotonic() + 20
    for orphan in orphans:
        # Whoever adopts orphans here may not reap them.
        with contextlib.suppress(psutil.NoSuchProcess):
            while orphan.status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < deadline
                time.sleep(0.01)


def triple(x: Any) -> Any:
    return 3 * x


def test_models_of_this_process_are_carried_to_workers(models: Path) -> None:
    # More than a socket takes at once.
    factors = bytes(range(10)) * 100_000

    def times(x: Any) -> Any:
        return factors[5] * x

    async def work() -> None:
        registrations = [Registration("triple", triple, "function"), Registration("times", times, "function")]
        async with running(models, registrations=registrations) as fleet:
            assert set(fleet.signatures) == {"triple", "times", "double", "waits"}
            signature = fleet.signatures["triple"]["1"]
            assert (signature.name, signature.device) == ("triple", "cpu")
            x = np.ones(2)
            assert await evaluate(fleet, "triple", x) == (3 * x).tobytes()
            assert await evaluate(fleet, "times", x) == (5 * x).tobytes()
            with pytest.raises(Fault):
                await evaluate(fleet, "neither", x)

    asyncio.run(work())


def test_what_cannot_be_carried_is_a_start_error() -> None:
    import threading

    lock = threading.Lock()

    def locked(x: Any) -> Any:
        with lock:
            return x

    with pytest.raises(StartError, match="'locked'"):
        asyncio.run(LocalFleet([], [Registration("locked", locked, "function")], devices="cpu").start())
