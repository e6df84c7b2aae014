"""Tensors out of files: .npy, .npz, .safetensors and JSON, told apart by what is in them. Nothing is unpickled."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from pullback._arrays import Array, is_differentiable
from pullback._cli.given import STDIN, Given
from pullback._cli.literals import described_dtype, from_json, is_described
from pullback._weights import SAFETENSORS
from pullback_wire import wire_dtype

#: An array as a file holds it, or as JSON (a list, a number, an object with dtype and data).
Raw: TypeAlias = Any

_NPY, _ZIP = b"\x93NUMPY", b"PK"


class Files:
    """Reads each file once, and standard input too, which can be read no more than that."""

    def __init__(self) -> None:
        self._read: dict[str, Raw | dict[str, Raw]] = {}

    def all_of(self, path: str) -> dict[str, Raw]:
        """A whole file of arrays by name. Raises ValueError for one without names, OSError."""
        found = self._contents(path)
        if not isinstance(found, dict) or is_described(found):
            raise ValueError(
                f"--inputs {path}: the file holds one array without a name; give it as --input NAME=@{path}"
            )
        return found

    def one_of(self, given: Given, name: str) -> Raw:
        """The array that was given: the only one in its file, the one behind the colon, or that called `name`."""
        assert given.path is not None
        path, key = _split(given.path)
        found = self._contents(path)
        if not isinstance(found, dict) or is_described(found):
            if key is not None:
                raise ValueError(f"{path} holds one array without a name, and {key!r} was asked for")
            return found
        if key is None:
            key = next(iter(found)) if len(found) == 1 else name
        if key not in found:
            raise ValueError(f"{path} holds {_listed(found)}, and {key!r} is not among them; say @{path}:NAME")
        return found[key]

    def _contents(self, path: str) -> Raw | dict[str, Raw]:
        if path not in self._read:
            if path == STDIN:
                self._read[path] = _parsed(io.BytesIO(sys.stdin.buffer.read()), "standard input")
            else:
                with Path(path).open("rb") as file:
                    self._read[path] = _parsed(file if file.seekable() else io.BytesIO(file.read()), path)
        return self._read[path]


def _split(path: str) -> tuple[str, str | None]:
    """A path and, where no file is called so, the key behind a colon, which keys may have as well."""
    parts = path.split(":")
    for end in range(len(parts), 0, -1):
        head = ":".join(parts[:end])
        if head == STDIN or (head and Path(head).exists()):
            return head, ":".join(parts[end:]) or None
    return path, None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def _parsed(file: BinaryIO, path: str) -> Raw | dict[str, Raw]:
    head = file.read(9)
    file.seek(0)
    try:
        if head.startswith(_NPY):
            return np.lib.format.read_array(file, allow_pickle=False)
        if head.startswith(_ZIP):
            return _npz(file)
        if head[8:9] == b"{" and head[6:8] == b"\0\0":
            return _safetensors(file.read())
        return json.loads(file.read(), object_pairs_hook=_object)
    except ImportError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        # A file may hold anything, and each of zipfile, zlib, lzma, tokenize and numpy has errors of its own.
        raise ValueError(
            f"{path} cannot be read as .npy, .npz, .safetensors or JSON: {str(error) or type(error).__name__}"
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values of one name, which is meant?"""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"one name stands for two values, among {_listed(name for name, _ in pairs)}")
    return found


def _npz(file: BinaryIO) -> dict[str, Array]:
    with zipfile.ZipFile(file) as archive:
        arrays = []
        for one in archive.infolist():
            with archive.open(one) as member:
                read = np.lib.format.read_array(member, allow_pickle=False)
                arrays.append((one.filename.removesuffix(".npy"), read))
        return _object(arrays)


def _safetensors(data: bytes) -> dict[str, Array]:
    try:
        import safetensors
    except ImportError:
        raise ImportError(
            "reading .safetensors files needs the package safetensors: pip install 'pullback[cli]'"
        ) from None
    try:
        found: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from None
    known = {label: np.dtype(name) for name, label in SAFETENSORS.items()}
    arrays = {}
    for name, one in found:
        if one["dtype"] not in known:
            raise ValueError(f"{name!r} has dtype {one['dtype']}, which no tensor here has")
        arrays[name] = np.frombuffer(one["data"], known[one["dtype"]]).reshape(one["shape"])
    return arrays


def tensor(raw: Raw, asked: np.dtype[Any] | None, declared: np.dtype[Any] | None, field: str, advice: str) -> Array:
    """An array out of what a file or an option holds.

    asked: the dtype that was asked for with it; arrays of another dtype are converted where that keeps their kind.
    declared: the dtype that JSON gets otherwise: what the model's signature says; None: it does not say.
    advice: how to ask for a dtype, e.g. "x:float64=...".

    Raises ValueError naming `field`.
    """
    if not isinstance(raw, np.ndarray):
        own = described_dtype(raw, field) if is_described(raw) else None
        dtype = own or asked or declared
        if dtype is None:
            raise ValueError(f"{field}: nothing says which dtype it has; say {advice}, or --dtype")
        array = from_json(raw, dtype, field)
        return array if asked is None else _converted(array, asked, field)
    if raw.dtype.type is np.void and raw.dtype.names is None:
        # numpy writes what it has no letter for as bytes.
        if asked is None or asked.itemsize != raw.dtype.itemsize:
            raise ValueError(
                f"{field}: the file holds elements of {raw.dtype.itemsize} bytes without a dtype (numpy stores "
                f"bfloat16 and float8 so); say which, as in {advice.replace('float64', 'bfloat16')}"
            )
        return raw.view(asked)
    try:
        wire_dtype(raw.dtype)
    except ValueError:
        raise ValueError(f"{field}: the file holds {raw.dtype}, which is no dtype of a tensor") from None
    return raw if asked is None else _converted(raw, asked, field)


def _converted(array: Array, asked: np.dtype[Any], field: str) -> Array:
    if array.dtype == asked:
        return array
    said = f"{field}: the array is {array.dtype.name}, and cannot be made {asked.name} without loss"
    if array.dtype.kind == "c" and asked.kind != "c":
        raise ValueError(said)
    with np.errstate(all="ignore"):
        cast: Array = array.astype(asked)
    if is_differentiable(array):
        # To another kind of floating-point number, but not so that one becomes infinite.
        kept = is_differentiable(cast) and np.array_equal(np.isfinite(array), np.isfinite(cast))
    else:
        kept = np.array_equal(array, cast.astype(array.dtype)) and np.dtype(asked) != np.bool_
    if not kept:
        raise ValueError(said)
    return cast


def merged(groups: Iterable[tuple[str, Mapping[str, Array]]]) -> dict[str, Array]:
    """Arrays by name of several sources. Raises ValueError for a name that is given twice."""
    found: dict[str, Array] = {}
    for option, arrays in groups:
        for name, array in arrays.items():
            if name in found:
                raise ValueError(f"{option}: {name!r} is given twice")
            found[name] = array
    return found
