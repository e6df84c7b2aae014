"""How log lines look, in the front and in workers: for a console, or as one JSON object a line.

Each line says which request it is about, where it is about one (`tracking`). In JSON mode everything that a worker
says comes through the front: log records as such, other output (a model's print, a library's warning on stderr) as
records of the logger "pullback_server.output", line by line. `fleet.output` takes it there.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from pullback_server import tracking

Format = Literal["console", "json"]

#: Before a worker's log record on its way to the front, so that no print passes for one (RFC 7464).
RECORD = b"\x1e"
_CONSOLE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Named(logging.Filter):
    """Writes the request at hand into each record that does not have one yet."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id"):
            request = tracking.current()
            record.request_id = "" if request is None else request.id
            record.trace_id = "" if request is None else request.trace_id
        return True


class _Console(logging.Formatter):
    """As usual, with the request's id at the end of the first line; a line about a call has its fields there."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        if words := getattr(record, "_words", ""):
            return f"{line} {words}"
        if not (request_id := getattr(record, "request_id", "")):
            return line
        first, newline, rest = line.partition("\n")
        return f"{first} [{request_id}]{newline}{rest}"


def _json_formatter() -> logging.Formatter:
    # Not for those who want a console: it is no small import.
    from pythonjsonlogger.json import JsonFormatter

    class Lines(JsonFormatter):
        """time (ISO 8601, UTC), level, logger, message, request_id, trace_id, whatever else was said, traceback."""

        def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
            return _iso(record.created)

        def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in log_data.items() if value != ""}

    return Lines(
        ["asctime", "levelname", "name", "message", "request_id", "trace_id"],
        rename_fields={
            "asctime": "time",
            "levelname": "level",
            "name": "logger",
            "exc_info": "traceback",
            "stack_info": "stack",
        },
        json_ensure_ascii=False,
    )


def configure(level: str, form: Format, stream: TextIO | None = None) -> None:
    """Has this process, which is a server and nothing else, log to `stream` (None: stderr)."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(_json_formatter() if form == "json" else _Console(_CONSOLE))
    _install(handler, level)
    if form == "json":
        # Else Python itself would write them between the lines.
        logging.captureWarnings(True)


def configure_worker(name: str, level: str, form: Format) -> None:
    """Has a worker log: to its stderr, or in JSON mode to the front, which then reads its stdout and stderr."""
    handler: logging.Handler
    if form == "json":
        handler = _ToFront()
        logging.captureWarnings(True)
        # A pipe would make it wait for a page of text.
        if sys.stdout is not None:
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(_Console(f"%(asctime)s %(levelname)s {name} %(name)s: %(message)s"))
    _install(handler, level)


def _install(handler: logging.Handler, level: str) -> None:
    handler.addFilter(_Named())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _ToFront(logging.Handler):
    """Writes records as JSON after RECORD, each in a write of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            told = {
                "name": record.name,
                "levelno": record.levelno,
                "levelname": record.levelname,
                "created": record.created,
                "msg": record.getMessage(),
                "request_id": getattr(record, "request_id", ""),
                "trace_id": getattr(record, "trace_id", ""),
            }
            if record.exc_info:
                told["exc_text"] = logging.Formatter().formatException(record.exc_info)
            os.write(2, b"\n" + RECORD + json.dumps(told).encode() + b"\n")
        except Exception:
            self.handleError(record)


def record_of(line: bytes, worker: str) -> logging.LogRecord | None:
    """The record in a line that a worker wrote after RECORD; None where there is none."""
    try:
        told = json.loads(line)
        # What _ToFront writes, and nothing else: a model may write to its stderr what it likes.
        created = float(told["created"])
        # Only a time that can be written is one.
        _iso(created)
        found = {"levelno": int(told["levelno"]), "created": created, "worker": worker}
        texts = ("name", "levelname", "msg", "request_id", "trace_id", "exc_text")
        return logging.makeLogRecord(found | {name: str(told[name]) for name in texts if name in told})
    except (ValueError, KeyError, TypeError, OverflowError, OSError, RecursionError):
        return None


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
