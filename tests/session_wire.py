"""A session spoken frame by frame, for tests of the contract: no client library in between."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc
import numpy as np

from pullback_wire import SESSION_SERVICE, Reason, TensorReader, TensorWriter, decode, encode
from pullback_wire.v1 import session_service_pb2 as pb

TIMEOUT = 60.0


class OpFailed(Exception):
    """An op's own status."""

    def __init__(self, status: pb.OpStatus) -> None:
        super().__init__(status.message)
        self.code = status.code
        self.message = status.message
        from google.rpc import error_details_pb2

        info = error_details_pb2.ErrorInfo()
        self.reason = None
        for detail in status.details:
            if detail.Unpack(info):
                self.reason = Reason[info.reason]


class Wire:
    """One session on a channel of its own."""

    def __init__(
        self, target: str, *models: str, credit: int = 0, open: bool = True, metadata: Any = (), **options: Any
    ) -> None:
        self._channel = grpc.insecure_channel(
            target,
            options=[("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)],
        )
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call = self._channel.stream_stream(f"/{SESSION_SERVICE}/Session")
        self.call = call(self._frames(), metadata=metadata)
        self.count = 0
        self.handle = 0
        self.transfer = 0
        self.answers: dict[int, tuple[pb.SessionResponse, Sequence[memoryview]]] = {}
        self.seen: list[pb.SessionResponse] = []
        self.chunks: dict[int, bytearray] = {}
        if open:
            opening = pb.OpenSession(models=[pb.ModelRef(name=name) for name in models], credit_bytes=credit, **options)
            self.opened = self.wait(self.send(pb.SessionRequest(open=opening)))[0].opened

    def _frames(self) -> Iterator[bytes]:
        while (frame := self._out.get()) is not None:
            yield frame

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._out.put(None)
        self._channel.close()

    def half_close(self) -> None:
        self._out.put(None)

    def raw(self, frame: pb.SessionRequest, payloads: Sequence[Any] = ()) -> None:
        """Sends a frame as it is."""
        self._out.put(encode(frame.SerializeToString(), payloads))

    def send(self, frame: pb.SessionRequest, payloads: Sequence[Any] = ()) -> int:
        """Sends an op. Returns its number."""
        self.count += 1
        frame.op = self.count
        self.raw(frame, payloads)
        return self.count

    def wait(self, op: int) -> tuple[pb.SessionResponse, Sequence[memoryview]]:
        """The answer to an op. Raises OpFailed, or grpc.RpcError when the stream ends."""
        while op not in self.answers:
            frame, payloads = decode(pb.SessionResponse, next(self.call))
            self.seen.append(frame)
            if frame.WhichOneof("frame") == "chunk":
                data = self.chunks.setdefault(frame.chunk.transfer, bytearray())
                assert frame.chunk.offset == len(data)
                data += payloads[0]
                self.raw(pb.SessionRequest(credit=pb.Credit(bytes=len(payloads[0]))))
            elif frame.op:
                self.answers[frame.op] = frame, payloads
        frame, payloads = self.answers.pop(op)
        if frame.status.code:
            raise OpFailed(frame.status)
        return frame, payloads

    def new(self) -> int:
        self.handle += 1 << 17
        return self.handle

    # Ops, sent and not waited for.

    def put(self, array: Any, requires_grad: bool = False, handle: int = 0) -> tuple[int, int]:
        """Returns the op and the handle."""
        writer = TensorWriter()
        handle = handle or self.new()
        op = pb.PutOp(tensors=[writer.add("", np.asarray(array))], handles=[handle], requires_grad=[requires_grad])
        return self.send(pb.SessionRequest(put=op), writer.payloads), handle

    def call_op(
        self,
        callee: str | Any,
        inputs: Mapping[str, Any],
        *,
        options: Mapping[str, Any] | None = None,
        release: Sequence[int] = (),
        handle: int = 0,
        parameters: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> tuple[int, int]:
        """callee: "model:NAME", "loss:NAME" or an operation. Operands: handles or arrays. Returns op and handle."""
        writer = TensorWriter()
        handle = handle or self.new()

        def operands(values: Mapping[str, Any]) -> list[pb.Operand]:
            return [
                pb.Operand(name=name, handle=value)
                if isinstance(value, int)
                else pb.Operand(name=name, tensor=writer.add(name, np.asarray(value)))
                for name, value in values.items()
            ]

        op = pb.CallOp(handles=[handle], inputs=operands(inputs), parameters=operands(parameters or {}), **fields)
        kind, _, name = callee.rpartition(":")
        if kind == "model":
            op.function.model = name
        elif kind == "loss":
            op.loss.name = name
        else:
            op.operation = name
            op.options_json = json.dumps(options or {})
        return self.send(pb.SessionRequest(call=op, release=release), writer.payloads), handle

    def grad(self, outputs: Sequence[int], inputs: Sequence[int], **fields: Any) -> tuple[int, list[int]]:
        """Returns the op and the handles of the gradients."""
        handles = [self.new() for _ in inputs]
        op = pb.GradOp(outputs=outputs, inputs=inputs, handles=handles, **fields)
        return self.send(pb.SessionRequest(grad=op)), handles

    def get(self, *handles: int) -> list[np.ndarray]:
        """Values, waited for."""
        return self.values(self.send(pb.SessionRequest(get=pb.GetOp(handles=handles))))

    def values(self, op: int) -> list[np.ndarray]:
        """The values in an op's answer, chunks or not."""
        frame, payloads = self.wait(op)
        reader = TensorReader(payloads)
        found = []
        for info in frame.result.handles:
            if not info.has_value:
                continue
            if info.tensor.transfer:
                whole = TensorReader([memoryview(bytes(self.chunks.pop(info.tensor.transfer)))])
                found.append(whole.array(info.tensor, "tensor"))
            else:
                found.append(reader.array(info.tensor, "tensor"))
        return found

    def release(self, *handles: int) -> int:
        return self.send(pb.SessionRequest(release_only=pb.ReleaseOp(), release=handles))

    def upload(self, array: np.ndarray, chunk: int = 1 << 20, end: int | None = None) -> int:
        """Sends an array as chunks, without regard to credit. Returns the transfer."""
        self.transfer += 1
        data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        for offset in range(0, len(data) if end is None else end, chunk):
            part = data[offset : offset + chunk]
            self.raw(pb.SessionRequest(chunk=pb.Chunk(transfer=self.transfer, offset=offset, size=len(data))), [part])
        return self.transfer
