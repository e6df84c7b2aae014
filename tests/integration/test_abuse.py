"""Callers who take their time, come in crowds, never listen or never stay: bounded, refused, and no harm to others."""

from __future__ import annotations

import contextlib
import queue
import random
import re
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from tests.conftest import ZOO
from tests.fuzz import garbage
from tests.fuzz.house import House
from tests.fuzz.recording import SESSION
from tests.serving import Served
from tests.session_wire import Wire

from pullback_server import Server, model
from pullback_server.rpc import session as sessions
from pullback_wire import GRADIENT_METHODS, Reason, TensorWriter, encode, encode_message
from pullback_wire.v1 import gradient_service_pb2 as pb
from pullback_wire.v1 import session_service_pb2

MIB = 1 << 20
VJP = GRADIENT_METHODS["ComputeVjp"].path


@model("cube")
def cube(x):  # type: ignore[no-untyped-def]
    """x cubed."""
    return x**3


@model("slow")
def slow(x):  # type: ignore[no-untyped-def]
    """Takes a twentieth of a second."""
    import time as clock

    clock.sleep(0.05)
    return x * 2


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("served"), str(ZOO), "--devices", "cpu", "--session-bytes", str(64 * MIB))
    yield served
    served.process.terminate()
    served.process.wait(60)


@pytest.fixture(scope="module")
def house(served: Served) -> House:
    return House(served.process.pid, served.target, served.http, served.log)


@pytest.fixture(scope="module")
def impatient() -> Iterator[Server]:
    """A server that waits for nobody longer than a second or two."""
    with Server(
        cube, slow, devices="cpu", threads=1, session_idle_seconds=2.0, session_heartbeat_seconds=1.5
    ) as server:
        yield server


def reason_of(error: grpc.RpcError) -> Reason | None:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            info = error_details_pb2.ErrorInfo()
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Unpack(info):
                    return Reason(info.reason)
    return None


def vjp_request(name: str = "cube", size: int = 3) -> bytes:
    writer = TensorWriter()
    x = np.ones(size)
    request = pb.ComputeVjpRequest(
        function={"model": name}, inputs=[writer.add("x", x)], cotangents=[writer.add("output", x)]
    )
    return encode_message(request, writer.payloads)


def answered_by(served: Served) -> int:
    """VJPs of "cube" that the server says it answered."""
    found = re.search(
        r'^pullback_requests_total\{code="OK",method="ComputeVjp",model="cube"\} (\S+)', served.get("/metrics"), re.M
    )
    return int(float(found[1])) if found else 0


def port_of(target: str) -> int:
    return int(target.rpartition(":")[2])


@contextlib.contextmanager
def connected(port: int, count: int) -> Iterator[list[socket.socket]]:
    held: list[socket.socket] = []
    try:
        for _ in range(count):
            held.append(socket.create_connection(("127.0.0.1", port), timeout=30))  # noqa: PERF401 - must be closed
        yield held
    finally:
        for one in held:
            one.close()


# Streams that take their time.


def test_a_session_that_never_opens_is_ended(impatient: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_OPENING", 1.0)
    out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with grpc.insecure_channel(impatient.target) as channel:
        call = channel.stream_stream(SESSION)(iter(out.get, None), timeout=60)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        out.put(None)
    assert reason_of(caught.value) is Reason.DEADLINE_EXCEEDED


@pytest.mark.parametrize("credit", [0, 1 << 20], ids=["whole", "in chunks"])
@pytest.mark.parametrize("beating", [True, False], ids=["with heartbeats", "silent"])
def test_a_session_that_never_reads_is_ended(impatient: Server, credit: int, beating: bool) -> None:
    """It holds results in the worker, and whoever writes to it waits: heartbeats do not excuse that."""
    done = threading.Event()
    frames = [
        session_service_pb2.SessionRequest(op=1, open=session_service_pb2.OpenSession(credit_bytes=credit)),
    ]
    payload = bytes(8 * MIB)

    def sending() -> Iterator[bytes]:
        yield frames[0].SerializeToString()
        tensor = session_service_pb2.PutOp(handles=[1])
        tensor.tensors.add(dtype=13, shape=[MIB])
        yield encode(session_service_pb2.SessionRequest(op=2, put=tensor).SerializeToString(), [payload])
        for op in range(3, 23):
            yield session_service_pb2.SessionRequest(
                op=op, get=session_service_pb2.GetOp(handles=[1])
            ).SerializeToString()
        while not done.wait(0.3):
            if beating:
                beat = session_service_pb2.SessionRequest(heartbeat=session_service_pb2.Heartbeat())
                yield beat.SerializeToString()

    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(impatient.target, options=options) as channel:
        call = channel.stream_stream(SESSION)(sending(), timeout=90)
        house = gauges(impatient)
        try:
            until = time.monotonic() + 60
            while not house()["sessions"]:
                assert time.monotonic() < until
                time.sleep(0.02)
            while house()["sessions"]:
                assert time.monotonic() < until, "the session goes on"
                time.sleep(0.1)
            assert house()["session_retained_bytes"] == 0
        finally:
            done.set()
            call.cancel()


def gauges(server: Server) -> Any:
    """Reads the metrics of an embedded server."""
    import urllib.request

    def read() -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        found = dict.fromkeys(("sessions", "session_retained_bytes", "requests_in_flight"), 0.0)
        for line in lines:
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0].removeprefix("pullback_")
            if name in found:
                found[name] += float(value)
        return found

    return read


def test_bodies_that_trickle_hold_nobody_up(served: Served, house: House) -> None:
    """A hundred calls of which a byte comes now and then; they end when their connections do."""
    port = port_of(served.target)
    call = (
        garbage._HELLO + garbage.frame(1, 4, 1, garbage.request(VJP)) + garbage.frame(0, 0, 1, b"\x00\x10\x00\x00\x00")
    )
    with connected(port, 100) as peers:
        for one in peers:
            one.sendall(call)
        for _ in range(5):
            for one in peers:
                one.sendall(garbage.frame(0, 0, 1, b"x"))
            house.answers()
    assert not house.settled()


def test_connections_that_never_say_what_they_want_are_not_in_the_way(served: Served, house: House) -> None:
    port = port_of(served.target)
    with connected(port, 200) as peers:
        for index, one in enumerate(peers):
            one.sendall(garbage._HELLO[: index % 24])
        house.answers()
        before = house.holds()["descriptors"]
    until = time.monotonic() + 30
    while house.holds()["descriptors"] > before - 150:
        assert time.monotonic() < until, "connections that were closed are held on to"
        time.sleep(0.1)
    house.answers()


# Crowds.


def idle_connections(served: Served, house: House, count: int, tell: bool = False) -> float:
    """Bytes of the front that one connection takes which has got through HTTP/2's preface and is then idle."""
    house.answers()
    before = house.holds()
    with connected(port_of(served.target), count) as peers:
        for one in peers:
            one.sendall(garbage._HELLO)
        for one in peers:
            # The server's settings: it has accepted.
            assert one.recv(9)
        house.answers()
        after = house.holds()
        assert after["descriptors"] - before["descriptors"] >= count
        assert after["threads"] - before["threads"] < 50
    until = time.monotonic() + 60
    while house.holds()["descriptors"] > before["descriptors"] + 20:
        assert time.monotonic() < until, "connections that were closed are held on to"
        time.sleep(0.1)
    house.answers()
    each = (after["front"] - before["front"]) / count
    if tell:
        print(f"\n{count} idle connections: {each / 1024:.1f} KiB each")
    return each


def test_hundreds_of_idle_connections(served: Served, house: House) -> None:
    assert idle_connections(served, house, 500) < 256 << 10


@pytest.mark.slow
def test_ten_thousand_idle_connections(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 10_500:
        pytest.skip(f"the limit of open files is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        served = Served(tmp_path, str(ZOO), "--devices", "cpu")
        try:
            house = House(served.process.pid, served.target, served.http, served.log)
            assert idle_connections(served, house, 10_000, tell=True) < 128 << 10
        finally:
            served.process.terminate()
            served.process.wait(60)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_over_the_limit_are_closed(tmp_path: Path) -> None:
    served = Served(tmp_path, str(ZOO), "--devices", "cpu", "--max-connections", "20")
    try:
        with connected(port_of(served.target), 60) as peers:
            refused = 0
            for one in peers:
                one.settimeout(5)
                with contextlib.suppress(OSError):
                    one.sendall(garbage._HELLO)
                try:
                    refused += not one.recv(9)
                except OSError:
                    refused += 1
            assert 40 <= refused < 60
        # When they have gone there is room again.
        House(served.process.pid, served.target, served.http, served.log).answers()
    finally:
        served.process.terminate()
        served.process.wait(60)


def test_very_many_calls_on_one_connection(served: Served, house: House) -> None:
    """More than it may have at once: the others are refused, or wait their turn at the client."""
    request = vjp_request()
    before = answered_by(served)
    with grpc.insecure_channel(served.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.unary_unary(VJP)
        futures = [call.future(request, timeout=60) for _ in range(3000)]
        answered = 0
        for future in futures:
            answered += future.code() is grpc.StatusCode.OK
            if future.code() is grpc.StatusCode.UNAVAILABLE:
                # Sent before the server's settings had come; REFUSED_STREAM says that nothing was done for it.
                assert "RST_STREAM with error code 7" in future.details()
            elif future.code() is grpc.StatusCode.CANCELLED:
                # gRPC had taken it in and gave it up before it reached the application.
                assert reason_of(future) is None
            elif future.code() is not grpc.StatusCode.OK:
                assert reason_of(future) is Reason.OVERLOADED
    assert answered > 500
    # Whatever the transport refused was not computed.
    assert answered_by(served) - before == answered
    house.answers()
    assert not house.settled()


def test_streams_opened_and_left_alone(served: Served, house: House) -> None:
    port = port_of(served.target)
    headers = garbage.request(SESSION)
    with connected(port, 3) as peers:
        for one in peers:
            one.sendall(garbage._HELLO + b"".join(garbage.frame(1, 4, 2 * n + 1, headers) for n in range(300)))
        house.answers()
    assert not house.settled()


def test_metadata_that_is_too_large_is_refused(served: Served, house: House) -> None:
    before = house.holds()["front"]
    with grpc.insecure_channel(served.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        for _ in range(50):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(VJP)(vjp_request(), metadata=[("filler", "x" * (64 << 10))], timeout=30)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        # The connection goes on.
        channel.unary_unary(VJP)(vjp_request(), metadata=[("filler", "x" * 4000)], timeout=30)
    assert house.holds()["front"] - before < 32 * MIB
    house.answers()


# Floods, and callers that leave.


def test_a_session_that_floods_is_refused_op_by_op(served: Served, house: House) -> None:
    with Wire(served.target, "cube") as wire:
        _, handle = wire.put(np.ones(100_000))
        ops = [wire.send(session_service_pb2.SessionRequest(get={"handles": [handle]})) for _ in range(20_000)]
        house.answers()
        told = {0: 0, int(Reason.OVERLOADED.code): 0}
        for data in wire.call:
            frame = session_service_pb2.SessionResponse.FromString(data)
            if frame.op:
                told[frame.status.code] += 1
            if frame.op == ops[-1]:
                break
    assert sum(told.values()) == len(ops) + 1
    assert told[0] > 64, told
    assert not house.settled()


def test_callers_that_send_and_leave_leave_nothing(served: Served, house: House) -> None:
    rng = random.Random(0)
    request = vjp_request(size=50_000)
    with grpc.insecure_channel(served.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.unary_unary(VJP)
        for _ in range(500):
            future = call.future(request, timeout=30)
            if rng.random() < 0.5:
                time.sleep(rng.uniform(0, 0.003))
            future.cancel()
        for _ in range(100):
            out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
            stream: Any = channel.stream_stream(SESSION)(iter(out.get, None))
            out.put(session_service_pb2.SessionRequest(op=1, open={}).SerializeToString())
            if rng.random() < 0.5:
                next(stream)
            stream.cancel()
            out.put(None)
    assert not house.settled()
    house.answers()
    assert not house.complaints()


# The HTTP port.


def test_http_clients_who_take_their_time_do_not_hold_up_a_probe(served: Served, house: House) -> None:
    port = port_of(served.http)
    with connected(port, 300) as peers:
        for index, one in enumerate(peers):
            with contextlib.suppress(OSError):
                one.sendall(b"GET /metrics HTTP/1.1\r\nHost"[: index % 30])
        for _ in range(5):
            assert served.get("/livez") == "ok\n"
            assert "pullback_requests_in_flight" in served.get("/metrics")
        assert house.holds()["threads"] < 150
    house.answers()


def test_http_clients_who_do_not_read(served: Served, house: House) -> None:
    port = port_of(served.http)
    with contextlib.ExitStack() as held:
        for _ in range(100):
            peer = held.enter_context(socket.socket())
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.connect(("127.0.0.1", port))
            peer.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert served.get("/livez") == "ok\n"
    assert not house.complaints()
