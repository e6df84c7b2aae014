"""SessionService as the contract says it, frame by frame: order, pipelining, failures, budgets, chunks, ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from tests.session_wire import OpFailed, Wire

import pullback as pb_client
from pullback_server import Server, model
from pullback_wire import Reason, TensorWriter
from pullback_wire.v1 import gradient_service_pb2, session_service_pb2

MIB = 1 << 20


@model("cube")
def cube(x):  # type: ignore[no-untyped-def]
    """x cubed."""
    return x**3


@model("slow")
def slow(x):  # type: ignore[no-untyped-def]
    """Takes about a tenth of a second."""
    import time as clock

    clock.sleep(0.1)
    return x * 2


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(cube, slow, devices="cpu", threads=1, session_bytes=64 * MIB) as server:
        yield server


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    with Wire(server.target) as wire:
        yield wire


@contextlib.contextmanager
def refused(reason: Reason, *parts: str) -> Iterator[None]:
    with pytest.raises(OpFailed) as caught:
        yield
    assert caught.value.reason is reason, caught.value.message
    for part in parts:
        assert part in caught.value.message


def metric(server: Server, name: str) -> float:
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as page:
        for line in page.read().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
    raise AssertionError(name)


def until(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_forward_and_backward_in_one_round_trip(wire: Wire) -> None:
    x = np.random.default_rng(0).normal(size=(3, 4))
    # Everything is sent before anything is read.
    _, leaf = wire.put(x, requires_grad=True)
    _, y = wire.call_op("model:cube", {"x": leaf})
    _, total = wire.call_op("sum", {"input": y})
    op, (gradient,) = wire.grad([total], [leaf], fetch_below=MIB)
    np.testing.assert_allclose(wire.values(op)[0], 3 * x**2, rtol=1e-14)
    np.testing.assert_allclose(wire.get(gradient, y)[1], x**3, rtol=1e-14)


def test_answers_come_in_order_and_carry_what_is_known_of_a_handle(wire: Wire) -> None:
    first, x = wire.put(np.ones((2, 5), np.float32), requires_grad=True)
    second, y = wire.call_op("model:cube", {"x": x})
    third, _ = wire.call_op("sum", {"input": y}, options={"dim": 1})
    frame, _ = wire.wait(third)
    assert [one.op for one in wire.seen if one.op] == [1, first, second, third]
    (info,) = frame.result.handles
    assert list(info.tensor.shape) == [2]
    assert info.requires_grad and not info.has_value


def test_a_failed_op_ends_quickly_all_that_depend_on_it_and_nothing_else(wire: Wire) -> None:
    _, good = wire.put(np.ones(3), requires_grad=True)
    bad, handle = wire.call_op("model:nothing", {"x": good})
    chain = []
    for _ in range(300):
        op, handle = wire.call_op("add", {"input": handle, "other": handle})
        chain.append(op)
    last, _y = wire.call_op("model:cube", {"x": good}, fetch_below=100)
    began = time.monotonic()
    with refused(Reason.MODEL_NOT_FOUND, "nothing"):
        wire.wait(bad)
    for op in chain:
        with refused(Reason.DEPENDENCY_FAILED, f"op {bad}", "nothing"):
            wire.wait(op)
    np.testing.assert_array_equal(wire.values(last)[0], np.ones(3))
    assert time.monotonic() - began < 10
    # A released failure is forgotten: the number is free again.
    wire.release(handle)
    with refused(Reason.BAD_HANDLE):
        wire.get(handle)


def test_sessions_cannot_reach_each_others_handles(server: Server) -> None:
    with Wire(server.target) as one, Wire(server.target) as other:
        op, mine = one.put(np.arange(4.0))
        one.wait(op)
        for guess in (mine, 1, 2, mine + 1, 2**62):
            with refused(Reason.BAD_HANDLE):
                other.get(guess)
        op, _same = other.put(np.zeros(2), handle=mine)
        other.wait(op)
        np.testing.assert_array_equal(one.get(mine)[0], np.arange(4.0))


def test_stateless_requests_run_in_between(wire: Wire) -> None:
    x = np.arange(5.0)
    writer = TensorWriter()
    request = gradient_service_pb2.ComputeVjpRequest(
        inputs=[writer.add("x", x)], cotangents=[writer.add("output", np.ones(5))]
    )
    request.function.model = "cube"
    frame = session_service_pb2.SessionRequest(stateless=session_service_pb2.StatelessOp(vjp=request))
    answer, payloads = wire.wait(wire.send(frame, writer.payloads))
    assert answer.WhichOneof("frame") == "stateless"
    (gradient,) = answer.stateless.vjp.gradients
    np.testing.assert_array_equal(np.frombuffer(payloads[gradient.value.payload]), 3 * x**2)
    # And by chunks, there and back.
    with Wire(wire_target(wire), credit=2 * MIB, chunk_threshold=MIB) as other:
        big = np.random.default_rng(0).normal(size=MIB)
        transfer = other.upload(big)
        request = gradient_service_pb2.EvaluateRequest(inputs=[TensorWriter().add("x", big)])
        request.inputs[0].transfer = transfer
        request.function.model = "cube"
        op = other.send(session_service_pb2.SessionRequest(stateless=session_service_pb2.StatelessOp(evaluate=request)))
        answer, _ = other.wait(op)
        number = answer.stateless.evaluate.outputs[0].transfer
        np.testing.assert_allclose(np.frombuffer(other.chunks[number]), big**3, rtol=1e-14)


def wire_target(wire: Wire) -> str:
    return str(wire._channel._channel.target().decode())  # type: ignore[attr-defined]


def test_chunks_both_ways_and_what_is_half_sent(server: Server) -> None:
    with Wire(server.target, credit=2 * MIB, chunk_threshold=MIB) as wire:
        array = np.random.default_rng(1).normal(size=(3, MIB // 2))
        transfer = wire.upload(array)
        tensor = TensorWriter().add("", array)
        tensor.transfer = transfer
        put = session_service_pb2.PutOp(tensors=[tensor], handles=[wire.new()], requires_grad=[True])
        wire.wait(wire.send(session_service_pb2.SessionRequest(put=put)))
        np.testing.assert_array_equal(wire.get(put.handles[0])[0], array)
        # Half of one: the op says how much came; the rest of the session goes on.
        transfer = wire.upload(array, end=2 * MIB)
        put.tensors[0].transfer = transfer
        put.handles[0] = wire.new()
        with refused(Reason.BAD_TENSOR, f"{2 * MIB} of {array.nbytes} bytes"):
            wire.wait(wire.send(session_service_pb2.SessionRequest(put=put)))
        wire.raw(session_service_pb2.SessionRequest(chunk=session_service_pb2.Chunk(transfer=transfer)))
        with refused(Reason.DEPENDENCY_FAILED):
            wire.get(put.handles[0])
        until(lambda: metric(server, "pullback_bytes_in_flight") == 0)


def test_a_spent_budget_refuses_with_numbers_and_release_makes_room(server: Server) -> None:
    with Wire(server.target) as wire:
        assert wire.opened.budget_bytes == 64 * MIB
        held = [wire.put(np.zeros(MIB)) for _ in range(7)]
        for op, _ in held:
            wire.wait(op)
        op, over = wire.put(np.zeros(2 * MIB))
        with refused(Reason.SESSION_BUDGET, str(64 * MIB)):
            wire.wait(op)
        # In one go, with nothing read in between: a release, and what needs its room.
        wire.release(held[0][1], held[1][1], over)
        op, handle = wire.put(np.ones(2 * MIB))
        wire.wait(op)
        assert wire.get(handle)[0].sum() == 2 * MIB
        assert metric(server, "pullback_session_retained_bytes") == 7 * 8 * MIB
        # An upload that could never fit is refused while it comes, and the session lives on.
        transfer = wire.upload(np.zeros(9 * MIB))
        tensor = TensorWriter().add("", np.zeros(9 * MIB))
        tensor.transfer = transfer
        put = session_service_pb2.PutOp(tensors=[tensor], handles=[wire.new()])
        with refused(Reason.SESSION_BUDGET, str(64 * MIB)):
            wire.wait(wire.send(session_service_pb2.SessionRequest(put=put)))
        assert len(wire.get(handle)) == 1


def test_everything_is_freed_when_a_stream_ends_however_it_ends(server: Server) -> None:
    for end in ("close frame", "half close", "cut"):
        wire = Wire(server.target)
        op, x = wire.put(np.ones(MIB), requires_grad=True)
        op, _ = wire.call_op("model:cube", {"x": x})
        wire.wait(op)
        wire.upload(np.zeros(MIB), end=MIB)
        assert metric(server, "pullback_sessions") == 1
        assert metric(server, "pullback_session_retained_bytes") >= 16 * MIB
        assert metric(server, "pullback_session_handles") == 2
        if end == "close frame":
            wire.raw(session_service_pb2.SessionRequest(close=session_service_pb2.CloseSession()))
        elif end == "half close":
            wire.half_close()
        else:
            wire.call.cancel()
        until(lambda: metric(server, "pullback_sessions") == 0)
        assert metric(server, "pullback_session_retained_bytes") == 0
        assert metric(server, "pullback_session_handles") == 0
        until(lambda: metric(server, "pullback_bytes_in_flight") == 0)
        wire.close()


def test_a_busy_session_takes_turns_with_everybody_else(server: Server) -> None:
    with Wire(server.target) as busy, Wire(server.target) as other, pb_client.connect(server.target) as client:
        _, x = busy.put(np.ones(2))
        ops = [busy.call_op("model:slow", {"x": x})[0] for _ in range(30)]
        time.sleep(0.15)
        began = time.monotonic()
        np.testing.assert_array_equal(client.model("cube").evaluate(np.full(2, 2.0)), np.full(2, 8.0))
        first = time.monotonic() - began
        op, _y = other.put(np.ones(3))
        other.wait(op)
        second = time.monotonic() - began
        # Three seconds of work are queued; each of these waited for two or three ops of it.
        assert first < 1.0 and second < 1.6
        busy.wait(ops[-1])


def test_what_the_contract_rules_out_ends_the_session_with_a_reason(server: Server) -> None:
    def ends(wire: Wire, *parts: str) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            wire.wait(10**6)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        for part in parts:
            assert part in caught.value.details()
        wire.close()

    wire = Wire(server.target, open=False)
    wire.raw(session_service_pb2.SessionRequest(op=1, get=session_service_pb2.GetOp(handles=[1])))
    ends(wire, "first frame", "get")
    wire = Wire(server.target)
    wire.count = 0
    wire.put(np.ones(1))
    ends(wire, "op 1 comes after op 1")
    wire = Wire(server.target)
    wire.raw(
        session_service_pb2.SessionRequest(chunk=session_service_pb2.Chunk(transfer=1, offset=5, size=9)), [b"1234"]
    )
    ends(wire, "never began")
    wire = Wire(server.target)
    wire._out.put(b"\xff\xff\xff")
    ends(wire)
    with Wire(server.target, open=False) as wire:
        wire.raw(
            session_service_pb2.SessionRequest(
                op=1,
                open=session_service_pb2.OpenSession(models=[session_service_pb2.ModelRef(name="cub")]),
            )
        )
        with pytest.raises(grpc.RpcError) as caught:
            next(wire.call)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert "cube" in caught.value.details()
    until(lambda: metric(server, "pullback_sessions") == 0)


def test_random_frames_break_nothing(server: Server) -> None:
    rng = np.random.default_rng(5)
    for _ in range(40):
        wire = Wire(server.target)
        op, x = wire.put(np.ones(3), requires_grad=True)
        for _ in range(5):
            frame = session_service_pb2.SessionRequest(
                call=session_service_pb2.CallOp(operation="add", handles=[wire.new()], options_json='{"other": 1}')
            )
            frame.call.inputs.add(name="input", handle=x)
            data = bytearray(frame.SerializeToString())
            for _ in range(int(rng.integers(1, 4))):
                data[int(rng.integers(len(data)))] = int(rng.integers(256))
            wire._out.put(bytes(data))
        wire.half_close()
        with contextlib.suppress(grpc.RpcError):
            for _ in wire.call:
                pass
        wire.close()
    with Wire(server.target) as wire:
        op, x = wire.put(np.ones(3))
        wire.wait(op)
    until(lambda: metric(server, "pullback_sessions") == 0)


def test_silent_and_idle_sessions_end() -> None:
    with Server(cube, devices="cpu", threads=1, session_idle_seconds=0.5, session_heartbeat_seconds=1.5) as server:
        for beat in (True, False):
            wire = Wire(server.target)
            assert wire.opened.idle_timeout.ToMilliseconds() == 500
            if beat:
                wire.raw(session_service_pb2.SessionRequest(heartbeat=session_service_pb2.Heartbeat()))
            began = time.monotonic()
            with pytest.raises(grpc.RpcError) as caught:
                wire.wait(99)
            assert caught.value.code() is grpc.StatusCode.ABORTED
            assert "idle for 0.5 s" in caught.value.details()
            assert time.monotonic() - began < 5
            wire.close()
    with Server(cube, devices="cpu", threads=1, session_heartbeat_seconds=1.0) as server:
        wire = Wire(server.target)
        with pytest.raises(grpc.RpcError) as caught:
            wire.wait(99)
        assert "nothing was heard" in caught.value.details()
        assert any(frame.WhichOneof("frame") == "heartbeat" for frame in wire.seen)
        wire.close()


def test_a_killed_worker_ends_its_sessions_at_once_and_new_ones_work() -> None:
    with Server(cube, slow, devices="cpu", threads=1) as own:
        # Of this very server; others of this process have workers too.
        assert own._app is not None
        victim = own._app._fleet.workers[0].pid
        assert victim is not None
        idle, busy = Wire(own.target), Wire(own.target)
        _, x = busy.put(np.ones(2))
        op, _ = busy.call_op("model:slow", {"x": x})
        killer = threading.Timer(0.05, os.kill, (victim, signal.SIGKILL))
        killer.start()
        began = time.monotonic()
        for wire, number in ((busy, op + 1), (idle, 5)):
            with pytest.raises(grpc.RpcError) as caught:
                wire.wait(op)
                wire.wait(number)
            assert caught.value.code() is grpc.StatusCode.ABORTED
            assert "was lost" in caught.value.details()
            wire.close()
        assert time.monotonic() - began < 3
        # It waits for the replacement.
        with Wire(own.target) as wire:
            op, x = wire.put(np.ones(2))
            wire.wait(op)
            assert metric(own, "pullback_sessions") == 1


@pytest.mark.parametrize("holds", [True, False])
def test_shutting_down_tells_sessions_and_gives_them_time(holds: bool) -> None:
    server = Server(cube, devices="cpu", threads=1).start()
    grace = 6.0 if holds else 60.0
    with Wire(server.target) as wire:
        if holds:
            op, _x = wire.put(np.ones(2))
            wire.wait(op)
        stopping = threading.Thread(target=server.stop, args=(grace,))
        began = time.monotonic()
        stopping.start()
        with pytest.raises(grpc.RpcError) as caught:
            wire.wait(99)
        took = time.monotonic() - began
        assert caught.value.code() is grpc.StatusCode.ABORTED
        (notice,) = [frame.go_away for frame in wire.seen if frame.WhichOneof("frame") == "go_away"]
        assert grace * 0.8 <= notice.time_left.ToMilliseconds() / 1000 <= grace
        assert "shutting down" in notice.reason
        stopping.join()
        # What it holds is kept for as long as was promised; one that holds nothing keeps no server from ending.
        assert took > 4 if holds else took < 30
