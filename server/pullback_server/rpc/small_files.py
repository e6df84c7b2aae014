"""Reading the small files that say who may come in."""

from __future__ import annotations

from pathlib import Path

#: Nobody writes more by hand, or means to.
_LARGEST = 4 << 20


def contents(path: str, what: str, failure: type[Exception]) -> bytes:
    """A file's bytes. what: it is, for the message. Raises `failure` where it cannot be read, or is too large."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise failure(f"{what} {path}: {error.strerror}") from None
    if len(data) > _LARGEST:
        raise failure(f"{what} {path}: it has more than {_LARGEST} bytes")
    return data
