"""The repository examples/models: served as it is, called through the client, compared with the same code run here."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import pullback as pb
from pullback_server import Server

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "examples" / "models"
NAMES = ["digits-conv", "encoder", "kepler", "potential", "ste-quantizer"]


@pytest.fixture(scope="module")
def client() -> Iterator[pb.Client]:
    with Server(repository=str(MODELS), threads=1) as server, pb.connect(server.target) as client:
        yield client


def code(path: str) -> Any:
    """A file of examples/models as a module of its own."""
    found = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), MODELS / path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def compare(
    model: pb.RemoteModel,
    local: Any,
    inputs: Mapping[str, np.ndarray],
    wrt: list[str],
    output: str,
    *,
    rtol: float,
    others: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Outputs, VJP and HVP along random cotangents and tangents, against torch here.

    rtol: relative to the largest element of what is compared.
    """
    rng = np.random.default_rng(0)
    x = {name: torch.from_numpy(value).requires_grad_(name in wrt) for name, value in inputs.items()}
    found = local(**x)
    y = found[output] if isinstance(found, dict) else found
    v = np.asarray(rng.normal(size=tuple(y.shape)), y.detach().numpy().dtype)
    t = {name: np.asarray(rng.normal(size=inputs[name].shape), inputs[name].dtype) for name in wrt}
    first = torch.autograd.grad(y, [x[n] for n in wrt], torch.from_numpy(v), create_graph=True)
    along = sum((g * torch.from_numpy(t[n])).sum() for g, n in zip(first, wrt, strict=True))
    second = (
        torch.autograd.grad(along, [x[n] for n in wrt], materialize_grads=True)
        if along.requires_grad
        else [torch.zeros_like(x[n]) for n in wrt]
    )

    def close(got: np.ndarray, expected: torch.Tensor, what: str) -> None:
        wanted = expected.detach().numpy()
        assert got.dtype == wanted.dtype, what
        np.testing.assert_allclose(got, wanted, rtol=0, atol=rtol * max(np.abs(wanted).max(), 1e-30), err_msg=what)

    outputs, gradients = model.vjp(inputs, {output: v}, wrt=wrt)
    close(outputs[output] if isinstance(outputs, dict) else outputs, y, "outputs")
    hvps = model.hvp(inputs, t, {output: v}, wrt=wrt, return_outputs=False, allow_unused=True).hvps
    for place, name in enumerate(wrt):
        close(gradients[name], first[place], f"gradient by {name}")
        got = hvps[name]
        close(np.zeros_like(inputs[name]) if got is None else got, second[place], f"HVP by {name}")


def diamond(cells: int, a: float = 5.431) -> dict[str, np.ndarray]:
    """Silicon's lattice, 8 atoms in each cubic cell of edge a, in Angstrom."""
    face = np.array([[0, 0, 0], [0, 2, 2], [2, 0, 2], [2, 2, 0]])
    basis = np.concatenate([face, face + 1]) / 4
    corners = np.stack(np.meshgrid(*[np.arange(cells)] * 3), -1).reshape(-1, 1, 3)
    return {"positions": ((basis + corners) * a).reshape(-1, 3), "box": np.full(3, cells * a)}


def held_out() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels that examples/train_digits_conv.py does not train on."""
    digits = load_digits()
    _, x, _, y = train_test_split(digits.images, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    return (x / 16).astype(np.float32), y


def test_what_is_there(client: pb.Client) -> None:
    found = {info.name: info for info in client.models()}
    assert sorted(found) == NAMES
    assert all(info.description for info in found.values())
    # A promise of second order where it is right, and of any order where there is no code but torch's.
    assert {name: info.max_order for name, info in found.items()} == {
        "digits-conv": None, "encoder": None, "kepler": 2, "potential": None, "ste-quantizer": 2,
    }  # fmt: skip


def test_encoder(client: pb.Client) -> None:
    model = client.model("encoder")
    local = code("encoder/model.py").from_pretrained(str(MODELS / "encoder" / "1")).eval()
    text = ["Licensed under the Apache License", "Version 2.0"]
    ids = np.array([[*line.encode().ljust(32, b"\0")[:32]] for line in text])
    mask = np.array([[*(np.arange(32) < len(line))] for line in text]).astype(np.int64)
    inputs = {"input_ids": ids, "attention_mask": mask, "offset": np.zeros((2, 32, 32), np.float32)}
    compare(model, local, inputs, ["offset"], "last_hidden_state", rtol=1e-4)
    compare(model, local, inputs, ["offset"], "pooler_output", rtol=1e-4)
    without = model.evaluate({"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(without["pooler_output"], model.evaluate(inputs)["pooler_output"], rtol=1e-5)
    # Padding tells nothing.
    cotangents = {"pooler_output": np.ones((2, 32), np.float32)}
    _, gradients = model.vjp(inputs, cotangents, wrt=["offset"])
    assert (gradients["offset"][1, len(text[1]) :] == 0).all()
    assert (gradients["offset"][1, : len(text[1])] != 0).any(-1).all()
    with pytest.raises(pb.errors.ValueOutOfRange):
        model.evaluate({"input_ids": ids + 100, "attention_mask": mask})


def test_what_the_encoder_has_learned(client: pb.Client) -> None:
    """A letter of its training text that is masked."""
    model = client.model("encoder")
    text = "y of this License, Derivative Wo"
    at = text.index("cens")
    ids = np.array([[*text.encode()]])
    ids[0, at] = 0
    hidden = model.evaluate({"input_ids": ids, "attention_mask": np.ones_like(ids)})["last_hidden_state"]
    every = np.arange(128).reshape(4, 32)
    table = model.evaluate({"input_ids": every, "attention_mask": np.ones_like(every)})["word_embeddings"]
    assert chr((table.reshape(128, 32) @ hidden[0, at]).argmax()) == "c"


def test_potential(client: pb.Client) -> None:
    model = client.model("potential")
    rest = diamond(1)
    moved = dict(rest, positions=rest["positions"] + np.random.default_rng(0).normal(scale=0.15, size=(8, 3)))
    compare(model, code("potential/1/model.py").potential, moved, ["positions", "box"], "energy", rtol=1e-12)
    for cells in (1, 2):
        energy, gradients = model.value_and_grad(diamond(cells))
        # Its lattice constant is 5.431 Angstrom; the cohesive energy is usually given as 4.3363 or 4.3364 eV.
        assert abs(energy / (8 * cells**3) + 4.3363) < 2e-4
        assert np.abs(gradients["positions"]).max() < 1e-12
    # Nothing is gained by moving all atoms together.
    hessian = model.hessian(moved, wrt="positions")
    assert np.abs(hessian.sum(2)).max() < 1e-12 * np.abs(hessian).max()
    shifted = dict(moved, positions=moved["positions"] + [30.0, -7.0, 1.0])
    np.testing.assert_allclose(model.evaluate(shifted), model.evaluate(moved), rtol=1e-12)
    with pytest.raises(pb.errors.ValueOutOfRange):
        model.evaluate(dict(rest, box=np.array([5.0, 5.0, 0.1])))


def test_silicon_is_as_stiff_as_published(client: pb.Client) -> None:
    """Elastic constants of this potential: C11 151.4, C12 76.4 GPa (E. R. Cowley, 1988, as quoted by LAMMPS)."""
    crystal = diamond(1)

    def curvature(*strain: float) -> float:
        """d2E/ds2 / volume in GPa, all lengths growing by s * strain."""
        stretched = {name: value * np.array(strain) for name, value in crystal.items()}
        hvps = client.model("potential").hvp(crystal, stretched, wrt=["positions", "box"]).hvps
        in_ev = sum(float((hvps[name] * stretched[name]).sum()) for name in hvps)
        return in_ev / float(crystal["box"].prod()) * 160.2177

    c11 = curvature(1, 0, 0)
    c12 = curvature(1, 1, 0) / 2 - c11
    assert abs(c11 - 151.4) < 0.1
    assert abs(c12 - 76.4) < 0.1


def test_kepler(client: pb.Client) -> None:
    model = client.model("kepler")
    mean = np.linspace(-20, 20, 41)
    inputs = {"mean": mean, "eccentricity": np.linspace(0, 0.95, 41)}
    compare(model, code("kepler/1/model.py").kepler, inputs, ["mean", "eccentricity"], "anomaly", rtol=1e-12)
    found = model.evaluate(inputs)
    np.testing.assert_allclose(found - inputs["eccentricity"] * np.sin(found), mean, rtol=1e-13, atol=1e-13)


def test_ste_quantizer(client: pb.Client) -> None:
    model = client.model("ste-quantizer")
    x = np.array([[-5.0, -2.0, -0.2, 0.1, 0.15, 1.9, 2.1]], np.float32)
    compare(model, code("ste-quantizer/1/model.py").Quantizer(4, 2.0), {"x": x}, ["x"], "y", rtol=1e-6)
    y, gradient = model.vjp(x, np.ones_like(x))
    np.testing.assert_allclose(y * 7 / 2, [[-7, -7, -1, 0, 1, 7, 7]], atol=1e-5)
    np.testing.assert_array_equal(gradient, [[0, 1, 1, 1, 1, 1, 0]])


def test_digits_conv(client: pb.Client) -> None:
    model = client.model("digits-conv")
    local = code("digits-conv/model.py").DigitsConv().eval()
    local.load_state_dict(load_file(MODELS / "digits-conv" / "1" / "weights.safetensors"))
    images, labels = held_out()
    compare(model, local, {"image": images[:10]}, ["image"], "logits", rtol=1e-4)
    assert (model.evaluate(images).argmax(1) == labels).mean() > 0.95


@pytest.mark.parametrize("file", sorted(MODELS.glob("*.py")), ids=lambda path: path.name)
def test_check_of_a_file(file: Path) -> None:
    command = [sys.executable, "-m", "pullback_server.cli", "check", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 would be served" in done.stdout


def test_check() -> None:
    command = [sys.executable, "-m", "pullback_server.cli", "check", str(MODELS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if not line.startswith((" ", "model "))]
    assert [row[0] for row in rows if row][: len(NAMES)] == NAMES
    assert f"{len(NAMES)} of {len(NAMES)} would be served" in done.stdout
    assert "straight-through" in done.stdout
