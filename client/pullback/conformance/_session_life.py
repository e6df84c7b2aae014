"""Checks of sessions: how they begin and end, and what travels in them."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pullback.conformance._arrays import drawn, rng
from pullback.conformance._check import Mismatch, Skip, expect, expect_equal, of_server
from pullback.conformance._numbers import equal, same
from pullback.conformance._stream import Session
from pullback.conformance._subject import House, Subject
from pullback.conformance._wire import Refused
from pullback_wire import DTYPES, TensorWriter
from pullback_wire.v1 import session_service_pb2 as pb

_F64 = np.dtype(np.float64)
MIB = 1 << 20
#: Seconds in which a server that does not heed its credit would have sent more.
_MOMENT = 0.5


@of_server(
    "session.open", "`open` is answered by `opened`, with an id, a byte budget, credit, times and the largest message."
)
def opened(house: House) -> None:
    with Session(house.wire, [house.plain.name]) as session:
        found = session.opened
        expect(bool(found.session_id), "a session_id", repr(found.session_id))
        for name in ("budget_bytes", "credit_bytes", "max_message_bytes"):
            expect(getattr(found, name) > 0, f"{name} over 0", getattr(found, name))
        for name in ("heartbeat_timeout", "idle_timeout"):
            expect(getattr(found, name).ToMilliseconds() > 0, f"{name} over 0", str(getattr(found, name)))
    # Two sessions are told apart in logs.
    with Session(house.wire) as other:
        expect(other.opened.session_id != found.session_id, "another session_id", other.opened.session_id)


@of_server("session.tensors", "What is put comes back bit by bit: every dtype, 0-d, of no elements.")
def tensors(house: House) -> None:
    with Session(house.wire) as session:
        arrays = []
        for dtype in DTYPES.values():
            for shape in ((), (3, 2), (0,), (2, 0, 3)):
                count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
                data = rng(str(dtype), shape).integers(0, 2 if dtype == np.bool_ else 256, count).astype(np.uint8)
                arrays.append(data.view(dtype).reshape(shape))
        op, handles = session.put(*arrays, requires_grad=False)
        session.wait(op)
        for array, found in zip(arrays, session.get(*handles), strict=True):
            expect_equal((found.dtype, found.shape), (array.dtype, array.shape), "a tensor")
            expect_equal(found.tobytes(), array.tobytes(), f"bytes of {array.dtype} {list(array.shape)}:")


@of_server("session.chunks", "Tensors of any size travel in chunks, within the credit that each side grants the other.")
def chunks(house: House) -> None:
    values = drawn(rng("chunks"), _F64, (5, MIB // 8))
    with Session(house.wire, credit=2 * MIB, threshold=MIB) as session:
        if session.opened.budget_bytes < 16 * MIB:
            raise Skip(f"a session may hold {session.opened.budget_bytes} bytes only")
        described = TensorWriter().add("", values)
        described.transfer = session.upload(values.tobytes())
        put = pb.PutOp(tensors=[described], handles=[session.new()], requires_grad=[True])
        session.wait(session.send(pb.SessionRequest(put=put), (), "put of a tensor of 5 MiB that came in chunks"))
        (back,) = session.get(put.handles[0])
        expect_equal(session.seen.count("chunk") > 1, True, "several chunks:")
        expect_equal(back.tobytes() == values.tobytes(), True, "the very bytes:")
        total = session.made("sum", {"input": put.handles[0]})
        equal(session.get(total)[0], np.asarray(values.sum()), "their sum")


@of_server(
    "session.credit",
    "The server sends no more chunks than it has credit for, and grants credit for those that it took.",
)
def credit(house: House) -> None:
    values = drawn(rng("credit"), _F64, (3, MIB // 8))
    with Session(house.wire, credit=MIB, threshold=MIB) as session:
        handle = session.leaf(values, False)
        session.grants = False
        op = session.send(pb.SessionRequest(get=pb.GetOp(handles=[handle])), (), "get 3 MiB, for 1 MiB of credit")
        while not session.chunks:
            session.read()
        with ThreadPoolExecutor(1) as pool:
            # Whatever chunk comes now, there is no credit for.
            more = pool.submit(session.read)
            with contextlib.suppress(TimeoutError):
                more.result(_MOMENT)
            sent = sum(len(data) for data in session.chunks.values())
            session.grants = True
            session.raw(pb.SessionRequest(credit=pb.Credit(bytes=sent)))
            more.result()
        expect(sent <= MIB, f"at most {MIB} bytes of chunks without more credit", sent)
        (back,) = session.values(op)
        expect_equal(back.tobytes() == values.tobytes(), True, "the very bytes:")


@of_server(
    "session.parameters",
    "Handles for hosted parameters are the session's own copies; what changes them changes nothing else.",
)
def parameters(house: House) -> None:
    def fits(one: Subject) -> bool:
        return 0 < one.model.parameter_count < 1 << 18 and bool(one.wrt)

    subject = house.among(fits, "has parameters and a VJP")
    names = [spec.name for spec in subject.model.parameters if spec.dtype in (12, 13)][:1]
    if not names:
        raise Skip("its parameters are neither float32 nor float64")
    with Session(house.wire, [subject.name]) as session:
        handle = session.new()
        frame = pb.SessionRequest(
            parameters=pb.ParametersOp(model=pb.ModelRef(name=subject.name), names=names, handles=[handle])
        )
        try:
            session.wait(session.send(frame))
        except Refused as refused:
            if refused.reason == "UNSUPPORTED_BY_MODEL":
                raise Skip("its parameters cannot be given") from None
            raise
        (before,) = session.get(handle)
        same(subject.evaluate(parameters={names[0]: before}), subject.outputs, subject.tolerance, "output with its own")
        op, _ = session.call("mul_", {"input": handle}, {"other": 2.0}, no_grad=True)
        session.wait(op)
        equal(session.get(handle)[0], 2 * before, "the session's own copy")
    same(subject.evaluate(), subject.outputs, 20 * subject.eps, "output of the hosted model")


@of_server("session.close", "A session that its client closes ends well; what is sent before is answered.")
def close_(house: House) -> None:
    for how in ("a close frame", "the end of the stream"):
        session = Session(house.wire)
        with session:
            op, _ = session.put(np.ones(2))
            if how == "a close frame":
                session.raw(pb.SessionRequest(close=pb.CloseSession()))
            else:
                session.half_close()
            session.wait(op)
            ended = session.ends()
            if ended is not None:
                raise Mismatch(f"OK after {how}", ended.words)


@of_server(
    "session.heartbeat", "A client's heartbeat is taken and not answered; a server that is silent sends its own."
)
def heartbeat(house: House) -> None:
    with Session(house.wire) as session:
        for _ in range(3):
            session.raw(pb.SessionRequest(heartbeat=pb.Heartbeat()))
        op, _ = session.put(np.ones(1))
        session.wait(op)
        beat = session.opened.heartbeat_timeout.ToMilliseconds() / 3000
        if beat > house.budget:
            raise Skip(f"it is taken; the server's own would come after {beat:g} s, --patience is {house.budget:g} s")
        seen = len(session.seen)
        while "heartbeat" not in session.seen[seen:]:
            session.read()
