"""numpy arrays <-> `Tensor` messages and payloads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pullback_wire.dtypes import ITEM_SIZES, dtype_name, numpy_dtype, wire_dtype
from pullback_wire.framing import Buffer, WireError
from pullback_wire.v1 import tensor_pb2 as pb

#: More axes than torch (64) or numpy (64) can have.
MAX_AXES = 64
_INT64_MAX = 2**63 - 1


def element_count(shape: Sequence[int], field: str) -> int:
    """Product of the extents, checked as the wire demands.

    Raises WireError naming `field` for a negative extent, too many axes, or a product over 2**63 - 1. The product
    is taken over the non-zero extents too, so that [0, 2**62, 4] is refused: no library can represent its strides.
    """
    if len(shape) > MAX_AXES:
        raise WireError(f"{field}.shape has {len(shape)} axes, at most {MAX_AXES} are possible", f"{field}.shape")
    total = 1
    empty = False
    for axis, extent in enumerate(shape):
        if extent < 0:
            raise WireError(f"{field}.shape[{axis}] is {extent}, expected 0 or more", f"{field}.shape")
        if extent == 0:
            empty = True
        else:
            total *= extent
            # Strides count bytes, so leave room for the widest element (16 bytes).
            if total > _INT64_MAX // 16:
                raise WireError(
                    f"{field}.shape {list(shape)} has more elements than can be addressed", f"{field}.shape"
                )
    return 0 if empty else total


def bytes_view(array: np.ndarray) -> memoryview:
    """A flat view of the bytes of a C-contiguous array, whatever its dtype (the buffer protocol knows no bfloat16)."""
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


class TensorWriter:
    """Collects the payloads of one message while its tensors are described."""

    def __init__(self) -> None:
        self.payloads: list[Buffer] = []

    def add(self, name: str, array: np.ndarray) -> pb.Tensor:
        """Describes `array` and keeps a view of its bytes; copies only where it is not C-contiguous little-endian.

        Any shape; any dtype of `pullback_wire.DTYPES` in either byte order. The array must not change before the
        message is encoded.

        Raises ValueError for a dtype that cannot travel.
        """
        number = wire_dtype(array.dtype)
        # Not ascontiguousarray, which makes 0-d arrays 1-d.
        plain = np.asarray(array, dtype=numpy_dtype(number), order="C")
        self.payloads.append(bytes_view(plain))
        return self.describe(name, number, array.shape)

    def add_bytes(self, name: str, number: int, shape: Sequence[int], data: Buffer) -> pb.Tensor:
        """Describes a tensor whose bytes are already in wire order."""
        self.payloads.append(data)
        return self.describe(name, number, shape)

    def describe(self, name: str, number: int, shape: Sequence[int]) -> pb.Tensor:
        return pb.Tensor(name=name, dtype=number, shape=shape, payload=len(self.payloads) - 1)  # type: ignore[arg-type]


class TensorReader:
    """Checks the tensors of one received message against its payloads; each payload may be claimed once."""

    def __init__(self, payloads: Sequence[memoryview]) -> None:
        self.payloads = payloads
        self._claimed: set[int] = set()

    def claim(self, tensor: pb.Tensor, field: str) -> memoryview:
        """The bytes of `tensor`, after its dtype, shape, payload index and byte count were held against each other.

        Raises WireError naming `field`. Nothing is allocated.
        """
        size = ITEM_SIZES.get(tensor.dtype)
        if size is None:
            raise WireError(f"{field}.dtype is {dtype_name(tensor.dtype)}, expected a known dtype", f"{field}.dtype")
        expected = element_count(tensor.shape, field) * size
        index = tensor.payload
        if index >= len(self.payloads):
            raise WireError(
                f"{field}.payload is {index}, the message has {len(self.payloads)} payloads", f"{field}.payload"
            )
        if index in self._claimed:
            raise WireError(f"{field}.payload is {index}, which another tensor uses already", f"{field}.payload")
        data = self.payloads[index]
        if len(data) != expected:
            raise WireError(
                f"{field} is {dtype_name(tensor.dtype)} {list(tensor.shape)} and needs {expected} bytes, "
                f"its payload has {len(data)}",
                field,
            )
        self._claimed.add(index)
        return data

    def array(self, tensor: pb.Tensor, field: str) -> np.ndarray:
        """The tensor as an aligned, writable array that owns its memory (one copy).

        Raises WireError as `claim` does.
        """
        data = self.claim(tensor, field)
        array = np.empty(tuple(tensor.shape), dtype=numpy_dtype(tensor.dtype))
        if data:
            array.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, dtype=np.uint8)
        return array

    def finish(self) -> None:
        """Raises WireError when a payload belongs to no tensor: whoever sent it meant something by it."""
        for index in range(len(self.payloads)):
            if index not in self._claimed:
                raise WireError(f"payloads[{index}] belongs to no tensor", f"payloads[{index}]")
