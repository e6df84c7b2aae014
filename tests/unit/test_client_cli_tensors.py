"""Tensors on the command line and in its files, and what the commands do with them, against a server in numpy."""

import argparse
import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from tests.unit.client_server import Failure, Fake, serving

from pullback._cli import main, samples
from pullback._cli.given import Given
from pullback._cli.given import given as parsed
from pullback._cli.literals import from_json, to_json
from pullback._cli.reading import Files, tensor
from pullback._cli.writing import write
from pullback._info import TensorInfo, model_info
from pullback_wire import Reason, numpy_dtype
from pullback_wire.dtypes import DTYPES
from pullback_wire.v1 import model_service_pb2

Array = np.ndarray[Any, Any]
ALL = [numpy_dtype(number) for number in DTYPES]


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    with serving(Fake()) as fake:
        yield fake


def run(capsys: pytest.CaptureFixture[str], fake: Fake, *arguments: str) -> tuple[int, str, str]:
    status = main([*arguments, "--target", fake.target])
    said = capsys.readouterr()
    return status, said.out, said.err


def same(one: Array, other: Array) -> bool:
    """Bit for bit, whatever NaN is made of."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    wide = [array.astype(np.complex128) for array in (one, other)]
    if not all(np.array_equal(np.isnan(part(wide[0])), np.isnan(part(wide[1]))) for part in (np.real, np.imag)):
        return False
    return np.isnan(wide[0]).any() or one.tobytes() == other.tobytes()


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    dtype = draw(st.sampled_from(ALL))
    shape = draw(nps.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    count = int(np.prod(shape)) * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    if dtype == np.bool_:
        return (np.frombuffer(data, np.uint8) > 127).reshape(shape)
    return np.frombuffer(data, dtype).reshape(shape)


@settings(max_examples=150, deadline=None)
@given(arrays())
def test_json_holds_any_array(array: Array) -> None:
    told = json.loads(json.dumps(to_json(array), allow_nan=False))
    assert same(from_json(told, array.dtype, "x"), array)
    assert same(tensor(told, None, None, "x", ""), array)
    if array.size:
        assert same(from_json(told["data"], array.dtype, "x"), array)


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".json", ".safetensors"])
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_files_hold_what_was_written(tmp_path: Path, dtype: np.dtype[Any], suffix: str) -> None:
    array = np.arange(6).reshape(2, 3).T.astype(dtype)
    if str(dtype) == "float8_e8m0fnu":
        # Powers of two alone.
        array = np.array([0.5, 1.0, 2.0]).astype(dtype)
    path = tmp_path / f"of a model{suffix}"
    odd = dtype.isbuiltin != 1 if suffix in (".npy", ".npz") else suffix == ".safetensors" and dtype == np.complex128
    if odd:
        with pytest.raises(ValueError, match=f"{dtype}, which {suffix} files cannot hold"):
            write(path, {"grad:x": array})
        assert list(tmp_path.iterdir()) == []
        return
    write(path, {"grad:x": array})
    assert list(tmp_path.iterdir()) == [path]
    if suffix == ".safetensors" and importlib.util.find_spec("safetensors") is None:
        # As for users of the client alone.
        with pytest.raises(ImportError, match=r"pip install 'pullback\[cli\]'"):
            Files().all_of(str(path))
        return
    for name in (str(path), *([f"{path}:grad:x"] if suffix != ".npy" else [])):
        found = tensor(Files().one_of(Given(None, None, name), "x"), None, None, "x", "")
        assert same(found, array)
    if suffix != ".npy":
        assert list(Files().all_of(str(path))) == ["grad:x"]


def test_what_was_there_stays_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    write(path, {"x": np.ones(3)})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="bfloat16"):
        write(path, {"x": np.ones(3), "y": np.ones(3, ml_dtypes.bfloat16)})
    assert path.read_bytes() == before
    link = tmp_path / "link.npz"
    link.symlink_to(path)
    write(link, {"x": np.zeros(2), "file": np.ones(1)})
    assert link.is_symlink()
    assert sorted(np.load(path)) == ["file", "x"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link.npz", "out.npz"]


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("unpickled"),))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = np.array([Malice()], dtype=object)
    np.save("evil.npy", evil, allow_pickle=True)
    np.savez("evil.npz", x=evil)
    evil.dump("evil.pkl")
    for name in ("evil.npy", "evil.npz", "evil.pkl"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            Files().one_of(Given("x", None, name), "x")
    assert not Path("unpickled").exists()


@pytest.mark.parametrize(
    "data", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00v\x00{'descr'", b"PK\x03\x04", b"[1, 2", b"\xff\xfe"]
)
def test_broken_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.npy cannot be read"):
        Files().one_of(Given("x", None, str(tmp_path / "x.npy")), "x")


def test_elements_without_a_dtype(tmp_path: Path) -> None:
    array = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    np.save(tmp_path / "x.npy", array)
    raw = Files().one_of(Given("x", None, str(tmp_path / "x.npy")), "x")
    with pytest.raises(ValueError, match=r"elements of 2 bytes without a dtype.*--input x:bfloat16="):
        tensor(raw, None, array.dtype, "--input x", "--input x:float64=...")
    with pytest.raises(ValueError, match="elements of 2 bytes"):
        tensor(raw, np.dtype(np.float32), None, "x", "")
    assert same(tensor(raw, array.dtype, None, "x", ""), array)


@pytest.mark.parametrize(
    ("array", "dtype", "kept"),
    [
        (np.array([0.1]), "float32", True),
        (np.array([1e300]), "float32", False),
        (np.array([np.inf, np.nan]), "float16", True),
        (np.array([1, 2]), "float32", True),
        (np.array([2**53 + 1]), "float64", False),
        (np.array([300]), "uint8", False),
        (np.array([1.0]), "int64", False),
        (np.array([1j]), "float64", False),
        (np.array([1.0]), "complex64", True),
        (np.array([0, 1]), "bool", False),
    ],
)
def test_conversion_that_was_asked_for(array: Array, dtype: str, kept: bool) -> None:
    if kept:
        assert tensor(array, np.dtype(dtype), None, "x", "").dtype == dtype
    else:
        with pytest.raises(ValueError, match=f"cannot be made {dtype} without loss"):
            tensor(array, np.dtype(dtype), None, "x", "")


@pytest.mark.parametrize(
    ("literal", "dtype", "told"),
    [
        ("[1.5]", "int64", "elements that are float"),
        ("[true]", "float32", "elements that are bool"),
        ("[0, 1]", "bool", "elements that are int"),
        ("[256]", "uint8", r"outside 0\.\.255"),
        ("[-1]", "uint64", "outside"),
        ("[18446744073709551615, -1]", "int64", "outside"),
        ("[1e39]", "float32", "float32 cannot"),
        ("[500.0]", "float8_e4m3fn", "float8_e4m3fn cannot"),
        ("[[1], [1, 2]]", "float64", "different lengths"),
        ('["one"]', "float64", '"one" is no number'),
        ("[null]", "float64", "null is no number"),
        ("[1, 2, 3]", "complex64", "pair"),
        ("1", "complex64", "pair"),
        ('{"dtype": "float9", "data": 1}', "float32", "float9"),
        ('{"dtype": "float32", "shape": [3], "data": [1, 2]}', "float32", r"data has shape \[2\]"),
    ],
)
def test_json_that_is_no_array(literal: str, dtype: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        tensor(json.loads(literal), None, np.dtype(getattr(ml_dtypes, dtype, dtype)), "x", "")


def test_json_integers_are_exact() -> None:
    for dtype, number in (("int64", 2**63 - 1), ("int64", -(2**63)), ("uint64", 2**64 - 1), ("int64", 2**53 + 1)):
        assert int(from_json(number, np.dtype(dtype), "x")) == number


def test_ways_to_give_a_tensor() -> None:
    f64 = np.dtype(np.float64)
    assert parsed("x=@a=b.npy") == Given("x", None, "a=b.npy")
    assert parsed("@a=b.npy") == Given(None, None, "a=b.npy")
    assert parsed("fc.weight:double=[1]") == Given("fc.weight", f64, None, [1])
    assert parsed("x=-") == parsed("x=@-") == Given("x", None, "-")
    assert parsed("-0.5") == Given(None, None, None, -0.5)
    for text, told in (
        ("x", "neither @FILE nor JSON"),
        ("x=x.npy", "a file is @x.npy"),
        ("=1", "no name"),
        ("x:float=1:2", "neither"),
        ("x:flaot64=1", "'flaot64' is no dtype"),
        ("@", "names no file"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=told):
            parsed(text)


# Commands.


def test_grad(fake: Fake, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(
        capsys, fake, "grad", "square", "--input", "x=[1, 2, 3]", "--grad-output", "output:float64=[1, 1, 2]"
    )
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "square version 2: vjp",
        "  outputs",
        "    output: float64[3]  norm 9.89949  min 1  max 9",
        "      [1. 4. 9.]",
        "  gradients",
        "    x: float64[3]  norm 12.8062  min 2  max 12",
        "      [ 2.  4. 12.]",
    ]
    assert fake.seen[-1].tensors["cotangents"]["output"].dtype == np.float64
    out_file = tmp_path / "out.npz"
    np.save(tmp_path / "v.npy", np.array([1.0, 0.0], ">f8"))
    status, out, _ = run(
        capsys, fake, "grad", "square", "-i", "[1, 2]", "--grad-output", f"@{tmp_path / 'v.npy'}", "--max-norm", "9",
        "--json", "-o", str(out_file),
    )  # fmt: skip
    assert status == 0
    assert json.loads(out) == {
        "model": "square", "version": "2", "revision": 0, "method": "vjp", "norm": 2.0,
        "outputs": {"output": {"dtype": "float64", "shape": [2], "data": [1.0, 4.0]}},
        "gradients": {"x": {"dtype": "float64", "shape": [2], "data": [2.0, 0.0]}},
    }  # fmt: skip
    with np.load(out_file) as found:
        assert {name: found[name].tolist() for name in found} == {"output": [1.0, 4.0], "grad:x": [2.0, 0.0]}


def test_what_the_call_is_asked_for(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(
        capsys, fake, "grad", "square", "-i", "[1, 2]", "--loss", "mse_loss", "--loss-target", "target:float64=[1, 1]",
        "--loss-option", "reduction=sum", "--loss-option", "delta=0.5", "--train", "--seed", "7", "--wrt", "x,fc*",
        "--wrt", "w", "--allow-unused", "--result-dtype", "float32", "--detect-anomaly", "--model-version", "1",
        "--param", "w=[1, 2, 3]", "--no-outputs",
    )  # fmt: skip
    assert (status, err) == (0, "") and "outputs" not in out
    sent = fake.seen[-1]
    function = sent.message.function
    assert (function.loss.name, dict(function.loss.options)) == ("mse_loss", {"reduction": "sum", "delta": 0.5})
    assert (function.version, function.seed, function.detect_anomaly) == ("1", 7, True)
    assert list(sent.message.wrt) == ["x", "fc*", "w"] and sent.message.allow_unused
    assert sent.message.results.omit_outputs and sent.message.results.dtype
    # Of the signature: w is float32.
    assert sent.tensors["parameters"]["w"].dtype == np.float32


def test_inputs_by_name_in_a_file(fake: Fake, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_text('{"x": [1, 2], "index": {"dtype": "int32", "data": [3]}}')
    status, out, err = run(capsys, fake, "evaluate", "pair", "--inputs", str(path), "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["outputs"]["double"]["data"] == [2.0, 4.0]
    sent = fake.seen[-1].tensors["inputs"]
    assert (sent["x"].dtype, sent["index"].dtype) == (np.float64, np.int32)
    status, _, err = run(capsys, fake, "evaluate", "pair", "--inputs", str(path), "--input", "x=[1, 2]")
    assert status == 1 and "'x' is given twice" in err
    np.save(tmp_path / "x.npy", np.ones(2))
    status, _, err = run(capsys, fake, "evaluate", "pair", "--inputs", str(tmp_path / "x.npy"))
    assert status == 1 and "one array without a name" in err


def test_standard_input(fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO()

    np.savez(Stdin.buffer, x=np.array([1.0, 2.0]), v=np.array([1.0, 0.0]))
    Stdin.buffer.seek(0)
    monkeypatch.setattr("sys.stdin", Stdin)
    status, out, err = run(capsys, fake, "grad", "square", "-i", "x=-", "--grad-output", "@-:v", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["gradients"]["x"]["data"] == [2.0, 0.0]


def test_unused_is_null(fake: Fake, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = (
        "-i",
        "x=[1]",
        "-i",
        "index:int64=[0]",
        "-i",
        "z:float64=1",
        "--grad-output",
        "double:float64=[1]",
        "--allow-unused",
    )
    path = tmp_path / "out.json"
    status, out, _ = run(capsys, fake, "grad", "pair", *given, "--json", "-o", str(path))
    assert status == 0 and json.loads(out)["gradients"]["z"] is None
    assert sorted(json.loads(path.read_text())) == ["double", "grad:x", "total"]
    assert "    z: unused" in run(capsys, fake, "grad", "pair", *given)[1].splitlines()


def test_every_derivative(fake: Fake, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = ("square", "-i", "[1, 2]", "-o", str(tmp_path / "out.npz"))
    for command, more, names in (
        ("evaluate", [], ["output"]),
        ("jvp", ["--tangent", "[1, 0]"], ["jvp:output", "output"]),
        ("hvp", ["--tangent", "x=[1, 0]", "--grad-output", "ones"], ["grad:x", "hvp:x", "output"]),
        ("jacobian", [], ["jacobian:output:x", "output"]),
        ("hessian", [], ["grad:x", "hessian:x:x", "output"]),
    ):
        status, _, err = run(capsys, fake, command, *given, *more)
        assert (status, err) == (0, ""), err
        with np.load(tmp_path / "out.npz") as found:
            assert sorted(found) == names
    # A .npy file holds what the command is named after.
    assert run(capsys, fake, "hvp", *given[:3], "--tangent", "[1, 0]", "-o", str(tmp_path / "h.npy"))[0] == 0
    assert np.load(tmp_path / "h.npy").tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["grad", "square", "-i", "x=@nowhere.npy"], "nowhere.npy: No such file"),
        (["grad", "square", "-i", "x=[1]", "-i", "x=[2]"], "--input: 'x' is given twice"),
        (["grad", "square", "-i", "y=[1]"], "--input y: square has none of this name; it has x"),
        (["grad", "pair", "-i", "[1]"], "say which is meant, as in NAME=...; there are x, index"),
        (["grad", "pair", "-i", "x=[1]", "-i", "index=[1]"], "--input index:float64=..., or --dtype"),
        (["grad", "pair", "-i", "x=[1]", "--grad-output", "[1]"], "there are double, total"),
        (["grad", "square", "-i", "x=[[1], [2, 3]]"], "different lengths"),
        (["grad", "square", "-i", "[1]", "-o", "no/such/folder.npz"], "there is no folder"),
        (["grad", "pair", "-i", "x=[1]", "-o", "out.npy", "--allow-unused", "-i", "z:float64=1", "--wrt", "w.*"],
         "a .npy file holds one array, and there are 2"),
        (["grad", "square", "-i", "[1]", "--loss", "mse_loss", "--loss-target", "[0.5]"], "--loss-target target:"),
        (["ping", "--tls-ca", __file__], "the file holds no PEM certificates"),
        (["ping", "--tls-ca", "/no/such/file"], "--tls-ca /no/such/file: No such file"),
        (["ping", "--tls-cert", __file__, "--tls-key", __file__], "--tls-key"),
        (["ping", "--tls-cert", "c.pem"], "--tls-cert and --tls-key belong together"),
        (["bench", "pair"], "input 'index': the signature says no dtype"),
        (["bench", "square", "--rows", "3"], "declares no batch axis"),
        (["bench", "square", "--shape", "x=3,4"], r"its shape cannot be [3, 4]"),
        (["bench", "square", "--shape", "w=3"], "has no input 'w'"),
        (["top", "--once", "--metrics", "http://127.0.0.1:1"], "http://127.0.0.1:1 cannot be reached"),
    ],
)  # fmt: skip
def test_a_failure_is_one_sentence(
    fake: Fake,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, fake, *arguments)
    assert status == 1
    assert err.startswith("pullback: ") and err.count("\n") == 1 and told in err
    assert not out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["grad", "m"], "--input"),
        (["grad", "m", "--input", "x"], "argument --input/-i: 'x' is neither @FILE nor JSON"),
        (["jvp", "m", "--input", "x=1"], "--tangent"),
        (["grad", "m", "-i", "1", "-o", "out.txt"], "argument --output/-o: 'out.txt' ends in none of .npz"),
        (["grad", "m", "-i", "1", "--param", "[1]"], "argument --param: '[1]' has no name"),
        (["grad", "m", "-i", "1", "--max-norm", "0"], "argument --max-norm"),
        (["grad", "m", "-i", "1", "--seed", "-3"], "argument --seed"),
        (["grad", "m", "-i", "1", "--wrt", "x,,y"], "argument --wrt"),
        (["grad", "square", "-i", "[1]", "--loss-target", "[1]"], "need --loss"),
        (["bench", "m", "--concurrency", "1,0"], "argument --concurrency: '0' is no whole number above 0"),
        (["bench", "m", "--shape", "x"], "argument --shape"),
        (["ping", "--timeout", "-1"], "argument --timeout: '-1' is no number of seconds above 0"),
        (["top", "--metrics", "ftp://host"], "argument --metrics"),
        (["top"], "use --once, or --json"),
    ],
)
def test_bad_usage_names_the_option(
    fake: Fake, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--target", fake.target])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert told in err and err.startswith("usage: pullback ")


@pytest.mark.parametrize("value", ["@t.npy", "target=@t.npy", "[1, 2]"])
def test_a_loss_target_is_not_an_address(capsys: pytest.CaptureFixture[str], value: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["grad", "m", "-i", "1", "--loss", "mse_loss", "--target", value])
    assert caught.value.code == 2 and "--loss-target" in capsys.readouterr().err


def test_a_token_is_not_sent_in_plain_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PULLBACK_TOKEN", "secret")
    assert main(["top", "--once", "--target", "gradients.example:8470"]) == 1
    err = capsys.readouterr().err
    assert "plain text" in err and "secret" not in err


def test_bench(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    before = {method: fake.calls(method) for method in ("ComputeVjp", "Evaluate")}
    status, out, err = run(
        capsys, fake, "bench", "square", "--shape", "x=5", "--concurrency", "1,3", "--seconds", "0.2",
        "--warmup", "0.05", "--json",
    )  # fmt: skip
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["inputs"] == {"x": {"dtype": "float64", "shape": [5]}}
    assert (found["request_bytes"], found["response_bytes"]) == (80, 80)
    assert [level["callers"] for level in found["levels"]] == [1, 3]
    # One evaluation, to learn the outputs' shape, and one call before any is counted.
    made = 1 + sum(level["calls"] + level["warmup_calls"] for level in found["levels"])
    assert fake.calls("ComputeVjp") - before["ComputeVjp"] == made
    assert fake.calls("Evaluate") - before["Evaluate"] == 1
    for level in found["levels"]:
        assert level["calls"] == level["answered"] > 0 and level["errors"] == {}
        assert level["calls_per_second"] == pytest.approx(level["answered"] / level["seconds"])
        times = level["latency_ms"]
        assert 0 < times["p50"] <= times["p90"] <= times["p95"] <= times["p99"] <= times["max"]
        # This server tells no timings.
        assert level["shares"] == {} and level["merged_rows"] is None


def test_errors_in_a_bench_are_counted(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.delay = 0.01
    timer_failures = [Failure.of(Reason.OVERLOADED, retry_after=0.01)] * 3
    seen = len(fake.seen)

    class Later(list[Failure]):
        """Fails the calls after the first two, which are no part of what is measured."""

        def __bool__(self) -> bool:
            return len(fake.seen) - seen > 4 and len(self) > 0

    fake.failures = Later(timer_failures)
    try:
        status, out, _ = run(capsys, fake, "bench", "square", "--concurrency", "1", "--seconds", "0.5", "--warmup", "0")
    finally:
        fake.delay, fake.failures = 0.0, []
    assert status == 0
    row = next(line for line in out.splitlines() if line.split()[:1] == ["1"])
    assert row.endswith("3  3 OVERLOADED")


def test_samples_are_what_the_signature_allows() -> None:
    info = model_info(model_service_pb2.Model(name="m", batch_axis=0))
    specs = (
        TensorInfo("x", "float32", ("batch", 4)),
        TensorInfo("label", "int64", ("batch",), minimum=2, maximum=5),
        TensorInfo("share", "float64", ("batch", "k"), minimum=0.25, maximum=0.5),
        TensorInfo("above", "bfloat16", (100,), minimum=3),
        TensorInfo("mask", "bool", (100,)),
        TensorInfo("z", "complex64", ()),
        TensorInfo("index", "int32", (100,)),
        TensorInfo("extra", "float32", (1,), optional=True),
    )
    info = type(info)(**{**info.__dict__, "inputs": specs})
    found = samples.inputs(info, {}, {}, 50, None, np.random.default_rng(0))
    assert {name: (array.dtype.name, array.shape) for name, array in found.items()} == {
        "x": ("float32", (50, 4)), "label": ("int64", (50,)), "share": ("float64", (50, 1)),
        "above": ("bfloat16", (100,)), "mask": ("bool", (100,)), "z": ("complex64", ()), "index": ("int32", (100,)),
    }  # fmt: skip
    assert set(found["label"].tolist()) == {2, 3, 4, 5}
    assert 0.25 <= found["share"].min() < found["share"].max() <= 0.5
    assert found["above"].min() >= 3 and set(found["index"].tolist()) == {0, 1}
    found = samples.inputs(info, {}, {"share": (7, 3)}, None, None, np.random.default_rng(0))
    assert found["x"].shape == (7, 4) and found["share"].shape == (7, 3)
    with pytest.raises(ValueError, match="--rows 8: the inputs given have 7 rows"):
        samples.inputs(info, {}, {"share": (7, 3)}, 8, None, np.random.default_rng(0))


# What is not there.


@pytest.mark.parametrize(
    ("missing", "arguments", "told"),
    [
        ("safetensors", ["evaluate", "square", "-i", "x=@x.safetensors"], "pip install 'pullback[cli]'"),
        ("rich", ["top", "--metrics", "http://127.0.0.1:1"], "pip install 'pullback[cli]'"),
    ],
)
def test_the_extra_is_named(
    fake: Fake, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    missing: str, arguments: list[str], told: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.safetensors", {"x": np.ones(2)})
    monkeypatch.setitem(sys.modules, missing, None)
    for name in [name for name in sys.modules if name.startswith((f"{missing}.", "pullback._cli.top_screen"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    status, _, err = run(capsys, fake, *arguments)
    assert status == 1 and told in err and missing in err and err.count("\n") == 1


def test_nothing_is_loaded_that_is_not_needed(fake: Fake) -> None:
    code = (
        "import sys; from pullback._cli import main\n"
        f"assert main(['grad', 'square', '-i', '[1]', '--grad-output', 'ones', '--target', {fake.target!r}]) == 0\n"
        "assert not {'rich', 'safetensors', 'torch', 'jax', 'scipy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_as_a_module(fake: Fake) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pullback", "models", "--target", fake.target],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "square" in done.stdout


def test_help_shows_an_example_of_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    overview = capsys.readouterr().out
    commands = [line.split()[0] for line in overview.splitlines() if line.startswith("  ") and line[2].islower()]
    assert len(commands) == 15
    for command in commands:
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert f"pullback {command}" in capsys.readouterr().out.partition("for example:")[2]


def test_the_example_of_describe_works(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    lines = run(capsys, fake, "describe", "square")[1].splitlines()
    example = lines[lines.index("  for example") + 1]
    assert shlex.split(example)[:3] == ["pullback", "grad", "square"]
    status, out, err = run(capsys, fake, *shlex.split(example)[1:])
    assert (status, err) == (0, "") and "gradients" in out
