"""Files of results: a whole one, or none."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pullback._arrays import Array
from pullback._cli.literals import to_json
from pullback._weights import SAFETENSORS, opened

_SUFFIXES = (".npz", ".npy", ".safetensors", ".json")


def output_file(text: str) -> Path:
    """A file that can be written, by its suffix; what argparse makes of --output."""
    path = Path(text)
    if path.suffix.lower() not in _SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} ends in none of {', '.join(_SUFFIXES)}")
    return path


def check_place(path: Path) -> None:
    """Better said before the call than after. Raises OSError."""
    target = path.resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"--output {path}: there is no folder {path.parent}")
    # A whole file takes another's place, which a pipe or a device would not survive.
    if target.exists() and not target.is_file():
        raise OSError(f"--output {path}: there is something that is no regular file")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"--output {path}: nothing can be written to the folder {path.parent}")


def write(path: Path, arrays: Mapping[str, Array]) -> None:
    """Writes arrays by name; a reader finds what was there before, or all of it.

    Raises ValueError for arrays that a file of this kind cannot hold, OSError.
    """
    # A link stays one; the kind of file goes by the name that was given, whatever it leads to.
    target = path.resolve()
    # Beside it, since only within a file system can one file take another's place.
    draft = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with draft.open("xb") as file:
            _write(file, path, arrays)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as error:
        # Not the draft's name, which nobody has given.
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        draft.unlink(missing_ok=True)


def _write(file: BinaryIO, path: Path, arrays: Mapping[str, Array]) -> None:
    suffix = path.suffix.lower()
    if suffix == ".json":
        named = {name: to_json(array) for name, array in arrays.items()}
        file.write(json.dumps(named, allow_nan=False).encode() + b"\n")
        return
    for name, array in arrays.items():
        held = array.dtype.name in SAFETENSORS if suffix == ".safetensors" else array.dtype.isbuiltin == 1
        if not held:
            other = ".npz" if suffix == ".safetensors" else ".safetensors"
            raise ValueError(
                f"{path.name}: {name!r} is {array.dtype.name}, which {suffix} files cannot hold; write {other} or "
                ".json, or ask for another --result-dtype"
            )
    if suffix == ".safetensors":
        with opened(arrays) as source:
            for piece in source.pieces():
                file.write(piece)
    elif suffix == ".npz":
        # Not np.savez, whose own arguments are no names that a tensor could have.
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
    else:
        if len(arrays) != 1:
            raise ValueError(f"{path.name}: a .npy file holds one array, and there are {len(arrays)}; write .npz")
        np.lib.format.write_array(file, next(iter(arrays.values())), allow_pickle=False)
