"""The exporter: a file that computes what the model computes, or none, and why."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from tests.unit import engine_jobs as jobs
from tests.unit import source_items as items

from pullback_server.engine.exporting import find, main
from pullback_server.engine.hosted import build
from pullback_server.engine.sources import registration_of
from pullback_server.hosting.loading import LoadError
from pullback_wire import Reason

torch.set_num_threads(1)

MODELS = '''
import torch
from torch import nn
from pullback_server import model, spec

X = {"x": spec("float32", ["batch", 4])}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.register_buffer("shift", torch.ones(4), persistent=False)
        self.constant = torch.full((4,), 0.5)


@model("mlp", inputs=X, batch_axis=0)
class MLP(Net):
    """A perceptron."""
    def forward(self, x):
        return self.second(self.drop(self.first(x)).tanh() * self.scale + self.shift) * self.constant


@model("conv", inputs={"image": spec("float32", ["batch", 2, 6, 6])})
class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(48, 2))

    def forward(self, image):
        return self.body(image)


@model("encoder", inputs={"x": spec("float32", ["batch", "time", 8])})
class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")

    def forward(self, x):
        return self.layer(x)


class Rounds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class Reverses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@model("straight", inputs=X)
class Straight(Net):
    def forward(self, x):
        return self.second(Rounds.apply(self.first(x)))


@model("reversal", inputs=X)
class Reversal(Net):
    def forward(self, x):
        return self.second(Reverses.apply(self.first(x)))


@model("honest", inputs=X)
class Honest(Net):
    def forward(self, x):
        return self.second(Doubles.apply(self.first(x).tanh()))


@model("detached", inputs=X)
class Detached(Net):
    def forward(self, x):
        h = self.first(x)
        return self.second(h) * h.detach() ** 2


@model("cut", inputs=X)
class Cut(Net):
    def forward(self, x):
        h = self.first(x).sin()
        with torch.no_grad():
            k = self.second(h)
        return h * k


@model("inference", inputs=X)
class Inference(Net):
    def forward(self, x):
        h = self.first(x).sin()
        with torch.inference_mode():
            k = self.second(h)
        return h * k.clone()


@model("hooked", inputs=X)
class Hooked(Net):
    def __init__(self):
        super().__init__()
        self.first.weight.register_hook(lambda g: 3 * g)

    def forward(self, x):
        return self.second(self.first(x))


@model("integers", inputs={"ids": spec("int64", ["batch", "n"], low=0, high=6), "x": spec("float32", [3])})
class Integers(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 3)

    def forward(self, ids, x):
        return self.table(ids).sin() * x


@model("tied", inputs=X)
class Tied(Net):
    def __init__(self):
        super().__init__()
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).sin())


@model("two", inputs=X, outputs=("a", "b"))
class Two(Net):
    def forward(self, x):
        return self.first(x).sin(), self.second(x)


@model("named", inputs={"x": spec("float32", ["batch", 4]), "y": spec("float32", ["batch", 4])})
class Named(Net):
    def forward(self, x, *, y):
        return {"a": self.first(x) * y, "b": (y ** 3,)}


@model("plain", inputs={"x": spec("float64", ["n"])})
def plain(x):
    return x.sin() * x


@model("even", inputs={"x": spec("float32", ["n"])})
def even(x):
    return x.reshape(2, -1).prod(0) if x.shape[0] % 2 == 0 else x.reshape(-1) ** 2


@model("branch", inputs=X)
class Branch(Net):
    def forward(self, x):
        return self.first(x) if float(x.sum()) > 0 else self.second(x)


@model("undeclared")
class Undeclared(Net):
    def forward(self, x):
        return x


@model("narrow", inputs=X)
class Narrow(Net):
    def forward(self, x):
        return self.first(x.to(torch.float32)).sin().to(torch.bfloat16)
'''


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "models.py"
    path.write_text(textwrap.dedent(MODELS))
    return path


def exported(models: Path, name: str, folder: Path, *more: str) -> int:
    return main([f"{models}:{name}", "--output", str(folder / "model.pt2"), *more])


GOOD = ["mlp", "conv", "encoder", "honest", "detached", "cut", "integers", "tied", "two", "named", "plain", "narrow"]


@pytest.mark.parametrize("name", GOOD)
def test_what_is_exported_computes_what_the_model_computes(
    models: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exported(models, name, tmp_path) == 0
    said = capsys.readouterr().out
    assert "3 random points" in said and "fixed" not in said
    assert list(tmp_path.iterdir()) == [tmp_path / "model.pt2"]
    python = find(f"{models}:{name}")
    item = items.make_item(tmp_path, {"kind": "pt2"})
    found = registration_of(item, {})
    host = jobs.Host(found)
    (signature,) = host.engine.signatures()
    assert "were compared with the original's" in found.abilities.notes[0]
    assert found.inputs == python.inputs and found.batch_axis == python.batch_axis
    local = build(python, torch.device("cpu"))
    assert [p.name for p in signature.parameters] == list(local.parameters)
    inputs = {
        key: torch.randint(0, 6, (3, 2))
        if spec.dtype == "int64"
        else torch.randn(
            [5 if isinstance(e, str) else e for e in spec.shape or ()], dtype=getattr(torch, str(spec.dtype))
        )
        for key, spec in python.inputs.items()
    }
    if name == "integers":
        inputs["x"] = torch.randn(3)
    leaves = {key: t.clone().requires_grad_(t.is_floating_point()) for key, t in inputs.items()}
    for parameter in local.parameters.values():
        parameter.requires_grad_()
    expected = local.code(**leaves)
    outputs = host("evaluate", "m", inputs, version="3").outputs
    flat = list(outputs.values())
    mine = (
        expected
        if isinstance(expected, tuple)
        else (expected["a"], *expected["b"])
        if isinstance(expected, dict)
        else (expected,)
    )
    for a, b in zip(flat, mine, strict=True):
        torch.testing.assert_close(a, b.detach())
    v = {key: torch.randn_like(one) for key, one in outputs.items()}
    wrt = [key for key, t in inputs.items() if t.is_floating_point()]
    named = dict(local.parameters)
    grads = torch.autograd.grad(
        list(mine), [*(leaves[key] for key in wrt), *named.values()], list(v.values()), allow_unused=True
    )
    reply = host(
        "vjp", "m", inputs, version="3", wrt=[*wrt, *(f"param:{key}" for key in named)], cotangents=v, allow_unused=True
    )
    for a, b in zip(reply.grads.values(), grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "straight",
            ["gradient by", "differs, most at [", "in the original", "autograd.Function Rounds", "Python source"],
        ),
        ("reversal", ["autograd.Function Reverses", "weights.safetensors"]),
        ("inference", ["inference_mode"]),
        ("hooked", ["gradient by parameter 'first.weight'", "hooks"]),
        ("branch", ["torch.export fails", "Python source"]),
        ("undeclared", ["not every input declares its shape"]),
        ("nothing", ["no model 'nothing'", "mlp"]),
    ],
)
def test_what_is_refused_leaves_no_file(
    models: Path, name: str, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exported(models, name, tmp_path) == 1
    said = capsys.readouterr().err
    for part in parts:
        assert part in said, said
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_file_stays_where_the_next_is_refused(models: Path, tmp_path: Path) -> None:
    assert exported(models, "mlp", tmp_path) == 0
    before = (tmp_path / "model.pt2").read_bytes()
    assert exported(models, "straight", tmp_path) == 1
    assert (tmp_path / "model.pt2").read_bytes() == before


def test_extents_that_cannot_be_free_are_fixed_and_checked(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exported(models, "even", tmp_path) == 0
    assert "its extents are fixed" in capsys.readouterr().out
    found = registration_of(items.make_item(tmp_path, {"kind": "pt2"}), {})
    assert found.inputs["x"].shape == (2,)
    (record,) = jobs.Host(found).engine.signatures()[0].inputs
    assert record.shape == (2,)


def test_axes_are_named_on_the_command_line(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exported(models, "integers", tmp_path, "--dynamic", "ids.1=time", "--samples", "1") == 0
    assert registration_of(items.make_item(tmp_path, {"kind": "pt2"}), {}).inputs["ids"].shape == ("batch", "time")
    capsys.readouterr()
    for wrong in ("ids=time", "ids.7=time", "other.0=time", "ids.0=3"):
        assert exported(models, "integers", tmp_path, "--dynamic", wrong) == 1
        assert f"--dynamic {wrong}" in capsys.readouterr().err


def test_as_a_program(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.pt2"
    command = [sys.executable, "-m", "pullback_server.engine.exporting", f"{models}:mlp", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "float64" in done.stdout
    names = zipfile.ZipFile(output).namelist()
    assert any(name.endswith("extra/pullback.json") for name in names)


def test_several_models_need_a_name(models: Path) -> None:
    with pytest.raises(LoadError, match="say which"):
        find(str(models))


def test_wrong_shapes_are_the_callers_fault_and_no_error_of_the_model(models: Path, tmp_path: Path) -> None:
    assert exported(models, "mlp", tmp_path) == 0
    found = registration_of(items.make_item(tmp_path, {"kind": "pt2"}), {})
    host = jobs.Host(found)
    with jobs.refused(Reason.UNSUPPORTED_BY_MODEL, "exported in eval mode", field="train"):
        host("evaluate", "m", {"x": torch.randn(2, 4)}, version="3", train=True)
