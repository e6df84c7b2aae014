"""Log lines for consoles and machines, and what workers write on its way into them."""

import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from pullback_server import logs, tracking
from pullback_server.fleet import output


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """The root logger is the process's, and pytest's."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in list(root.handlers):
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(False)


def said(form: logs.Format, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    logs.configure(level, form, stream)
    return stream


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_line_of_json_says_when_who_what_and_for_which_request() -> None:
    stream = said("json")
    log = logging.getLogger("somebody")
    log.debug("not this")
    with tracking.as_of(tracking.Request("one", TRACE)):
        log.warning("two\nlines, %d%%", 7, extra={"worker": "cpu-0", "bytes": 3})
    log.info("umlaut: ü")
    try:
        raise ValueError("as asked")
    except ValueError:
        log.exception("it failed")
    first, second, third = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["message"] == "two\nlines, 7%"
    assert (first["level"], first["logger"]) == ("WARNING", "somebody")
    assert (first["request_id"], first["trace_id"]) == ("one", "0af7651916cd43dd8448eb211c80319c")
    assert (first["worker"], first["bytes"]) == ("cpu-0", 3)
    moment = datetime.fromisoformat(first["time"])
    assert moment.utcoffset() is not None
    assert abs(moment.timestamp() - time.time()) < 60
    assert second["message"] == "umlaut: ü"
    assert "request_id" not in second
    assert third["traceback"].endswith("ValueError: as asked")


def test_a_console_has_the_id_at_the_end_of_the_first_line() -> None:
    stream = said("console", "warning")
    log = logging.getLogger("somebody")
    log.info("not this")
    log.warning("plain")
    with tracking.as_of(tracking.Request("one")):
        log.warning("first\nsecond")
    plain, first, second = stream.getvalue().splitlines()
    assert plain.endswith(" WARNING somebody: plain")
    assert first.endswith(" WARNING somebody: first [one]")
    assert second == "second"


def test_nested_requests_and_batches_are_named() -> None:
    assert tracking.current() is None
    one = tracking.Request("one")
    with tracking.as_of(one):
        with tracking.as_of(one.op(3, "grad")):
            found = tracking.current()
            assert found is not None
            assert found.id == "one/3"
        assert tracking.current() is one
    assert tracking.current() is None
    members = [tracking.Request(f"r{number}") for number in range(10)]
    batch = tracking.together([None, *members], {})
    assert batch is not None
    assert batch.id == "r0,r1,r2,r3,r4,r5,r6,r7,and 2 more"
    assert batch.member(0) is None
    assert batch.member(2) is members[1]
    assert tracking.together([None, None], {}) is None


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (TRACE, True),
        (TRACE[:-2] + "00", True),
        ("01" + TRACE[2:] + "-more", True),
        (TRACE + "-more", False),
        ("ff" + TRACE[2:], False),
        (TRACE.upper(), False),
        ("00-" + "0" * 32 + TRACE[35:], False),
        (TRACE[:36] + "0" * 16 + TRACE[52:], False),
        ("", False),
    ],
)
def test_contexts_are_what_the_standard_says(text: str, good: bool) -> None:
    assert tracking.is_traceparent(text) is good


def test_what_a_process_writes_becomes_records_line_by_line() -> None:
    """A real process: prints, a library that writes to the descriptor, log records, and a line without an end."""
    stream = said("json")
    reading, writing = output.pipe()
    code = """
import logging, os, sys
from pullback_server import logs, tracking
print("before")
logs.configure_worker("cpu-3", "info", "json")
print("printed")
os.write(2, b"raw, and then ")
with tracking.as_of(tracking.Request("one")):
    logging.getLogger("models").info("from inside")
    try:
        raise KeyError("x")
    except KeyError:
        logging.getLogger("models").exception("it failed")
logging.getLogger("models").debug("not this")
os.write(1, b"\\x1enot json\\n")
forged = [b"3", b"[1]", b'{"name": "x", "msg": "y"}',
    b'{"name": "x", "msg": "y", "levelno": "high", "created": 1}',
    b'{"name": "x", "msg": "y", "levelno": 50, "created": NaN}',
    b'{"name": "forged", "msg": "100 %d", "levelno": 50, "created": 1, "args": [1, 2], "exc_info": [1, 2, 3]}']
for line in forged:
    os.write(2, b"\\x1e" + line + b"\\n")
os.write(2, b"\\xff no utf-8")
"""
    output.relay(reading, "cpu-3")
    subprocess.run([sys.executable, "-u", "-c", code], stdout=writing, stderr=writing, check=True, timeout=60)
    os.close(writing)
    until = time.monotonic() + 30
    while "no utf-8" not in stream.getvalue():
        assert time.monotonic() < until, stream.getvalue()
        time.sleep(0.01)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    told = [line["message"] for line in lines if line["logger"] == "pullback_server.output"]
    # What only looks like a record of a worker's is text; a relay that ended there would break the model's next print.
    assert [line for line in told if "\x1e" not in line or "json" in line] == [
        "worker cpu-3: before",
        "worker cpu-3: printed",
        "worker cpu-3: raw, and then",
        "worker cpu-3: \x1enot json",
        "worker cpu-3: \ufffd no utf-8",
    ]
    assert len(told) == 10
    assert [line["message"] for line in lines if line["logger"] == "forged"] == ["100 %d"]
    inside, failed = (line for line in lines if line["logger"] == "models")
    assert (inside["message"], inside["level"], inside["request_id"]) == ("from inside", "INFO", "one")
    assert failed["traceback"].endswith("KeyError: 'x'")
    assert {line["worker"] for line in lines} == {"cpu-3"}
