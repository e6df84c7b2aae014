"""A session spoken frame by frame."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from pullback.conformance._check import Absent, Mismatch
from pullback.conformance._wire import Refused, Wire, refused_by
from pullback_wire import SESSION_SERVICE, TensorReader, TensorWriter, WireError, decode, encode
from pullback_wire.v1 import session_service_pb2 as pb

#: Room that is left behind a handle for outputs that there may be more of.
_ROOM = 1 << 10
_PATH = f"/{SESSION_SERVICE}/Session"


class Session:
    """One session, on a connection of its own.

    credit: bytes of chunks that the server may send before it is granted more. bare: nothing is sent to open it.
    seen: kinds of the server's frames so far. granted: bytes that the client may still send as chunks. grants: whether
    credit is given anew for chunks that came.
    """

    def __init__(
        self, wire: Wire, models: Sequence[str] = (), credit: int = 0, threshold: int = 0, bare: bool = False
    ) -> None:
        self._wire = wire
        self._channel = wire.open()
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # Without a deadline a server that never answers would hang the suite.
        self._call = self._channel.stream_stream(_PATH)(self._frames(), metadata=wire.metadata, timeout=wire.timeout)
        self.op = self._handle = self._transfer = 0
        self.answers: dict[int, tuple[pb.SessionResponse, Sequence[memoryview]]] = {}
        self.order: list[int] = []
        self.seen: list[str] = []
        self.chunks: dict[int, bytearray] = {}
        self.granted = 0
        self.grants = True
        if not bare:
            opening = pb.OpenSession(
                models=[pb.ModelRef(name=name) for name in models], credit_bytes=credit, chunk_threshold=threshold
            )
            number = self.send(pb.SessionRequest(open=opening), note=f"open a session for {list(models)}")
            try:
                frame, _ = self.wait(number)
                if frame.WhichOneof("frame") != "opened":
                    raise Mismatch("`opened` in answer to `open`", repr(frame.WhichOneof("frame")))
            except BaseException:
                self.close()
                raise
            self.opened = frame.opened
            self.granted += frame.opened.credit_bytes

    def _frames(self) -> Iterator[bytes]:
        while (frame := self._out.get()) is not None:
            yield frame

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cuts the connection."""
        self._out.put(None)
        self._channel.close()

    def half_close(self) -> None:
        """The client's side of the stream ends."""
        self._out.put(None)

    def raw(self, frame: pb.SessionRequest, payloads: Sequence[Any] = ()) -> None:
        """Sends a frame as it is."""
        self._out.put(encode(frame.SerializeToString(), payloads))

    def raw_bytes(self, data: bytes) -> None:
        """Sends bytes that may be no frame."""
        self._out.put(data)

    def send(self, frame: pb.SessionRequest, payloads: Sequence[Any] = (), note: str = "") -> int:
        """Sends an op. Returns its number."""
        self.op += 1
        frame.op = self.op
        self._wire.say(f"session, op {self.op}: {note or frame.WhichOneof('frame')}")
        self.raw(frame, payloads)
        return self.op

    def new(self) -> int:
        """A handle that was not used."""
        self._handle += _ROOM
        return self._handle

    def read(self) -> pb.SessionResponse:
        """One frame. Raises Refused where the stream has ended, Mismatch where it ended well too early."""
        import grpc

        try:
            data = next(self._call)
        except StopIteration:
            raise Mismatch("an answer", "the end of the session") from None
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise Absent("SessionService is UNIMPLEMENTED") from None
            raise refused_by(error, self._wire.asked) from None
        try:
            frame, payloads = decode(pb.SessionResponse, data)
        except WireError as error:
            raise Mismatch("a frame that can be read", str(error)) from None
        kind = frame.WhichOneof("frame")
        self.seen.append(kind or "status")
        if kind == "chunk":
            self._take(frame.chunk, payloads)
        elif kind == "credit":
            self.granted += frame.credit.bytes
        elif frame.op:
            self.order.append(frame.op)
            self.answers[frame.op] = frame, payloads
        return frame

    def _take(self, chunk: pb.Chunk, payloads: Sequence[memoryview]) -> None:
        data = self.chunks.setdefault(chunk.transfer, bytearray())
        if len(payloads) != 1 or chunk.offset != len(data) or not 0 < len(payloads[0]) <= 4 << 20:
            raise Mismatch(f"a chunk of one payload at {len(data)}", f"{len(payloads)} payloads at {chunk.offset}")
        data += payloads[0]
        if len(data) > chunk.size:
            raise Mismatch(f"chunks of {chunk.size} bytes in all", str(len(data)))
        if self.grants:
            self.raw(pb.SessionRequest(credit=pb.Credit(bytes=len(payloads[0]))))

    def wait(self, op: int) -> tuple[pb.SessionResponse, Sequence[memoryview]]:
        """The answer to an op. Raises Refused with the op's own status."""
        while op not in self.answers:
            self.read()
        frame, payloads = self.answers.pop(op)
        if frame.status.code:
            if frame.WhichOneof("frame") is not None:
                raise Mismatch("no frame beside a status that is not OK", repr(frame.WhichOneof("frame")))
            import grpc

            name = next((code.name for code in grpc.StatusCode if code.value[0] == frame.status.code), "")
            if not name:
                raise Mismatch("a status code of gRPC's", str(frame.status.code))
            size = sum(detail.ByteSize() for detail in frame.status.details)
            raise Refused(name, frame.status.message, frame.status.details, size, self._wire.asked)
        return frame, payloads

    def ends(self) -> Refused | None:
        """How the stream ends: with a status, or well."""
        try:
            while True:
                self.read()
        except Refused as refused:
            return refused
        except Mismatch:
            return None

    # Ops, sent and not waited for.

    def put(
        self, *arrays: np.ndarray, requires_grad: bool = True, handles: Sequence[int] = ()
    ) -> tuple[int, list[int]]:
        """Returns the op and the handles."""
        writer = TensorWriter()
        handles = list(handles) or [self.new() for _ in arrays]
        tensors = [writer.add("", array) for array in arrays]
        op = pb.PutOp(tensors=tensors, handles=handles, requires_grad=[requires_grad] * len(arrays))
        note = "put " + ", ".join(f"{array.dtype} {list(array.shape)}" for array in arrays)
        return self.send(pb.SessionRequest(put=op), writer.payloads, note), handles

    def leaf(self, array: np.ndarray, requires_grad: bool = True) -> int:
        """A tensor's handle, waited for."""
        op, (handle,) = self.put(array, requires_grad=requires_grad)
        self.wait(op)
        return handle

    def call(
        self, callee: str, inputs: Mapping[str, Any], options: Mapping[str, Any] | None = None, **fields: Any
    ) -> tuple[int, int]:
        """callee: "model:NAME" or a tensor operation. Operands: handles or arrays. Returns the op and first handle."""
        writer = TensorWriter()
        op = pb.CallOp(handles=[self.new()], **fields)
        for name, value in inputs.items():
            operand = op.inputs.add(name=name)
            if isinstance(value, int):
                operand.handle = value
            else:
                operand.tensor.CopyFrom(writer.add(name, np.asarray(value)))
        kind, _, name = callee.rpartition(":")
        if kind == "model":
            op.function.model = name
            op.function.seed = 20_240_607
        else:
            op.operation = name
            op.options_json = json.dumps(options or {})
        return self.send(pb.SessionRequest(call=op), writer.payloads, f"call {callee}"), op.handles[0]

    def made(self, callee: str, inputs: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> int:
        """The first handle of a call, waited for."""
        op, handle = self.call(callee, inputs, options)
        self.wait(op)
        return handle

    def grad(self, outputs: Sequence[int], inputs: Sequence[int], **fields: Any) -> tuple[int, list[int]]:
        """Returns the op and the gradients' handles."""
        handles = [self.new() for _ in inputs]
        op = pb.GradOp(outputs=outputs, inputs=inputs, handles=handles, **fields)
        said = ", ".join(f"{name} {value}" for name, value in fields.items())
        return self.send(pb.SessionRequest(grad=op), (), f"grad {said}"), handles

    def get(self, *handles: int) -> list[np.ndarray]:
        """Values, waited for."""
        return self.values(self.send(pb.SessionRequest(get=pb.GetOp(handles=handles))))

    def values(self, op: int) -> list[np.ndarray]:
        """Those in an op's answer, whether they came in it or in chunks."""
        frame, payloads = self.wait(op)
        reader = TensorReader(payloads)
        found = []
        for info in frame.result.handles:
            if not info.has_value:
                continue
            if info.tensor.transfer:
                data = self.chunks.pop(info.tensor.transfer, bytearray())
                whole = pb.HandleInfo.FromString(info.SerializeToString()).tensor
                whole.payload = 0
                found.append(TensorReader([memoryview(bytes(data))]).array(whole, "a transferred tensor"))
            else:
                found.append(reader.array(info.tensor, f"handle {info.handle}"))
        reader.finish()
        return found

    def release(self, *handles: int) -> int:
        """Returns the op."""
        return self.send(pb.SessionRequest(release_only=pb.ReleaseOp(), release=handles), (), f"release {handles}")

    def upload(self, data: bytes, chunk: int = 1 << 20) -> int:
        """Sends bytes as chunks, within the credit that was granted. Returns the transfer."""
        self._transfer += 1
        for offset in range(0, len(data), chunk):
            part = data[offset : offset + chunk]
            while self.granted < len(part):
                self.read()
            self.granted -= len(part)
            self.raw(pb.SessionRequest(chunk=pb.Chunk(transfer=self._transfer, offset=offset, size=len(data))), [part])
        return self._transfer
