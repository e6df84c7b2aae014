"""The `pullback` command."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tests.unit.client_server import Fake, serving

from pullback._cli import main


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with serving(Fake()) as fake:
        yield fake.target


def test_models(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--target", target]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["MODEL", "VERSION", "STATE", "PARAMETERS", "DERIVATIVES", "DESCRIPTION"]
    assert lines[3] == "square  2        ready  3           any order, jvp  the square function"
    assert all(line == line.rstrip() for line in lines)


def test_describe(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--target", target, "describe", "pair"]) == 0
    out = capsys.readouterr().out
    for line in (
        "pair: the pair function",
        "  version     2 (of 1, 2)",
        "  gradients   any order; jvp available",
        "    x: float64[n]",
        "    z: any[...] (optional)",
        "    w: float32[3]",
        "    mse_loss(input, target, [weight], reduction=)",
    ):
        assert line in out.splitlines()


def test_ping(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ping", "--target", target]) == 0
    assert f"{target} is serving: " in capsys.readouterr().out


def test_json(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json", "--target", target]) == 0
    models = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in models] == ["echo", "pair", "square"]
    assert main(["--json", "describe", "square", "--target", target]) == 0
    model = json.loads(capsys.readouterr().out)
    assert model["parameters"][0] == {
        "name": "w", "dtype": "float32", "shape": [3], "optional": False, "minimum": None, "maximum": None
    }  # fmt: skip
    assert main(["--json", "ping", "--target", target]) == 0
    assert json.loads(capsys.readouterr().out)["serving"] is True


def test_the_target_comes_from_the_environment(
    target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PULLBACK_TARGET", target)
    assert main(["ping"]) == 0
    assert target in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["ping", "--target", "127.0.0.1:1", "--timeout", "5"],
        ["models", "--target", " ", "--timeout", "1"],
        ["ping", "--target", "127.0.0.1:1", "--tls-ca", "/no/such/file"],
        ["ping", "--target", "127.0.0.1:1", "--tls-cert", "/no/such/file"],
    ],
)
def test_a_failure_is_one_sentence_and_status_1(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("pullback: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["dance"], ["describe"], ["ping", "--timeout", "-1"], ["ping", "--colour"]])
def test_bad_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: pullback" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("pullback ")


def test_a_reader_who_has_read_enough(target: str) -> None:
    """`pullback models | true` ends without a traceback."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pullback._cli", "models", "--target", target],
            stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""
