"""Weights to upload: the bytes of a safetensors file, wherever they are, read piece by piece."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from pullback._arrays import as_array
from pullback_wire import TensorWriter
from pullback_wire.framing import Buffer

#: A path, the file's bytes, a binary file that can seek, or arrays by name.
Weights: TypeAlias = str | os.PathLike[str] | Buffer | BinaryIO | Mapping[str, Any]

#: Bytes read at once.
PIECE = 1 << 20
#: What safetensors calls a dtype, by numpy's name of it. It has none for complex128.
SAFETENSORS = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Bytes that can be read more than once, from buffers or, where `file` is given, from there on at `start`."""

    size: int
    buffers: tuple[Buffer, ...] = ()
    file: BinaryIO | None = None
    start: int = 0

    def pieces(self, most: int = PIECE) -> Iterator[Buffer]:
        """All bytes in order, at most `most` at once; fewer than `size` of a file that has become shorter."""
        for buffer in self.buffers:
            view = memoryview(buffer)
            for at in range(0, len(view), most):
                yield view[at : at + most]
        if self.file is not None:
            self.file.seek(self.start)
            left = self.size
            while left and (piece := self.file.read(min(most, left))):
                left -= len(piece)
                yield piece

    def sha256(self) -> bytes:
        """Their SHA-256. Reads everything."""
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.digest()


@contextmanager
def opened(weights: Weights) -> Iterator[Source]:
    """The bytes of `weights`, for as long as the context lasts.

    Raises OSError for a file that cannot be read, TypeError for what holds no weights, ValueError for a file that
    cannot seek, or is no binary one, and for arrays that make no safetensors file.
    """
    if isinstance(weights, str | os.PathLike):
        with Path(weights).open("rb") as file:
            yield _from_file(file)
    elif isinstance(weights, bytes | bytearray | memoryview):
        view = memoryview(weights).cast("B")
        yield Source(len(view), (view,))
    elif isinstance(weights, Mapping):
        buffers = _safetensors(weights)
        yield Source(sum(map(len, buffers)), buffers)
    elif hasattr(weights, "read") and hasattr(weights, "seek"):
        if isinstance(weights.read(0), str):
            raise ValueError("weights is a text file; open it with mode 'rb'")
        yield _from_file(weights)
    else:
        raise TypeError(
            f"weights is a {type(weights).__name__}, expected the path of a safetensors file, its bytes, a binary "
            "file, or a mapping from names to arrays"
        )


def _from_file(file: BinaryIO) -> Source:
    if not file.seekable():
        # Its digest goes ahead of its bytes, so it is read twice.
        raise ValueError("weights is a file that cannot seek; pass a path, or the bytes")
    start = file.tell()
    return Source(file.seek(0, os.SEEK_END) - start, file=file, start=start)


def _safetensors(weights: Mapping[str, Any]) -> tuple[Buffer, ...]:
    """A safetensors file of arrays: its head, and views of their memory, of which only odd layouts are copied.

    By hand: the format is a length, a JSON table and the bytes, and the safetensors package would copy them all.
    """
    arrays = {}
    for name, value in weights.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise TypeError(f"weights has a key {name!r}, expected names of parameters and buffers")
        array = arrays[name] = as_array(value, f"weights[{name!r}]")
        if array.dtype.name not in SAFETENSORS:
            raise TypeError(f"weights[{name!r}] has dtype {array.dtype.name}, which a safetensors file cannot hold")
    writer = TensorWriter()
    table: dict[str, Any] = {}
    end = 0
    # Large elements first, so that each lies where its size wants it.
    for name in sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name)):
        array = arrays[name]
        writer.add(name, array)
        begin, end = end, end + array.nbytes
        table[name] = {"dtype": SAFETENSORS[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return (len(head).to_bytes(8, "little") + head, *writer.payloads)
