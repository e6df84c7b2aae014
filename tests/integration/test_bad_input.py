"""Everything a caller can get wrong, sent as bytes over a socket: what comes back, and that all others carry on.

After each test the same channel still answers correctly and the worker is the process that it was.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import numpy as np
import psutil
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests import bad_models

from pullback_server import Server
from pullback_wire import (
    ERROR_DOMAIN,
    GRADIENT_METHODS,
    MODEL_METHODS,
    Reason,
    TensorReader,
    TensorWriter,
    decode,
    encode,
    encode_message,
)
from pullback_wire.dtypes import ITEM_SIZES
from pullback_wire.v1 import function_pb2, tensor_pb2

MODELS = Path(bad_models.__file__)
LIMIT = 1 << 20
MAX_COTANGENTS = 64
METHODS = {**GRADIENT_METHODS, **MODEL_METHODS}
#: A call that has not ended by then hangs.
PATIENCE = 30.0

F64 = tensor_pb2.DTYPE_FLOAT64
CUBE = np.array([[1.0, -2.0, 3.0], [0.5, 0.25, 4.0]])
VECTOR = np.array([1.0, 2.0, 3.0])
LOGITS = {"x": CUBE}
LABELS = np.array([0, 2])


def array(values: object, dtype: str = "float64") -> np.ndarray:
    return np.array(values, dtype=dtype)


# ---- requests


Corrupt = Callable[[Any, list[Any]], None]


def request(
    method: str,
    model: str = "",
    *,
    corrupt: Corrupt | None = None,
    function: dict[str, Any] | None = None,
    **fields: Any,
) -> bytes:
    """A request in bytes; dicts of arrays become tensors; `corrupt` gets the message and its payloads at the end."""
    message = METHODS[method].request()
    writer = TensorWriter()
    if "function" in message.DESCRIPTOR.fields_by_name:
        message.function.CopyFrom(function_pb2.Function(model=model, **(function or {})))
    for name, value in fields.items():
        of = message.DESCRIPTOR.fields_by_name[name]
        if of.message_type is not None and of.message_type.name == "Tensor":
            pairs = value.items() if isinstance(value, dict) else value
            getattr(message, name).extend([writer.add(key, np.asarray(entry)) for key, entry in pairs])
        elif of.message_type is not None:
            getattr(message, name).CopyFrom(of.message_type._concrete_class(**value))
        elif isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    payloads: list[Any] = list(writer.payloads)
    if corrupt is not None:
        corrupt(message, payloads)
    return encode_message(message, payloads)


def moved(name: str, tangent: np.ndarray, method: str) -> dict[str, Any]:
    """The tangent that a ComputeHvp has to have besides; nothing for other methods."""
    return {"tangents": {name: tangent}} if method == "ComputeHvp" else {}


def loss(name: str, options: dict[str, Any] | None = None, bindings: dict[str, str] | None = None) -> dict[str, Any]:
    return {"loss": function_pb2.Loss(name=name, options=options, bindings=bindings)}


def nested(depth: int) -> bytes:
    """A request whose loss has an option of lists in lists, by hand: protobuf's Python would not build it."""

    def inside(number: int, body: bytes) -> bytes:
        return encode(b"", [body]).replace(b"\xa2\x06", bytes([number << 3 | 2]), 1)

    value = b""
    for _ in range(depth):
        value = inside(6, inside(1, value))
    entry = inside(1, b"reduction") + inside(2, value)
    return inside(1, inside(3, inside(2, inside(1, entry))))


def change(path: str, **values: Any) -> Corrupt:
    """Overwrites fields of one tensor, e.g. change("inputs", shape=[-1])."""

    def corrupt(message: Any, payloads: list[Any]) -> None:
        tensor = getattr(message, path)[0]
        for name, value in values.items():
            if name == "shape":
                del tensor.shape[:]
                tensor.shape.extend(value)
            else:
                setattr(tensor, name, value)

    return corrupt


def payload(index: int, edit: Callable[[bytes], bytes]) -> Corrupt:
    def corrupt(message: Any, payloads: list[Any]) -> None:
        payloads[index] = edit(bytes(payloads[index]))

    return corrupt


def share(message: Any, payloads: list[Any]) -> None:
    message.inputs[1].payload = 0
    del payloads[1]


def share_and_leave_over(message: Any, payloads: list[Any]) -> None:
    message.inputs[1].payload = 0


def orphan(message: Any, payloads: list[Any]) -> None:
    payloads.append(b"12345678")


def no_payloads(message: Any, payloads: list[Any]) -> None:
    payloads.clear()


# ---- answers


@dataclass(frozen=True)
class Refusal:
    """An error as a caller sees it."""

    code: grpc.StatusCode
    message: str
    reason: str
    domain: str
    violations: tuple[tuple[str, str], ...]
    retry: bool
    size: int

    @property
    def all_text(self) -> str:
        return " ".join([self.message, *(part for violation in self.violations for part in violation)])


def refusal(error: grpc.RpcError) -> Refusal:
    trailing = dict(error.trailing_metadata() or ())
    raw = trailing.get("grpc-status-details-bin", b"")
    status = status_pb2.Status.FromString(raw)
    if raw:
        assert status.code == error.code().value[0], "the details contradict the status code"
        assert status.message == error.details(), "the details contradict the message"
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        for kind in (info, bad, retry):
            detail.Unpack(kind)
    return Refusal(
        error.code(),
        error.details() or "",
        info.reason,
        info.domain,
        tuple((violation.field, violation.description) for violation in bad.field_violations),
        retry.HasField("retry_delay"),
        len(raw),
    )


def results(method: str, answer: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    """The response, and every tensor in it by "field:name"."""
    message, payloads = decode(METHODS[method].response, answer)
    reader = TensorReader(payloads)
    found: dict[str, np.ndarray] = {}
    for of in message.DESCRIPTOR.fields:
        if of.message_type is None or of.message_type.name not in ("Tensor", "Gradient", "Block"):
            continue
        for entry in getattr(message, of.name):
            kind = of.message_type.name
            if kind != "Tensor" and entry.unused:
                continue
            tensor = entry if kind == "Tensor" else entry.value
            name = f"{entry.row},{entry.column}" if kind == "Block" else entry.name
            found[f"{of.name}:{name}"] = reader.array(tensor, of.name)
    reader.finish()
    return message, found


# ---- the server


@dataclass
class Wire:
    """One channel to the server under test."""

    server: Server
    channel: grpc.Channel
    calls: int = 0
    pids: frozenset[int] = frozenset()
    others: frozenset[int] = frozenset()

    def send(self, method: str, data: bytes, timeout: float = PATIENCE) -> bytes:
        answer: bytes = self.channel.unary_unary(METHODS[method].path)(data, timeout=timeout)
        return answer

    def refused(self, method: str, data: bytes) -> Refusal:
        with pytest.raises(grpc.RpcError) as caught:
            message, _ = results(method, self.send(method, data))
            pytest.fail(f"the call was answered: {str(message)[:300]}")
        return refusal(caught.value)

    def is_well(self) -> None:
        """A unique call gets its own answer, from the worker that was always there."""
        self.calls += 1
        x = CUBE + self.calls
        v = np.full_like(x, 0.5)
        data = request("ComputeVjp", "cube", inputs={"x": x}, cotangents={"y": v}, wrt=["x"])
        _, found = results("ComputeVjp", self.send("ComputeVjp", data))
        np.testing.assert_allclose(found["outputs:y"], x**3)
        np.testing.assert_allclose(found["gradients:x"], 3 * x**2 * v)
        before, self.pids = self.pids, worker_pids() - self.others
        assert self.pids == before, "the worker is another process than it was"

    def metric(self, line: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.server.metrics_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return sum(float(row.rsplit(" ", 1)[1]) for row in text.splitlines() if row.startswith(line))


def worker_pids() -> frozenset[int]:
    children = psutil.Process().children(recursive=True)
    return frozenset(
        child.pid for child in children if "pullback_server.engine.worker" in " ".join(child.cmdline() or [""])
    )


@pytest.fixture(scope="module")
def _wire() -> Iterator[Wire]:
    before = worker_pids()
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with (
        Server(MODELS, threads=1, devices="cpu:1", max_message_bytes=LIMIT, max_cotangents=MAX_COTANGENTS) as server,
        grpc.insecure_channel(server.target, options=options) as channel,
    ):
        wire = Wire(server, channel)
        wire.pids, wire.others = worker_pids() - before, before
        assert len(wire.pids) == 1
        yield wire


@pytest.fixture
def wire(_wire: Wire) -> Iterator[Wire]:
    yield _wire
    _wire.is_well()


# ---- the table


@dataclass(frozen=True)
class Case:
    """A request, and the refusal that the contract gives it.

    reasons: more than one where the contract leaves it open.
    field: a pattern for the field of a BadRequest violation; None: none is asked for.
    says: what the sentence (or its violations) must contain: the field, expected and received.
    """

    id: str
    method: str
    data: bytes
    reasons: tuple[Reason, ...]
    field: str | None = None
    says: Sequence[str] = ()


CASES: list[Case] = []


def case(
    id: str, method: str, data: bytes, *reasons: Reason, field: str | None = None, says: Sequence[str] = ()
) -> None:
    CASES.append(Case(id, method, data, reasons, field, says))


def cube(method: str = "ComputeVjp", **fields: Any) -> bytes:
    return request(method, "cube", **{"inputs": {"x": CUBE}, "wrt": ["x"], "cotangents": {"y": CUBE}, **fields})


# models, versions, losses
case("unknown model", "Evaluate", request("Evaluate", "cubes"), Reason.MODEL_NOT_FOUND, says=["cubes", "'cube'"])
case("model of another case", "Evaluate", request("Evaluate", "Cube"), Reason.MODEL_NOT_FOUND, says=["Cube", "'cube'"])
case("absurd model name", "Evaluate", request("Evaluate", "m\n\x00\u00e9" * 50_000), Reason.MODEL_NOT_FOUND)
case("unknown version", "ComputeVjp", cube(function={"version": "99"}), Reason.VERSION_NOT_FOUND, says=["cube", "99"])
case(
    "version that is no number",
    "ComputeVjp",
    cube(function={"version": "latest"}),
    Reason.VERSION_NOT_FOUND,
    says=["cube", "latest"],
)
case(
    "unknown loss",
    "ComputeVjp",
    cube(function=loss("mse"), cotangents={}),
    Reason.LOSS_NOT_FOUND,
    says=["mse", "mse_loss"],
)
case(
    "function of torch that is no loss",
    "ComputeVjp",
    cube(function=loss("relu"), cotangents={}),
    Reason.LOSS_NOT_FOUND,
    says=["relu"],
)
case("private attribute as a loss", "ComputeVjp", cube(function=loss("__dict__")), Reason.LOSS_NOT_FOUND)
case("get an unknown model", "GetModel", request("GetModel", name="cubes"), Reason.MODEL_NOT_FOUND, says=["'cube'"])
case("get an unknown version", "GetModel", request("GetModel", name="cube", version="99"), Reason.VERSION_NOT_FOUND)

# names of inputs
case(
    "missing input",
    "Evaluate",
    request("Evaluate", "pair", inputs={"first": VECTOR}),
    Reason.BAD_NAME,
    field="inputs",
    says=["second"],
)
case("no inputs at all", "Evaluate", request("Evaluate", "cube"), Reason.BAD_NAME, field="inputs", says=["'x'"])
case(
    "extra input",
    "Evaluate",
    request("Evaluate", "cube", inputs={"x": CUBE, "zebra": VECTOR}),
    Reason.BAD_NAME,
    field=r"inputs\[1\]",
    says=["zebra", "'x'"],
)
case(
    "misspelt input",
    "Evaluate",
    request("Evaluate", "pair", inputs={"first": VECTOR, "secnod": VECTOR}),
    Reason.BAD_NAME,
    field="inputs",
    says=["secnod", "second"],
)
case(
    "duplicate input",
    "Evaluate",
    request("Evaluate", "cube", inputs=[("x", CUBE), ("x", CUBE)]),
    Reason.BAD_NAME,
    field=r"inputs",
    says=["x", "twice"],
)
case(
    "input without a name",
    "Evaluate",
    request("Evaluate", "cube", inputs={"": CUBE}),
    Reason.BAD_NAME,
    field="inputs",
    says=["'x'"],
)
case(
    "input of a model whose shapes are not declared",
    "Evaluate",
    request("Evaluate", "anything", inputs={"y": CUBE}),
    Reason.BAD_NAME,
    field="inputs",
    says=["'x'"],
)

# dtypes and shapes against the signature
case(
    "wrong dtype",
    "Evaluate",
    request("Evaluate", "cube", inputs={"x": CUBE.astype("float32")}),
    Reason.BAD_TENSOR,
    field=r"inputs\[0\]",
    says=["x", "float32", "float64"],
)
case(
    "wrong extent",
    "Evaluate",
    request("Evaluate", "cube", inputs={"x": np.ones((2, 4))}),
    Reason.BAD_TENSOR,
    field=r"inputs\[0\]",
    says=["x", "[2, 4]", "[n, 3]"],
)
case(
    "wrong rank",
    "Evaluate",
    request("Evaluate", "cube", inputs={"x": np.ones(3)}),
    Reason.BAD_TENSOR,
    field=r"inputs\[0\]",
    says=["x", "[3]", "[n, 3]"],
)
case(
    "0-d for a matrix",
    "Evaluate",
    request("Evaluate", "cube", inputs={"x": np.float64(1)}),
    Reason.BAD_TENSOR,
    field=r"inputs\[0\]",
    says=["x", "[]", "[n, 3]"],
)
case(
    "named dims that disagree",
    "Evaluate",
    request("Evaluate", "pair", inputs={"first": np.ones(3), "second": np.ones(4)}),
    Reason.BAD_TENSOR,
    field=r"inputs\[1\]",
    says=["second", "n", "3", "4"],
)
case(
    "integer over its declared range",
    "Evaluate",
    request("Evaluate", "lookup", inputs={"ids": array([0, 10], "int64"), "scale": array(1)}),
    Reason.VALUE_OUT_OF_RANGE,
    field=r"inputs",
    says=["ids", "10", "9"],
)
case(
    "integer under its declared range",
    "Evaluate",
    request("Evaluate", "lookup", inputs={"ids": array([-1, 3], "int64"), "scale": array(1)}),
    Reason.VALUE_OUT_OF_RANGE,
    field=r"inputs",
    says=["ids", "-1", "0"],
)

# tensors that contradict themselves
for id_, corrupt, says in [
    ("payload too short", payload(0, lambda data: data[:-1]), ["48", "47"]),
    ("payload too long", payload(0, lambda data: data + b"\0"), ["48", "49"]),
    ("payload empty", payload(0, lambda data: b""), ["48", "0"]),
    ("negative extent", change("inputs", shape=[-2, -3]), ["-2", "0 or more"]),
    ("one negative extent", change("inputs", shape=[2, -3]), ["-3"]),
    ("least int64 as an extent", change("inputs", shape=[-(2**63), 3]), [str(-(2**63))]),
    ("extents that overflow", change("inputs", shape=[2**62, 3]), [str(2**62)]),
    ("extents that overflow to 48 bytes", change("inputs", shape=[2**61 + 2, 3]), []),
    ("extents that overflow beside a zero", change("inputs", shape=[0, 2**62, 4]), []),
    ("a shape larger than memory", change("inputs", shape=[2**40, 3]), ["48"]),
    ("more axes than torch has", change("inputs", shape=[1] * 65), ["65", "64"]),
    ("unknown dtype number", change("inputs", dtype=77), ["77"]),
    ("negative dtype number", change("inputs", dtype=-1), ["-1"]),
    ("no dtype", change("inputs", dtype=0), []),
    ("payload index out of range", change("inputs", payload=5), ["5", "1"]),
    ("greatest payload index", change("inputs", payload=2**32 - 1), [str(2**32 - 1)]),
    ("no payloads", no_payloads, ["0"]),
]:
    case(
        id_,
        "Evaluate",
        request("Evaluate", "cube", inputs={"x": CUBE}, corrupt=corrupt),
        Reason.BAD_TENSOR,
        field=r"inputs\[0\]",
        says=says,
    )
PAIR = {"first": VECTOR, "second": VECTOR}
case(
    "shared payload",
    "Evaluate",
    request("Evaluate", "pair", inputs=PAIR, corrupt=share),
    Reason.BAD_TENSOR,
    field=r"inputs\[1\]",
    says=["0"],
)
case(
    "shared payload and one left over",
    "Evaluate",
    request("Evaluate", "pair", inputs=PAIR, corrupt=share_and_leave_over),
    Reason.BAD_TENSOR,
    field=r"inputs\[1\]",
)
case(
    "orphan payload",
    "Evaluate",
    request("Evaluate", "cube", inputs={"x": CUBE}, corrupt=orphan),
    Reason.BAD_TENSOR,
    field=r"payloads\[1\]",
    says=["payloads[1]"],
)
case(
    "a session's transfer in a unary call",
    "Evaluate",
    request("Evaluate", "cube", inputs={"x": CUBE}, corrupt=change("inputs", transfer=3)),
    Reason.BAD_TENSOR,
    Reason.MALFORMED_REQUEST,
    says=["transfer"],
)
case(
    "cotangent whose payload is short",
    "ComputeVjp",
    cube(corrupt=payload(1, lambda data: data[:8])),
    Reason.BAD_TENSOR,
    field=r"cotangents\[\w+\]",
    says=["48", "8"],
)
case(
    "target whose shape is negative",
    "ComputeVjp",
    cube(
        function=loss("cross_entropy"), cotangents={}, targets={"target": LABELS}, corrupt=change("targets", shape=[-2])
    ),
    Reason.BAD_TENSOR,
    field=r"targets\[\w+\]",
    says=["-2"],
)

# cotangents
case(
    "[2] for a scalar",
    "ComputeVjp",
    request("ComputeVjp", "energy", inputs={"x": VECTOR}, cotangents={"e": np.ones(2)}),
    Reason.BAD_COTANGENT,
    field=r"cotangents\[\w+\]",
    says=["e", "[2]", "[]"],
)
case(
    "[1] for a scalar",
    "ComputeVjp",
    request("ComputeVjp", "energy", inputs={"x": VECTOR}, cotangents={"e": np.ones(1)}),
    Reason.BAD_COTANGENT,
    field=r"cotangents\[\w+\]",
    says=["e", "[1]", "[]"],
)
case(
    "[4] for a [2, 2]",
    "ComputeVjp",
    request("ComputeVjp", "anything", inputs={"x": np.ones((2, 2))}, cotangents={"y": np.ones(4)}),
    Reason.BAD_COTANGENT,
    field=r"cotangents\[\w+\]",
    says=["y", "[4]", "[2, 2]"],
)
case(
    "scalar for a [2, 3], which would broadcast",
    "ComputeVjp",
    cube(cotangents={"y": np.float64(1)}),
    Reason.BAD_COTANGENT,
    field=r"cotangents\[\w+\]",
    says=["y", "[]", "[2, 3]"],
)
case(
    "[1, 3] for a [2, 3], which would broadcast",
    "ComputeHvp",
    cube("ComputeHvp", cotangents={"y": np.ones((1, 3))}, tangents={"x": CUBE}),
    Reason.BAD_COTANGENT,
    field=r"cotangents\[\w+\]",
    says=["y", "[1, 3]", "[2, 3]"],
)
for narrow in ("float32", "complex128", "int64"):
    case(
        f"{narrow} cotangent for a float64 output",
        "ComputeVjp",
        cube(cotangents={"y": CUBE.astype(narrow)}),
        Reason.BAD_COTANGENT,
        field=r"cotangents\[\w+\]",
        says=["y", narrow, "float64"],
    )
case(
    "cotangent of an unknown output",
    "ComputeVjp",
    cube(cotangents={"why": CUBE}),
    Reason.BAD_NAME,
    field=r"cotangents\[\w+\]",
    says=["why", "'y'"],
)
case(
    "duplicate cotangent",
    "ComputeVjp",
    cube(cotangents=[("y", CUBE), ("y", CUBE)]),
    Reason.BAD_NAME,
    field=r"cotangents",
    says=["y", "twice"],
)
case(
    "cotangent of an integer output",
    "ComputeVjp",
    request("ComputeVjp", "two", inputs={"x": VECTOR}, cotangents={"index": array(1, "int64")}),
    Reason.NOT_DIFFERENTIABLE,
    Reason.BAD_COTANGENT,
    says=["index"],
)
for method in ("ComputeVjp", "ComputeHvp"):
    case(
        f"{method}: missing cotangent of a non-scalar",
        method,
        request(method, "cube", inputs={"x": CUBE}, **moved("x", CUBE, method)),
        Reason.MISSING_COTANGENT,
        says=["y", "[2, 3]"],
    )
    case(
        f"{method}: missing cotangents of several outputs",
        method,
        request(method, "two", inputs={"x": VECTOR}, **moved("x", VECTOR, method)),
        Reason.MISSING_COTANGENT,
        says=["square", "total"],
    )
    case(
        f"{method}: missing cotangent of a complex scalar",
        method,
        request(method, "spectrum", inputs={"z": VECTOR + 1j}, **moved("z", VECTOR + 1j, method)),
        Reason.MISSING_COTANGENT,
        says=["y", "complex128"],
    )
case(
    "unreduced loss without a cotangent",
    "ComputeVjp",
    cube(function=loss("mse_loss", {"reduction": "none"}), cotangents={}, targets={"target": CUBE}),
    Reason.MISSING_COTANGENT,
    says=["loss", "[2, 3]"],
)

# several cotangents at once
BATCH = {"cotangents_batched": True}
case(
    "K over the limit",
    "ComputeVjp",
    cube(cotangents={"y": np.ones((MAX_COTANGENTS + 1, 2, 3))}, **BATCH),
    Reason.RESULT_TOO_LARGE,
    says=[str(MAX_COTANGENTS + 1), str(MAX_COTANGENTS)],
)
for extent in (10**6, 2**40):
    case(
        f"K = {extent} cotangents of no bytes",
        "ComputeVjp",
        request(
            "ComputeVjp",
            "cube",
            inputs={"x": np.ones((0, 3))},
            cotangents={"y": np.ones((0, 0, 3))},
            corrupt=change("cotangents", shape=[extent, 0, 3]),
            **BATCH,
        ),
        Reason.RESULT_TOO_LARGE,
        says=[str(extent), str(MAX_COTANGENTS)],
    )
case(
    "K gradients larger than the limit, from small cotangents",
    "ComputeVjp",
    request("ComputeVjp", "energy", inputs={"x": np.ones(4000)}, cotangents={"e": np.ones(64)}, **BATCH),
    Reason.RESULT_TOO_LARGE,
    says=[str(LIMIT)],
)
case(
    "batched cotangents that have no axis of K",
    "ComputeVjp",
    cube(**BATCH),
    Reason.BAD_COTANGENT,
    field=r"cotangents\[\w+\]",
    says=["y", "[2, 3]"],
)
case(
    "a batched cotangent of a scalar without any axis",
    "ComputeVjp",
    request("ComputeVjp", "energy", inputs={"x": VECTOR}, cotangents={"e": array(1)}, **BATCH),
    Reason.BAD_COTANGENT,
    field=r"cotangents\[\w+\]",
    says=["e", "[]"],
)
case(
    "batched cotangents that disagree on K",
    "ComputeVjp",
    request(
        "ComputeVjp", "two", inputs={"x": VECTOR}, cotangents={"square": np.ones((4, 3)), "total": np.ones(5)}, **BATCH
    ),
    Reason.BAD_COTANGENT,
    field=r"cotangents\[\w+\]",
    says=["4", "5"],
)
case(
    "batched, without cotangents",
    "ComputeVjp",
    request("ComputeVjp", "energy", inputs={"x": VECTOR}, **BATCH),
    Reason.MISSING_COTANGENT,
    Reason.BAD_OPTION,
    Reason.BAD_COTANGENT,
)

# tangents
for method in ("ComputeJvp", "ComputeHvp"):
    more: dict[str, Any] = {"cotangents": {"y": CUBE}} if method == "ComputeHvp" else {}

    def pushed(tangents: Any, method: str = method, more: dict[str, Any] = more, **fields: Any) -> bytes:
        return request(method, "cube", inputs={"x": CUBE}, tangents=tangents, **more, **fields)

    for id_, tangents, reason, says in [
        ("tangent of another shape", {"x": np.ones((3, 2))}, Reason.BAD_COTANGENT, ["x", "[3, 2]", "[2, 3]"]),
        ("tangent that would broadcast", {"x": np.ones((1, 3))}, Reason.BAD_COTANGENT, ["x", "[1, 3]", "[2, 3]"]),
        ("float32 tangent", {"x": CUBE.astype("f4")}, Reason.BAD_COTANGENT, ["x", "float32", "float64"]),
        ("tangent of an output", {"y": CUBE}, Reason.BAD_NAME, ["y", "x"]),
        ("glob as a tangent", {"*": CUBE}, Reason.BAD_NAME, ["*"]),
        ("duplicate tangent", [("x", CUBE), ("x", CUBE)], Reason.BAD_NAME, ["x"]),
        ("one tangent under two names", [("x", CUBE), ("input:x", CUBE)], Reason.BAD_NAME, ["x"]),
    ]:
        case(f"{method}: {id_}", method, pushed(tangents), reason, field="tangents", says=says)
LOOKUP = {"ids": array([1, 2], "int64"), "scale": array(2)}
case(
    "tangent of an integer",
    "ComputeJvp",
    request("ComputeJvp", "lookup", inputs=LOOKUP, tangents={"ids": array([1, 1], "int64")}),
    Reason.NOT_DIFFERENTIABLE,
    Reason.BAD_COTANGENT,
    says=["ids", "int64"],
)
case(
    "tangent of what is not in wrt",
    "ComputeHvp",
    request(
        "ComputeHvp",
        "pair",
        inputs=PAIR,
        wrt=["first"],
        cotangents={"p": VECTOR},
        tangents={"first": VECTOR, "second": VECTOR},
    ),
    Reason.BAD_NAME,
    field="tangents",
    says=["second", "wrt"],
)

# wrt
LOOKED_UP = {"inputs": LOOKUP, "cotangents": {"y": np.ones((2, 4))}}
for id_, wrt, reasons, says in [
    ("wrt of an integer input", ["ids"], (Reason.NOT_DIFFERENTIABLE,), ["ids", "int64"]),
    ("wrt of an integer input by prefix", ["input:ids"], (Reason.NOT_DIFFERENTIABLE,), ["ids", "int64"]),
    ("unknown wrt", ["idz"], (Reason.BAD_NAME,), ["idz", "ids"]),
    ("empty wrt", [""], (Reason.BAD_NAME,), []),
    ("ambiguous wrt", ["scale"], (Reason.BAD_NAME,), ["input:scale", "param:scale"]),
    ("wrt of an unknown parameter", ["param:ids"], (Reason.BAD_NAME,), ["ids"]),
    ("wrt of an output", ["y"], (Reason.BAD_NAME,), ["y"]),
    ("wrt with an unknown prefix", ["buffer:scale"], (Reason.BAD_NAME,), ["buffer:scale"]),
    ("wrt glob that matches nothing", ["tabel.*"], (Reason.BAD_NAME,), ["tabel.*"]),
    ("wrt glob that matches only integers", ["id*"], (Reason.BAD_NAME, Reason.NOT_DIFFERENTIABLE), ["id*"]),
    ("wrt glob over targets without a loss", ["target:*"], (Reason.BAD_NAME,), ["target"]),
    ("wrt glob that cannot be", ["["], (Reason.BAD_NAME,), ["["]),
    ("wrt glob with a reversed range", ["[z-a]"], (Reason.BAD_NAME,), ["[z-a]"]),
    ("wrt glob that backtracks", ["*a" * 200 + "!"], (Reason.BAD_NAME,), []),
    ("wrt twice", ["input:scale", "input:scale"], (Reason.BAD_NAME,), ["scale", "twice"]),
]:
    case(
        id_,
        "ComputeVjp",
        request("ComputeVjp", "lookup", wrt=wrt, **LOOKED_UP),
        *reasons,
        field="wrt" if reasons == (Reason.BAD_NAME,) else None,
        says=says,
    )
case(
    "nothing to differentiate by",
    "ComputeVjp",
    request("ComputeVjp", "anything", inputs={"x": array([1, 2], "int64")}, cotangents={"y": array([1, 2], "int64")}),
    Reason.NOT_DIFFERENTIABLE,
    Reason.BAD_NAME,
    says=["int64"],
)
for method in ("ComputeVjp", "ComputeHvp", "ComputeJacobian", "ComputeHessian"):
    for name in ("index", "detached", "no_grad"):
        case(
            f"{method}: output of {name} needs no grad",
            method,
            request(method, name, inputs={"x": VECTOR}, **moved("x", VECTOR, method)),
            Reason.NOT_DIFFERENTIABLE,
            says=["y"],
        )
SPARE = {"inputs": {"used": VECTOR, "spare": VECTOR}, "wrt": ["used", "spare"]}
for method in ("ComputeVjp", "ComputeHvp", "ComputeJacobian"):
    given_ = {} if method == "ComputeJacobian" else {"cotangents": {"y": VECTOR}}
    case(
        f"{method}: unused input",
        method,
        request(method, "ignores", **SPARE, **given_, **moved("used", VECTOR, method)),
        Reason.UNUSED_INPUT,
        says=["spare", "allow_unused"],
    )
case(
    "target without a prefix in wrt",
    "ComputeVjp",
    cube(function=loss("mse_loss"), cotangents={}, targets={"target": CUBE}, wrt=["target"]),
    Reason.BAD_NAME,
    field="wrt",
    says=["target:target"],
)

# given parameters
case(
    "unknown parameter",
    "ComputeVjp",
    request("ComputeVjp", "lookup", parameters={"table.wieght": np.ones((10, 4))}, wrt=["input:scale"], **LOOKED_UP),
    Reason.BAD_NAME,
    field=r"parameters\[0\]",
    says=["table.wieght", "table.weight"],
)
case(
    "parameter of another shape",
    "ComputeVjp",
    request("ComputeVjp", "lookup", parameters={"table.weight": np.ones((4, 10))}, wrt=["input:scale"], **LOOKED_UP),
    Reason.BAD_TENSOR,
    field=r"parameters\[0\]",
    says=["table.weight", "[4, 10]", "[10, 4]"],
)
case(
    "parameter of another dtype",
    "ComputeVjp",
    request("ComputeVjp", "lookup", parameters={"scale": array(1, "float32")}, wrt=["input:scale"], **LOOKED_UP),
    Reason.BAD_TENSOR,
    field=r"parameters\[0\]",
    says=["scale", "float32", "float64"],
)
case(
    "duplicate parameter",
    "ComputeVjp",
    request("ComputeVjp", "lookup", parameters=[("scale", 1.0), ("scale", 2.0)], wrt=["input:scale"], **LOOKED_UP),
    Reason.BAD_NAME,
    field=r"parameters",
    says=["scale", "twice"],
)
case(
    "parameter for a function that has none",
    "ComputeVjp",
    cube(parameters={"weight": CUBE}),
    Reason.BAD_NAME,
    field=r"parameters\[0\]",
    says=["weight"],
)

# losses
ENTROPY = {"function": loss("cross_entropy"), "cotangents": {}}
case(
    "target without a loss",
    "ComputeVjp",
    cube(targets={"target": LABELS}),
    Reason.BAD_NAME,
    Reason.BAD_OPTION,
    says=["target"],
)
case(
    "missing target", "ComputeVjp", cube(**ENTROPY), Reason.BAD_NAME, field="targets", says=["target", "cross_entropy"]
)
case(
    "misspelt target",
    "ComputeVjp",
    cube(**ENTROPY, targets={"targte": LABELS}),
    Reason.BAD_NAME,
    field="targets",
    says=["targte", "'target'"],
)
case(
    "duplicate target",
    "ComputeVjp",
    cube(**ENTROPY, targets=[("target", LABELS), ("target", LABELS)]),
    Reason.BAD_NAME,
    field="targets",
    says=["target", "twice"],
)
for wrong in (3, -1, 2**62):
    case(
        f"class {wrong} of 3",
        "ComputeVjp",
        cube(**ENTROPY, targets={"target": array([0, wrong], "int64")}),
        Reason.VALUE_OUT_OF_RANGE,
        says=["target", str(wrong), "0 to 2"],
    )
case(
    "class out of range, nll_loss",
    "ComputeVjp",
    cube(function=loss("nll_loss"), cotangents={}, targets={"target": array([0, 3], "int64")}),
    Reason.VALUE_OUT_OF_RANGE,
    says=["target", "3"],
)
case(
    "classes for another number of rows",
    "ComputeVjp",
    cube(**ENTROPY, targets={"target": array([0, 1, 2], "int64")}),
    Reason.BAD_TENSOR,
    says=["target", "[3]"],
)
case(
    "class weights of another length",
    "ComputeVjp",
    cube(**ENTROPY, targets={"target": LABELS, "weight": np.ones(4)}),
    Reason.BAD_TENSOR,
    says=["weight", "[4]", "3"],
)
for id_, function, says in [
    ("option of the wrong type", loss("cross_entropy", {"label_smoothing": "much"}), ["label_smoothing", "much"]),
    ("option that is a list", loss("cross_entropy", {"label_smoothing": [0.1]}), ["label_smoothing"]),
    ("option that is a struct", loss("cross_entropy", {"ignore_index": {"a": 1}}), ["ignore_index"]),
    ("integer option with a fraction", loss("cross_entropy", {"ignore_index": 1.5}), ["ignore_index", "1.5"]),
    ("integer option out of reach", loss("cross_entropy", {"ignore_index": 1e300}), ["ignore_index"]),
    ("option out of its range", loss("cross_entropy", {"label_smoothing": 7.0}), ["label_smoothing", "7"]),
    ("unknown option", loss("cross_entropy", {"label_smooting": 0.1}), ["label_smooting", "label_smoothing"]),
    ("tensor argument as an option", loss("cross_entropy", {"weight": 1.0}), ["weight"]),
    ("bad reduction", loss("cross_entropy", {"reduction": "average"}), ["reduction", "average", "mean"]),
    ("reduction that is a number", loss("cross_entropy", {"reduction": 1}), ["reduction"]),
]:
    case(
        f"loss {id_}",
        "ComputeVjp",
        cube(function=function, cotangents={}, targets={"target": LABELS}),
        Reason.BAD_OPTION,
        says=says,
    )
for id_, bindings, says in [
    ("to an unknown output", {"input": "logits"}, ["logits", "y"]),
    ("to an unknown argument", {"inptu": "y"}, ["inptu", "input"]),
]:
    case(
        f"loss bound {id_}",
        "ComputeVjp",
        cube(function=loss("cross_entropy", bindings=bindings), cotangents={}, targets={"target": LABELS}),
        Reason.BAD_NAME,
        says=says,
    )
case(
    "loss argument that is both bound and given",
    "ComputeVjp",
    request(
        "ComputeVjp",
        "two",
        function=loss("mse_loss", bindings={"input": "square", "target": "square"}),
        inputs={"x": VECTOR},
        targets={"target": VECTOR},
    ),
    Reason.BAD_NAME,
    says=["target"],
)
case(
    "loss after several outputs, not bound",
    "ComputeVjp",
    request("ComputeVjp", "two", function=loss("mse_loss"), inputs={"x": VECTOR}, targets={"target": VECTOR}),
    Reason.BAD_NAME,
    Reason.BAD_OPTION,
    says=["square", "total"],
)
for id_, output, target in [
    ("[N, 1] and [N]", np.ones((4, 1)), np.ones(4)),
    ("[N] and [N, 1]", np.ones(4), np.ones((4, 1))),
    ("[N] and a scalar", np.ones(4), array(1)),
    ("[N] and [M]", np.ones(4), np.ones(5)),
]:
    case(
        f"mse_loss of {id_}",
        "ComputeVjp",
        request("ComputeVjp", "anything", function=loss("mse_loss"), inputs={"x": output}, targets={"target": target}),
        Reason.BAD_TENSOR,
        says=["target", str(list(output.shape)), str(list(target.shape))],
    )
case(
    "cotangent under the model's name of an output that the loss has replaced",
    "ComputeVjp",
    cube(function=loss("mse_loss"), cotangents={"y": CUBE}, targets={"target": CUBE}),
    Reason.BAD_NAME,
    field=r"cotangents\[\w+\]",
    says=["y", "loss"],
)

# options
for id_, value in [("negative", -1.0), ("NaN", float("nan")), ("negative infinity", float("-inf"))]:
    case(f"max_norm {id_}", "ComputeVjp", cube(max_norm=value), Reason.BAD_OPTION, says=["max_norm"])
for id_, number in [
    ("int64", tensor_pb2.DTYPE_INT64),
    ("bool", tensor_pb2.DTYPE_BOOL),
    ("complex64", tensor_pb2.DTYPE_COMPLEX64),
    ("float8", tensor_pb2.DTYPE_FLOAT8_E5M2),
    ("unknown", 77),
    ("negative", -3),
]:
    case(
        f"result dtype {id_}",
        "ComputeVjp",
        cube(results={"dtype": number}),
        Reason.BAD_OPTION,
        says=["results.dtype", "float32"],
    )
for number in (7, -1):
    case(f"mode {number}", "ComputeVjp", cube(function={"mode": number}), Reason.BAD_OPTION, says=["mode", str(number)])
case(
    "evaluate without its outputs",
    "Evaluate",
    request("Evaluate", "cube", inputs={"x": CUBE}, results={"omit_outputs": True}),
    Reason.BAD_OPTION,
    says=["omit_outputs"],
)

# dense derivatives
case(
    "Jacobian over the limit",
    "ComputeJacobian",
    request("ComputeJacobian", "cube", inputs={"x": np.ones((150, 3))}),
    Reason.RESULT_TOO_LARGE,
    says=[str(LIMIT), "16"],
)
case(
    "Hessian over the limit",
    "ComputeHessian",
    request("ComputeHessian", "energy", inputs={"x": np.ones(400)}),
    Reason.RESULT_TOO_LARGE,
    says=[str(LIMIT), "128"],
)
case(
    "Hessian over the limit only by its second wrt",
    "ComputeHessian",
    request(
        "ComputeHessian",
        "pair",
        function=loss("mse_loss"),
        inputs={"first": np.ones(300), "second": np.ones(300)},
        targets={"target": np.ones(300)},
    ),
    Reason.RESULT_TOO_LARGE,
    says=[str(LIMIT)],
)
for method in ("ComputeJacobian", "ComputeHessian"):
    case(
        f"{method} of a complex input",
        method,
        request(method, "spectrum", inputs={"z": VECTOR + 1j}),
        Reason.COMPLEX_UNSUPPORTED,
        says=["z", "complex128", "ComputeVjp"],
    )
case(
    "Hessian of a non-scalar",
    "ComputeHessian",
    request("ComputeHessian", "cube", inputs={"x": CUBE}),
    Reason.MISSING_COTANGENT,
    says=["y", "[2, 3]"],
)
case(
    "outputs over the limit",
    "Evaluate",
    request("Evaluate", "widen", inputs={"x": VECTOR}),
    Reason.RESULT_TOO_LARGE,
    says=[str(LIMIT)],
)

# models that fail
X = {"inputs": {"x": VECTOR}}
for name, says in [
    ("raises", ["ValueError", "the pressure is negative"]),
    ("raises_at_length", ["ValueError", "begin xxxxx"]),
    ("raises_in_many_lines", ["ValueError", "one", "two"]),
    ("raises_beyond_unicode", ["ValueError", "lone surrogate"]),
    ("raises_unprintably", ["Unprintable"]),
    ("recurses", ["RecursionError"]),
    ("exits", ["SystemExit", "3"]),
    ("interrupts", ["KeyboardInterrupt"]),
    ("returns_none", ["None"]),
    ("returns_text", ["str"]),
    ("returns_float", ["float"]),
    ("returns_nested_none", ["no tensor"]),
    ("returns_nothing_in_particular", ["no tensor"]),
    ("returns_a_tensor_and_text", ["str"]),
    ("returns_itself", []),
    ("returns_meta", ["meta"]),
    ("returns_too_few", ["2"]),
]:
    for method in ("Evaluate", "ComputeVjp"):
        reasons = (Reason.MODEL_ERROR,)
        if name == "returns_meta" and method == "ComputeVjp":
            reasons += (Reason.NOT_DIFFERENTIABLE,)
        case(f"{method}: {name}", method, request(method, name, **X), *reasons, says=[name, *says])
for name, says in [("backward_raises", ["ArithmeticError", "the backward gave up"]), ("backward_misshapes", [])]:
    case(
        name,
        "ComputeVjp",
        request("ComputeVjp", name, cotangents={"y": VECTOR}, **X),
        Reason.MODEL_ERROR,
        says=[name, *says],
    )

for at, kind in enumerate(bad_models.KINDS):
    memory = kind is MemoryError
    case(
        f"raises {kind.__name__}",
        "ComputeVjp",
        request("ComputeVjp", "raises_kind", inputs={"kind": array(at, "int64"), "x": VECTOR}),
        Reason.OUT_OF_MEMORY if memory else Reason.MODEL_ERROR,
        says=["raises_kind", "of some kind", *([] if memory else [kind.__name__])],
    )

# messages
case("empty message", "ComputeVjp", b"", Reason.MODEL_NOT_FOUND, Reason.BAD_NAME, Reason.MALFORMED_REQUEST)
for id_, data in [
    ("text", b"GET / HTTP/1.1\r\n\r\n"),
    ("a string that is not UTF-8", b"\x0a\x04\x0a\x02\xff\xfe"),
    ("a field longer than the message", b"\x0a\x7f\x0a"),
    ("an endless varint", b"\xff" * 64),
    ("a length of 2**63", b"\x0a" + b"\xff" * 9 + b"\x01"),
    ("field number 0", b"\x02\x00"),
    ("an end without a group", b"\x0c"),
]:
    case(f"message: {id_}", "ComputeVjp", data, Reason.MALFORMED_REQUEST)
case(
    "message: a payload longer than the message",
    "ComputeVjp",
    b"\xa2\x06\xff\xff\xff\xff\x0f",
    Reason.MALFORMED_REQUEST,
    Reason.BAD_TENSOR,
)
case("message: options nested beyond what protobuf reads", "ComputeVjp", nested(150), Reason.MALFORMED_REQUEST)
for method in METHODS:
    if method != "ListModels":
        case(f"{method}: malformed", method, b"\x0a\x7f\x0a", Reason.MALFORMED_REQUEST, Reason.ADMIN_DISABLED)
for method in ("LoadModel", "UnloadModel"):
    case(f"{method}: not enabled", method, request(method, name="cube"), Reason.ADMIN_DISABLED)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_each_fault_has_its_code_reason_field_and_sentence(wire: Wire, case: Case) -> None:
    got = wire.refused(case.method, case.data)
    assert got.reason in {reason.value for reason in case.reasons}, got
    assert got.code.value[0] == Reason(got.reason).code, got
    assert got.domain == ERROR_DOMAIN
    assert not got.retry, "a retry would fail again"
    assert got.size < 4096
    assert len(got.message) >= 10
    # As it travels: percent-encoded, and base64. Clients drop a part of all calls whose trailers exceed 8 KiB.
    assert len(quote(got.message, safe=" !#$&'()*+,/:;=?@[]\"")) + 4 * got.size / 3 < 7000, got
    assert not re.search(r"Traceback|File \"|\.py\b", got.message), got
    assert got.reason == Reason.MODEL_ERROR.value or got.message.isprintable(), got
    if case.field is not None:
        assert any(re.match(case.field, where) for where, _ in got.violations), got
    for words in case.says:
        assert words in got.all_text, (words, got)
        if case.field is None:
            assert words in got.message, (words, got)


def test_case_ids_are_unique() -> None:
    ids = [case.id for case in CASES]
    assert len(ids) == len(set(ids))


def test_violations_name_fields_by_path(wire: Wire) -> None:
    """One notation throughout, that of the wire: "cotangents[0].shape", never "cotangents[y].shape"."""
    table: list[tuple[str, str, bytes]] = [
        ("inputs[0].shape", "Evaluate", request("Evaluate", "cube", inputs={"x": np.ones(3)})),
        ("cotangents[0].shape", "ComputeVjp", cube(cotangents={"y": np.ones(4)})),
        ("cotangents[0].dtype", "ComputeVjp", cube(cotangents={"y": CUBE.astype("f4")})),
        ("targets[0]", "ComputeVjp", cube(**ENTROPY, targets={"target": array([0, 3], "int64")})),
        ("tangents[0].shape", "ComputeJvp", request("ComputeJvp", "energy", **X, tangents={"x": np.ones(2)})),
        ("wrt[0]", "ComputeVjp", cube(wrt=["z"])),
    ]
    got = [[where for where, _ in wire.refused(method, data).violations] for _, method, data in table]
    assert got == [[path] for path, _, _ in table]


# ---- what is not a fault


def test_an_unused_input_that_is_allowed_is_marked_and_not_zero(wire: Wire) -> None:
    data = request("ComputeVjp", "ignores", **SPARE, cotangents={"y": VECTOR}, allow_unused=True)
    message, found = results("ComputeVjp", wire.send("ComputeVjp", data))
    assert [(gradient.name, gradient.unused) for gradient in message.gradients] == [("used", False), ("spare", True)]
    np.testing.assert_allclose(found["gradients:used"], 2 * VECTOR * VECTOR)
    assert not message.gradients[1].HasField("value")


@pytest.mark.parametrize("method", ["ComputeHvp", "ComputeJacobian"])
def test_an_unused_input_that_is_allowed_is_marked_in_higher_calls_too(wire: Wire, method: str) -> None:
    more = {} if method == "ComputeJacobian" else {"cotangents": {"y": VECTOR}, "tangents": {"used": VECTOR}}
    data = request(method, "ignores", **SPARE, **more, allow_unused=True)
    message, _ = results(method, wire.send(method, data))
    entries = message.blocks if method == "ComputeJacobian" else [*message.gradients, *message.hvps]
    for entry in entries:
        name = entry.column if method == "ComputeJacobian" else entry.name
        assert entry.unused == (name == "spare"), message
        assert entry.HasField("value") != entry.unused


def test_nan_and_infinity_travel(wire: Wire) -> None:
    x = np.array([[np.nan, np.inf, -np.inf], [-0.0, 1e308, 5e-324]])
    v = np.array([[1.0, 2.0, 0.0], [np.nan, np.inf, -np.inf]])
    data = request("ComputeVjp", "cube", inputs={"x": x}, cotangents={"y": v}, wrt=["x"])
    _, found = results("ComputeVjp", wire.send("ComputeVjp", data))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(found["outputs:y"], x**3)
        np.testing.assert_array_equal(found["gradients:x"], v * (3 * x**2))
    assert np.signbit(found["outputs:y"][1, 0])


def test_nan_is_not_taken_for_a_value_in_range(wire: Wire) -> None:
    """mse_loss of a NaN target is NaN, not an error."""
    target = np.full_like(CUBE, np.nan)
    data = cube(function=loss("mse_loss"), cotangents={}, targets={"target": target})
    _, found = results("ComputeVjp", wire.send("ComputeVjp", data))
    assert np.isnan(found["outputs:loss"])
    assert np.isnan(found["gradients:x"]).all()


def test_an_ignored_class_is_no_class_out_of_range(wire: Wire) -> None:
    data = cube(**ENTROPY, targets={"target": array([0, -100], "int64")})
    _, found = results("ComputeVjp", wire.send("ComputeVjp", data))
    assert np.abs(found["gradients:x"][0]).max() > 0
    np.testing.assert_array_equal(found["gradients:x"][1], 0)


@pytest.mark.parametrize("max_norm", [0.5, 1e9, float("inf")])
def test_max_norm_clips_as_torch_does_and_reports_the_norm(wire: Wire, max_norm: float) -> None:
    plain = 3 * CUBE**2 * CUBE
    norm = np.linalg.norm(plain)
    message, found = results("ComputeVjp", wire.send("ComputeVjp", cube(max_norm=max_norm)))
    np.testing.assert_allclose(message.norms, [norm])
    np.testing.assert_allclose(found["gradients:x"], plain * min(1.0, max_norm / (norm + 1e-6)))


def test_a_max_norm_of_zero_gives_zeros_or_is_refused(wire: Wire) -> None:
    """torch.nn.utils.clip_grad_norm_ gives zeros; never may it mean "no clipping"."""
    try:
        _, found = results("ComputeVjp", wire.send("ComputeVjp", cube(max_norm=0.0)))
    except grpc.RpcError as error:
        assert refusal(error).reason == Reason.BAD_OPTION.value
    else:
        np.testing.assert_array_equal(found["gradients:x"], 0)


def test_integers_of_another_width_are_refused_or_mean_the_same_classes(wire: Wire) -> None:
    """torch refuses int32 targets; casting them is kinder, and right as long as the numbers are."""
    try:
        data = cube(**ENTROPY, targets={"target": LABELS.astype("int32")})
        _, narrow = results("ComputeVjp", wire.send("ComputeVjp", data))
    except grpc.RpcError as error:
        assert refusal(error).reason == Reason.BAD_TENSOR.value
    else:
        data = cube(**ENTROPY, targets={"target": LABELS})
        np.testing.assert_array_equal(
            narrow["gradients:x"], results("ComputeVjp", wire.send("ComputeVjp", data))[1]["gradients:x"]
        )


def test_a_sparse_output_is_refused_or_travels_dense(wire: Wire) -> None:
    try:
        _, found = results("Evaluate", wire.send("Evaluate", request("Evaluate", "returns_sparse", **X)))
    except grpc.RpcError as error:
        assert refusal(error).reason == Reason.MODEL_ERROR.value
    else:
        np.testing.assert_array_equal(found["outputs:output"], VECTOR)


def test_an_hvp_without_tangents_is_refused_or_zero(wire: Wire) -> None:
    """ "t for any subset of S": the empty one too, or a sentence that asks for one."""
    try:
        _, found = results("ComputeHvp", wire.send("ComputeHvp", cube("ComputeHvp")))
    except grpc.RpcError as error:
        assert refusal(error).reason == Reason.BAD_NAME.value
    else:
        np.testing.assert_array_equal(found["hvps:x"], 0)


def test_no_cotangents_at_once_give_no_gradients_or_are_refused(wire: Wire) -> None:
    data = cube(cotangents={"y": np.ones((0, 2, 3))}, **BATCH)
    try:
        _, found = results("ComputeVjp", wire.send("ComputeVjp", data))
    except grpc.RpcError as error:
        assert refusal(error).reason == Reason.BAD_COTANGENT.value
    else:
        assert found["gradients:x"].shape == (0, 2, 3)


def test_as_many_cotangents_as_the_limit_allows(wire: Wire) -> None:
    v = np.random.default_rng(0).standard_normal((MAX_COTANGENTS, 2, 3))
    _, found = results("ComputeVjp", wire.send("ComputeVjp", cube(cotangents={"y": v}, **BATCH)))
    np.testing.assert_allclose(found["gradients:x"], 3 * CUBE**2 * v)


def test_a_glob_passes_over_integers(wire: Wire) -> None:
    data = request("ComputeVjp", "lookup", wrt=["*"], **LOOKED_UP)
    message, _ = results("ComputeVjp", wire.send("ComputeVjp", data))
    assert {gradient.name for gradient in message.gradients} == {"input:scale", "param:scale", "table.weight"}


def test_unknown_fields_are_passed_over(wire: Wire) -> None:
    """A newer client's field, before and after the payloads."""
    unknown = b"\xba\x3e\x03abc"
    _, found = results("ComputeVjp", wire.send("ComputeVjp", unknown + cube() + unknown))
    np.testing.assert_allclose(found["gradients:x"], 3 * CUBE**3)


def test_payloads_may_come_first(wire: Wire) -> None:
    """Protobuf fields have no order."""
    whole = cube()
    header = decode(METHODS["ComputeVjp"].request, whole)[0].SerializeToString()
    payloads = encode(b"", [CUBE.tobytes(), CUBE.tobytes()])
    _, found = results("ComputeVjp", wire.send("ComputeVjp", payloads + header))
    np.testing.assert_allclose(found["gradients:x"], 3 * CUBE**3)


def test_what_one_call_does_to_torch_the_next_does_not_meet(wire: Wire) -> None:
    wire.send("Evaluate", request("Evaluate", "upsets_torch", inputs={"x": VECTOR}))
    wire.is_well()
    draw = request("Evaluate", "draws", inputs={"x": array([0, 0, 0])})
    wire.send("Evaluate", draw)
    x = array([1, 1, 1])
    first, second = (
        results("Evaluate", wire.send("Evaluate", request("Evaluate", "draws", inputs={"x": x})))[1]["outputs:y"]
        for _ in range(2)
    )
    assert (first != second).any(), "without a seed two draws are alike: a seed of an earlier call is still set"
    assert (first == first.astype("float32")).all(), "torch's default dtype is not float32 any more"


# ---- too much


def test_a_message_over_the_limit(wire: Wire) -> None:
    data = request("Evaluate", "energy", inputs={"x": np.ones(LIMIT // 8 + 1)})
    got = wire.refused("Evaluate", data)
    assert got.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not got.retry
    assert str(LIMIT) in got.message and str(len(data)) in got.message


def test_a_message_of_just_the_limit(wire: Wire) -> None:
    size = (LIMIT - 200) // 8
    x = np.arange(size, dtype="float64")
    data = request("ComputeVjp", "energy", inputs={"x": x}, results={"dtype": tensor_pb2.DTYPE_FLOAT32})
    assert len(data) <= LIMIT
    _, found = results("ComputeVjp", wire.send("ComputeVjp", data))
    assert found["gradients:x"].dtype == np.float32
    np.testing.assert_allclose(found["gradients:x"], 3 * x**2, rtol=1e-6)


def test_a_hundred_thousand_empty_payloads(wire: Wire) -> None:
    got = wire.refused("Evaluate", request("Evaluate", "cube", inputs={"x": CUBE}) + encode(b"", [b""] * 100_000))
    assert got.reason == Reason.BAD_TENSOR.value
    assert got.size < 4096


def test_ten_thousand_wrong_names(wire: Wire) -> None:
    inputs = {f"input number {number}": array(1) for number in range(10_000)}
    got = wire.refused("Evaluate", request("Evaluate", "cube", inputs=inputs))
    assert got.reason == Reason.BAD_NAME.value
    assert 0 < got.size < 4096


def test_an_unknown_method(wire: Wire) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        wire.channel.unary_unary("/pullback.v1.GradientService/ComputeMagic")(b"", timeout=PATIENCE)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


# ---- arbitrary bytes

FUZZ = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
VALID = {
    "Evaluate": request("Evaluate", "cube", inputs={"x": CUBE}),
    "ComputeVjp": cube(function={**loss("cross_entropy", {"label_smoothing": 0.1}), "seed": 3}, cotangents={}),
    "ComputeJvp": request("ComputeJvp", "pair", inputs=PAIR, tangents={"first": VECTOR}),
    "ComputeHvp": cube("ComputeHvp", tangents={"x": CUBE}),
    "ComputeJacobian": request("ComputeJacobian", "two", inputs={"x": VECTOR}),
    "ComputeHessian": request("ComputeHessian", "energy", inputs={"x": VECTOR}),
    "GetModel": request("GetModel", name="cube"),
}


def answered_or_mapped(wire: Wire, method: str, data: bytes) -> bool:
    """Sends; true when it was answered. A refusal is one of the contract's, and none of the server's own faults."""
    try:
        results(method, wire.send(method, data))
    except grpc.RpcError as error:
        got = refusal(error)
        assert got.reason in {reason.value for reason in Reason}, got
        assert got.code.value[0] == Reason(got.reason).code, got
        assert got.reason not in ("INTERNAL", "WORKER_LOST", "MODEL_ERROR", "DEADLINE_EXCEEDED"), got
        assert got.size < 4096
        return False
    return True


@FUZZ
@given(method=st.sampled_from(sorted(GRADIENT_METHODS)), data=st.binary(max_size=300))
@example(method="ComputeVjp", data=b"")
def test_random_bytes(wire: Wire, method: str, data: bytes) -> None:
    assert not answered_or_mapped(wire, method, data)


@FUZZ
@given(data=st.data())
def test_valid_messages_with_a_few_bytes_changed(wire: Wire, data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(sorted(VALID)))
    bytes_ = bytearray(VALID[method])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(bytes_) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert"])):
            case "set":
                bytes_[at] = data.draw(st.integers(0, 255))
            case "cut" if len(bytes_) > 1:
                del bytes_[at]
            case _:
                bytes_.insert(at, data.draw(st.integers(0, 255)))
    answered_or_mapped(wire, method, bytes(bytes_))


INPUTS = ["x", "z", "first", "second", "used", "spare", "ids", "scale"]
OUTPUTS = ["y", "e", "p", "square", "total", "index", "loss"]
OTHERS = ["target", "input", "weight", "table.weight", "", "*", "param:*", "input:scale", "param:scale", "target:*"]
NAMES = st.sampled_from([*INPUTS, *OUTPUTS, *OTHERS])
EXTENTS = st.lists(st.integers(0, 3), max_size=3)
#: All dtypes, and the likely ones again.
DTYPES = st.one_of(st.integers(1, 20), st.just(F64), st.just(F64), st.just(F64))


@st.composite
def any_request(draw: st.DrawFn) -> tuple[str, bytes]:
    """A well-formed message whose parts have little to do with each other."""
    method = draw(st.sampled_from(sorted(GRADIENT_METHODS)))
    message = METHODS[method].request()
    writer = TensorWriter()
    names = ["cube", "energy", "pair", "two", "ignores", "anything", "spectrum", "lookup", "index", "detached"]
    message.function.model = draw(st.sampled_from(names))
    message.function.mode = draw(st.integers(0, 2))  # type: ignore[assignment]
    if draw(st.booleans()):
        message.function.seed = draw(st.integers(0, 2**64 - 1))
    if draw(st.integers(0, 3)) == 0:
        message.function.loss.name = draw(st.sampled_from(["mse_loss", "cross_entropy", "nll_loss", "huber_loss"]))
        for key in draw(st.lists(st.sampled_from(["reduction", "delta", "ignore_index"]), max_size=2)):
            message.function.loss.options[key] = draw(
                st.one_of(st.sampled_from(["sum", "none", "mean"]), st.floats(), st.booleans(), st.none())
            )
    fields = message.DESCRIPTOR.fields_by_name
    for name in ("inputs", "targets", "parameters", "cotangents", "tangents"):
        if name not in fields:
            continue
        for _ in range(draw(st.integers(0, 1 if name != "inputs" else 2))):
            number, shape = draw(DTYPES), draw(EXTENTS)
            size = int(np.prod(shape, dtype=int)) * ITEM_SIZES[number]
            content = draw(st.sampled_from([b"\0", b"\x01", b"\xff", b"\x3f"])) * size
            getattr(message, name).append(writer.add_bytes(draw(NAMES), number, shape, content))
    if "wrt" in fields:
        message.wrt.extend(draw(st.lists(NAMES, max_size=2)))
    for name in ("cotangents_batched", "allow_unused", "return_cotangent_derivatives"):
        if name in fields and draw(st.booleans()):
            setattr(message, name, True)
    if "max_norm" in fields and draw(st.booleans()):
        message.max_norm = draw(st.floats())
    message.results.dtype = draw(st.sampled_from([0, 0, 0, 10, 11, 12, 13]))  # type: ignore[assignment]
    return method, encode_message(message, writer.payloads)


@settings(FUZZ, max_examples=400)
@given(drawn=any_request())
def test_well_formed_nonsense(wire: Wire, drawn: tuple[str, bytes]) -> None:
    answered_or_mapped(wire, *drawn)


@pytest.mark.parametrize("method", sorted(set(VALID) - {"GetModel"}))
def test_a_message_cut_anywhere_is_refused(wire: Wire, method: str) -> None:
    whole = VALID[method]
    for length in range(len(whole)):
        assert not answered_or_mapped(wire, method, whole[:length]), length


# ---- callers that go away


class Crowd:
    """Callers whose every input is unique and whose every answer is checked, until told to end."""

    def __init__(self, target: str, callers: int) -> None:
        self._target = target
        self._end = threading.Event()
        self.failures: list[BaseException] = []
        self.calls = 0
        self._threads = [threading.Thread(target=self._call, args=(caller,)) for caller in range(callers)]

    def _call(self, caller: int) -> None:
        try:
            with grpc.insecure_channel(self._target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
                call = channel.unary_unary(METHODS["ComputeVjp"].path)
                number = 0
                while number < 5 or not self._end.is_set():
                    number += 1
                    x = CUBE + 1000 * caller + number
                    answer = call(request("ComputeVjp", "cube", inputs={"x": x}, cotangents={"y": x}), timeout=PATIENCE)
                    np.testing.assert_allclose(results("ComputeVjp", answer)[1]["gradients:x"], 3 * x**3)
                    self.calls += 1
        except BaseException as error:
            self.failures.append(error)

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE)
        assert not any(thread.is_alive() for thread in self._threads), "calls hang"
        assert not self.failures, self.failures[0]


def nothing_is_left(wire: Wire) -> None:
    """In flight returns to zero: each good call gives the server time; a bounded number of them."""
    for _ in range(500):
        wire.is_well()
        if wire.metric("pullback_requests_in_flight") == 0 and wire.metric("pullback_bytes_in_flight") == 0:
            return
    pytest.fail("calls of callers that went away are still counted as in flight")


def sleeper(seconds: float) -> bytes:
    return request("ComputeVjp", "slow", inputs={"x": array([seconds])}, cotangents={"y": array([1])})


def in_the_worker(wire: Wire, count: float = 1) -> None:
    """Waits, by asking, until that many calls are with the server."""
    for _ in range(2000):
        if wire.metric('pullback_requests_in_flight{method="ComputeVjp"}') >= count:
            return
    pytest.fail("the call never reached the server")


def test_callers_that_cancel(wire: Wire) -> None:
    with Crowd(wire.server.target, 4) as crowd:
        path = METHODS["ComputeVjp"].path
        running = [wire.channel.unary_unary(path).future(sleeper(0.2), timeout=PATIENCE) for _ in range(6)]
        in_the_worker(wire)
        for call in running:
            call.cancel()
        for call in running:
            with pytest.raises(grpc.FutureCancelledError):
                call.result(PATIENCE)
    assert crowd.calls >= 20
    nothing_is_left(wire)


def test_callers_whose_time_runs_out(wire: Wire) -> None:
    with Crowd(wire.server.target, 2):
        path = METHODS["ComputeVjp"].path
        running = [wire.channel.unary_unary(path).future(sleeper(0.3), timeout=0.1) for _ in range(4)]
        for call in running:
            assert call.exception(PATIENCE).code() == grpc.StatusCode.DEADLINE_EXCEEDED
    nothing_is_left(wire)


VANISHING = """
import sys, grpc
call = grpc.insecure_channel(sys.argv[1]).unary_unary(sys.argv[2])
futures = [call.future(bytes.fromhex(sys.argv[3])) for _ in range(5)]
print("sent", flush=True)
[future.result() for future in futures]
"""


def test_a_caller_that_is_killed(wire: Wire) -> None:
    path = METHODS["ComputeVjp"].path
    with Crowd(wire.server.target, 4):
        caller = subprocess.Popen(
            [sys.executable, "-c", VANISHING, wire.server.target, path, sleeper(0.3).hex()], stdout=subprocess.PIPE
        )
        assert caller.stdout is not None
        assert caller.stdout.readline() == b"sent\n"
        in_the_worker(wire, 3)
        caller.send_signal(signal.SIGKILL)
        caller.wait()
        caller.stdout.close()
    nothing_is_left(wire)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4000,
        bytes(range(256)) * 100,
    ],
    ids=["nothing", "HTTP/1.1", "half a greeting", "a greeting and noise", "noise"],
)
def test_a_peer_that_speaks_no_grpc_and_resets(wire: Wire, sent: bytes) -> None:
    host, _, port = wire.server.target.rpartition(":")
    with Crowd(wire.server.target, 2), socket.create_connection((host, int(port)), timeout=10) as peer:
        peer.sendall(sent)
        # Closing now resets the connection instead of ending it.
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    nothing_is_left(wire)


def test_faulty_calls_among_good_ones(wire: Wire) -> None:
    """Every fault of the table at once, from several threads, while others get right answers."""
    wrong: list[tuple[str, str]] = []

    def misuse(cases: list[Case]) -> None:
        for case in cases:
            try:
                wire.send(case.method, case.data)
            except grpc.RpcError as error:
                reason = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
                if not any(allowed.value.encode() in reason for allowed in case.reasons):
                    wrong.append((case.id, str(error.details())))

    with Crowd(wire.server.target, 4):
        threads = [threading.Thread(target=misuse, args=(CASES[start::4],)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE)
        assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    nothing_is_left(wire)


def test_no_label_of_a_metric_comes_from_a_caller(wire: Wire) -> None:
    wire.refused("Evaluate", request("Evaluate", "zzz-a-name-that-nobody-hosts"))
    with urllib.request.urlopen(f"http://127.0.0.1:{wire.server.metrics_port}/metrics", timeout=10) as answer:
        assert b"zzz" not in answer.read()


def test_a_message_is_json_safe(wire: Wire) -> None:
    """Logs and dashboards take the sentence as it is: no lone surrogates, no control characters."""
    got = wire.refused("Evaluate", request("Evaluate", "raises_beyond_unicode", **X))
    json.dumps(got.message).encode()
    assert got.message.isprintable(), got
