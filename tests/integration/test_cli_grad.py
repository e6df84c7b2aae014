"""`pullback grad` and its kin against a real server: values as of local torch, through files of every kind."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

from pullback._cli import main
from pullback._cli.reading import Files
from pullback._cli.writing import write
from pullback_server import Server

MODELS = """
import torch
from torch import nn
from pullback_server import model, spec

@model("energy", inputs={"x": spec("float64", ["atoms", 3])})
def energy(x):
    first, second = torch.triu_indices(len(x), len(x), 1)
    r2 = (x[first] - x[second]).square().sum(-1)
    return 4 * (r2**-6 - r2**-3).sum()

@model("wave", inputs={"z": spec("complex128", ["n"])})
def wave(z):
    return z**2 * torch.exp(0.5j * z)

@model("half", inputs={"x": spec("bfloat16", ["n"])})
def half(x):
    return x.exp()

@model("two", inputs={"x": spec("float64", ["n"]), "y": spec("float64", ["n"])}, outputs=["product", "total"])
def two(x, y):
    return x.sin() * y, (x * y**2).sum()

@model("logarithm", inputs={"x": spec("float64", ["n"])}, gate=False)
def logarithm(x):
    return x.log()

@model("mlp", inputs={"input": spec("float64", ["batch", 4])}, batch_axis=0)
def mlp():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
"""
X = np.array([[0.0, 0.1, 0.2], [1.1, 0.0, 0.0], [0.3, 1.2, -0.4]])
T = np.array([[0.5, -1.0, 0.25], [0.0, 2.0, 1.0], [0.125, 0.0, -0.5]])


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "models.py").write_text(MODELS)
    with Server(folder / "models.py", threads=1) as server:
        yield server.target


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PULLBACK_TARGET", target)


def energy(x: torch.Tensor) -> torch.Tensor:
    first, second = torch.triu_indices(len(x), len(x), 1)
    r2 = (x[first] - x[second]).square().sum(-1)
    return 4 * (r2**-6 - r2**-3).sum()


def told(capsys: pytest.CaptureFixture[str], line: str) -> str:
    assert main(shlex.split(line)) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert err == ""
    return out


def close(found: Any, expected: torch.Tensor) -> None:
    assert found.dtype == np.float64 and found.shape == tuple(expected.shape)
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "given", ["x.npy", "all.npz:x", "all.npz", "all.safetensors", "x.json", "plain.json", "inline"]
)
def test_gradients_from_files_of_each_kind(capsys: pytest.CaptureFixture[str], given: str) -> None:
    np.save("x.npy", np.asfortranarray(X))
    np.savez("all.npz", x=X, other=T)
    safetensors.numpy.save_file({"x": X, "other": T}, "all.safetensors")
    write(Path("x.json"), {"x": X})
    Path("plain.json").write_text(json.dumps(X.tolist()))
    value = json.dumps(X.tolist()) if given == "inline" else "@" + given
    told(capsys, f"grad energy --input 'x={value}' -o out.npz")
    x = torch.tensor(X, requires_grad=True)
    (gradient,) = torch.autograd.grad(energy(x), x)
    with np.load("out.npz") as found:
        assert sorted(found) == ["grad:x", "output"]
        close(found["output"], energy(x))
        close(found["grad:x"], gradient)


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "json"])
def test_results_are_the_same_bits_in_files_of_each_kind(capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    np.save("x.npy", X)
    np.save("t.npy", T)
    document = json.loads(told(capsys, f"hvp energy -i x=@x.npy --tangent x=@t.npy -o out.{suffix} --json"))
    found = Files().all_of(f"out.{suffix}")
    assert sorted(found) == ["grad:x", "hvp:x", "output"]
    from pullback._cli.reading import tensor

    arrays = {name: tensor(raw, None, None, name, "") for name, raw in found.items()}
    printed = {
        "output": document["outputs"]["output"], "grad:x": document["gradients"]["x"], "hvp:x": document["hvps"]["x"]
    }  # fmt: skip
    for name, array in arrays.items():
        assert array.tobytes() == tensor(printed[name], None, None, name, "").tobytes()
    # And back in again: the gradient of a gradient's file.
    told(capsys, f"grad energy -i 'x=@out.{suffix}:grad:x' -o again.npy")
    gradient = torch.autograd.functional.jacobian(energy, torch.tensor(arrays["grad:x"]))
    np.testing.assert_allclose(np.load("again.npy"), gradient.numpy(), rtol=1e-12)


def test_second_derivatives(capsys: pytest.CaptureFixture[str]) -> None:
    np.save("x.npy", X)
    np.save("t.npy", T)
    _, hvp = torch.autograd.functional.hvp(energy, torch.tensor(X), torch.tensor(T))
    told(capsys, "hvp energy -i @x.npy --tangent @t.npy -o hvp.npy")
    close(np.load("hvp.npy"), hvp)
    told(capsys, "hessian energy -i @x.npy -o hessian.npy")
    close(np.load("hessian.npy"), torch.autograd.functional.hessian(energy, torch.tensor(X)))
    told(capsys, "jacobian energy -i @x.npy -o jacobian.npy")
    close(np.load("jacobian.npy"), torch.autograd.functional.jacobian(energy, torch.tensor(X)))
    told(capsys, "jvp energy -i @x.npy --tangent @t.npy -o jvp.npy")
    close(np.load("jvp.npy"), torch.func.jvp(energy, (torch.tensor(X),), (torch.tensor(T),))[1])


def test_complex_numbers_in_and_out(capsys: pytest.CaptureFixture[str]) -> None:
    z = torch.tensor([0.5 - 1j, 2 + 0.25j], dtype=torch.complex128, requires_grad=True)
    v = torch.tensor([1 + 1j, -2j], dtype=torch.complex128)
    (expected,) = torch.autograd.grad(z**2 * torch.exp(0.5j * z), z, v)
    out = told(capsys, "grad wave -i 'z=[[0.5, -1], [2, 0.25]]' --grad-output '[[1, 1], [0, -2]]' --json -o out.npz")
    with np.load("out.npz") as found:
        np.testing.assert_allclose(found["grad:z"], expected.numpy(), rtol=1e-13)
        pairs = np.stack([found["grad:z"].real, found["grad:z"].imag], -1).tolist()
    assert json.loads(out)["gradients"]["z"]["data"] == pairs


def test_bfloat16(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.tensor([1.0, -0.5], dtype=torch.bfloat16, requires_grad=True)
    (expected,) = torch.autograd.grad(x.exp(), x, torch.ones_like(x))
    np.save("x.npy", np.array([1.0, -0.5], ml_dtypes.bfloat16))
    told(capsys, "grad half -i x:bfloat16=@x.npy --grad-output ones -o out.safetensors")
    found = Files().all_of("out.safetensors")["grad:x"]
    assert found.dtype == ml_dtypes.bfloat16
    assert found.astype(np.float32).tolist() == expected.float().tolist()
    told(capsys, "grad half -i 'x=[1, -0.5]' --grad-output ones --result-dtype float32 -o out.npy")
    np.testing.assert_allclose(np.load("out.npy"), expected.float().numpy(), rtol=0.01)
    assert main(shlex.split("grad half -i x=@x.npy --grad-output ones")) == 1
    assert "without a dtype" in capsys.readouterr().err


def test_several_outputs_and_wrt(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = (torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in ([1.0, 2.0], [3.0, -1.0]))
    v = torch.tensor([0.5, 2.0], dtype=torch.float64)
    outputs = (x.sin() * y, (x * y**2).sum())
    expected = torch.autograd.grad(outputs, (x, y), (v, torch.tensor(-1.5, dtype=torch.float64)))
    line = "grad two -i 'x=[1, 2]' -i 'y=[3, -1]' --grad-output 'product=[0.5, 2]' --grad-output total=-1.5 -o out.npz"
    told(capsys, line)
    with np.load("out.npz") as found:
        assert sorted(found) == ["grad:x", "grad:y", "product", "total"]
        close(found["product"], outputs[0])
        close(found["grad:x"], expected[0])
        close(found["grad:y"], expected[1])
    told(capsys, line.replace(".npz", ".npy") + " --wrt y --no-outputs")
    close(np.load("out.npy"), expected[1])


def test_batched_cotangents(capsys: pytest.CaptureFixture[str]) -> None:
    told(
        capsys,
        "grad wave -i 'z=[[1, 0]]' --grad-output '[[[1, 0]], [[0, 1]]]' --batched --max-norm 0.5 --json -o g.npy",
    )
    assert np.load("g.npy").shape == (2, 1)


def test_a_loss_by_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    local = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    weight, bias = local[0].weight.detach().numpy(), np.array([0.1, 0.2, 0.3])
    x, labels = np.random.default_rng(0).normal(size=(6, 4)), np.array([0, 1, 2, 2, 1, 0])
    np.savez("in.npz", input=x)
    np.save("t.npy", labels)
    np.save("bias.npy", bias)
    with torch.no_grad():
        local[2].bias.copy_(torch.tensor(bias))
    # The server's weights are its own; those that count are given.
    write(Path("w.safetensors"), {"0.weight": weight, "0.bias": local[0].bias.detach().numpy()})
    given = " ".join(f"--param {name}=@w.safetensors" for name in ("0.weight", "0.bias"))
    write(Path("w2.npz"), {"2.weight": local[2].weight.detach().numpy()})
    line = (
        f"grad mlp --inputs in.npz {given} --param 2.weight=@w2.npz --param 2.bias=@bias.npy --loss cross_entropy "
        "--loss-option reduction=sum --loss-option label_smoothing=0.25 --wrt input,0.* --wrt 2.bias -o out.npz"
    )
    loss = nn.functional.cross_entropy(
        local(xt := torch.tensor(x, requires_grad=True)), torch.tensor(labels), reduction="sum", label_smoothing=0.25
    )
    expected = torch.autograd.grad(loss, (xt, local[0].weight, local[0].bias, local[2].bias))
    for target in ("@t.npy", "target=@t.npy", json.dumps(labels.tolist())):
        out = told(capsys, f"{line} --loss-target '{target}'")
        assert "loss: float64[]" in out
        with np.load("out.npz") as found:
            assert sorted(found) == ["grad:0.bias", "grad:0.weight", "grad:2.bias", "grad:input", "loss"]
            close(found["loss"], loss)
            for name, gradient in zip(("input", "0.weight", "0.bias", "2.bias"), expected, strict=True):
                close(found[f"grad:{name}"], gradient)
    assert not Path("out.npz.part").exists()


def test_what_a_loss_compares_with_has_the_outputs_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.tensor([2.0, 5.0], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(nn.functional.mse_loss(x.log(), torch.tensor([1.0, 0.0]).double()), x)
    told(capsys, "grad logarithm -i 'x=[2, 5]' --loss mse_loss --loss-target '[1, 0]' -o out.npy")
    close(np.load("out.npy"), expected)


def test_nan_is_a_value_and_json_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    line = "grad logarithm -i 'x=[0, -1, \"Infinity\"]' --grad-output ones"
    found = json.loads(told(capsys, f"{line} --json"), parse_constant=pytest.fail)
    assert found["outputs"]["output"]["data"] == ["-Infinity", "NaN", "Infinity"]
    assert found["gradients"]["x"]["data"] == ["Infinity", -1.0, 0.0]
    assert "1.00 NaN  2.00 Inf" in told(capsys, line)
    assert main(shlex.split("grad logarithm -i 'x=[0, -1]' --grad-output ones --detect-anomaly")) == 1
    assert "aten::log" in capsys.readouterr().err


def test_what_the_server_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for line, said in (
        ("grad two -i 'x=[1, 2]' -i 'y=[1, 2]'", "product"),
        ("grad two -i 'x=[1]' -i 'y=[1, 2]' --grad-output total=1", "n is 1 in 'x' and 2 here"),
        ("grad nobody -i 1", "nobody"),
        ("grad wave -i 'z=[[1, 0]]' --grad-output ones --wrt w", "'w'"),
        ("evaluate energy -i 'x:float32=[[1, 0, 0]]'", "float32"),
    ):
        assert main([*shlex.split(line), "-o", "out.npz"]) == 1
        out, err = capsys.readouterr()
        assert said in err and err.count("\n") == 1 and not out
        assert not Path("out.npz").exists()


def test_examples_of_describe_run(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("energy", "wave", "half", "two", "mlp"):
        lines = told(capsys, f"describe {name}").splitlines()
        example = lines[lines.index("  for example") + 1].strip()
        out = told(capsys, example.removeprefix("pullback "))
        assert "gradients" in out and "nan" not in out


def test_a_model_with_many_parameters_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, "models")
    assert {line.split()[0] for line in out.splitlines()[1:]} == {"energy", "half", "logarithm", "mlp", "two", "wave"}
    assert "0.weight: float64[5, 4]" in told(capsys, "describe mlp")
