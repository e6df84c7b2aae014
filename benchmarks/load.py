"""Processes that a benchmark has work for it: one that makes calls, one that computes locally.

Each is a process of its own, so that the benchmark's does not count; work and results are pickled through its standard
input and output.
"""

import asyncio
import importlib
import pickle
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from pullback_wire.malloc import pin_malloc

#: Connections at most; more callers share them.
CONNECTIONS = 8


@dataclass(frozen=True)
class Calls:
    """Callers that each wait for the answer to a call before they make the next.

    requests: of the first caller, the second, ...; begun anew where there are more callers.
    warm_up: seconds before those that are measured.
    """

    target: str
    path: str
    requests: list[bytes]
    callers: int
    warm_up: float
    seconds: float


@dataclass(frozen=True)
class Called:
    """What calls came to.

    rate: answered per second. latencies: seconds, sorted; both while measured.
    count: answered in all, the warm-up's and the last ones too. cpu: seconds that the callers took for these.
    failed: what calls failed with, by how many; those are not counted elsewhere.
    """

    rate: float
    latencies: list[float]
    count: int
    cpu: float
    failed: dict[str, int]

    def quantile(self, share: float) -> float:
        """The latency that this share of calls did not exceed."""
        return self.latencies[min(int(len(self.latencies) * share), len(self.latencies) - 1)] if self.latencies else 0.0


@dataclass(frozen=True)
class Local:
    """VJPs with respect to the input of a model, one after the other.

    module: which registers the model under `model`; its first input's first extent is the rows.
    copies: whether inputs come from the host's memory, and outputs and gradients go there, each time.
    """

    model: str
    rows: int
    seconds: float
    module: str = "models"
    device: str = "cpu"
    copies: bool = False


@dataclass(frozen=True)
class Computed:
    """What local VJPs came to. rate: rows per second; cpu: seconds of processor per row."""

    rate: float
    cpu: float


class Helper:
    """A process that does the work it is given, one at a time; ends with this one. role: "calls" or "local"."""

    def __init__(self, role: str) -> None:
        self._process = subprocess.Popen(
            # What is pickled must be found in a module of the same name on both sides.
            [sys.executable, "-c", "import load; load.main()", role],
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> "Helper":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def call(self, work: Calls) -> Called:
        """Makes calls."""
        found = self._do(work)
        assert isinstance(found, Called)
        return found

    def compute(self, work: Local) -> Computed:
        """Computes locally."""
        found = self._do(work)
        assert isinstance(found, Computed)
        return found

    def _do(self, work: object) -> object:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump(work, self._process.stdin)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)


async def _calls(work: Calls) -> Called:
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
    ]
    channels = [grpc.aio.insecure_channel(work.target, options) for _ in range(min(work.callers, CONNECTIONS))]
    latencies: list[float] = []
    failed: dict[str, int] = {}
    count = 0
    cpu = time.process_time()
    begin = time.perf_counter() + work.warm_up
    end = begin + work.seconds

    async def caller(index: int) -> None:
        nonlocal count
        call = channels[index % len(channels)].unary_unary(work.path)
        request = work.requests[index % len(work.requests)]
        now = time.perf_counter()
        while now < end:
            sent = now
            try:
                await call(request)
            except grpc.aio.AioRpcError as error:
                what = f"{error.code().name}: {error.details()}"
                failed[what] = failed.get(what, 0) + 1
                now = time.perf_counter()
                continue
            now = time.perf_counter()
            count += 1
            if begin <= now < end:
                latencies.append(now - sent)

    await asyncio.gather(*(caller(index) for index in range(work.callers)))
    cpu = time.process_time() - cpu
    for channel in channels:
        await channel.close()
    return Called(len(latencies) / work.seconds, sorted(latencies), count, cpu, failed)


def registered(name: str, module: str = "models") -> tuple[Any, tuple[int | str, ...]]:
    """The factory of a model with one input, and that input's shape."""
    from pullback_server.hosting.spec import registrations_of

    for factory in vars(importlib.import_module(module)).values():
        for registration in registrations_of(factory):
            if registration.name == name:
                (record,) = registration.inputs.values()
                assert record.shape is not None
                return factory, record.shape
    raise LookupError(f"{module}.py registers no model {name!r}")


def _local(work: Local) -> Computed:
    import torch

    torch.set_num_threads(1)
    factory, extents = registered(work.model, work.module)
    module = factory().to(work.device)
    shape = [extent if isinstance(extent, int) else work.rows for extent in extents]
    cuda = work.device != "cpu"
    x = torch.randn(shape, pin_memory=cuda)
    there = x.to(work.device).requires_grad_()
    v = torch.randn(module(there).shape, pin_memory=cuda)
    v_there = v.to(work.device)

    def vjp() -> None:
        leaf, cotangent = there, v_there
        if work.copies:
            leaf = x.to(work.device, non_blocking=True).requires_grad_()
            cotangent = v.to(work.device, non_blocking=True)
        output = module(leaf)
        (gradient,) = torch.autograd.grad(output, leaf, cotangent)
        if work.copies:
            gradient.cpu(), output.detach().cpu()
        elif cuda:
            torch.cuda.synchronize()

    until = time.perf_counter() + work.seconds / 4
    while time.perf_counter() < until:
        vjp()
    cpu = time.process_time()
    begin = now = time.perf_counter()
    times = 0
    while now - begin < work.seconds:
        vjp()
        times += 1
        now = time.perf_counter()
    rows = times * work.rows
    return Computed(rows / (now - begin), (time.process_time() - cpu) / rows)


def main() -> None:
    """What a helper does."""
    pin_malloc()
    works: dict[str, Any] = {"calls": lambda work: asyncio.run(_calls(work)), "local": _local}
    work = works[sys.argv[1]]
    while True:
        try:
            given = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(work(given), sys.stdout.buffer)
        sys.stdout.buffer.flush()
