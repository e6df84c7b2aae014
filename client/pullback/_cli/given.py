"""Tensors on a command line: `x=@x.npy`, `x=[1, 2]`, `x:float64=0.5`, `@v.npy`, `x=-`."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pullback._cli.usage import dtype as dtype_named

STDIN = "-"
ONES = "ones"


@dataclass(frozen=True)
class Given:
    """One tensor as it was given.

    name: None: it has none, and is the only one there can be.
    dtype: which was asked for with it.
    path: of a file, with a key behind a colon perhaps; "-": standard input; None: `literal` is its value, as JSON.
    """

    name: str | None
    dtype: np.dtype[Any] | None
    path: str | None
    literal: Any = None


def given(text: str) -> Given:
    """Reads one. Raises ArgumentTypeError, which argparse says with the option's name."""
    head, value = None, text
    if not text.startswith("@") and "=" in text:
        head, _, value = text.partition("=")
    name, dtype = (None, None) if head is None else _named(head)
    if value in (STDIN, "@" + STDIN):
        return Given(name, dtype, STDIN)
    if value.startswith("@"):
        if value == "@":
            raise argparse.ArgumentTypeError(f"{text!r} names no file behind the @")
        return Given(name, dtype, value[1:])
    try:
        return Given(name, dtype, None, json.loads(value))
    except (ValueError, RecursionError):
        hint = f"; a file is @{value}" if Path(value).suffix in (".npy", ".npz", ".json", ".safetensors") else ""
        raise argparse.ArgumentTypeError(
            f"{value!r} is neither @FILE nor JSON such as 0.5 or [[1, 2], [3, 4]]{hint}"
        ) from None


def cotangent(text: str) -> Given:
    """As `given`, and the word "ones": of every output, whatever its shape."""
    return Given(None, None, None, ONES) if text == ONES else given(text)


def named(text: str) -> Given:
    """As `given`, of what must have a name."""
    found = given(text)
    if found.name is None:
        raise argparse.ArgumentTypeError(f"{text!r} has no name; expected NAME=@FILE or NAME=JSON")
    return found


def _named(head: str) -> tuple[str, np.dtype[Any] | None]:
    name, colon, kind = head.strip().rpartition(":")
    if not colon:
        name, kind = kind, ""
    if not name:
        raise argparse.ArgumentTypeError(f"there is no name before the = (in {head!r}=...)")
    return name, dtype_named(kind) if colon else None
