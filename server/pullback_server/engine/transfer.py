"""Payload bytes into tensors and tensors into payload bytes, in a worker.

On the CPU a job's tensors stand right on the memory that the front wrote. On CUDA segments are registered with the
driver (pinned), so that copies run at full speed and without blocking; the stream is synchronised before the reply
goes out, so whoever reads the reply may use the memory again.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from pullback_server.faults import Fault
from pullback_server.ipc.layout import Buffer, place, spaced
from pullback_server.job import Job, TensorRef
from pullback_wire import Reason
from pullback_wire.dtypes import DTYPES, dtype_name

_log = logging.getLogger(__name__)

_TORCH: dict[int, torch.dtype] = {
    number: getattr(torch, dtype_name(number)) for number in DTYPES if hasattr(torch, dtype_name(number))
}


def references(job: Job) -> Iterator[TensorRef]:
    """Every tensor of a job."""
    yield from job.inputs
    yield from job.parameters
    yield from job.targets
    yield from job.cotangents
    yield from job.tangents


class Piece(NamedTuple):
    """Where one payload lies."""

    memory: memoryview | bytearray
    offset: int
    length: int


def pieces(memory: memoryview | bytearray, lengths: Sequence[int]) -> list[Piece]:
    """Payloads that lie as `layout.place` says. Raises Fault where there is less memory than that."""
    offsets, end = place(lengths)
    if end > len(memory):
        raise Fault(Reason.INTERNAL, f"payloads of {end} bytes came in {len(memory)} bytes of memory")
    return [Piece(memory, offset, length) for offset, length in zip(offsets, lengths, strict=True)]


class Pins:
    """Which mapped memory is registered with the CUDA driver; does nothing on other devices."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        #: By the identity of the mapping's view: its address; None where registering failed.
        self._pinned: dict[int, int | None] = {}

    def add(self, view: memoryview) -> None:
        if self._device.type != "cuda" or id(view) in self._pinned:
            return
        address = torch.frombuffer(view, dtype=torch.uint8).data_ptr()
        status = _cudart().cudaHostRegister(address, len(view), 0)
        self._pinned[id(view)] = address if int(status) == 0 else None
        if int(status) != 0:
            # The failed call leaves an error behind, which the next launch of a kernel would report as its own.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self._device)
            # Copies still work, through the driver's own staging memory.
            _log.warning("cudaHostRegister of %d bytes failed (%s); copies will be slower", len(view), status)

    def remove(self, view: memoryview | None) -> None:
        """To be called before the mapping is given up, and after every copy from or to it has ended."""
        address = self._pinned.pop(id(view), None)
        if address is not None:
            _cudart().cudaHostUnregister(address)


def _cudart() -> Any:
    """CUDA's runtime, as torch binds it; without types."""
    cuda: Any = torch.cuda
    return cuda.cudart()


class Watch:
    """Tells whether anybody still looks at a job's bytes in a segment."""

    def __init__(self) -> None:
        self._views: list[weakref.ref[memoryview]] = []

    def over(self, view: memoryview) -> memoryview:
        self._views.append(weakref.ref(view))
        return view

    def alive(self) -> bool:
        """Whether a view is alive, once everything that is merely waiting for the garbage collector is gone."""
        if all(view() is None for view in self._views):
            return False
        gc.collect()
        return any(view() is not None for view in self._views)


def tensors_of(
    refs: Iterable[TensorRef], places: Sequence[Piece], watch: Watch | None, device: torch.device
) -> list[torch.Tensor]:
    """The tensors by payload index, on `device`.

    places: of the payloads. On the CPU the tensors are views of that memory.
    watch: is told of every view; None when the memory is never used again anyway.

    Raises Fault when a tensor contradicts the bytes it should have. Copies to a CUDA device may still be under way.
    """
    found: list[torch.Tensor | None] = [None] * len(places)
    for ref in refs:
        if not 0 <= ref.payload < len(places) or found[ref.payload] is not None:
            raise Fault(Reason.INTERNAL, f"tensor {ref.name!r} has no payload of its own (index {ref.payload})")
        found[ref.payload] = _tensor(ref, places[ref.payload], watch, device)
    return [torch.empty(0) if tensor is None else tensor for tensor in found]


def _tensor(ref: TensorRef, place: Piece, watch: Watch | None, device: torch.device) -> torch.Tensor:
    memory, offset, length = place
    dtype = _TORCH.get(ref.dtype)
    if dtype is None:
        raise Fault(Reason.BAD_TENSOR, f"tensor {ref.name!r} is {dtype_name(ref.dtype)}, which torch does not have")
    count = math.prod(ref.shape)
    if count * dtype.itemsize != length:
        raise Fault(
            Reason.BAD_TENSOR,
            f"tensor {ref.name!r} is {dtype_name(ref.dtype)} {list(ref.shape)} and needs {count * dtype.itemsize} "
            f"bytes, its payload has {length}",
        )
    if count == 0:
        return torch.empty(ref.shape, dtype=dtype, device=device)
    if watch is not None:
        memory, offset = watch.over(memoryview(memory)[offset : offset + length]), 0
    # Bytes other than 0 and 1 are no bools for torch: it would count and index with them.
    as_stored = torch.uint8 if dtype is torch.bool else dtype
    tensor = torch.frombuffer(memory, dtype=as_stored, count=count, offset=offset)
    if len(ref.shape) != 1:
        tensor = tensor.view(ref.shape)
    if device.type != "cpu":
        tensor = tensor.to(device, non_blocking=True)
    return tensor.ne(0) if dtype is torch.bool else tensor


def byte_counts(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Bytes of each tensor as a payload."""
    return [tensor.numel() * tensor.itemsize for tensor in tensors]


def packed(tensors: Sequence[torch.Tensor], lengths: Sequence[int]) -> Sequence[Buffer]:
    """The bytes of a few small tensors, laid out as `layout.place` says."""
    if all(_is_plain(tensor) for tensor in tensors):
        # Several torch calls for each tensor would take longer than all the rest of a small reply.
        return spaced(
            [ctypes.string_at(tensor.data_ptr(), length) for tensor, length in zip(tensors, lengths, strict=True)]
        )
    memory = bytearray(place(lengths)[1])
    store(tensors, lengths, memory)
    return (memory,)


def store(tensors: Sequence[torch.Tensor], lengths: Sequence[int], memory: memoryview | bytearray) -> None:
    """Copies tensors to where `layout.place` puts them; returns when they are there."""
    offsets, _ = place(lengths)
    devices = set()
    for tensor, length, offset in zip(tensors, lengths, offsets, strict=True):
        if not length:
            continue
        target = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        if _is_plain(tensor):
            # torch would share the copy out among its threads, which gains little, and on a busy machine costs
            # milliseconds: the copy is over only when every thread has had its turn.
            ctypes.memmove(target.data_ptr(), tensor.data_ptr(), length)
        else:
            # From the device; or lazily conjugated, negated or strided, which this turns into plain bytes.
            target.view(tensor.shape).copy_(tensor, non_blocking=True)
            devices.add(tensor.device)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the bytes of the tensor, as they lie in this process's memory, are what it says."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
