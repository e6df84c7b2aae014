"""Checks of errors within a session: an op fails by itself, and what breaks the protocol ends the session."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pullback.conformance._check import Mismatch, Skip, expect, expect_equal, of_server
from pullback.conformance._refusal import check_refusal
from pullback.conformance._stream import Session
from pullback.conformance._subject import House
from pullback.conformance._wire import Refused
from pullback_wire import Reason, TensorWriter
from pullback_wire.v1 import session_service_pb2 as pb


def _fails(session: Session, op: int, *reasons: Reason) -> None:
    """An op is refused, and the session lives on."""
    try:
        session.wait(op)
    except Refused as refused:
        check_refusal(refused, *reasons)
    else:
        raise Mismatch(" or ".join(reason.value for reason in reasons), "an answer")
    handle = session.leaf(np.arange(3.0), False)
    expect_equal(session.get(handle)[0].tolist(), [0.0, 1.0, 2.0], "after it, a tensor that was put:")


@of_server(
    "session.errors",
    "An op that cannot be reports its own status, with the same details as a call's, and ends nothing.",
)
def errors(house: House) -> None:
    with Session(house.wire) as session:
        x = session.leaf(np.ones(3))
        op, _ = session.call("no_such_operation", {"input": x})
        _fails(session, op, Reason.OPERATION_NOT_FOUND)
        op, _ = session.call("model:no-such-model-conformance", {"x": x})
        _fails(session, op, Reason.MODEL_NOT_FOUND, Reason.PERMISSION_DENIED)
        op, _ = session.call("matmul", {"input": x, "other": np.ones((7, 5))})
        _fails(session, op, Reason.BAD_OPERAND)
        op, _ = session.grad([session.leaf(np.ones(2), False)], [x])
        _fails(session, op, Reason.NOT_DIFFERENTIABLE)
        y = session.made("sin", {"input": x})
        op, _ = session.grad([y], [x])
        _fails(session, op, Reason.MISSING_COTANGENT)
        writer = TensorWriter()
        bad = [pb.Operand(tensor=writer.add("", np.ones(5)))]
        frame = pb.SessionRequest(grad=pb.GradOp(outputs=[y], inputs=[x], handles=[session.new()], grad_outputs=bad))
        _fails(session, session.send(frame, writer.payloads), Reason.BAD_COTANGENT)


@of_server("session.handles", "An op on a handle that is not there, or that makes one that is, is BAD_HANDLE.")
def handles(house: House) -> None:
    with Session(house.wire) as session:
        x = session.leaf(np.ones(3))
        for unknown in (x + 1, 2**62):
            op = session.send(pb.SessionRequest(get=pb.GetOp(handles=[unknown])), (), f"get {unknown}")
            _fails(session, op, Reason.BAD_HANDLE)
        op, _ = session.call("sin", {"input": x + 5})
        _fails(session, op, Reason.BAD_HANDLE)
        op, _ = session.put(np.zeros(3), handles=[x])
        _fails(session, op, Reason.BAD_HANDLE)
        expect_equal(session.get(x)[0].tolist(), [1.0, 1.0, 1.0], "what the handle stood for:")


@of_server("session.release", "A released handle is gone, and releasing one that is unknown is no error.")
def release(house: House) -> None:
    with Session(house.wire) as session:
        x = session.leaf(np.ones(3))
        y = session.made("sin", {"input": x})
        session.wait(session.release(y, 2**61))
        _fails(session, session.send(pb.SessionRequest(get=pb.GetOp(handles=[y]))), Reason.BAD_HANDLE)
        expect_equal(session.get(x)[0].tolist(), [1.0, 1.0, 1.0], "what was not released:")


@of_server("session.graph_freed", "A second backward without retain_graph is GRAPH_FREED; with it, it works.")
def graph_freed(house: House) -> None:
    with Session(house.wire) as session:
        x = session.leaf(np.array([0.5, 2.0]))
        total = session.made("sum", {"input": session.made("exp", {"input": x})})
        for retain in (True, False):
            op, (gradient,) = session.grad([total], [x], retain_graph=retain)
            session.wait(op)
            np.testing.assert_allclose(session.get(gradient)[0], np.exp([0.5, 2.0]), rtol=1e-13)
        op, _ = session.grad([total], [x])
        _fails(session, op, Reason.GRAPH_FREED)


@of_server(
    "session.modified",
    "A value that a backward needs and that was changed in place is MODIFIED_IN_PLACE, not a wrong gradient.",
)
def modified(house: House) -> None:
    with Session(house.wire) as session:
        x = session.leaf(np.array([0.5, 2.0]))
        y = session.made("exp", {"input": x})
        total = session.made("sum", {"input": y})
        op, _ = session.call("add_", {"input": y}, {"other": 1.0}, no_grad=True)
        session.wait(op)
        op, _ = session.grad([total], [x])
        _fails(session, op, Reason.MODIFIED_IN_PLACE)


@of_server("session.dependency", "Ops on what a failed op should have made are DEPENDENCY_FAILED; others are answered.")
def dependency(house: House) -> None:
    with Session(house.wire) as session:
        x = session.leaf(np.ones(3))
        first, bad = session.call("no_such_operation", {"input": x})
        second, worse = session.call("sin", {"input": bad})
        third, _ = session.call("add", {"input": x, "other": worse})
        fine, good = session.call("add", {"input": x, "other": x})
        for op, reason in ((first, Reason.OPERATION_NOT_FOUND), (second, Reason.DEPENDENCY_FAILED)):
            try:
                session.wait(op)
            except Refused as refused:
                check_refusal(refused, reason)
            else:
                raise Mismatch(reason.value, "an answer")
        _fails(session, third, Reason.DEPENDENCY_FAILED)
        session.wait(fine)
        expect_equal(session.get(good)[0].tolist(), [2.0, 2.0, 2.0], "x + x")


@of_server("session.isolation", "Handles mean nothing outside their session, and are gone with it.")
def isolation(house: House) -> None:
    with Session(house.wire) as one, Session(house.wire) as other:
        x = one.leaf(np.full(3, 7.0))
        _fails(other, other.send(pb.SessionRequest(get=pb.GetOp(handles=[x]))), Reason.BAD_HANDLE)
        op, _ = other.put(np.zeros(2), handles=[x + 7])
        other.wait(op)
        expect_equal(one.get(x)[0].tolist(), [7.0, 7.0, 7.0], "the first session's tensor:")
    with Session(house.wire) as later:
        _fails(later, later.send(pb.SessionRequest(get=pb.GetOp(handles=[x]))), Reason.BAD_HANDLE)


@of_server(
    "session.budget",
    "A tensor that cannot fit the byte budget is SESSION_BUDGET, said while it comes, and nothing else fails.",
)
def budget(house: House) -> None:
    with Session(house.wire) as session:
        size = (session.opened.budget_bytes // 8 + 1) * 8
        if size >= 2**62:
            raise Skip("the budget has no bound")
        part = b"\0" * 1024
        session.granted -= len(part)
        # Its first bytes announce the whole.
        session.raw(pb.SessionRequest(chunk=pb.Chunk(transfer=1, offset=0, size=size)), [part])
        described = TensorWriter().add("", np.zeros(0))
        del described.shape[:]
        described.shape.extend([size // 8])
        described.transfer = 1
        put = pb.PutOp(tensors=[described], handles=[session.new()])
        op = session.send(pb.SessionRequest(put=put), (), f"put of {size} bytes, announced by their first chunk")
        _fails(session, op, Reason.SESSION_BUDGET, Reason.OVERLOADED, Reason.BAD_TENSOR, Reason.OUT_OF_MEMORY)


@of_server("session.half_sent", "An op on a transfer that is not complete is BAD_TENSOR.")
def half_sent(house: House) -> None:
    with Session(house.wire) as session:
        session.raw(pb.SessionRequest(chunk=pb.Chunk(transfer=1, offset=0, size=64)), [b"\0" * 32])
        described = TensorWriter().add("", np.zeros(8))
        described.transfer = 1
        put = pb.PutOp(tensors=[described], handles=[session.new()])
        op = session.send(pb.SessionRequest(put=put), (), "put of 64 bytes of which 32 have come")
        _fails(session, op, Reason.BAD_TENSOR)


@of_server("session.protocol", "What the protocol rules out ends the session with MALFORMED_REQUEST.")
def protocol(house: House) -> None:
    def op_first(session: Session) -> None:
        session.raw(pb.SessionRequest(op=1, get=pb.GetOp(handles=[1])))

    def garbage(session: Session) -> None:
        session.raw_bytes(b"\xff\xff\xff")

    def backwards(session: Session) -> None:
        session.raw(pb.SessionRequest(op=1, get=pb.GetOp(handles=[1])))

    def gap(session: Session) -> None:
        session.raw(pb.SessionRequest(chunk=pb.Chunk(transfer=1, offset=5, size=9)), [b"1234"])

    def twice(session: Session) -> None:
        session.raw(pb.SessionRequest(op=2, open=pb.OpenSession()))

    wrong: list[tuple[str, bool, Callable[[Session], None]]] = [
        ("a first frame that is not `open`", True, op_first),
        ("bytes that are no frame, first", True, garbage),
        ("bytes that are no frame", False, garbage),
        ("an op whose number does not count up", False, backwards),
        ("a chunk of a transfer that never began", False, gap),
        ("`open` a second time", False, twice),
    ]
    for note, bare, send in wrong:
        with Session(house.wire, bare=bare) as session:
            house.wire.say(f"session, {note}")
            send(session)
            session.half_close()
            ended = session.ends()
            if ended is None:
                raise Mismatch("MALFORMED_REQUEST", f"a session that ended well after {note}")
            check_refusal(ended, Reason.MALFORMED_REQUEST)


@of_server("session.models", "A session for a model that is not there is refused when it is opened.")
def models(house: House) -> None:
    try:
        with Session(house.wire, ["no-such-model-conformance"]):
            pass
    except Refused as refused:
        check_refusal(refused, Reason.MODEL_NOT_FOUND, Reason.PERMISSION_DENIED)
        expect("no-such-model-conformance" in refused.message, "a message that names it", refused.message)
    else:
        raise Mismatch("MODEL_NOT_FOUND", "an open session")
