"""What a worker writes to its stdout and stderr, as records in the front's log."""

from __future__ import annotations

import logging
import os
import threading

from pullback_server import logs

_log = logging.getLogger("pullback_server.output")

#: Longest line; what is longer becomes several.
_LONGEST = 256 << 10


def relay(descriptor: int, worker: str) -> None:
    """Logs what comes from a pipe, in a thread of its own, until nobody can write to it any more; then closes it.

    A thread, since logging may block, and a model may print a lot; who prints more than is read waits.
    """
    threading.Thread(target=_relay, args=(descriptor, worker), name=f"output of {worker}", daemon=True).start()


def _relay(descriptor: int, worker: str) -> None:
    rest = b""
    with open(descriptor, "rb", buffering=0) as pipe:
        while data := pipe.read(64 << 10):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                _tell(line, worker)
            if len(rest) > _LONGEST:
                _tell(rest, worker)
                rest = b""
    _tell(rest, worker)


def _tell(line: bytes, worker: str) -> None:
    try:
        _log_line(line, worker)
    # Who stops reading breaks the pipe, and a print of the model's would be an error to all its callers.
    except Exception:
        _log.warning("a line of worker %s cannot be logged", worker, exc_info=True, extra={"worker": worker})


def _log_line(line: bytes, worker: str) -> None:
    if line.startswith(logs.RECORD):
        record = logs.record_of(line[len(logs.RECORD) :], worker)
        if record is not None:
            logging.getLogger(record.name).handle(record)
            return
    text = line.decode("utf-8", "replace").rstrip()
    if text:
        _log.info("worker %s: %s", worker, text, extra={"worker": worker, "request_id": "", "trace_id": ""})


def pipe() -> tuple[int, int]:
    """A pipe whose ends no other program inherits: where to read, where to write."""
    return os.pipe2(os.O_CLOEXEC)
