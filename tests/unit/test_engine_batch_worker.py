"""Batches in a worker: who is passed over, how answers are packed, and memory that is limited."""

from __future__ import annotations

import gc
import importlib.util
import math
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pullback_server import spec
from pullback_server.engine import Engine
from pullback_server.engine.members import Batches
from pullback_server.engine.shelf import Shelf
from pullback_server.engine.transfer import Watch, byte_counts, packed, pieces
from pullback_server.engine.worker import Worker
from pullback_server.hosting import Registration
from pullback_server.ipc import messages
from pullback_server.ipc.frames import FrameReader, send_frame
from pullback_server.ipc.layout import place
from pullback_server.job import Answered, Batch, BatchOutcome, FaultRecord, Skip

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("engine_jobs", HERE / "engine_jobs.py")
assert _spec is not None and _spec.loader is not None
jobs = sys.modules.setdefault("engine_jobs", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(jobs)

torch.set_num_threads(1)
Tensor = torch.Tensor
INF = math.inf


def cubed(x: Tensor) -> Tensor:
    if bool((x == 7).any()):
        raise ValueError("not seven")
    return x**3


class Front:
    """Says everything before the worker looks, so that what it finds does not depend on chance."""

    def __init__(self) -> None:
        self.socket, self._theirs = socket.socketpair()
        self._engine = Engine(torch.device("cpu"))
        self._engine.load(Registration("f", cubed, kind="function", inputs={"x": spec("float64", ["n"])}, batch_axis=0))
        self._reader = FrameReader(self.socket)
        setup = messages.Setup("w", "cpu", 1, [], None, [], 1 << 20)
        shelf = Shelf(self._engine, {}, None, True)
        self._worker = Worker(self._theirs, FrameReader(self._theirs), self._engine, shelf, setup)
        self._thread = threading.Thread(target=self._worker.serve)

    def post(self, id: int, made: Sequence[Any], deadlines: Sequence[float] | None = None, shadow: int = -1) -> None:
        tensors = [tensor for _, own in made for tensor in own]
        batch = Batch(
            [job for job, _ in made], [len(own) for _, own in made], list(deadlines or [INF] * len(made)), shadow
        )
        lengths = byte_counts(tensors)
        run = messages.Run(id, batch, INF, lengths, None)
        send_frame(self.socket, messages.encode(run), packed(tensors, lengths))

    def cancel(self, id: int, member: int = -1) -> None:
        send_frame(self.socket, messages.encode(messages.Cancel(id, member)))

    def answers(self, count: int) -> dict[int, Any]:
        if self._thread.ident is None:
            self._thread.start()
        found: dict[int, Any] = {}
        while len(found) < count:
            while (frame := self._reader.next()) is None:
                assert self._reader.receive()
            message: Any = messages.decode_to_front(frame.message)
            found[message.id] = (message, frame.tail)
        return found

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)
        if self._thread.ident is None:
            self._thread.start()
        self._thread.join(20)
        self.socket.close()
        self._theirs.close()


@pytest.fixture
def front() -> Iterator[Front]:
    found = Front()
    yield found
    found.close()


def vjp(*values: float, **more: Any) -> Any:
    x = torch.tensor(values, dtype=torch.float64)
    return jobs.make_job("vjp", "f", {"x": x}, wrt=["x"], **({"cotangents": {"output": torch.ones_like(x)}} | more))


def unpacked(message: Any, tail: bytearray) -> list[Any]:
    """The members' gradients, by their own indices into their own payloads."""
    assert isinstance(message.outcome, BatchOutcome)
    offsets, _ = place(message.lengths)
    payloads = [bytes(tail[o : o + n]) for o, n in zip(offsets, message.lengths, strict=True)]
    found: list[Any] = []
    for member in message.outcome.members:
        if isinstance(member, Answered):
            own, payloads = payloads[: member.count], payloads[member.count :]
            (grad,) = member.outcome.gradients
            found.append(torch.frombuffer(bytearray(own[grad.value.payload]), dtype=torch.float64).tolist())
        else:
            found.append(member)
    assert not payloads
    return found


def test_answers(front: Front) -> None:
    front.post(1, [vjp(1, 2), vjp(3), vjp(1, 1, 2)], shadow=1)
    message, tail = front.answers(1)[1]
    assert unpacked(message, tail) == [[3, 12], [27], [3, 3, 12]]
    outcome = message.outcome
    assert outcome.merged == 3 and not outcome.refused and outcome.splits == 0
    assert {"copy_in", "copy_out", "forward", "backward"} <= set(outcome.timings)


def test_faults(front: Front) -> None:
    bad = vjp(3, cotangents={"output": torch.ones(2).double()})
    front.post(1, [vjp(1), bad, vjp(2)])
    front.post(2, [vjp(1), vjp(7), vjp(2)])
    broken = vjp(2)
    broken[0].inputs = [type(broken[0].inputs[0])("x", 9999, (1,), 0)]
    front.post(3, [vjp(1), broken, vjp(2)])
    found = front.answers(3)
    for number, reason in ((1, "BAD_COTANGENT"), (2, "MODEL_ERROR"), (3, "BAD_TENSOR")):
        first, fault, last = unpacked(*found[number])
        assert (first, last) == ([3], [12])
        assert isinstance(fault, FaultRecord) and fault.reason == reason
        assert ("not seven" in fault.traceback) == (reason == "MODEL_ERROR")


def test_who_is_passed_over(front: Front) -> None:
    past = time.monotonic() - 1
    front.post(1, [vjp(1), vjp(2), vjp(3)], [INF, past, INF])
    front.post(2, [vjp(1), vjp(2), vjp(3)], shadow=2)
    front.cancel(2, 0)
    front.cancel(2, 2)
    front.post(3, [vjp(1), vjp(2)])
    front.cancel(3, 0)
    front.cancel(3, 1)
    front.post(4, [vjp(1), vjp(2)], [past, past])
    front.post(5, [vjp(1), vjp(2)])
    front.cancel(5)
    front.post(6, [vjp(1), vjp(2)], [past, INF])
    front.cancel(6, 1)
    found = front.answers(6)
    assert unpacked(*found[1]) == [[3], Skip(), [27]] and found[1][0].outcome.merged == 2
    assert unpacked(*found[2]) == [Skip(), [12], Skip()] and found[2][0].outcome.merged == 0
    assert all(isinstance(found[number][0], messages.Skipped) for number in (3, 4, 5, 6))


def python(text: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=HERE,
        env={"PYTHONPATH": str(HERE), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA is Linux's")
def test_limited_memory() -> None:
    """What does not fit is split until it does, or refused; and the process lives on."""
    out = python(
        """
        import torch
        import engine_jobs as jobs
        from pullback_server import spec
        from pullback_server.engine import batches
        from pullback_server.engine.boot import limit_memory
        from pullback_server.faults import Fault
        from pullback_server.hosting.options import Batching, Options
        from pullback_server.job import Batch

        torch.set_num_threads(1)
        # Most members may end up alone, and a busy machine takes longer for them than a worker should.
        batches._PATIENCE = 600

        def wide(x):
            for _ in range(4):
                x = (x.repeat(1, 64).sin() ** 2).reshape(x.shape[0], 64, -1).mean(1)
            return x

        host = jobs.host_function(
            wide,
            inputs={"x": spec("float64", ["n", 1024])},
            batch_axis=0,
            options=Options(batching=Batching(max_rows=64)),
        )
        limit_memory(torch.device("cpu"), 128 << 20)

        def made(rows, **more):
            x = torch.ones(rows, 1024).double()
            return jobs.make_job("vjp", "f", {"x": x}, wrt=["x"], cotangents={"output": torch.ones_like(x)}, **more)

        # A row takes 8 MiB; so do some of its sines.
        for rows in (1, 64, 1):
            found = host.engine.run(*made(rows))
            print(rows, found.outcome.splits > 0, found.tensors[0].shape[0])
        try:
            host.engine.run(*made(64, seed=1))
        except Fault as fault:
            print(fault.reason.value)
        members = [made(8) for _ in range(8)]
        batch = Batch([job for job, _ in members], [2] * 8, [0.0] * 8)
        found = host.engine.run_batch(batch, [tensors for _, tensors in members])
        print([type(member).__name__ for member in found.members], found.splits > 0, repr(found.refused))
        print(host.engine.run(*made(1)).outcome.splits)
        """
    )
    lines = out.splitlines()
    assert lines[:4] == ["1 False 1", "64 True 64", "1 False 1", "OUT_OF_MEMORY"], out
    assert lines[4] == f"{['EngineResult'] * 8} True ''" and lines[5] == "0", out


@pytest.mark.parametrize("what", ["well", "one fault", "all alone"])
def test_nothing_looks_at_the_members_bytes_afterwards(what: str) -> None:
    """Or their segment could never be used again. Without the garbage collector, which costs milliseconds."""
    host = jobs.host_function(cubed, inputs={"x": spec("float64", ["n"])}, batch_axis=0)
    made = [vjp(1, 2), vjp(7.0 if what == "all alone" else 3.0), vjp(4)]
    if what == "one fault":
        made[1] = vjp(3, cotangents={"output": torch.ones(2).double()})
    tensors = [tensor for _, own in made for tensor in own]
    lengths = byte_counts(tensors)
    memory = memoryview(bytearray(b"".join(packed(tensors, lengths))))
    batch = Batch([job for job, _ in made], [len(own) for _, own in made], [INF] * 3)
    watch = Watch()
    gc.collect()
    gc.disable()
    try:
        answer = Batches(host.engine, torch.device("cpu")).run(batch, pieces(memory, lengths), watch, set())
        assert len(watch._views) == 6 and all(view() is None for view in watch._views)
    finally:
        gc.enable()
    assert answer.outcome.merged == (0 if what == "all alone" else 3)
