"""What reads bytes that anybody may send, as functions of those bytes.

Each may raise what is documented and nothing else, takes time and memory that are in proportion to its input, and hands
on only what the next one can take. A first byte says which message is meant where there are several.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
from google.protobuf.message import Message
from tests.fuzz import mutating, token_target

from pullback_server.faults import Fault
from pullback_server.hosting.loading import LoadError
from pullback_server.ipc import messages
from pullback_server.ipc.frames import FrameError, FrameReader
from pullback_server.job import LossRecord, OrdersRecord, Signature, SpecRecord
from pullback_server.ops import SessionJob
from pullback_server.registry.incoming import Incoming
from pullback_server.rpc import status
from pullback_server.rpc.inference.contents import read, take_apart
from pullback_server.rpc.inference.translating import in_their_words, translate
from pullback_server.rpc.ops import OpTranslator, tensors_in
from pullback_server.rpc.request import ResultLimits, Translator, wire_path
from pullback_server.rpc.signature import SignatureView
from pullback_wire import GRADIENT_METHODS, MODEL_METHODS, Reason, TensorReader, TensorWriter, WireError, decode
from pullback_wire.dtypes import DTYPES
from pullback_wire.framing import encode_message
from pullback_wire.inference import open_inference_pb2 as inference
from pullback_wire.v1 import gradient_service_pb2 as gradient
from pullback_wire.v1 import session_service_pb2 as session

REQUESTS: Sequence[type[Message]] = tuple(
    method.request for method in (*GRADIENT_METHODS.values(), *MODEL_METHODS.values())
)
_GRADIENT: Sequence[type[Message]] = tuple(method.request for method in GRADIENT_METHODS.values())
_F64, _C128 = 13, 15
_LOSSES = [
    LossRecord("mse_loss", ("input", "target"), ("weight",), ("reduction",)),
    LossRecord("cross_entropy", ("input", "target"), ("weight",), ("reduction", "label_smoothing", "ignore_index")),
]


def _signature(name: str, inputs: list[SpecRecord], parameters: list[SpecRecord]) -> SignatureView:
    orders = OrdersRecord(-1, True, "")
    return SignatureView(Signature(name, "1", "", inputs, [], parameters, 0, _LOSSES, orders, "cpu", 0))


class _Models:
    """Finds what is hosted, as `rpc.catalogue.Catalogue` and `rpc.kept.Kept` do."""

    _HOSTED: Mapping[str, SignatureView] = {
        view.signature.name: view
        for view in (
            _signature("cube", [SpecRecord("x")], []),
            _signature("square_sum", [SpecRecord("x")], []),
            _signature("holomorphic", [SpecRecord("z", _C128, ("n",))], []),
            _signature("mixed", [SpecRecord("x", _F64, ("n",)), SpecRecord("y", _F64, ("n",)),
                                 SpecRecord("scale", _F64, (), optional=True)], [SpecRecord("x", _F64, ("n",))]),
            _signature("small", [SpecRecord("input", _F64, ("batch", 3))],
                       [SpecRecord("0.weight", _F64, (5, 3)), SpecRecord("0.bias")]),
            _signature("words", [SpecRecord("ids", 9, ("batch", "length"), minimum=0, maximum=10)], []),
        )
    }  # fmt: skip

    def find(self, name: str, version: str, field: str = "") -> SignatureView:
        if name not in self._HOSTED or version not in ("", "1"):
            raise Fault(Reason.MODEL_NOT_FOUND, f"no model is called {name!r}", f"{field}model")
        return self._HOSTED[name]


_models: Any = _Models()
_translator = Translator(_models, ResultLimits(64 << 20, 1024))
_ops = OpTranslator(_models, _translator)


def framing(data: bytes) -> None:
    """Any request, parsed."""
    if data:
        decode(REQUESTS[data[0] % len(REQUESTS)], data[1:], bounded=True)


def codec(data: bytes) -> None:
    """The tensors of a message, as arrays."""
    request, payloads = decode(gradient.EvaluateRequest, data, bounded=True)
    reader = TensorReader(payloads)
    for index, tensor in enumerate(request.inputs):
        array = reader.array(tensor, f"inputs[{index}]")
        assert array.nbytes <= len(data), (array.shape, array.dtype)
        assert array.dtype == DTYPES[tensor.dtype]
        # What was read can be written.
        TensorWriter().add(tensor.name, array)
    reader.finish()


def job(data: bytes) -> None:
    """A request of GradientService, up to the bytes that go to a worker."""
    if not data:
        return
    request: Any
    request, payloads = decode(_GRADIENT[data[0] % len(_GRADIENT)], data[1:], bounded=True)
    found = _translator.job(request, payloads)
    _crosses(messages.Run(1, found, 0.0, [len(payload) for payload in payloads], None))
    for field in ("inputs[x].shape", "wrt[0]", "tangents[" + (found.inputs[0].name if found.inputs else "") + "]"):
        wire_path(field, found)


def infer(data: bytes) -> None:
    """A request of the Open Inference Protocol, up to the bytes that go to a worker."""
    request, payloads = read(take_apart(data), 64 << 20)
    assert len(payloads) == len(request.inputs)
    ours, asked = translate(request, _models.find(request.model_name.partition("@")[0], request.model_version))
    try:
        found = _translator.job(ours, payloads)
    except Fault as fault:
        assert in_their_words(fault, asked.places).reason is fault.reason
        raise
    _crosses(messages.Run(1, found, 0.0, [len(payload) for payload in payloads], None))


def op(data: bytes) -> None:
    """A frame of a session, up to the bytes that go to a worker."""
    frame, payloads = decode(session.SessionRequest, data, bounded=True)
    for tensor in tensors_in(frame):
        # As though its chunks had come.
        if tensor.transfer:
            tensor.transfer, tensor.payload = 0, len(payloads) and tensor.payload % len(payloads)
    kind = frame.WhichOneof("frame")
    found: Any
    if kind == "stateless":
        found = _ops.stateless(frame, payloads, 1 << 20)
    elif kind in ("put", "call", "grad", "get", "parameters", "release_only"):
        found = SessionJob(1, frame.op, list(frame.release), _ops.op(frame, payloads), 1 << 20, 1 << 20)
    else:
        return
    _crosses(messages.Run(1, found, 0.0, [len(payload) for payload in payloads], None))


def _crosses(message: messages.Run) -> None:
    """What the front would send, a worker can read."""
    assert messages.encode(messages.decode_to_worker(messages.encode(message))) == messages.encode(message)


def upload(data: bytes) -> None:
    """A file that somebody uploads, up to the tensors that a worker makes of it."""
    from pullback_server.engine.weights import _read

    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "upload"
        kept.mkdir()
        incoming = Incoming(kept, len(data), sha256(data).digest(), lambda: None)
        try:

            async def receive() -> None:
                await incoming.write(data)
                await incoming.finish()

            asyncio.run(receive())
            _read(incoming.weights, "upload", False)
        finally:
            incoming.discard()


def ipc(data: bytes) -> None:
    """Frames between front and worker, and their messages."""
    ours, theirs = socket.socketpair()
    reader = FrameReader(ours)
    try:
        theirs.sendall(data[: 64 << 10])
        theirs.close()
        while reader.receive():
            while (frame := reader.next()) is not None:
                for read in (messages.decode_to_front, messages.decode_to_worker):
                    # A string that is no UTF-8 is a ValueError of another kind.
                    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
                        read(frame.message)
            # A frame claims its size, and gets so much room; that is between processes that trust one another.
            if reader._wanted > 1 << 20:
                return
    finally:
        reader.close()
        ours.close()


def trailers(data: bytes) -> None:
    """Whatever a message quotes, it fits into trailers, and says its cause."""
    text = data.decode("utf-8", "replace")
    reason = list(Reason)[len(data) % len(Reason)]
    fault = Fault(reason, text, text[::-1], 1.0)
    assert len(status.details(fault)) < 6000
    assert len(status.clip(text)) <= 1500
    assert status.op_status(fault).code == int(reason.code)


@dataclass(frozen=True)
class Target:
    """A function, what it may raise, and how its input is changed; None: byte by byte."""

    run: Callable[[bytes], None]
    raises: tuple[type[BaseException], ...]
    mutate: Callable[[bytes, random.Random], bytes] | None = None

    def __call__(self, data: bytes) -> None:
        try:
            self.run(data)
        except self.raises:
            return


def _chosen(types: Sequence[type[Message]]) -> Callable[[bytes, random.Random], bytes]:
    def mutate(data: bytes, rng: random.Random) -> bytes:
        which = data[0] if data and rng.random() < 0.95 else rng.randrange(256)
        return bytes([which]) + mutating.mutated(data[1:], types[which % len(types)], rng)

    return mutate


def _one(message_type: type[Message]) -> Callable[[bytes, random.Random], bytes]:
    return lambda data, rng: mutating.mutated(data, message_type, rng)


TARGETS: Mapping[str, Target] = {
    "framing": Target(framing, (WireError,), _chosen(REQUESTS)),
    "codec": Target(codec, (WireError,), _one(gradient.EvaluateRequest)),
    "job": Target(job, (WireError, Fault), _chosen(_GRADIENT)),
    "infer": Target(infer, (WireError, Fault), _one(inference.ModelInferRequest)),
    "op": Target(op, (WireError, Fault), _one(session.SessionRequest)),
    "upload": Target(upload, (Fault, LoadError), mutating.safetensors),
    "token": Target(token_target.verify, (Fault,), token_target.mutate),
    "ipc": Target(ipc, (FrameError,)),
    "trailers": Target(trailers, ()),
}


def seeds(name: str, unary: Mapping[str, Sequence[bytes]], sessions: Sequence[Sequence[bytes]]) -> list[bytes]:
    """Inputs of a target that are as they should be, from what a client sent."""
    methods = [*GRADIENT_METHODS.values(), *MODEL_METHODS.values()]
    if name in ("framing", "job"):
        among = methods if name == "framing" else list(GRADIENT_METHODS.values())
        return [bytes([index]) + data for index, method in enumerate(among) for data in unary.get(method.path, ())]
    if name == "codec":
        import numpy as np

        found = list(unary.get(GRADIENT_METHODS["Evaluate"].path, ()))
        for dtype in DTYPES.values():
            writer = TensorWriter()
            tensors = [writer.add("x", np.zeros((2, 3), dtype)), writer.add("y", np.zeros((), dtype))]
            found.append(encode_message(gradient.EvaluateRequest(inputs=tensors), writer.payloads))
        return found
    if name == "infer":
        return _inferences()
    if name == "op":
        return [frame for frames in sessions for frame in frames if len(frame) < 1 << 16]
    if name == "upload":
        import numpy as np
        from safetensors.numpy import save

        return [save({"weight": np.zeros((2, 3)), "bias": np.zeros(2, np.float32)}), save({})]
    if name == "token":
        return [token_target.token()]
    if name == "ipc":
        run = messages.Run(1, SessionJob(1, 2, [3], _ops.op(session.SessionRequest(get=session.GetOp(handles=[1])), ()),
                                         4, 5), 1.0, [8], None)  # fmt: skip
        done = messages.encode(messages.Failed(1, False, messages.FaultRecord("INTERNAL", "x")))
        return [
            len(body).to_bytes(4, "little") + (2).to_bytes(4, "little") + bytes(4) + body + b"xy"
            for body in (messages.encode(run), done)
        ]
    return [b"", "ein Sätzchen\0\U0001f4a5".encode() * 50]


def _inferences() -> list[bytes]:
    import numpy as np
    from tests.inference_wire import infer as asked

    x, ids = np.arange(6.0).reshape(2, 3), np.array([[1, 2, 3]])
    options: dict[str, Any] = {"loss": "cross_entropy", "loss:label_smoothing": 0.1, "wrt": "input,*", "seed": 3}
    return [
        asked(model, inputs, raw=raw, outputs=outputs, parameters=parameters, id="1").SerializeToString()
        for raw in (True, False)
        for model, inputs, outputs, parameters in (
            ("cube", {"x": x}, (), {}),
            ("words", {"ids": ids}, ("output",), {"priority": 1, "timeout": 1000}),
            ("cube@vjp", {"x": x, "grad_output:output": x}, ("grad:x",), {"max_norm": 1.0}),
            ("mixed@hvp", {"x": x[0], "y": x[1], "tangent:y": x[0]}, (), {"allow_unused": True}),
            ("small", {"input": x, "target": ids[0, :2]}, (), {"pullback_vjp": True, **options}),
        )
    ]
