"""Jobs on real worker processes: bytes there and back, shared memory never shared by mistake, faults, cancelling."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pullback_server.faults import Fault
from pullback_server.fleet import LocalFleet, Worker
from pullback_server.ipc.layout import INLINE_LIMIT
from pullback_server.job import Job, TensorRef
from pullback_wire import Reason
from pullback_wire.dtypes import DTYPES, wire_dtype

MODELS = '''
import os, sys, threading, time
import torch
from pullback_server import model

@model("echo", kind="function")
def echo(x):
    return x.view(x.shape)

@model("pair", kind="function")
def pair(x, y):
    return y, x[..., :1]

@model("double", kind="function")
def double(x):
    return x + x

@model("writes", kind="function")
def writes(x):
    x.mul_(2)
    return x

class Keeps(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kept = []

    def forward(self, x):
        # Index 0 asks what is kept of earlier inputs.
        if x.numel() == 1:
            return torch.stack([kept.sum() for kept in self.kept])
        self.kept.append(x.view(-1))
        return x.sum()

@model("keeps")
def keeps():
    return Keeps()

@model("waits", kind="function")
def waits(x):
    """Waits until the file that x spells exists."""
    path = bytes(x.tolist()).decode()
    open(path + ".began", "w").close()
    while not os.path.exists(path):
        time.sleep(0.001)
    return x

@model("raises", kind="function")
def raises(x):
    raise KeyError("no such thing")

@model("exits", kind="function")
def exits(x):
    sys.exit(3)

class Unsayable(Exception):
    def __str__(self):
        raise RuntimeError("no words")

@model("unsayable", kind="function")
def unsayable(x):
    raise Unsayable

@model("surrogate", kind="function")
def surrogate(x):
    raise ValueError("no file \\udcff")

@model("unsendable", kind="function")
def unsendable(x):
    return {"y\\udcff": x}

@model("cycles", kind="function")
def cycles(x):
    """Leaves its input to the garbage collector."""
    ring = [x]
    ring.append(ring)
    return x + 1

@model("threads", kind="function")
def threads(x):
    return x + torch.get_num_threads()
'''

KIB, MIB = 1 << 10, 1 << 20
#: Doubles that just travel in the control message.
EDGE = INLINE_LIMIT // 8


class Home:
    """A fleet and the event loop it lives on."""

    def __init__(self, fleet: Callable[[], LocalFleet]) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.fleet = self.wait(self._start(fleet))

    async def _start(self, fleet: Callable[[], LocalFleet]) -> LocalFleet:
        started = fleet()
        await started.start()
        return started

    def wait(self, work: Coroutine[Any, Any, Any], timeout: float = 60) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def close(self) -> None:
        self.wait(self.fleet.close(5))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    source = tmp_path_factory.mktemp("fleet") / "models.py"
    source.write_text(MODELS)
    home = Home(lambda: LocalFleet([str(source)], devices="cpu", threads=1, idle_bytes=8 * MIB))
    yield home
    home.close()


@pytest.fixture(scope="module")
def worker(home: Home) -> Worker:
    return home.fleet.workers[0]


def job(model: str, arrays: Sequence[np.ndarray], names: Sequence[str] = ("x", "y"), **options: Any) -> Job:
    inputs = [
        TensorRef(name, wire_dtype(array.dtype), array.shape, index)
        for index, (name, array) in enumerate(zip(names, arrays, strict=False))
    ]
    fields: dict[str, Any] = {
        "kind": "evaluate", "model": model, "version": "1", "loss": None, "train": False, "seed": None,
        "inputs": inputs, "parameters": [], "targets": [], "wrt": [], "cotangents": [], "batched": False,
        "tangents": [], "allow_unused": False, "return_outputs": True, "return_cotangent_derivatives": False,
        "result_dtype": 0, "max_norm": None, "max_result_bytes": 1 << 40, "max_cotangents": 64,
    }  # fmt: skip
    return Job(**{**fields, **options})


def raw(array: np.ndarray) -> bytes:
    return array.tobytes()


async def evaluate(worker: Worker, model: str, *arrays: np.ndarray, deadline: float = float("inf")) -> list[bytes]:
    with await worker.run(job(model, arrays), [raw(array) for array in arrays], deadline) as reply:
        return [bytes(reply.payloads[output.payload]) for output in reply.outcome.outputs]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        # What is waited for happens in another process.
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def numbers(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size)


@pytest.mark.parametrize("number", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (2, 3, 5), (300, 300)])
def test_every_dtype_and_shape_comes_back_as_it_went(
    home: Home, worker: Worker, number: int, shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(number)
    array = rng.integers(0, 2 if DTYPES[number].name == "bool" else 100, shape).astype(DTYPES[number])
    assert home.wait(evaluate(worker, "echo", array)) == [raw(array)]


def test_bytes_that_are_no_bools_become_true(home: Home, worker: Worker) -> None:
    # torch counts and indexes with what is in a bool's byte.
    array = np.array([0, 1, 2, 255], dtype=np.uint8).view(np.bool_)
    assert home.wait(evaluate(worker, "echo", array)) == [bytes([0, 1, 1, 1])]


@pytest.mark.parametrize("size", [1, EDGE // 2 - 8, EDGE // 2, EDGE, 90 * KIB, MIB])
def test_two_inputs_of_any_size_keep_apart(home: Home, worker: Worker, size: int) -> None:
    x, y = numbers(1, size), numbers(2, size + 3)
    assert home.wait(evaluate(worker, "pair", x, y)) == [raw(y), raw(x[:1])]


def test_an_empty_tensor_beside_a_large_one(home: Home, worker: Worker) -> None:
    x, y = numbers(1, 50_000), np.zeros((0, 3))
    for _ in range(3):
        assert home.wait(evaluate(worker, "pair", x, y)) == [b"", raw(x[:1])]


@pytest.mark.parametrize("size", [EDGE - 1, EDGE, EDGE + 1])
def test_one_tensor_around_the_edge_of_what_travels_inline(home: Home, worker: Worker, size: int) -> None:
    x = numbers(size, size)
    assert home.wait(evaluate(worker, "double", x)) == [raw(2 * x)]


def test_very_many_payloads(home: Home, worker: Worker) -> None:
    # The rest are parameters that the model does not know, so the message is what is tested: it must arrive whole.
    arrays = [numbers(index, 1) for index in range(1500)]
    wrong = job("echo", arrays[:1])
    wrong.parameters = [TensorRef(f"p{i}", wire_dtype(a.dtype), a.shape, i) for i, a in enumerate(arrays) if i]
    with pytest.raises(Fault) as fault:
        home.wait(worker.run(wrong, [raw(array) for array in arrays], float("inf")))
    assert fault.value.reason is Reason.BAD_NAME


def test_many_callers_get_their_own_answers_from_reused_slots(home: Home, worker: Worker) -> None:
    async def caller(number: int) -> None:
        rng = np.random.default_rng(number)
        for _ in range(15):
            size = int(rng.choice([10, 5000, 40_000, 150_000]))
            x = rng.standard_normal(size)
            model = ("echo", "double", "writes")[int(rng.integers(3))]
            expected = x if model == "echo" else x + x
            assert await evaluate(worker, model, x) == [raw(expected)]

    async def load() -> None:
        await asyncio.gather(*(caller(number) for number in range(16)))

    home.wait(load())
    assert worker.outstanding == 0


def test_a_model_that_writes_into_its_input_sees_the_original_bytes(home: Home, worker: Worker) -> None:
    for size in (5, 50_000):
        x = numbers(size, size)
        before = x.copy()
        for _ in range(3):
            assert home.wait(evaluate(worker, "writes", x)) == [raw(2 * x)]
        # The caller's bytes are its own.
        assert (x == before).all()


def memory_bytes() -> int:
    """Bytes of shared memory that this process holds."""
    return sum(size for _, size in memory_files("self").items())


def memory_files(pid: int | str) -> dict[int, int]:
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if "memfd:pullback" in str(entry.readlink()):
                status = entry.stat()
                found[status.st_ino] = status.st_blocks * 512
        except FileNotFoundError:
            continue
    return found


def test_a_second_identical_load_peaks_no_higher(home: Home, worker: Worker) -> None:
    """Everything shared between this process and its worker, watched through loads of mixed sizes."""
    pid = home.fleet.workers[0].pid
    peak = 0

    def shared() -> int:
        # Other servers of this process have memory of their own, which their workers map, and not this one.
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        mapped = {int(line.split()[4]) for line in lines if "memfd:pullback" in line}
        ours = {inode: size for inode, size in memory_files("self").items() if inode in mapped}
        return sum({**ours, **memory_files(pid or "")}.values())

    async def caller(number: int) -> None:
        nonlocal peak
        rng = np.random.default_rng(number)
        for _ in range(6):
            x = rng.standard_normal(int(rng.choice([20_000, 130_000, 400_000])))
            assert await evaluate(worker, "echo", x) == [raw(x)]
            peak = max(peak, shared())

    async def load(callers: int) -> int:
        nonlocal peak
        peak = 0
        await asyncio.gather(*(caller(number) for number in range(callers)))
        # Nothing is in use now: what is left is within the budget of each side.
        await until(lambda: shared() <= 2 * 8 * MIB)
        return peak

    for _ in range(2):
        # 400_000 doubles are 3.05 MiB and take a segment of 3.5 MiB: at most 6 each way at once, or the idle budget.
        assert home.wait(load(6)) <= 2 * 6 * 3.5 * MIB
    # One after the other, so that chance has no part in it.
    first = home.wait(load(1))
    assert home.wait(load(1)) <= first


def test_what_a_model_keeps_of_its_inputs_does_not_change_under_it(home: Home, worker: Worker) -> None:
    inputs = [np.full(50_000, float(value)) for value in range(1, 6)]
    for x in inputs:
        home.wait(evaluate(worker, "keeps", x))
        # Jobs of the same size in between would be given the same memory.
        for filler in (numbers(1, 50_000), numbers(2, 50_000)):
            home.wait(evaluate(worker, "double", filler))
    (sums,) = home.wait(evaluate(worker, "keeps", np.ones(1)))
    assert np.frombuffer(sums).tolist() == [x.sum() for x in inputs]


def test_what_only_the_garbage_collector_holds_is_used_again(home: Home, worker: Worker) -> None:
    x = numbers(3, 200_000)
    home.wait(evaluate(worker, "cycles", x))
    before = memory_bytes()
    for _ in range(5):
        assert home.wait(evaluate(worker, "cycles", x)) == [raw(x + 1)]
    assert memory_bytes() == before


def test_a_result_still_looked_at_after_its_reply_does_not_change(home: Home, worker: Worker) -> None:
    x = numbers(5, 100_000)

    async def work() -> None:
        with await worker.run(job("echo", [x]), [raw(x)], float("inf")) as reply:
            held = np.frombuffer(reply.payloads[0])
        for seed in range(3):
            await evaluate(worker, "echo", numbers(seed, 100_000))
        assert (held == x).all()

    home.wait(work())


def test_a_reply_that_nobody_leaves_gives_its_memory_back(home: Home, worker: Worker) -> None:
    x = numbers(5, 100_000)

    async def work() -> None:
        for _ in range(30):
            await worker.run(job("echo", [x]), [raw(x)], float("inf"))
        assert await evaluate(worker, "echo", x) == [raw(x)]

    home.wait(work())
    assert len(memory_files(home.fleet.workers[0].pid or "")) < 25


@pytest.mark.parametrize("model", ["raises", "exits", "unsayable", "surrogate", "unsendable"])
@pytest.mark.parametrize("size", [3, 50_000])
def test_a_model_that_raises_costs_nothing_but_its_call(home: Home, worker: Worker, model: str, size: int) -> None:
    restarts = home.fleet.restarts
    with pytest.raises(Fault) as fault:
        home.wait(evaluate(worker, model, np.ones(size)))
    assert fault.value.reason in (Reason.MODEL_ERROR, Reason.INTERNAL)
    assert "Traceback" not in fault.value.message
    fault.value.message.encode()
    assert home.wait(evaluate(worker, "echo", np.ones(2))) == [raw(np.ones(2))]
    assert home.fleet.restarts == restarts


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        (TensorRef("x", wire_dtype(np.dtype("f8")), (4,), 0), Reason.BAD_TENSOR),
        (TensorRef("x", 99, (3,), 0), Reason.BAD_TENSOR),
        (TensorRef("x", wire_dtype(np.dtype("f8")), (3,), 1), Reason.INTERNAL),
    ],
)
def test_a_job_that_contradicts_its_bytes_is_refused(
    home: Home, worker: Worker, ref: TensorRef, reason: Reason
) -> None:
    wrong = job("echo", [])
    wrong.inputs = [ref]
    with pytest.raises(Fault) as fault:
        home.wait(worker.run(wrong, [bytes(24)], float("inf")))
    assert fault.value.reason is reason


class Gate:
    """A file that the model `waits` waits for."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "open"
        self.x = np.frombuffer(str(self.path).encode(), dtype=np.uint8)

    def open(self) -> None:
        self.path.touch()

    async def began(self) -> None:
        await until(Path(f"{self.path}.began").exists)


def test_a_job_whose_time_ran_out_while_it_waited_is_not_begun(home: Home, worker: Worker, tmp_path: Path) -> None:
    gate, late = Gate(tmp_path), Gate(tmp_path / "late")

    async def work() -> None:
        blocker = asyncio.create_task(evaluate(worker, "waits", gate.x))
        await gate.began()
        deadline = time.monotonic() + 0.01
        waiting = asyncio.create_task(evaluate(worker, "waits", late.x, deadline=deadline))
        await asyncio.sleep(0)
        assert worker.outstanding == 2
        await until(lambda: time.monotonic() > deadline)
        gate.open()
        with pytest.raises(Fault) as fault:
            await waiting
        assert fault.value.reason is Reason.DEADLINE_EXCEEDED
        await blocker
        with pytest.raises(Fault) as fault:
            await evaluate(worker, "echo", gate.x, deadline=time.monotonic())
        assert fault.value.reason is Reason.DEADLINE_EXCEEDED

    home.wait(work())
    assert worker.outstanding == 0


@pytest.mark.parametrize("size", [10, 100_000, 1_000_000])
def test_a_cancelled_job_is_passed_over_and_its_place_comes_back(
    home: Home, worker: Worker, tmp_path: Path, size: int
) -> None:
    gate = Gate(tmp_path)
    never = Gate(tmp_path / "nowhere")
    room = threading.Event()
    x = numbers(1, size)

    async def work() -> None:
        home.fleet.on_change = room.set
        blocker = asyncio.create_task(evaluate(worker, "waits", gate.x))
        await gate.began()
        # Cancelled while it waits in the worker's queue, and while its bytes are still being written.
        tasks: list[Awaitable[Any]] = []
        for turns in (0, 1, 50):
            task = asyncio.create_task(evaluate(worker, "double", x))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            tasks.append(task)
        # This one would never end if it began.
        begun = asyncio.create_task(evaluate(worker, "waits", never.x))
        await asyncio.sleep(0)
        begun.cancel()
        results = await asyncio.gather(*tasks, begun, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        assert worker.outstanding >= 2
        gate.open()
        await blocker
        await until(lambda: worker.outstanding == 0)
        assert await evaluate(worker, "double", x) == [raw(2 * x)]
        home.fleet.on_change = lambda: None

    home.wait(work())
    # Whoever waits for a place must hear that there is one.
    assert room.is_set()


def test_a_running_job_whose_caller_left_is_finished_and_forgotten(home: Home, worker: Worker, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def work() -> None:
        running = asyncio.create_task(evaluate(worker, "waits", gate.x))
        await gate.began()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert worker.outstanding == 1
        gate.open()
        assert await evaluate(worker, "echo", gate.x) == [raw(gate.x)]

    home.wait(work())
    assert worker.outstanding == 0


def test_stages_are_timed_and_threads_are_as_configured(home: Home, worker: Worker) -> None:
    async def work() -> None:
        x = np.zeros(100_000)
        with await worker.run(job("threads", [x]), [raw(x)], float("inf")) as reply:
            assert reply.timings["transfer"] > 0
            assert reply.timings["compute"] > 0
            assert np.frombuffer(bytes(reply.payloads[0]))[0] == 1

    home.wait(work())


def test_the_front_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, pullback_server.fleet; print([n for n in ('torch', 'grpc', 'cloudpickle') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert found.stdout.strip() == "[]", found.stderr
