"""Large tensors in parts: what may be sent, and what has come."""

from __future__ import annotations

from typing import Any

import numpy as np

from pullback._arrays import Array
from pullback_wire import WireError, element_count, numpy_dtype
from pullback_wire.dtypes import ITEM_SIZES
from pullback_wire.v1 import session_service_pb2 as pb
from pullback_wire.v1 import tensor_pb2

#: Tensors of at least this many bytes travel in chunks.
CHUNK_THRESHOLD = 4 << 20
#: Bytes of one chunk; the contract allows 4 MiB.
CHUNK_BYTES = 1 << 20
#: Bytes of chunks that the server may have under way to this client.
WINDOW = 16 << 20


class Downloads:
    """Tensors that arrive in chunks, each written straight to where it will stay."""

    def __init__(self) -> None:
        self._buffers: dict[int, tuple[Array, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._buffers)

    def add(self, chunk: pb.Chunk, payload: memoryview) -> None:
        """Takes one chunk. Raises WireError for one that does not follow on the last."""
        transfer, size = chunk.transfer, chunk.size
        if size == 0:
            self._buffers.pop(transfer, None)
            return
        buffer, filled = self._buffers.get(transfer, (None, 0))
        if buffer is None:
            buffer = np.empty(size, dtype=np.uint8)
        end = filled + len(payload)
        if chunk.offset != filled or len(buffer) != size or end > size or not payload:
            raise WireError(
                f"chunk of transfer {transfer}: {len(payload)} bytes at {chunk.offset} of {size}, "
                f"expected them at {filled} of {len(buffer)}",
                "chunk",
            )
        buffer[filled:end] = np.frombuffer(payload, dtype=np.uint8)
        self._buffers[transfer] = (buffer, end)

    def take(self, transfer: int) -> Array:
        """The bytes of a transfer that is complete. Raises WireError for any other."""
        buffer, filled = self._buffers.pop(transfer, (None, 0))
        if buffer is None or filled != len(buffer):
            raise WireError(f"transfer {transfer} is referred to, but has not come whole", "transfer")
        return buffer


def as_tensor(buffer: Array, tensor: tensor_pb2.Tensor, field: str) -> Array:
    """The bytes of a transfer as the array that `tensor` describes. Raises WireError where they do not fit."""
    size = ITEM_SIZES.get(tensor.dtype)
    if size is None or element_count(tensor.shape, field) * size != len(buffer):
        raise WireError(f"{field} and its transfer of {len(buffer)} bytes contradict each other", field)
    array: Array = buffer.view(numpy_dtype(tensor.dtype)).reshape(tuple(tensor.shape))
    return array


class Credit:
    """Bytes that may still be sent; guarded by its stream's lock."""

    def __init__(self) -> None:
        self.left = 0

    def take(self, amount: int) -> bool:
        """Takes `amount` if there is that much."""
        if self.left < amount:
            return False
        self.left -= amount
        return True


def chunk_frame(transfer: int, offset: int, size: int) -> Any:
    """The frame of one chunk, to which its bytes are the one payload."""
    return pb.SessionRequest(chunk=pb.Chunk(transfer=transfer, offset=offset, size=size))
