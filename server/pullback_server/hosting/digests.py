"""Whether files are whole: copying with a digest, SHA256SUMS, and the size that a safetensors file says it has."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from pullback_server.hosting.manifest_paths import ignored, unfit

_CHUNK = 4 << 20
_SUM = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


def copy(source: BinaryIO, to: Path, stopped: Callable[[], bool] = lambda: False) -> tuple[str, int]:
    """Copies what can still be read of `source` to a new file. Its SHA-256 in hex, and its bytes.

    Raises OSError; InterruptedError soon after `stopped` tells so.
    """
    digest = hashlib.sha256()
    size = 0
    to.parent.mkdir(parents=True, exist_ok=True)
    # Never a link: a file that is written to in place would change under those who use the copy.
    with to.open("xb") as copied:
        while chunk := source.read(_CHUNK):
            if stopped():
                raise InterruptedError("the server is stopping")
            digest.update(chunk)
            copied.write(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def digest_of(sums: Mapping[str, str]) -> str:
    """One SHA-256 over many: of the sorted lines that sha256sum would write of the files."""
    lines = sorted(f"{digest}  {path}\n" for path, digest in sums.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def compare(listed: str, own: Mapping[str, str], name: str) -> None:
    """Compares what sha256sum wrote of a directory with the digests of its files, by path.

    `name` is that of the file it was written to. What a repository ignores may be listed or not.

    Raises ValueError, whose message is to be read after the directory, for what is missing, different or no such line.
    """
    wanted: dict[str, str] = {}
    for number, line in enumerate(listed.splitlines(), 1):
        if not line.strip():
            continue
        matched = _SUM.fullmatch(line)
        if matched is None:
            raise ValueError(f"/{name}: line {number} is {line[:100]!r}, expected a SHA-256, two spaces and a path")
        path = matched[2].removeprefix("./")
        if unfit(path):
            raise ValueError(f"/{name}: line {number} names {path!r}, {unfit(path)}")
        # `sha256sum *` lists what it writes to, as it was before.
        if path != name and not ignored(path):
            wanted[path] = matched[1].lower()
    for path in sorted({*wanted, *own}):
        if path not in own:
            raise ValueError(f"/{path} is missing, but {name} lists it: it is still being copied, or was removed")
        if path not in wanted:
            raise ValueError(f"/{path} is not listed in {name}: it is still being written, or does not belong here")
        if wanted[path] != own[path]:
            raise ValueError(f"/{path} differs from {name}: it is still being copied, or damaged")


def check_safetensors(path: Path) -> None:
    """Raises ValueError, whose message is to be read after the path, for a file that is not whole safetensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # Not to be believed yet, and so not to be read before it is known to be there.
        if size < 8:
            raise ValueError(f"is truncated: has {size} bytes, expected a header's length in the first 8")
        end = 8 + length
        if size >= end:
            end += _data_bytes(os.pread(file.fileno(), length, 8))
    if size < end:
        raise ValueError(f"is truncated, or no safetensors file: has {size} bytes, its header says {end}")
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"is no safetensors file: {error}") from None


def _data_bytes(header: bytes) -> int:
    """Bytes of the tensors that a header describes; 0: it cannot be told, and the library will say why."""
    try:
        tensors = json.loads(header)
        return max((int(one["data_offsets"][1]) for name, one in tensors.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 0
