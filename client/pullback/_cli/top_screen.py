"""The terminal that `pullback top` draws on, and the key that ends it. Needs rich."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from pullback._cli.tables import duration
from pullback._cli.top_rows import Table, View

#: Seconds between looks at the keyboard, at most.
_LOOK = 0.25


class Screen:
    """The alternate screen, and what was there before when it is left."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._live = Live(console=Console(), screen=True, auto_refresh=False, transient=True)
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Screen:
        with contextlib.ExitStack() as undo:
            undo.enter_context(_terminated())
            undo.enter_context(_keys())
            undo.enter_context(self._live)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def quit(self) -> bool:
        """Whether q was pressed; waits a moment for it."""
        wait = min(self._interval, _LOOK)
        if not sys.stdin.isatty():
            time.sleep(wait)
            return False
        ready, _, _ = select.select([sys.stdin], [], [], wait)
        if not ready:
            return False
        # Of the terminal itself: what Python had read ahead, select would not tell of.
        keys = os.read(sys.stdin.fileno(), 1024)
        # Empty where the terminal has gone.
        return not keys or b"q" in keys.lower()

    def draw(self, view: View | None, error: str, since: float) -> None:
        """Draws the last answer, and why there is no later one. since: monotonic time of that answer."""
        parts: list[RenderableType] = []
        if error:
            silent = duration(time.monotonic() - since)
            parts.append(Text(f"{error}; trying again (for {silent})", style="bold red"))
        if view is not None:
            style = "dim" if error else ""
            parts += [Text(line, style=style or ("bold" if not at else "")) for at, line in enumerate(view.lines)]
            parts += [part for table in view.tables for part in (Text(), _drawn(table, style))]
        elif not error:
            parts.append(Text("asking ..."))
        parts += [Text(), Text("q ends", style="dim")]
        self._live.update(Group(*parts), refresh=True)


def _drawn(table: Table, style: str) -> RichTable:
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, style=style, expand=False)
    for head, side in zip(table.rows[0], table.sides, strict=True):
        drawn.add_column(head, justify="right" if side == "r" else "left", no_wrap=True, header_style="bold cyan")
    for row in table.rows[1:]:
        drawn.add_row(*(_cell(cell) for cell in row), style=style)
    return drawn


def _cell(cell: str) -> Text:
    bad = any(word in cell for word in ("failed", "dead", "faulty"))
    return Text(cell, style="bold red" if bad else "")


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does: a terminal would else stay on the other screen, without an echo."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _keys() -> Iterator[None]:
    """Keys as they are pressed, not line by line; as it was when it is over."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
