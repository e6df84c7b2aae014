"""Checks of sessions: what is called and differentiated there."""

from __future__ import annotations

import numpy as np

from pullback.conformance._check import Mismatch, Skip, expect, expect_equal, of_model, of_server
from pullback.conformance._numbers import equal, norm, same
from pullback.conformance._second import promises_second
from pullback.conformance._stream import Session
from pullback.conformance._subject import House, Subject
from pullback.conformance._wire import Answer, Refused
from pullback_wire import TensorReader, TensorWriter
from pullback_wire.v1 import session_service_pb2 as pb

MIB = 1 << 20


@of_model("session.grad", "A call keeps its graph, and GradOp gives what ComputeVjp gives.")
def grad(subject: Subject) -> None:
    subject.differentiates()
    with Session(subject.wire, [subject.name]) as session:
        handles = {}
        for name, array in subject.inputs.items():
            handles[name] = session.leaf(array, name in subject.wrt)
        op, first = session.call(f"model:{subject.name}", handles)
        made = session.wait(op)[0].result.handles
        expect_equal([info.name for info in made], list(subject.outputs), "outputs")
        found = {info.name: info.handle for info in made}
        expect_equal(made[0].handle, first, "handle of the first output")
        values = dict(zip(found, session.get(*found.values()), strict=True))
        same(values, subject.outputs, subject.tolerance, "output")
        writer = TensorWriter()
        cotangents = [pb.Operand(tensor=writer.add("", v)) for v in subject.cotangents.values()]
        wanted = [session.new() for _ in subject.wrt]
        frame = pb.SessionRequest(
            grad=pb.GradOp(
                outputs=[found[name] for name in subject.cotangents],
                grad_outputs=cotangents,
                inputs=[handles[name] for name in subject.wrt],
                handles=wanted,
            )
        )
        session.wait(session.send(frame, writer.payloads))
        gradients: dict[str, np.ndarray | None] = dict(zip(subject.wrt, session.get(*wanted), strict=True))
        same(gradients, subject.vjp(), subject.tolerance, "gradient")


@of_model(
    "session.create_graph",
    "Under create_graph gradients can be differentiated in turn: what ComputeHvp gives, or ORDER_UNAVAILABLE.",
)
def create_graph(subject: Subject) -> None:
    subject.differentiates()
    tangents = subject.tangents()
    with Session(subject.wire, [subject.name]) as session:
        handles = {name: session.leaf(array, name in subject.wrt) for name, array in subject.inputs.items()}
        op, _ = session.call(f"model:{subject.name}", handles)
        made = {info.name: info.handle for info in session.wait(op)[0].result.handles}
        cotangents = [pb.Operand(handle=session.leaf(v, False)) for v in subject.cotangents.values()]
        leaves = [handles[name] for name in subject.wrt]
        outputs = [made[name] for name in subject.cotangents]
        try:
            op, gradients = session.grad(outputs, leaves, grad_outputs=cotangents, create_graph=True)
            session.wait(op)
            directions = [pb.Operand(handle=session.leaf(tangents[name], False)) for name in subject.wrt]
            op, twice = session.grad(gradients, leaves, grad_outputs=directions, allow_unused=True)
            infos = session.wait(op)[0].result.handles
        except Refused as refused:
            if refused.reason == "NOT_DIFFERENTIABLE" and not norm(subject.hvp(tangents).gradients("hvps")):
                raise Skip("its gradients depend on nothing") from None
            if promises_second(subject) or refused.reason != "ORDER_UNAVAILABLE":
                raise
            raise Skip("it has no second derivative, and promises none (ORDER_UNAVAILABLE)") from None
        found: dict[str, np.ndarray | None] = {
            name: np.zeros_like(subject.inputs[name]) if info.unused else session.get(handle)[0]
            for name, handle, info in zip(subject.wrt, twice, infos, strict=True)
        }
    right = subject.hvp(tangents).gradients("hvps")
    filled = {name: np.zeros_like(subject.inputs[name]) if array is None else array for name, array in right.items()}
    same(found, filled, subject.tolerance, "second derivative", max(norm(subject.vjp()), norm(filled)))


@of_server(
    "session.third_order", "Any order goes through the server's own operations: the third derivative of sin is -cos."
)
def third_order(house: House) -> None:
    values = np.array([0.3, -1.1, 2.0])
    with Session(house.wire) as session:
        x = session.leaf(values)
        y = session.made("sin", {"input": x})
        for right in (np.cos(values), -np.sin(values), -np.cos(values)):
            one = session.leaf(np.ones(3), False)
            op, (y,) = session.grad([y], [x], grad_outputs=[pb.Operand(handle=one)], create_graph=True)
            session.wait(op)
            equal(session.get(y)[0], right, "derivative")


@of_server(
    "session.unused", "A tensor that the outputs do not depend on is `unused` with allow_unused, else UNUSED_INPUT."
)
def unused(house: House) -> None:
    with Session(house.wire) as session:
        x, other = session.leaf(np.ones(2)), session.leaf(np.ones(2))
        total = session.made("sum", {"input": session.made("sin", {"input": x})})
        op, _ = session.grad([total], [x, other], allow_unused=True, retain_graph=True)
        infos = session.wait(op)[0].result.handles
        expect_equal([info.unused for info in infos], [False, True], "unused")
        op, _ = session.grad([total], [x, other])
        try:
            session.wait(op)
        except Refused as refused:
            expect_equal(refused.reason, "UNUSED_INPUT", "reason")
        else:
            raise Mismatch("UNUSED_INPUT", "an answer")


@of_server(
    "session.pipelining",
    "Ops are answered in their order, and may be sent before those that they depend on are answered.",
)
def pipelining(house: House) -> None:
    values = np.linspace(-1, 1, 5)
    with Session(house.wire) as session:
        _, (x,) = session.put(values)
        _, y = session.call("mul", {"input": x, "other": x})
        _, total = session.call("sum", {"input": y})
        op, (gradient,) = session.grad([total], [x])
        last = session.send(pb.SessionRequest(get=pb.GetOp(handles=[gradient, y])))
        found = session.values(last)
        expect_equal(session.order, sorted(session.order), "answers to ops")
        expect(op in session.order, f"an answer to op {op}", session.order)
        equal(found[0], 2 * values, "gradient of sum(x * x)")
        equal(found[1], values**2, "x * x")


@of_server("session.fetch", "Values come along with the op that makes them when they are asked for, or small enough.")
def fetch(house: House) -> None:
    values = np.arange(4.0)
    with Session(house.wire) as session:
        x = session.leaf(values)
        op, _ = session.call("exp", {"input": x}, fetch_below=MIB)
        equal(session.values(op)[0], np.exp(values), "exp(x)")
        op, y = session.call("exp", {"input": x})
        infos = session.wait(op)[0].result.handles
        expect_equal([info.has_value for info in infos], [False], "has_value")
        expect_equal([list(info.tensor.shape) for info in infos], [[4]], "shape")
        expect(infos[0].requires_grad, "requires_grad", False)
        op, _ = session.grad([y], [x], grad_outputs=[pb.Operand(handle=x)], fetch_below=MIB)
        equal(session.values(op)[0], np.exp(values) * values, "gradient")


@of_server("session.stateless", "A call of GradientService as an op of a session is answered like the unary call.")
def stateless(house: House) -> None:
    subject = house.plain
    what = subject.draft("ComputeVjp", cotangents=subject.cotangents, wrt=subject.wrt)
    with Session(house.wire, [subject.name]) as session:
        frame = pb.SessionRequest(stateless=pb.StatelessOp(vjp=what.message))
        answer, payloads = session.wait(session.send(frame, what.payloads, what.words))
        expect_equal(answer.WhichOneof("frame"), "stateless", "frame")
        found = Answer(answer.stateless.vjp, TensorReader(payloads), b"", {})
    right = house.wire.ask(what)
    same(found.outputs(), right.outputs(), subject.tolerance, "output")
    same(found.gradients(), right.gradients(), subject.tolerance, "gradient")
    expect_equal(found.message.model_version, right.message.model_version, "model_version")
