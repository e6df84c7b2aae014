"""model.toml: what it says, and what is wrong with it, by key."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pullback_server.hosting import Batching, Compile, Gate, Options, TensorSpec
from pullback_server.hosting.loading import LoadError
from pullback_server.hosting.manifest import Manifest, RepositoryError, read_manifest

FULL = """
description = "Digits."
batch_axis = 0
outputs = ["logits", "features"]
[source]
file = "net.py"
object = "Net"
weights = "net.bin"
allow_pickle = true
arguments = { hidden = 3, names = ["a"], rate = inf }
[inputs.x]
dtype = "float32"
shape = ["batch", 784]
low = 0
high = 1.5
[options]
batching = { max_rows = 64, pad_to = [8, 4] }
compile = { rows = [4, 8] }
autocast = "bfloat16"
checkpoint = ["layers.*"]
micro_batch = 16
hard_timeout = 30
devices = ["cuda-*"]
replicas = 2
[gate]
enabled = true
points = 3
seconds = inf
intended = { gradient = "straight-through" }
[versions]
specific = [1, 3]
"""


def read(text: str) -> Manifest:
    return read_manifest(text, "repo/net/model.toml", "net")


def problems(text: str) -> list[str]:
    with pytest.raises(RepositoryError) as caught:
        read(text)
    lines = str(caught.value).split("\n")
    assert all(line.startswith("repo/net/model.toml: ") for line in lines)
    return [line.removeprefix("repo/net/model.toml: ") for line in lines]


def test_every_key() -> None:
    manifest = read(FULL)
    source = manifest.source
    assert (source.kind, source.file, source.object, source.weights) == ("python", "net.py", "Net", "net.bin")
    assert source.arguments == {"hidden": 3, "names": ["a"], "rate": float("inf")}
    assert (manifest.description, manifest.batch_axis) == ("Digits.", 0)
    assert manifest.outputs == ("logits", "features")
    assert manifest.specs() == {"x": TensorSpec("float32", ("batch", 784), 0, 1.5)}
    assert manifest.options() == Options(
        batching=Batching(max_rows=64, pad_to=(4, 8)),
        compile=Compile(rows=(4, 8)),
        autocast="bfloat16",
        checkpoint=("layers.*",),
        micro_batch=16,
        hard_timeout=30,
        devices=("cuda-*",),
        replicas=2,
    )
    assert manifest.gate_of() == Gate(True, {"gradient": "straight-through"}, 3, float("inf"))
    assert manifest.picked(["10", "3", "1", "2"]) == ["1", "3"]
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_an_empty_file_is_a_manifest() -> None:
    manifest = read("")
    assert manifest == Manifest() == Manifest.model_validate_json(manifest.model_dump_json())
    assert (manifest.options(), manifest.gate_of(), manifest.specs()) == (Options(), Gate(), {})
    assert manifest.picked(["9", "10", "1"]) == ["10"] and manifest.picked([]) == []
    assert read('\ufeffname = "net"\r\n').name == "net"


@pytest.mark.parametrize(
    ("text", "kind", "file"),
    [
        ("", "python", "model.py"),
        ('file = "a/b.pt2"', "pt2", "a/b.pt2"),
        ('file = "b.pt"', "torchscript", "b.pt"),
        ('kind = "pt2"', "pt2", "model.pt2"),
        ('kind = "torchscript"', "torchscript", "model.pt"),
        ('module = "package.nets"', "python", None),
        ('kind = "entry-point"\nentry_point = "net"', "entry-point", None),
    ],
)
def test_kinds_of_source(text: str, kind: str, file: str | None) -> None:
    manifest = read(f"[source]\n{text}")
    assert (manifest.source.kind, manifest.source.file) == (kind, file)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_weights(tmp_path: Path) -> None:
    source = read("").source
    assert source.weights_in(tmp_path) is None
    (tmp_path / "weights.safetensors").touch()
    assert source.weights_in(tmp_path) == tmp_path / "weights.safetensors"
    named = read('[source]\nweights = "a/w.safetensors"').source
    assert named.weights_in(tmp_path) == tmp_path / "a/w.safetensors"


@pytest.mark.parametrize(
    ("text", "picked"),
    [("latest = 2", ["9", "10"]), ("all = true", ["1", "9", "10"]), ("specific = [10, 7]", ["10"]), ("", ["10"])],
)
def test_version_policies(text: str, picked: list[str]) -> None:
    assert read(f"[versions]\n{text}").picked(["10", "9", "1"]) == picked


def test_bounds_of_integers_keep_their_digits() -> None:
    big = 2**62 + 1
    assert read(f"[inputs.x]\nlow = -{big}\nhigh = {big}").specs()["x"].high == big


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('batch_axis = "3"', "batch_axis is '3', expected a whole number"),
        ("batch_axis = true", "batch_axis is true, expected a whole number"),
        ("batch_axis = 1.0", "batch_axis is 1.0, expected a whole number"),
        ("batch_axis = -1", "batch_axis is -1, expected 0 or more"),
        ("description = 3", "description is 3, expected a text in quotes"),
        ("description = 2020-01-01", "description is a date or time"),
        ("source = { arguments = { day = 07:30:00 } }", "source.arguments.day is a date or time"),
        ('outputs = "y"', "outputs is 'y', expected a list"),
        ('outputs = ["y", "y"]', "outputs is ['y', 'y'], expected names that differ"),
        ('outputs = ["y", ""]', "outputs.1 is '', expected a text that is not empty"),
        ('name = "other"', "name is 'other', expected 'net'"),
        ("source = []", "source is [], expected a table"),
        ("[source]\nkind = 'pt3'", "source.kind is 'pt3', expected 'python', 'pt2', 'torchscript' or 'entry-point'"),
        ("[source]\nfile = '../net.py'", "source.file is '../net.py', expected a relative path without '..'"),
        ("[source]\nfile = '/net.py'", "source.file is '/net.py', expected a relative path"),
        ("[source]\nfile = 'a\\net.py'", "source.file is 'a\\\\net.py', expected a relative path"),
        ("[source]\nfile = ''", "source.file is '', expected a relative path"),
        ('[source]\nfile = "a\\u0000.py"', "source.file is 'a\\x00.py', expected a path of printable characters"),
        ("[source]\nfile = '.net.py'", "source.file is '.net.py', but names that begin with '.'"),
        ("[source]\nfile = 'net.txt'", "source.file is 'net.txt', expected a .py file for the kind 'python'"),
        ("[source]\nkind = 'pt2'\nfile = 'net.py'", "source.file is 'net.py', expected a .pt2 file"),
        ("[source]\nfile = 'n.py'\nmodule = 'n'", "source.module is 'n' and file is 'n.py', expected one of them"),
        ("[source]\nmodule = 'a-b'", "source.module is 'a-b', expected a Python name"),
        ("[source]\nobject = '1'", "source.object is '1', expected a Python name"),
        ("[source]\narguments = { 'a b' = 1 }", "source.arguments has the key 'a b', expected names of the factory's"),
        ("[source]\nkind = 'pt2'\nobject = 'N'", "source.object is 'N', but a source of kind 'pt2' takes none"),
        ("[source]\nkind = 'torchscript'\narguments = { a = 1 }", "source.arguments is {'a': 1}, but a source of kind"),
        ("[source]\nentry_point = 'n'", "source.entry_point is 'n', but a source of kind 'python' takes none"),
        ("[source]\nkind = 'entry-point'", "source.entry_point is missing"),
        ("[source]\nweights = 'w.npz'", "source.weights is 'w.npz', expected a .safetensors file"),
        ("[source]\nweights = '/w.safetensors'", "source.weights is '/w.safetensors', expected a relative path"),
        ("[source]\nallow_pickle = 1", "source.allow_pickle is 1, expected true or false"),
        ("inputs = 3", "inputs is 3, expected a table"),
        ("[inputs.x]\ndtype = 'flaot32'", "inputs.x.dtype: no dtype is called 'flaot32'; known: bfloat16, bool"),
        ("[inputs.x]\ndtype = 3", "inputs.x.dtype is 3, expected a text in quotes"),
        ("[inputs.x]\nshape = [-1]", "inputs.x.shape: a shape holds extents (0 or more) and names"),
        ("[inputs.x]\nshape = [1, 2.5]", "inputs.x.shape.1 is 2.5, expected a whole number or a text in quotes"),
        ("[inputs.x]\nlow = '0'", "inputs.x.low is '0', expected a whole number or a number"),
        ("[inputs.x]\nlow = nan", "inputs.x.low is nan, expected a finite number"),
        ("[inputs.x]\nhigh = inf", "inputs.x.high is inf, expected a finite number"),
        ("[inputs.x]\nlow = 2\nhigh = 1", "inputs.x.low is 2, expected at most high, which is 1"),
        ("[options]\nreplicas = '3'", "options.replicas is '3', expected a whole number"),
        ("[options]\nreplicas = 0", "options.replicas is 0, expected a positive number"),
        ("[options]\nmicro_batch = 2", "options.micro_batch needs a batch_axis"),
        ("[options]\nhard_timeout = nan", "options.hard_timeout is nan, expected a positive number"),
        ("[options]\nautocast = 'fp8'", "options.autocast is 'fp8', expected 'bfloat16' or 'float16'"),
        ("[options]\ndevices = 'cpu-0'", "options.devices is 'cpu-0', expected a list"),
        ("[options]\ncheckpoint = ['']", "options.checkpoint is [''], expected a list of globs"),
        ("[options]\ncompile = true", "options.compile is true, expected a table"),
        ("[options]\ncompile = { rows = [0] }", "options.compile.rows is 0, expected a positive number"),
        ("[options]\nbatching = { max_rows = 0 }", "options.batching.max_rows is 0, expected a positive number"),
        (
            "[options]\nbatching = { max_rowz = 1 }",
            "options.batching.max_rowz is not a key; did you mean options.batch",
        ),
        ("[gate]\npoints = 0", "gate.points is 0, expected 1 or more"),
        ("[gate]\nseconds = 0", "gate.seconds is 0, expected more than 0"),
        ("[gate]\nintended = { foo = 'x' }", "gate.intended names 'foo', expected one of gradient, second, rows"),
        ("[gate]\nintended = { rows = ' ' }", "gate.intended['rows'] is ' ', expected the reason in words"),
        ("[versions]\nlatest = 1\nall = true", "versions.latest and all are given, expected exactly one of"),
        ("[versions]\nlatest = 0", "versions.latest is 0, expected 1 or more"),
        ("[versions]\nall = false", "versions.all is false, expected true"),
        ("[versions]\nspecific = []", "versions.specific is [], expected a list that is not empty"),
        ("[versions]\nspecific = ['1']", "versions.specific.0 is '1', expected a whole number"),
        ("descripton = 'x'", "descripton is not a key; did you mean description?"),
        ("[version]\nlatest = 1", "version is not a key; did you mean versions?"),
        ("micro_batch = 3", "micro_batch is not a key; did you mean options.micro_batch?"),
        ("[gate]\nbatch_axis = 0", "gate.batch_axis is not a key; did you mean batch_axis? It goes above the first"),
        ("[inputs.x]\nzzz = 0", "inputs.x.zzz is not a key; expected one of dtype, high, low, shape"),
    ],
)
def test_what_is_refused(text: str, expected: str) -> None:
    (line,) = problems(text)
    assert line.startswith(expected)


def test_a_pickle_is_refused_with_the_reason_and_the_way_out() -> None:
    (line,) = problems("[source]\nweights = 'w.pth'")
    assert "can be made to run any program" in line and "save_file" in line and "allow_pickle = true" in line


def test_all_problems_are_told_at_once() -> None:
    text = """
        nam = 'x'
        name = 'other'
        [options]
        micro_batch = 0
        replicas = 0
        batching = { max_rows = 0, max_bytes = 0 }
        [gate]
        points = 0
        seconds = 0
        [inputs.x]
        dtype = 'a'
        [inputs.y]
        shape = [-1]
    """
    told = problems(text)
    assert len(told) == 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = 1\nb = = 2", "(at line 2, column 5)"),
        ("a = 1\nb = [1,", "(at line 2, column 8, the end of the file)"),
        ("a = 1\na = 2", "(at line 2"),
        ("a = " + "[" * 100_000, "not TOML: nested too deeply"),
    ],
)
def test_broken_toml(text: str, expected: str) -> None:
    (line,) = problems(text)
    assert line.startswith("not TOML: ") and expected in line


def test_it_is_a_load_error() -> None:
    with pytest.raises(LoadError):
        read("x = 1")


def test_a_manifest_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read("").batch_axis = 3


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PLAIN = st.recursive(
    st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
FINITE = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "description": TEXT,
            "batch_axis": st.integers(0, 9),
            "source": st.fixed_dictionaries({"arguments": st.dictionaries(st.just("a"), PLAIN)}),
            "inputs": st.dictionaries(
                TEXT.filter(bool),
                st.fixed_dictionaries(
                    {},
                    optional={"low": FINITE, "shape": st.lists(st.integers(0, 2**40) | TEXT.filter(bool), max_size=3)},
                ),
                max_size=2,
            ),
            "options": st.fixed_dictionaries(
                {},
                optional={
                    "hard_timeout": st.floats(1e-9, 1e9),
                    "batching": st.fixed_dictionaries({"pad_to": st.lists(st.integers(1, 99), max_size=4)}),
                    "compile": st.fixed_dictionaries({"rows": st.lists(st.integers(1, 99), max_size=4)}),
                },
            ),
            "versions": st.fixed_dictionaries({"specific": st.lists(st.integers(1, 10**18), min_size=1, max_size=3)}),
        },
    )
)
def test_a_manifest_survives_the_way_to_a_worker(data: dict[str, Any]) -> None:
    manifest = Manifest.model_validate_json(json.dumps(data))
    again = Manifest.model_validate_json(manifest.model_dump_json())
    assert again == manifest and again.options() == manifest.options() and again.specs() == manifest.specs()


def test_every_option_is_a_key() -> None:
    """Options added to the dataclasses are keys without more ado."""
    for name in (one.name for one in dataclasses.fields(Options)):
        (line,) = problems(f"[options]\n{name} = 2020-01-01")
        assert line.startswith(f"options.{name} is a date")
        (line,) = problems(f"[options]\n{name}x = 1")
        assert line.startswith(f"options.{name}x is not a key")


def test_of_many_problems_ten_are_told() -> None:
    with pytest.raises(RepositoryError) as caught:
        read_manifest("\n".join(f"k{number} = 1" for number in range(20_000)), "model.toml", "net")
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "model.toml: and 19990 more problems"
