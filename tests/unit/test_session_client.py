"""The client's side of a session's stream, against a small server in numpy that keeps the contract or breaks it."""

from __future__ import annotations

import contextlib
import gc
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
from tests.unit.client_server import Failure

import pullback as pb
from pullback import _stream, errors
from pullback._memory import Memory
from pullback._session import Keep, Session
from pullback._transfers import CHUNK_BYTES
from pullback_wire import Reason, TensorReader, TensorWriter, decode, encode_message, numpy_dtype
from pullback_wire.v1 import session_service_pb2 as spb

Arrays = dict[int, np.ndarray[Any, Any]]


@dataclass
class Worker:
    """Sessions in numpy: add, mul, put, get, grad of nothing. What it does wrong is set by the tests."""

    heartbeat: float = 30.0
    credit: int = 2 << 20
    silent: bool = False
    answers: bool = True
    open_failure: Failure | None = None
    open_failures: list[Failure] = field(default_factory=list)
    op_failures: dict[str, Failure] = field(default_factory=dict)
    abort: Failure | None = None
    frames: list[Any] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    push: list[spb.SessionResponse] = field(default_factory=list)
    sessions: int = 0
    worst: int = 0
    given_up: list[int] = field(default_factory=list)
    target: str = ""

    def of_kind(self, kind: str) -> list[Any]:
        return [frame for frame in self.frames if frame.WhichOneof("frame") == kind]

    def serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.sessions += 1

        def read() -> None:
            try:
                self._read(requests, context, out.put)
            except Exception as error:
                if context.is_active():
                    print("worker:", repr(error))
            out.put(None)

        context.add_callback(self.ended.set)
        threading.Thread(target=read, daemon=True).start()
        yield from iter(out.get, None)
        if self.abort is not None:
            self.abort.abort(context)

    def _read(self, requests: Iterator[bytes], context: Any, put: Callable[[bytes], None]) -> None:
        held: Arrays = {}
        buffers: dict[int, bytearray] = {}
        outstanding = begun = 0
        window = 0

        def answer(op: int, **more: Any) -> None:
            if self.answers:
                put(spb.SessionResponse(op=op, **more).SerializeToString())

        for data in requests:
            frame, payloads = decode(spb.SessionRequest, data)
            self.frames.append(frame)
            kind = frame.WhichOneof("frame")
            for handle in frame.release:
                held.pop(handle, None)
            while self.push:
                put(self.push.pop(0).SerializeToString())
            if kind == "open":
                if self.open_failures:
                    answer(frame.op, status=_status(self.open_failures.pop(0)))
                    return
                window = frame.open.credit_bytes
                opened = spb.SessionOpened(
                    session_id="s1", credit_bytes=self.credit, device="cpu", budget_bytes=1 << 30
                )
                opened.heartbeat_timeout.FromMilliseconds(int(self.heartbeat * 1000))
                opened.max_message_bytes = 8 << 20
                answer(frame.op, opened=opened)
            elif kind == "chunk":
                outstanding += len(payloads[0]) if payloads else 0
                self.worst = max(self.worst, outstanding)
                if frame.chunk.size == 0:
                    assert not payloads
                    self.given_up.append(frame.chunk.transfer)
                    buffers.pop(frame.chunk.transfer, None)
                    continue
                if frame.chunk.offset == 0:
                    assert frame.chunk.transfer > begun
                    begun = frame.chunk.transfer
                buffer = buffers.setdefault(frame.chunk.transfer, bytearray())
                assert frame.chunk.offset == len(buffer)
                buffer += payloads[0]
                if outstanding >= self.credit // 2 and not self.silent:
                    put(spb.SessionResponse(credit=spb.Credit(bytes=outstanding)).SerializeToString())
                    outstanding = 0
            elif kind == "credit":
                window += frame.credit.bytes
            elif kind == "close":
                return
            elif kind == "release_only":
                answer(frame.op, result=spb.OpResult())
            elif kind in ("put", "call", "get", "parameters") and not self.silent:
                failure = self.op_failures.get(kind if kind != "call" else frame.call.operation)
                if failure is not None:
                    answer(frame.op, status=_status(failure))
                    continue
                if self.abort is not None and kind == "call" and frame.call.operation == "abort":
                    return
                window = self._run(frame, kind, payloads, held, buffers, put, window)

    def _run(self, frame: Any, kind: str, payloads: Any, held: Arrays, buffers: Any, put: Any, window: int) -> int:
        reader = TensorReader(payloads)

        def value(operand: Any, field: str) -> Any:
            if operand.WhichOneof("source") == "handle":
                return held[operand.handle]
            tensor = operand.tensor
            if tensor.transfer:
                raw = np.frombuffer(bytes(buffers.pop(tensor.transfer)), numpy_dtype(tensor.dtype))
                array = raw.reshape(tuple(tensor.shape))
            else:
                array = reader.array(tensor, field)
            if operand.keep:
                held[operand.keep] = array
            return array

        writer = TensorWriter()
        response = spb.SessionResponse(op=frame.op)
        results: list[tuple[int, Any, bool]] = []
        if kind == "put":
            for tensor, handle in zip(frame.put.tensors, frame.put.handles, strict=True):
                held[handle] = value(spb.Operand(tensor=tensor), "put")
            response.result.SetInParent()
        elif kind == "get":
            results = [(handle, held[handle], True) for handle in frame.get.handles]
        else:
            arguments = [value(operand, operand.name) for operand in frame.call.inputs]
            options = json.loads(frame.call.options_json or "{}")
            arguments += [options[key] for key in ("input", "other") if key in options]
            if frame.call.operation == "sleep":
                time.sleep(float(arguments[0]))
            made = np.asarray(
                arguments[0] * arguments[1] if frame.call.operation == "mul" else arguments[0] + arguments[1]
            )
            held[frame.call.handles[0]] = made
            results = [(frame.call.handles[0], made, made.nbytes <= frame.call.fetch_below)]
        for handle, array, whole in results:
            info = response.result.handles.add(handle=handle, has_value=whole)
            if whole and array.nbytes >= 4 << 20:
                data = array.reshape(-1).view(np.uint8).data
                for offset in range(0, len(data), CHUNK_BYTES):
                    part = data[offset : offset + CHUNK_BYTES]
                    chunk = spb.Chunk(transfer=handle, offset=offset, size=len(data))
                    put(encode_message(spb.SessionResponse(chunk=chunk), [part]))
                info.tensor.CopyFrom(TensorWriter().add("", array))
                info.tensor.payload, info.tensor.transfer = 0, handle
            elif whole:
                info.tensor.CopyFrom(writer.add("", array))
            else:
                info.tensor.CopyFrom(TensorWriter().add("", array))
        if self.answers:
            put(encode_message(response, writer.payloads))
        return window


def _status(failure: Failure) -> spb.OpStatus:
    status = spb.OpStatus()
    status.ParseFromString(failure.details())
    return status


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    server = grpc.server(ThreadPoolExecutor(16))
    method = {"Session": grpc.stream_stream_rpc_method_handler(worker.serve)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("pullback.v1.SessionService", method),))
    worker.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield worker
    finally:
        server.stop(0).wait()


@pytest.fixture
def client(worker: Worker) -> Iterator[pb.Client]:
    with pb.connect(worker.target, timeout=20) as client:
        yield client


@contextlib.contextmanager
def soon(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def until(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


ONES = np.ones(3)


def test_ops_are_pipelined_and_answered_in_any_order_of_asking(client: pb.Client) -> None:
    session = client.session()
    first = session.call("add", {"input": Keep(ONES, session.new_handle()), "other": ONES}, fetch=True)
    second = session.call("mul", {"input": first.result()[0].handle, "other": 3 * ONES}, fetch=True)
    third = session.call("add", {"input": ONES, "other": ONES}, fetch=True)
    assert third.result()[0].value is not None
    assert second.result()[0].value.tolist() == [6, 6, 6]
    assert second.result() is second.result()
    assert [one.op for one in (first, second, third)] == [2, 3, 4]


def test_many_threads_read_for_each_other(client: pb.Client) -> None:
    session = client.session()
    wrong: list[Any] = []

    def work(number: float) -> None:
        for step in range(100):
            (info,) = session.call("add", {"input": ONES * number, "other": ONES * step}, fetch=True).result()
            if info.value is None or info.value.tolist() != [number + step] * 3:
                wrong.append(info)

    threads = [threading.Thread(target=work, args=(float(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong and not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("size", [3, 1 << 20])
def test_many_threads_read_one_answer(client: pb.Client, size: int) -> None:
    session = client.session()
    wrong: list[Any] = []
    for _ in range(20):
        pending = session.call("add", {"input": np.ones(size), "other": ONES[:1]}, fetch=True)
        gate = threading.Barrier(6)

        def read(pending: Any = pending, gate: threading.Barrier = gate) -> None:
            try:
                gate.wait()
                assert pending.result()[0].value.sum() == 2 * size
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=read) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert not wrong


def test_chunks_both_ways_within_credit(client: pb.Client, worker: Worker) -> None:
    big = np.random.default_rng(0).normal(size=3 << 20)
    with client.session() as session:
        handle = session.put(big)
        (found,) = session.get([handle])
        np.testing.assert_array_equal(found, big)
        assert found.flags.writeable and found.flags.aligned
    chunks = worker.of_kind("chunk")
    assert len(chunks) == 24 and worker.worst <= worker.credit
    assert sum(frame.credit.bytes for frame in worker.of_kind("credit")) >= 16 << 20


def test_an_upload_without_credit_ends_in_time_and_is_given_up(client: pb.Client, worker: Worker) -> None:
    with client.session(timeout=0.5) as session:
        worker.silent = True
        with pytest.raises(errors.DeadlineExceeded):
            session.put(np.zeros(1 << 20))
        assert not session.usable


def test_a_waiting_upload_does_not_stop_others(client: pb.Client, worker: Worker) -> None:
    session = client.session()
    worker.credit = 1 << 40
    thread = threading.Thread(target=lambda: session.put(np.zeros(1 << 20)))
    thread.start()
    until(lambda: len(worker.of_kind("chunk")) == 2)
    (info,) = session.call("add", {"input": ONES, "other": ONES}, fetch=True).result()
    assert info.value is not None and thread.is_alive()
    worker.push.append(spb.SessionResponse(credit=spb.Credit(bytes=8 << 20)))
    session.call("add", {"input": ONES, "other": ONES}, fetch=True).result()
    thread.join(5)
    assert not thread.is_alive()
    until(lambda: len(worker.of_kind("chunk")) == 8)


def test_releases_ride_on_the_next_op(client: pb.Client, worker: Worker) -> None:
    x = client.tensor(ONES)
    y = x + 1.0
    z = y * 2.0
    del y
    gc.collect()
    assert not any(frame.release for frame in worker.frames)
    z + 1.0
    assert len([handle for frame in worker.frames for handle in frame.release]) == 1


def test_a_leaf_is_sent_once_and_failures_send_it_anew(client: pb.Client, worker: Worker) -> None:
    x = client.tensor(ONES)
    worker.op_failures["add"] = Failure.of(Reason.BAD_OPERAND, message="do not go together", field="other")
    with pytest.raises(errors.BadOperand, match="do not go together") as caught:
        x + 1.0
    assert caught.value.violations == (errors.Violation("other", "do not go together"),)
    worker.op_failures.clear()
    assert (x + 1.0).tolist() == [2, 2, 2]
    assert (x * x).tolist() == [1, 1, 1]
    kept = [o.keep for frame in worker.of_kind("call") for o in frame.call.inputs if o.keep]
    assert len(kept) == 2 and kept[0] != kept[1]


def test_one_round_trip_brings_small_values(client: pb.Client, worker: Worker) -> None:
    y = client.tensor(ONES) + 1.0
    count = len(worker.frames)
    assert y.numpy().tolist() == [2, 2, 2] and y.sum is not None and y.shape == (3,)
    assert len(worker.frames) == count


def test_heartbeats(client: pb.Client, worker: Worker) -> None:
    worker.heartbeat = 0.3
    session = client.session()
    until(lambda: len(worker.of_kind("heartbeat")) >= 3)
    session.release(7)
    until(lambda: worker.of_kind("release_only"))
    assert list(worker.of_kind("release_only")[0].release) == [7]
    assert session.usable


def test_silence_is_loss(client: pb.Client, worker: Worker) -> None:
    worker.heartbeat = 0.4
    session = client.session()
    worker.silent = True
    pending = session.call("add", {"input": ONES, "other": ONES})
    with soon(3), pytest.raises(errors.SessionLost, match="nothing was heard"):
        pending.result()
    with soon(0.1), pytest.raises(errors.SessionLost):
        session.call("add", {"input": ONES, "other": ONES})
    assert worker.ended.wait(5)


def test_a_timeout_ends_the_session(client: pb.Client, worker: Worker) -> None:
    session = client.session()
    worker.silent = True
    pending = session.call("add", {"input": ONES, "other": ONES})
    with soon(2), pytest.raises(errors.DeadlineExceeded):
        pending.result(timeout=0.2)
    with pytest.raises(errors.SessionLost, match="over"):
        session.put(ONES)
    with pytest.raises(errors.SessionLost):
        pending.result()


def test_followers_time_out_as_well(client: pb.Client, worker: Worker) -> None:
    session = client.session()
    worker.silent = True
    found: list[Any] = []

    def lead() -> None:
        try:
            session.call("add", {"input": ONES, "other": ONES}).result(timeout=10)
        except errors.PullbackError as error:
            found.append(error)

    thread = threading.Thread(target=lead)
    thread.start()
    until(lambda: session._stream._leading)
    with soon(2), pytest.raises(errors.DeadlineExceeded):
        session.call("add", {"input": ONES, "other": ONES}).result(timeout=0.2)
    thread.join(5)
    assert isinstance(found[0], errors.SessionLost)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (Failure.of(Reason.SESSION_LOST, message="the worker died"), errors.SessionLost),
        (Failure(14, "socket closed"), errors.SessionLost),
        (Failure(13, "oops"), errors.SessionLost),
        (Failure.of(Reason.NOT_READY, retry_after=1.0), errors.NotReady),
    ],
)
def test_a_stream_that_breaks(client: pb.Client, worker: Worker, failure: Failure, kind: type[Exception]) -> None:
    worker.abort = failure
    session = client.session()
    pending = [session.call("abort", {"input": ONES, "other": ONES}) for _ in range(5)]
    for one in pending:
        with soon(5), pytest.raises(kind):
            one.result()
    with pytest.raises(errors.SessionLost):
        session.put(ONES)
    assert not session.usable


def test_opening_is_retried(client: pb.Client, worker: Worker) -> None:
    worker.open_failures = [
        Failure.of(Reason.NOT_READY, retry_after=0.01),
        Failure.of(Reason.OVERLOADED, retry_after=0.01),
    ]
    assert client.session().usable
    assert worker.sessions == 3
    worker.open_failures = [Failure.of(Reason.MODEL_NOT_FOUND, message="no such")]
    with pytest.raises(errors.ModelNotFound, match="no such"):
        client.session(models=["nobody"])


def test_go_away_moves_the_default_session(client: pb.Client, worker: Worker) -> None:
    x = client.tensor(ONES)
    y = x + 1.0
    worker.push.append(spb.SessionResponse(go_away=spb.GoAway(reason="draining")))
    assert (y + 1.0).tolist() == [3, 3, 3]
    z = client.tensor(ONES) + 1.0
    assert worker.sessions == 2 and z.bound_session is not y.bound_session


def test_a_default_session_that_ended_unnoticed_is_replaced(
    client: pb.Client, worker: Worker, monkeypatch: Any
) -> None:
    monkeypatch.setattr("pullback._session._STALE", 0.05)
    x = client.tensor(ONES)
    y = x + 1.0
    worker.abort = Failure.of(Reason.SESSION_LOST, message="idle for too long")
    y.bound_session.call("abort", {"input": ONES, "other": ONES})
    assert worker.ended.wait(5)
    worker.abort = None
    time.sleep(0.1)
    assert y.bound_session.usable
    assert (x + 2.0).tolist() == [3, 3, 3]
    # Its value came along with the answer.
    assert (y + 1.0).tolist() == [3, 3, 3]
    assert worker.sessions == 2


def test_answers_that_contradict_themselves(client: pb.Client, worker: Worker) -> None:
    session = client.session()
    worker.push.append(spb.SessionResponse(op=99, result=spb.OpResult()))
    with pytest.raises(errors.ProtocolError):
        session.call("add", {"input": ONES, "other": ONES}).result()


def test_closing_waits_for_the_server(client: pb.Client, worker: Worker) -> None:
    with client.session() as session:
        session.put(ONES)
    assert worker.ended.wait(1)
    assert worker.of_kind("close")
    with pytest.raises(errors.SessionLost, match="closed"):
        session.put(ONES)


def test_a_collected_session_says_goodbye(client: pb.Client, worker: Worker) -> None:
    session = client.session()
    session.put(ONES)
    threads = threading.active_count()
    del session
    gc.collect()
    assert worker.ended.wait(5)
    until(lambda: threading.active_count() < threads or threads <= 3)


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_dropped_client_takes_its_session_along(worker: Worker, pipelined: bool) -> None:
    """By counting references: nobody knows when a cycle is found."""
    gc.collect()
    gc.disable()
    try:
        client = pb.connect(worker.target)
        y = client.tensor(ONES) + 1.0
        session = client.session(pipelined=pipelined)
        z = session.tensor(ONES) * y
        assert z.tolist() == [2, 2, 2] and worker.sessions == 2
        del client, session
        time.sleep(0.1)
        assert not worker.ended.is_set()
        assert (z * z).tolist() == [4, 4, 4] and (y * 2.0).tolist() == [4, 4, 4]
        del y
        assert worker.ended.wait(5)
        worker.ended.clear()
        del z
        assert worker.ended.wait(5)
    finally:
        gc.enable()


def test_a_closed_client_ends_its_sessions(worker: Worker) -> None:
    client = pb.connect(worker.target)
    y = client.tensor(ONES) + 1.0
    session = client.session()
    client.close()
    assert worker.ended.wait(5)
    for use in (lambda: y.bound_session.get([1]), lambda: session.get([1])):
        with pytest.raises((errors.SessionLost, errors.ClientClosed)):
            use()
    with pytest.raises(RuntimeError, match="no client"):
        y * 1.0


def test_a_server_without_sessions(worker: Worker) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with pb.connect(f"127.0.0.1:{port}") as client, pytest.raises(errors.Unimplemented):
        client.session()
    server.stop(0).wait()


def test_memory_is_known_in_the_order_of_answers() -> None:
    memory = Memory()
    infos = [spb.HandleInfo(handle=2, shares=1), spb.HandleInfo(handle=3, shares=2), spb.HandleInfo(handle=4)]
    memory.note(infos)
    assert sorted(memory.beside(1)) == [2, 3] and sorted(memory.beside(3)) == [1, 2] and memory.beside(4) == []
    memory.forget([1, 2])
    memory.note([spb.HandleInfo(handle=5, shares=3)])
    assert sorted(memory.beside(5)) == [1, 3] and memory.same(3, 5) and not memory.same(4, 5)
    memory.forget([3, 5])
    assert memory.beside(1) == []


def test_sessions_are_not_picklable_and_clients_are(client: pb.Client) -> None:
    import copy
    import pickle

    with client.session() as session, pytest.raises(TypeError, match="pickle"):
        pickle.dumps(session)
    x = client.tensor(ONES, requires_grad=True)
    with pytest.raises(TypeError, match="numpy"):
        pickle.dumps(x)
    other = copy.deepcopy(x)
    assert other.requires_grad and other is not x
    assert pickle.loads(pickle.dumps(client)).target == client.target


def test_an_interrupted_wait_ends_the_session(client: pb.Client, worker: Worker, monkeypatch: Any) -> None:
    session = client.session()

    class Interrupted:
        def __init__(self, call: Any) -> None:
            self.call = call

        def __next__(self) -> bytes:
            raise KeyboardInterrupt

        def cancel(self) -> None:
            self.call.cancel()

    session._stream._call = Interrupted(session._stream._call)
    with pytest.raises(KeyboardInterrupt):
        session.call("add", {"input": ONES, "other": ONES}).result()
    with pytest.raises(errors.SessionLost, match="KeyboardInterrupt"):
        session.put(ONES)
    assert worker.ended.wait(5)


def test_which_session_is_unclear_without_a_client() -> None:
    gc.collect()
    from pullback._transport import Transport

    if not [one for one in list(Transport.everyone) if not one.closed]:
        with pytest.raises(RuntimeError, match=r"client.session\(\)"):
            pb.tensor(ONES) + 1.0


def test_frames_beyond_the_limit_are_refused_before_they_are_sent(worker: Worker) -> None:
    worker.credit = 0
    with pb.connect(worker.target) as client:
        session = client.session()
        with pytest.raises(errors.MessageTooLarge):
            session.put(np.zeros(2 << 20))
        assert session.call("add", {"input": ONES, "other": ONES}, fetch=True).result()[0].value is not None


def test_nothing_is_left_in_the_registry(client: pb.Client) -> None:
    with client.session() as session:
        assert session._stream._key in _stream._calls
    assert session._stream._key not in _stream._calls
    assert isinstance(client.session(), Session)


# The tables.


def test_functional_has_torchs_losses() -> None:
    torch = pytest.importorskip("torch")
    import inspect

    for name in pb.functional.__all__:
        if not name.endswith(("loss", "entropy", "logits", "div")):
            continue
        ours = inspect.signature(getattr(pb.functional, name))
        theirs = inspect.signature(getattr(torch.nn.functional, name))
        late = {"size_average", "reduce", "distance_function", "options"}
        assert {key: one.default for key, one in ours.parameters.items()} == {
            key: one.default for key, one in theirs.parameters.items() if key not in late
        }, name


def test_every_operation_is_a_method() -> None:
    from pullback_wire.operations import OPERATIONS

    for name, operation in OPERATIONS.items():
        if not operation.variadic:
            made = getattr(pb.Tensor, name)
            assert callable(made) or (name in ("real", "imag") and isinstance(made, property)), name
            assert made.__doc__


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(1.5, "float32"), (2, "int64"), (True, "bool"), ([1.0, 2.0], "float32"), (1j, "complex64"), (ONES, "float64")],
)
def test_tensor_takes_torchs_dtypes(value: Any, dtype: str) -> None:
    assert pb.tensor(value).dtype.name == dtype
    assert pb.tensor(value, dtype="complex128").dtype.name == "complex128"


def test_a_tensor_copies_its_data() -> None:
    data = np.ones((2, 3)).T
    x = pb.tensor(data)
    data[:] = 7
    assert x.tolist() == [[1, 1]] * 3
    x.numpy()[:] = 5
    assert x.tolist() == [[1, 1]] * 3
    with pytest.raises(errors.NotDifferentiable):
        pb.tensor([1, 2], requires_grad=True)
    with pytest.raises(ValueError, match="dtype"):
        pb.tensor([1.0], dtype="float13")
