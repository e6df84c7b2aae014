"""Plain text for people: columns, sizes, times."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any

#: Columns of text that goes to a file or a pipe, whatever the terminal.
_PIPE_WIDTH = 120
#: What a terminal would take for commands.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def columns(rows: Sequence[Sequence[str]], indent: str = "", right: str = "") -> str:
    """Rows of equal length as columns, two spaces apart.

    right: a letter for each column: "r" has it aligned to the right; what is missing means the left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = right.ljust(len(widths), "l")
    lines = (
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, sides, strict=True)
        )
        for row in rows
    )
    return "\n".join(indent + line.rstrip() for line in lines)


def width() -> int:
    """Columns that a line may have: the terminal's; where stdout is none, a constant."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _PIPE_WIDTH


def cut(line: str, most: int) -> str:
    """A line of at most so many characters."""
    return line if len(line) <= most else line[: max(most - 1, 0)] + "…"


def visible(text: str) -> str:
    """The same with control characters written out: names and descriptions are what others made them."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def say(text: str) -> None:
    """Prints it for people."""
    print(visible(text), flush=True)


def print_json(value: Any) -> None:
    """Prints a document."""
    unicode = "utf" in (sys.stdout.encoding or "").lower()
    print(json.dumps(value, indent=2, ensure_ascii=not unicode))


def sized(count: float) -> str:
    """A number of bytes: "512 bytes", "3.0 MiB"."""
    size, units = float(count), ["KiB", "MiB", "GiB", "TiB"]
    if count < 1024:
        return f"{count:.0f} bytes"
    while size >= 1024 and units:
        size, unit = size / 1024, units.pop(0)
    return f"{size:.1f} {unit}"


def short(number: float) -> str:
    """Three digits that count: 0.00124, 1.24, 12.4, 1,240."""
    magnitude = abs(number)
    if magnitude >= 99.95:
        return f"{number:,.0f}"
    if magnitude >= 9.995:
        return f"{number:.1f}"
    return f"{number:.2f}" if magnitude >= 0.995 or not magnitude else f"{number:.3g}"


def duration(seconds: float | None) -> str:
    """850 µs, 1.24 ms, 12.3 s, 4 min 10 s, 3 h 5 min, 2 d 4 h; "-" where it is not known."""
    if seconds is None:
        return "-"
    if seconds < 1e-3:
        return f"{short(seconds * 1e6)} µs" if seconds > 0 else "0 s"
    if seconds < 1:
        return f"{short(seconds * 1e3)} ms"
    if seconds < 60:
        return f"{short(seconds)} s"
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole % 86400 // 3600, whole % 3600 // 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"
