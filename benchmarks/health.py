"""What looking at the health of gradients costs, and what counting costs.

Three servers, alike but for that: the usual one, one with --no-gradient-health, and one whose metrics count nothing
besides (silent_server.py). They take turns in short slices, in an order drawn anew in each round, so that whatever else
the machine does meets all of them. Told are ratios within a round, of wall time per call and of the servers' processor
time per call, which a busy machine disturbs less: their median, and an interval that holds the median of 95 in 100 such
runs (bootstrap). Run: python benchmarks/health.py
"""

import argparse
import platform
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median

import grpc
import numpy as np
import psutil
import torch
from load import Calls, Helper, registered
from serving import HERE, Running, pullback_server
from throughput import VJP, busy, case_of

from pullback_wire import TensorWriter, encode_message
from pullback_wire.v1 import gradient_service_pb2 as messages
from pullback_wire.v1.function_pb2 import Function

ON, OFF, SILENT = "as it is", "no health", "no health, no counting"
SERVERS = (ON, OFF, SILENT)
#: Seconds of a slice, and before it.
SLICE, WARM_UP = 0.6, 0.1


@dataclass
class Seen:
    """Of one server, by round: seconds per call, and seconds of processor per call."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def request_of(name: str, rows: int, wrt: Sequence[str]) -> bytes:
    """A VJP of `rows` rows."""
    factory, shape = registered(name)
    torch.manual_seed(1)
    x = torch.randn([rows if isinstance(extent, str) else extent for extent in shape])
    v = torch.randn_like(factory()(x))
    writer = TensorWriter()
    message = messages.ComputeVjpRequest(
        function=Function(model=name),
        inputs=[writer.add("input", x.numpy())],
        cotangents=[writer.add("output", v.numpy())],
        wrt=wrt,
    )
    return encode_message(message, writer.payloads)


def spent(server: Running) -> float:
    """Seconds of processor that a server has taken, workers and all."""
    process = psutil.Process(server.process.pid)
    return sum(busy(one) for one in [process, *process.children(recursive=True)])


def one_caller(server: Running, request: bytes) -> tuple[float, float]:
    """Median seconds of a call, and mean seconds of processor."""
    with grpc.insecure_channel(server.target) as channel:
        call = channel.unary_unary(VJP)
        call(request)
        until = time.perf_counter() + WARM_UP
        while time.perf_counter() < until:
            call(request)
        taken = []
        before, until = spent(server), time.perf_counter() + SLICE
        while (began := time.perf_counter()) < until:
            call(request)
            taken.append(time.perf_counter() - began)
        return median(taken), (spent(server) - before) / len(taken)


def many_callers(server: Running, requests: list[bytes], callers: int, helper: Helper) -> tuple[float, float]:
    """Seconds of wall time and of processor per call, of callers that each wait for an answer."""
    before = spent(server)
    called = helper.call(Calls(server.target, VJP, requests, callers, WARM_UP, SLICE))
    if called.failed:
        raise SystemExit(f"calls failed: {called.failed}")
    return 1 / called.rate, (spent(server) - before) / called.count


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the bounds of its 95 % interval."""
    generator = np.random.default_rng(0)
    drawn = np.median(generator.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return median(ratios), float(low), float(high)


def compare(
    title: str, servers: dict[str, Running], work: Callable[[Running], tuple[float, float]], rounds: int
) -> None:
    seen = {name: Seen() for name in servers}
    for server in servers.values():
        work(server)
    for _ in range(rounds):
        for name in random.sample(SERVERS, len(SERVERS)):
            wall, cpu = work(servers[name])
            seen[name].wall.append(wall)
            seen[name].cpu.append(cpu)
    print(f"\n{title}")
    for name, one in seen.items():
        print(f"  {name:<24} {median(one.wall) * 1e3:8.3f} ms   processor {median(one.cpu) * 1e3:8.3f} ms per call")
    for what, with_it, without in (("gradient health", ON, OFF), ("counting", OFF, SILENT), ("both", ON, SILENT)):
        told = []
        for kind in ("wall", "cpu"):
            pairs = zip(getattr(seen[with_it], kind), getattr(seen[without], kind), strict=True)
            middle, low, high = interval([one / other for one, other in pairs])
            told.append(f"{kind} {middle:.3f} x ({low:.3f} to {high:.3f})")
        print(f"  {what:<24} {',   '.join(told)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--callers", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--models", nargs="*", default=["mlp", "convnet", "encoder"])
    arguments = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{arguments.rounds} rounds of slices of {SLICE} s; ratios: with it to without it, 95 % interval"
    )
    models = (str(HERE / "models.py"), "--threads", "1")
    silent = (str(HERE / "silent_server.py"),)
    with ExitStack() as stack:
        servers = {
            ON: stack.enter_context(pullback_server(*models)),
            OFF: stack.enter_context(pullback_server(*models, "--no-gradient-health")),
            SILENT: stack.enter_context(pullback_server(*models, "--no-gradient-health", program=silent)),
        }
        helper = stack.enter_context(Helper("calls"))
        for name in arguments.models:
            for title, wrt in (("the input", ["input"]), ("all parameters", [])):
                request = request_of(
                    name, 32, wrt or [f"param:{key}" for key, _ in registered(name)[0]().named_parameters()]
                )
                compare(
                    f"{name}: one caller, VJP of 32 rows with respect to {title}",
                    servers,
                    lambda server, request=request: one_caller(server, request),
                    arguments.rounds,
                )
            requests = case_of(name).requests
            for callers in arguments.callers:
                compare(
                    f"{name}: {callers} callers of one row",
                    servers,
                    lambda server, requests=requests, n=callers: many_callers(server, requests, n, helper),
                    arguments.rounds,
                )


if __name__ == "__main__":
    main()
