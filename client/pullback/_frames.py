"""Ops of a session as frames, and answers as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pullback._arrays import Array
from pullback._stream import Reply, Stream
from pullback._transfers import CHUNK_THRESHOLD, as_tensor
from pullback_wire import TensorReader, TensorWriter, WireError, numpy_dtype, wire_dtype
from pullback_wire.codec import bytes_view
from pullback_wire.framing import Buffer
from pullback_wire.v1 import session_service_pb2 as pb
from pullback_wire.v1 import tensor_pb2

#: More than this many bytes do not stand in one frame together; they go in chunks instead.
_INLINE_BYTES = 16 << 20


@dataclass(frozen=True)
class Keep:
    """An operand that is sent and stored under a handle on the way."""

    array: Array
    handle: int
    requires_grad: bool = False


#: An operand of an op: a handle, or a value that is sent with it.
Operand = int | Array | Keep


class HandleInfo(NamedTuple):
    """What the server says of a tensor that an op made or read.

    dtype, shape: None and () for a gradient that does not exist (`unused`). value: None unless it came along.
    """

    handle: int
    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int, ...]
    requires_grad: bool
    unused: bool
    value: Array | None


class FrameWriter:
    """Describes the tensors of one frame; large ones are sent ahead of it in chunks, as they are described.

    Raises what `Stream.upload` raises.
    """

    def __init__(self, stream: Stream, what: str, deadline: float) -> None:
        self._stream = stream
        self._what = what
        self._deadline = deadline
        self._writer = TensorWriter()
        self._inline = 0

    @property
    def payloads(self) -> Sequence[Any]:
        """The bytes of those that are not sent ahead."""
        return self._writer.payloads

    def tensor(self, name: str, array: Array) -> tensor_pb2.Tensor:
        """The description of one tensor."""
        room = min(_INLINE_BYTES, self._stream.limit // 2)
        chunked = array.nbytes >= CHUNK_THRESHOLD or self._inline + array.nbytes > room
        if not (chunked and array.nbytes and self._stream.takes_chunks):
            self._inline += array.nbytes
            return self._writer.add(name, array)
        number = wire_dtype(array.dtype)
        plain = np.asarray(array, dtype=numpy_dtype(number), order="C")
        transfer = self.upload(bytes_view(plain))
        return tensor_pb2.Tensor(name=name, dtype=number, shape=array.shape, transfer=transfer)  # type: ignore[arg-type]

    @property
    def takes_chunks(self) -> bool:
        """Whether the server does."""
        return self._stream.takes_chunks

    def upload(self, data: memoryview) -> int:
        """Sends bytes ahead. Returns the transfer's number."""
        return self._stream.upload(data, self._what, self._deadline)

    def inline(self, data: Buffer) -> int:
        """Bytes that go in the frame itself. Returns the payload's index."""
        self._writer.payloads.append(data)
        return len(self._writer.payloads) - 1

    def operand(self, name: str, operand: Operand | None) -> pb.Operand:
        """One argument of an op; None: an operand without a source."""
        if operand is None:
            return pb.Operand(name=name)
        if isinstance(operand, int):
            return pb.Operand(name=name, handle=operand)
        if isinstance(operand, Keep):
            return pb.Operand(
                name=name,
                tensor=self.tensor(name, operand.array),
                keep=operand.handle,
                requires_grad=operand.requires_grad,
            )
        return pb.Operand(name=name, tensor=self.tensor(name, operand))

    def operands(self, named: Mapping[str, Operand]) -> list[pb.Operand]:
        """Arguments by name."""
        return [self.operand(name, operand) for name, operand in named.items()]


class FrameReader(TensorReader):
    """Reads the tensors of one answer, wherever their bytes came."""

    def __init__(self, reply: Reply, stream: Stream) -> None:
        super().__init__(reply.payloads)
        self._reply = reply
        self._stream = stream

    def array(self, tensor: tensor_pb2.Tensor, field: str) -> Array:
        """The tensor as an aligned, writable array. Raises WireError as `TensorReader.array` does."""
        if not tensor.transfer:
            return super().array(tensor, field)
        buffer = self._reply.buffers.get(tensor.transfer)
        return as_tensor(self._stream.downloads.take(tensor.transfer) if buffer is None else buffer, tensor, field)


def read_handles(reader: FrameReader, handles: Iterable[pb.HandleInfo]) -> list[HandleInfo]:
    """What an op made or read. Raises WireError for an answer that contradicts itself."""
    found = []
    for index, info in enumerate(handles):
        if info.unused:
            found.append(HandleInfo(info.handle, info.name, None, (), False, True, None))
            continue
        tensor = info.tensor
        try:
            dtype = numpy_dtype(tensor.dtype)
        except ValueError as error:
            raise WireError(f"handles[{index}]: {error}", "handles") from None
        value = reader.array(tensor, f"handles[{index}].tensor") if info.has_value else None
        found.append(HandleInfo(info.handle, info.name, dtype, tuple(tensor.shape), info.requires_grad, False, value))
    reader.finish()
    return found
