"""Which names of files and versions a repository may hold."""

from __future__ import annotations

import re

#: What writers leave behind, or have not finished; and what Python leaves beside the files that it runs.
_UNFINISHED = (".tmp", ".part", ".partial", "~")
_CACHE = "__pycache__"


_VERSION = re.compile(r"[1-9][0-9]{0,17}")


def is_version(text: str) -> bool:
    """Whether it is the number of a version: at most 18 digits, without leading zeros."""
    return _VERSION.fullmatch(text) is not None


def ignored(path: str) -> bool:
    """Whether a relative path is nothing that a repository serves: hidden, unfinished, or a cache of Python's."""
    return any(part.startswith(".") or part.endswith(_UNFINISHED) or part == _CACHE for part in path.split("/"))


def unfit(path: str) -> str:
    """Why a relative path cannot be a file of a model; empty: it can."""
    if path.startswith("/") or "\\" in path or any(part in ("", ".", "..") for part in path.split("/")):
        return "expected a relative path without '..', '.', '//' and backslashes"
    if not path.isprintable():
        return "expected a path of printable characters"
    return ""


def check_relative(path: str) -> None:
    """Raises ValueError for what cannot be the path of a file of a model: absolute, leading out of it, or ignored."""
    if reason := unfit(path):
        raise ValueError(f"is {path!r}, {reason}")
    if ignored(path):
        raise ValueError(
            f"is {path!r}, but names that begin with '.', end in {', '.join(_UNFINISHED)} or are {_CACHE} are ignored"
        )
