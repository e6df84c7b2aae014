"""`pullback top`: how a server is, again and again."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from typing import Any

from pullback._cli.status import Source, source_of
from pullback._cli.top_rows import Rates, View, view
from pullback._cli.usage import UsageError


class Watch:
    """What a server says of itself, with the rates that come of asking it more than once."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._rates = Rates()
        self._point: dict[str, Any] | None = None

    def look(self) -> dict[str, Any]:
        """Asks once. Raises OSError, ValueError."""
        try:
            return self._looked()
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.source.url} sent a status that cannot be read ({error!r})") from None

    def _looked(self) -> dict[str, Any]:
        document = self.source.fetch(self._point["time"] if self._point else 0.0)
        now = document["now"]
        if self._point is not None and self._point["time"] < now["server"]["started"]:
            # Started anew since.
            self._point, self._rates = None, Rates()
        if document["points"]:
            self._point = document["points"][-1]
            self._rates.add(self._point["time"], now["traffic"]["models"])
        return document

    def view(self, document: dict[str, Any]) -> View:
        """The same for people. Raises ValueError."""
        try:
            return view(self.source.url, document["now"], self._point, self._rates)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.source.url} sent a status that cannot be read ({error!r})") from None


def run(arguments: argparse.Namespace) -> None:
    """Once, as lines of JSON, or drawn over and over."""
    watch = Watch(source_of(arguments))
    if arguments.once:
        document = watch.look()
        print(json.dumps({"error": None, **document["now"]}) if arguments.json else watch.view(document).text())
    elif arguments.json:
        _lines(watch, arguments.interval)
    else:
        _live(watch, arguments.interval)


def _lines(watch: Watch, interval: float) -> None:
    """One object a line, also while nobody answers."""
    while True:
        try:
            told = {"error": None, **watch.look()["now"]}
        except (OSError, ValueError) as error:
            told = {"error": str(error)}
        print(json.dumps(told), flush=True)
        time.sleep(interval)


def _live(watch: Watch, interval: float) -> None:
    if not sys.stdout.isatty():
        raise UsageError("standard output is no terminal; use --once, or --json")
    try:
        from pullback._cli.top_screen import Screen
    except ImportError:
        raise ImportError(
            "`pullback top` draws with the package rich: pip install 'pullback[cli]'; --once and --json do without"
        ) from None
    poller = _Poller(watch, interval)
    poller.start()
    try:
        with Screen(interval) as screen:
            while not screen.quit():
                screen.draw(poller.view, poller.error, poller.since)
    except KeyboardInterrupt:
        # The usual way to leave it.
        pass


class _Poller(threading.Thread):
    """Asks in a thread of its own, so that keys are heard while a server does not answer.

    view: of the last answer; None: there was none. error: why the last question had none. since: when there was one.
    """

    def __init__(self, watch: Watch, interval: float) -> None:
        super().__init__(name="pullback-top", daemon=True)
        self._watch = watch
        self._interval = interval
        self.view: View | None = None
        self.error = ""
        self.since = time.monotonic()

    def run(self) -> None:
        while True:
            try:
                self.view = self._watch.view(self._watch.look())
                self.error, self.since = "", time.monotonic()
            except (OSError, ValueError) as error:
                self.error = str(error)
            time.sleep(self._interval)
