"""The command line where something is odd: files that lie, places that cannot be written, streams that are closed."""

import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.client_server import Fake, serving

from pullback._cli import main
from pullback._cli.given import Given
from pullback._cli.reading import Files, tensor
from pullback._cli.tables import visible
from pullback._cli.writing import write

SQUARE = ("grad", "square", "--input", "x=[1, 2, 3]", "--grad-output", "output:float64=[1, 1, 1]")


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    with serving(Fake()) as fake:
        yield fake


def command(*arguments: str, shell: str = 'exec "$@"', **how: Any) -> subprocess.CompletedProcess[str]:
    """shell: what starts it. Not preexec_fn: Python code between fork and exec does not go with gRPC's threads here."""
    line = ["sh", "-c", shell, "sh", sys.executable, "-m", "pullback", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120, **how)


# Files.


def _npy(header: bytes, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def _shaped(shape: str, data: bytes = b"") -> bytes:
    return _npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': " + shape.encode() + b", }\n", data)


def _zipped(data: bytes, compression: int = zipfile.ZIP_STORED, times: int = 1) -> bytearray:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for _ in range(times):
            archive.writestr("x.npy", data)
    return bytearray(file.getvalue())


def _whole() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(100.0))
    return file.getvalue()


def _strange() -> dict[str, bytes]:
    method, encrypted = _zipped(_whole()), _zipped(_whole())
    listing = method.find(b"PK\x01\x02")
    method[8] = method[listing + 10] = 99
    encrypted[6] |= 1
    encrypted[listing + 8] |= 1
    found = {"an unknown method": bytes(method), "encrypted": bytes(encrypted)}
    for name, kind in (("deflate", zipfile.ZIP_DEFLATED), ("bzip2", zipfile.ZIP_BZIP2), ("lzma", zipfile.ZIP_LZMA)):
        cut = _zipped(_whole(), kind)
        cut[50:70] = bytes(byte ^ 0xFF for byte in cut[50:70])
        found[f"{name}, corrupt"] = bytes(cut)
    return {
        **found,
        "terabytes that are not there": _shaped(f"({10**13},)"),
        "the same in an archive": bytes(_zipped(_shaped(f"({10**13},)"))),
        "an extent below 0": _shaped("(-1,)"),
        "a header that does not end": _npy(b'{"""abc\n'),
        "brackets that do not close": _npy(b"{(((((((\n"),
    }


@pytest.mark.parametrize("name", _strange())
def test_a_file_that_lies_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(_strange()[name])
    with pytest.raises(ValueError, match=r"x\.npz cannot be read"):
        Files().one_of(Given("x", None, str(path)), "x")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_two_values_of_one_name_none_is_taken(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(_zipped(_whole(), times=2))
    (tmp_path / "x.json").write_text('{"x": [1.0], "x": [2.0]}')
    for name in ("x.npz", "x.json"):
        with pytest.raises(ValueError, match="'x', 'x'"):
            Files().all_of(str(tmp_path / name))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 900 + "1" + "]" * 900, "nested more than 64 deep"),
        ('{"dtype": "float64", "shape": [0, 1000000000000000000000000000], "data": []}', "x: shape .* cannot be"),
        ('{"dtype": "float64", "shape": [4294967296, 4294967296], "data": []}', "x: data has shape"),
    ],
)
def test_json_of_no_shape(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        tensor(Files().one_of(Given("x", None, str(path)), "x"), None, np.dtype(np.float64), "x", "")


def test_lists_too_deep_for_a_loss(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    deep = "[" * 900 + "1" + "]" * 900
    assert main([*SQUARE[:4], "--loss", "cross_entropy", "--loss-target", deep, "--target", fake.target]) == 1
    assert "--loss-target target" in capsys.readouterr().err


# Results.


def test_the_kind_of_file_goes_by_the_name_that_was_given(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"before")
    (tmp_path / "other.json").write_bytes(b"before")
    for name, leads_to in (("latest.npz", "blob"), ("newest.npz", "other.json")):
        (tmp_path / name).symlink_to(tmp_path / leads_to)
        write(tmp_path / name, {"x": np.ones(3), "y": np.zeros(2)})
        with np.load(tmp_path / leads_to) as found:
            assert sorted(found) == ["x", "y"]


def test_what_is_no_file_is_not_replaced(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "full.npz").symlink_to("/dev/full")
    before = len(fake.seen)
    for name in ("pipe.npz", "folder.npz", "full.npz"):
        assert main([*SQUARE, "-o", str(tmp_path / name), "--target", fake.target]) == 1
        assert f"--output {tmp_path / name}: there is something that is no regular file" in capsys.readouterr().err
    assert (tmp_path / "pipe.npz").is_fifo()
    # Said before anything was asked.
    assert len(fake.seen) == before


def test_a_disk_that_is_full(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    path.write_text("before")
    done = command(*SQUARE, "-o", str(path), "--target", fake.target, "--json", shell='ulimit -f 0; exec "$@"')
    assert (done.returncode, done.stdout) == (1, "")
    # The name that was given, not that of the draft.
    assert done.stderr == f"pullback: {path}: File too large\n"
    assert path.read_text() == "before" and [one.name for one in tmp_path.iterdir()] == ["out.npz"]


# Streams.


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(fake: Fake, closed: str) -> None:
    shell = f'exec "$@" {closed}'
    done = command(*SQUARE, "--json", "--target", fake.target, shell=shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ""
    # What cannot be said is not said elsewhere.
    wrong = command(*SQUARE[:3], "x:float64=-", "--target", fake.target, stdin=subprocess.DEVNULL, shell=shell)
    assert wrong.returncode == 1 and wrong.stdout == "" and "Traceback" not in wrong.stderr
    assert ("standard input cannot be read" in wrong.stderr) == ("2>" not in closed)


def test_a_locale_of_few_characters(fake: Fake) -> None:
    fake.told = {"description": "∇ of \x1b]0;title\x07 §"}
    try:
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        told = command("models", "--target", fake.target, env=environment)
        document = command("describe", "square", "--json", "--target", fake.target, env=environment)
        readable = command("describe", "square", "--json", "--target", fake.target)
    finally:
        fake.told = {}
    assert told.returncode == document.returncode == 0, told.stderr + document.stderr
    assert "\\u2207 of " in told.stdout
    # What a terminal would take for a command is written out.
    assert "\x1b" not in told.stdout and "\\x1b]0;title\\x07" in told.stdout
    assert json.loads(document.stdout)["description"] == "∇ of \x1b]0;title\x07 §"
    assert "∇ of" in readable.stdout


def test_control_characters_are_written_out() -> None:
    assert visible("a\x1b[31m\rb\x9b\n\tµ²") == "a\\x1b[31m\\x0db\\x9b\n\tµ²"


# Options.


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--concurrency", "100000"), "100000 callers are more than 4096"),
        (("--seconds", "inf"), "--seconds: 'inf' is no number of seconds"),
        (("--timeout", "1e300"), "--timeout: '1e300' is no number of seconds"),
    ],
)
def test_numbers_out_of_reason(
    fake: Fake, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "square", *arguments, "--target", fake.target])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("extent", [10**13, 10**30])
def test_inputs_that_no_memory_holds(fake: Fake, capsys: pytest.CaptureFixture[str], extent: int) -> None:
    assert main(["bench", "square", "--shape", f"x={extent}", "--target", fake.target]) == 1
    assert f"input 'x': of the shape [{extent}] none can be made" in capsys.readouterr().err
