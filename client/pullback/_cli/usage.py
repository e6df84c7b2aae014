"""Values of options: what argparse is told to make of them, and what it says where that cannot be."""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np

from pullback._arrays import tensor_dtype

#: Of a bench, at once.
_CALLERS = 4096


class UsageError(Exception):
    """Options that do not go together; said as argparse says that one is wrong, with exit status 2."""


def seconds(text: str) -> float:
    """A time above 0, of less than thirty years."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    # More than this neither locks nor sleep take.
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0 and below 1e9")
    return number


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def seed(text: str) -> int:
    """A whole number that a seed can be."""
    if not text.isascii() or not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 2**64 - 1")
    return int(text)


def callers(text: str) -> list[int]:
    """Numbers of callers, with commas between them. Each is a thread."""
    found = [count(part.strip()) for part in text.split(",")]
    if max(found) > _CALLERS:
        raise argparse.ArgumentTypeError(f"{max(found)} callers are more than {_CALLERS}, for each is a thread")
    return found


def names(text: str) -> list[str]:
    """Names or globs, with commas between them."""
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; expected such as x,fc1.*")
    return found


def dtype(text: str) -> np.dtype[Any]:
    """A dtype by torch's name."""
    try:
        return tensor_dtype(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no dtype; expected such as float32, int64 or bfloat16") from None


def shape(text: str) -> tuple[str, tuple[int, ...]]:
    """NAME=2,3: a tensor's name and its extents; NAME= is a 0-d one."""
    name, equals, extents = text.partition("=")
    parts = [part.strip() for part in extents.split(",")] if extents.strip() else []
    if not name or not equals or not all(part.isascii() and part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=EXTENT,EXTENT,... such as x=32,784")
    return name, tuple(map(int, parts))


def pair(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE")
    return name, value
