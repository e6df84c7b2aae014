"""Callers in processes of their own: some call whatever becomes of the calls before, some one call at a time."""

import asyncio
import http.client
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import NamedTuple
from urllib.parse import urlsplit

import grpc
import numpy as np

from pullback_wire import CALLER_KEY, GRADIENT_METHODS, TensorWriter, encode_message
from pullback_wire.v1 import gradient_service_pb2 as pb
from pullback_wire.v1.function_pb2 import Function

VJP = GRADIENT_METHODS["ComputeVjp"].path
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]


class Call(NamedTuple):
    """What a call came to. at: when it was made, on the time.monotonic clock. outcome: "OK", or the error's reason."""

    at: float
    seconds: float
    outcome: str


class Probed(NamedTuple):
    """Seconds that each probe took, by what was asked; and by how much the prober itself was late each time."""

    livez: list[float]
    health: list[float]
    late: list[float]


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """As many processes, which run functions of this module."""
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        # They import this first.
        for ready in [pool.submit(time.sleep, 0.2) for _ in range(count)]:
            ready.result()
        yield pool


def vjp_request(model: str, name: str, x: np.ndarray, cotangent: np.ndarray) -> bytes:
    """The bytes of a ComputeVjp."""
    writer = TensorWriter()
    request = pb.ComputeVjpRequest(
        function=Function(model=model), inputs=[writer.add(name, x)], cotangents=[writer.add("output", cotangent)]
    )
    return encode_message(request, writer.payloads)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed; NaN where there is none."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else float("nan")


async def _one(call: Callable[..., Awaitable[bytes]], request: bytes, limit: float, caller: str) -> Call:
    at = time.monotonic()
    outcome = "OK"
    try:
        await call(request, timeout=limit, metadata=((CALLER_KEY, caller),))
    except grpc.aio.AioRpcError as error:
        outcome = _reason(error)
    return Call(at, time.monotonic() - at, outcome)


def _reason(error: grpc.aio.AioRpcError) -> str:
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    for reason in ("OVERLOADED", "DEADLINE_EXCEEDED", "WORKER_LOST", "INTERNAL"):
        if reason.encode() in bytes(details):
            return reason
    return str(error.code().name)


def open_loop(
    target: str, request: bytes, begin: float, seconds: float, rate: float, deadlines: tuple[float, float], caller: str
) -> list[Call]:
    """Calls at random times, whatever becomes of those before, with deadlines between two bounds.

    begin: on the time.monotonic clock. rate: calls per second.
    """

    async def work() -> list[Call]:
        rng = np.random.default_rng(abs(hash(caller)))
        gaps = rng.exponential(1 / rate, int(rate * seconds))
        limits = rng.uniform(*deadlines, len(gaps))
        channels = [grpc.aio.insecure_channel(target, _OPTIONS) for _ in range(4)]
        calls = [channel.unary_unary(VJP) for channel in channels]
        tasks = []
        due = begin
        for index, (gap, limit) in enumerate(zip(gaps, limits, strict=True)):
            due += float(gap)
            if (pause := due - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            tasks.append(asyncio.create_task(_one(calls[index % len(calls)], request, float(limit), caller)))
        found = await asyncio.gather(*tasks)
        for channel in channels:
            await channel.close()
        return found

    return asyncio.run(work())


def closed_loop(
    target: str, request: bytes, begin: float, seconds: float, callers: int, deadline: float, caller: str
) -> list[Call]:
    """Calls of so many that each wait for an answer before they make the next."""

    async def work() -> list[Call]:
        channel = grpc.aio.insecure_channel(target, _OPTIONS)
        call = channel.unary_unary(VJP)
        await asyncio.sleep(max(begin - time.monotonic(), 0))
        found: list[Call] = []

        async def one() -> None:
            while time.monotonic() < begin + seconds:
                found.append(await _one(call, request, deadline, caller))

        await asyncio.gather(*(one() for _ in range(callers)))
        await channel.close()
        return found

    return asyncio.run(work())


def probe(target: str, http_address: str, begin: float, seconds: float, every: float) -> Probed:
    """Asks for /livez and for gRPC's health every so many seconds, each with ten seconds to answer."""
    place = urlsplit(http_address).netloc
    channel = grpc.insecure_channel(target, _OPTIONS)
    health = channel.unary_unary("/grpc.health.v1.Health/Check")
    health(b"", timeout=10)
    found = Probed([], [], [])
    due = begin
    while due < begin + seconds:
        time.sleep(max(due - time.monotonic(), 0))
        found.late.append(time.monotonic() - due)
        began = time.perf_counter()
        connection = http.client.HTTPConnection(place, timeout=10)
        connection.request("GET", "/livez")
        alive = connection.getresponse().status == 200
        connection.close()
        between = time.perf_counter()
        # SERVING
        healthy = health(b"", timeout=10) == b"\x08\x01"
        ended = time.perf_counter()
        found.livez.append(between - began if alive else float("inf"))
        found.health.append(ended - between if healthy else float("inf"))
        due = max(due + every, time.monotonic())
    channel.close()
    return found
