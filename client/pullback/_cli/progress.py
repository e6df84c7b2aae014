"""How far something is, told on stderr where that is a terminal; nothing otherwise, so that files stay clean."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator

#: Takes the share that is done, and a word on it.
Show = Callable[[float, str], None]


@contextlib.contextmanager
def shown(title: str) -> Iterator[Show]:
    """Shows it while the context lasts, by rich where it is installed."""
    if not sys.stderr.isatty():
        yield lambda share, told: None
    elif importlib.util.find_spec("rich") is None:
        with _plain(title) as show:
            yield show
    else:
        with _rich(title) as show:
            yield show


@contextlib.contextmanager
def _plain(title: str) -> Iterator[Show]:
    def show(share: float, told: str) -> None:
        bar = "#" * int(30 * min(share, 1.0))
        print(f"\r\x1b[K{title} [{bar:<30}] {told}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _rich(title: str) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(30), TextColumn("{task.fields[told]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=1.0, told="")
        yield lambda share, told: progress.update(task, completed=min(share, 1.0), told=told)
