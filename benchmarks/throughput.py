"""Many callers with one row each: what merging them gains, against the floor of gRPC and of the computation itself.

VJPs with respect to the input, requests made beforehand, sent by callers in a process of their own that each wait for
an answer before they send the next. Contestants are a bare echo of as many bytes, the server, and the same server with
--no-batching; they take turns within a round, with the same VJP in process, on one thread as the worker has it. Ratios
are taken within a round, figures are medians of rounds. Run: python benchmarks/throughput.py
"""

import argparse
import platform
import re
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median

import grpc
import numpy as np
import psutil
import torch
from load import Called, Calls, Computed, Helper, Local, registered
from serving import HERE, Running, child_process, pullback_server

import pullback as pb
from pullback_wire import GRADIENT_METHODS, TensorReader, TensorWriter, decode, encode_message
from pullback_wire.v1 import gradient_service_pb2 as messages
from pullback_wire.v1.function_pb2 import Function

VJP = GRADIENT_METHODS["ComputeVjp"].path
MODELS = ("mlp", "encoder", "convnet")
CALLERS = (1, 4, 16, 64)
#: Rows of the local batch, and unique requests.
ROWS = 64
ECHO, MERGED, ALONE = "bare echo", "Pullback", "Pullback, --no-batching"
#: Seconds of a local measurement.
_LOCAL = 1.0


@dataclass(frozen=True)
class Case:
    """One model: requests of one row each, and what torch says that their answers hold.

    expected: outputs and gradients, computed in one and row by row. They differ beyond rounding where a ReLU's argument
    is zero but for rounding, so either is right.
    """

    model: str
    requests: list[bytes]
    expected: list[tuple[np.ndarray, np.ndarray]]


def case_of(name: str) -> Case:
    factory, shape = registered(name)
    torch.manual_seed(1)
    x = torch.randn([ROWS if isinstance(extent, str) else extent for extent in shape])
    module = factory()
    v = torch.randn_like(module(x))

    def vjp(rows: torch.Tensor, cotangent: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        leaf = rows.clone().requires_grad_()
        output = module(leaf)
        (gradient,) = torch.autograd.grad(output, leaf, cotangent)
        return output.detach().numpy(), gradient.numpy()

    alone = [vjp(x[row : row + 1], v[row : row + 1]) for row in range(ROWS)]
    expected = [vjp(x, v), (np.concatenate([y for y, _ in alone]), np.concatenate([g for _, g in alone]))]
    requests = []
    for row in range(ROWS):
        writer = TensorWriter()
        message = messages.ComputeVjpRequest(
            function=Function(model=name),
            inputs=[writer.add("input", x[row : row + 1].numpy())],
            cotangents=[writer.add("output", v[row : row + 1].numpy())],
            wrt=["input"],
        )
        requests.append(encode_message(message, writer.payloads))
    return Case(name, requests, expected)


def check(case: Case, target: str) -> int:
    """Makes all calls at once and compares each answer with torch. Returns the bytes of an answer."""
    with grpc.insecure_channel(target) as channel:
        call = channel.unary_unary(VJP)
        answers = [pending.result() for pending in [call.future(request) for request in case.requests]]
    for row, data in enumerate(answers):
        message, payloads = decode(messages.ComputeVjpResponse, data)
        reader = TensorReader(payloads)
        found = reader.array(message.outputs[0], "outputs[0]"), reader.array(message.gradients[0].value, "gradients[0]")
        for index, what in enumerate(("output", "gradient")):
            # Sums over a row are taken in another order in a batch.
            if not any(np.allclose(found[index], one[index][row : row + 1], 1e-4, 1e-5) for one in case.expected):
                raise SystemExit(f"{case.model}: the {what} of request {row} is wrong")
    return len(answers[0])


@dataclass
class Seen:
    """What one contestant did in the rounds, with some number of callers. cpu: seconds per call, of its processes."""

    rates: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p95: list[float] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    cpu: dict[str, list[float]] = field(default_factory=dict)


def busy(process: psutil.Process) -> float:
    """Seconds of processor that a process has taken."""
    times = process.cpu_times()
    return float(times.user + times.system)


def batch_rows(metrics: str, model: str) -> tuple[float, float]:
    """Rows and number of the merged computations so far."""
    with urllib.request.urlopen(metrics, timeout=10) as answer:
        text = answer.read().decode()
    found = dict(re.findall(rf'^pullback_batch_rows_(sum|count){{model="{model}"}} (\S+)$', text, re.MULTILINE))
    return float(found.get("sum", 0)), float(found.get("count", 0))


@dataclass
class Contestant:
    """Who answers calls: where, and the processes that work for that."""

    target: str
    path: str
    processes: dict[str, psutil.Process]
    metrics: str | None = None

    def measure(self, helper: Helper, case: Case, callers: int, seconds: float, seen: Seen) -> None:
        """Adds a round's figures. Raises SystemExit when a call fails."""
        before = {name: busy(process) for name, process in self.processes.items()}
        rows, computed = batch_rows(self.metrics, case.model) if self.metrics else (0.0, 0.0)
        called = helper.call(Calls(self.target, self.path, case.requests, callers, seconds / 5, seconds))
        if called.failed:
            raise SystemExit(f"{case.model}, {callers} callers: calls failed: {called.failed}")
        if self.metrics:
            after = batch_rows(self.metrics, case.model)
            seen.rows.append((after[0] - rows) / (after[1] - computed) if after[1] > computed else 1.0)
        self._note(called, before, seen)

    def _note(self, called: Called, before: dict[str, float], seen: Seen) -> None:
        seen.rates.append(called.rate)
        seen.p50.append(called.quantile(0.5))
        seen.p95.append(called.quantile(0.95))
        seen.cpu.setdefault("callers", []).append(called.cpu / called.count)
        for name, process in self.processes.items():
            seen.cpu.setdefault(name, []).append((busy(process) - before[name]) / called.count)


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return median(a / b for a, b in zip(above, below, strict=True))


def measure(
    case: Case,
    contestants: dict[str, Contestant],
    callers: Callable[[], Helper],
    local: Helper,
    rounds: int,
    span: float,
) -> None:
    """Measures one model and prints what it came to."""
    seen = {(name, count): Seen() for count in CALLERS for name in contestants}
    own: dict[int, list[Computed]] = {1: [], ROWS: []}
    with callers() as helper:
        for _ in range(rounds):
            for rows, found in own.items():
                found.append(local.compute(Local(case.model, rows, _LOCAL)))
            for count in CALLERS:
                # Where it matters most, longest.
                seconds = span if count == CALLERS[-1] else span / 3
                for name, contestant in contestants.items():
                    contestant.measure(helper, case, count, seconds, seen[name, count])
    report(case, seen, own)


def report(case: Case, seen: dict[tuple[str, int], Seen], computed: dict[int, list[Computed]]) -> None:
    own = {rows: [one.rate for one in found] for rows, found in computed.items()}
    gain = ratio(own[ROWS], own[1])
    print(f"  in process, rows/s: batch {ROWS} {median(own[ROWS]):.0f}, batch 1 {median(own[1]):.0f}: gain {gain:.1f}")
    print(
        f"  {'callers':>7}  {'':<24} {'calls/s':>8} {'x echo':>7} {'p50 ms':>7} {'p95 ms':>7} {'rows':>5}"
        "   CPU per call, µs"
    )
    for (name, count), one in seen.items():
        cpu = ", ".join(f"{who} {median(values) * 1e6:.0f}" for who, values in one.cpu.items())
        rows = f"{median(one.rows):5.1f}" if one.rows else " " * 5
        print(
            f"  {count:>7}  {name:<24} {median(one.rates):8.0f} {ratio(one.rates, seen[ECHO, count].rates):7.2f} "
            f"{median(one.p50) * 1e3:7.2f} {median(one.p95) * 1e3:7.2f} {rows}   {cpu}"
        )
    most = CALLERS[-1]
    merged, alone, echo = (seen[name, most].rates for name in (MERGED, ALONE, ECHO))
    ceiling = [min(pair) for pair in zip(own[ROWS], echo, strict=True)]
    limit = "the computation" if median(own[ROWS]) < median(echo) else "the echo"
    gained = ratio(merged, alone)
    print(
        f"  {most} callers: Pullback / min(local batch {ROWS}, echo)  {ratio(merged, ceiling):.2f}   ({limit} is less)"
    )
    print(f"  {most} callers: gain of merging {gained:.2f}, / gain in process  {gained / gain:.2f}")
    for name in (ECHO, MERGED, ALONE):
        one = seen[name, most]
        busy_of = ", ".join(
            f"{who} {median(a * b for a, b in zip(values, one.rates, strict=True)):.0%}"
            for who, values in one.cpu.items()
        )
        print(f"  {most} callers, {name}: of one processor take {busy_of}")
    # Where others use the processors too, rates say little; this still does.
    spent = {
        name: [sum(parts) for parts in zip(*seen[name, most].cpu.values(), strict=True)] for name in (MERGED, ECHO)
    }
    floor = [echo + one.cpu for echo, one in zip(spent[ECHO], computed[ROWS], strict=True)]
    print(
        f"  {most} callers: CPU per call, callers included: {median(spent[MERGED]) * 1e6:.0f} µs, "
        f"echo and local batch {ROWS} {median(floor) * 1e6:.0f} µs: floor / Pullback  {ratio(floor, spent[MERGED]):.2f}"
    )


def worker_of(server: Running) -> dict[str, psutil.Process]:
    front = psutil.Process(server.process.pid)
    (worker,) = front.children()
    return {"front": front, "worker": worker}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.5, help=f"of a measurement with {CALLERS[-1]} callers")
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} processors, 1 torch thread, "
        f"Python {platform.python_version()}, torch {torch.__version__}, grpcio {grpc.__version__}"
    )
    hosted = (str(HERE / "models.py"), "--threads", "1", "--devices", "cpu:1")
    began = time.monotonic()
    with ExitStack() as stack:
        on = stack.enter_context(pullback_server(*hosted))
        off = stack.enter_context(pullback_server(*hosted, "--no-batching"))
        echo = stack.enter_context(child_process("echo_server.py"))
        local = stack.enter_context(Helper("local"))
        for name in arguments.models:
            case = case_of(name)
            length = check(case, on.target)
            check(case, off.target)
            rows, computed = batch_rows(on.metrics, name)
            with pb.connect(on.target) as client:
                most = client.model(name).info.max_batch_rows
            print(
                f"\n{name}: {registered(name)[0].__doc__} {len(case.requests[0])} bytes there, {length} back. "
                f"{ROWS} unique calls at once are right ({rows:.0f} rows in {computed:.0f} merged computations). "
                f"At most {most} rows are merged"
            )
            contestants = {
                ECHO: Contestant(echo.target, f"/echo/{length}", {"echo": psutil.Process(echo.process.pid)}),
                MERGED: Contestant(on.target, VJP, worker_of(on), on.metrics),
                ALONE: Contestant(off.target, VJP, worker_of(off), off.metrics),
            }
            measure(case, contestants, lambda: Helper("calls"), local, arguments.rounds, arguments.seconds)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
