"""The gallery: every program runs at its small size against what `make serve-examples` serves, and its claim holds."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from tests.serving import Served
from torch.nn.functional import mse_loss

import pullback as pb

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
GALLERY = ROOT / "docs" / "gallery.md"
PROGRAMS = sorted(path.stem for path in EXAMPLES.glob("*.py") if "from _gallery import" in path.read_text())


def served_by_make() -> list[str]:
    """The arguments of `pullback-server serve` in the Makefile's line, with whole paths."""
    makefile = (ROOT / "Makefile").read_text()
    found = re.search(r"^serve-examples: .*\n\t\$\(BIN\)/pullback-server serve (.+)$", makefile, re.MULTILINE)
    assert found is not None
    arguments: list[str] = []
    for word in found[1].split():
        if "*" in word:
            arguments += map(str, sorted(ROOT.glob(word)))
        else:
            arguments.append(str(ROOT / word) if word.startswith("examples/") else word)
    return arguments


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    arguments = served_by_make()
    # The tests' own server has one thread anyhow.
    at = arguments.index("--threads")
    server = Served(tmp_path_factory.mktemp("served"), *arguments[:at], *arguments[at + 2 :])
    yield server
    server.channel.close()
    server.process.terminate()
    assert server.process.wait(30) == 0


def calls(served: Served, method: str, model: str) -> int:
    """How many there were of one method to one model."""
    wanted = rf'^pullback_requests_total{{code="OK",method="{method}",model="{model}"}} (\S+)'
    found = re.search(wanted, served.get("/metrics"), re.MULTILINE)
    return int(float(found[1])) if found else 0


def run(served: Served, name: str, picture: Path) -> str:
    """What a program prints, once it has succeeded and drawn."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--small", "--target", served.target]
    done = subprocess.run([*command, "--output", str(picture)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert 700 <= image.width <= 1200 and 350 <= image.height <= 700
        # Not one colour: something was drawn.
        assert len(set(image.convert("L").resize((90, 45)).tobytes())) > 8
    assert 5_000 < picture.stat().st_size < 100_000
    return done.stdout


def figure(pattern: str, text: str) -> float:
    """The number in the first group."""
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1])


def test_what_make_serves_is_what_the_programs_call(served: Served) -> None:
    named = {
        name: re.findall(r"connected\(options((?:, \"[\w-]+\")+)\)", (EXAMPLES / f"{name}.py").read_text())
        for name in PROGRAMS
    }
    assert all(len(found) == 1 for found in named.values()), named
    wanted = {model for found in named.values() for model in re.findall(r'"([\w-]+)"', found[0])}
    with pb.connect(served.target) as client:
        assert wanted <= {info.name for info in client.models() if info.state == "ready"}


def test_saliency(served: Served, tmp_path: Path) -> None:
    said = run(served, "saliency", tmp_path / "one.png")
    assert figure(r"add up to f\(x\) - f\(blank\) within (\S+)", said) < 1e-4
    assert "740 gradients in 3 calls" in said


def test_adversarial(served: Served, tmp_path: Path) -> None:
    said = run(served, "adversarial", tmp_path / "deeper" / "one.png")
    assert (
        figure(r"epsilon 0\.150: .* PGD +(\S+) %", said) < 20 < 85 < figure(r"epsilon 0\.150: .* noise +(\S+) %", said)
    )


def test_posterior(served: Served, tmp_path: Path) -> None:
    before = calls(served, "ComputeVjp", "orbit")
    said = run(served, "posterior", tmp_path / "one.png")
    assert figure(r"32 chains of 30 draws: r-hat (\S+),", said) < 1.1
    # 40 draws with the first ones, of at most 7 steps, each of all chains: never 32 times as many.
    assert 40 < calls(served, "ComputeVjp", "orbit") - before < 40 * 10


def test_guided(served: Served, tmp_path: Path) -> None:
    said = run(served, "guided", tmp_path / "one.png")
    judged = [float(share) for share in re.findall(r"local judge +(\S+) %", said)]
    assert judged[0] < 25 < 85 < judged[-1]


def test_remote_layer(served: Served, tmp_path: Path) -> None:
    said = run(served, "remote_layer", tmp_path / "one.png")
    assert figure(r"apart by (\S+) at most", said) < 1e-3
    assert figure(r"after 200 steps: (\S+) %", said) > 85


def test_maml(served: Served, tmp_path: Path) -> None:
    said = run(served, "maml", tmp_path / "one.png")
    slope, second, first = re.findall(r"-?\d+\.\d{6}", said)
    assert abs(float(second) / float(slope) - 1) < 1e-4 < abs(float(first) / float(slope) - 1)


def test_design(served: Served, tmp_path: Path) -> None:
    said = run(served, "design", tmp_path / "one.png")
    best = figure(r"designed by gradients: .* mean temperature ([\d.]+)", said)
    assert best < figure(r"a bar from the window: .* mean temperature ([\d.]+)", said)


def test_newton_or_descent(served: Served, tmp_path: Path) -> None:
    said = run(served, "newton_or_descent", tmp_path / "one.png")
    assert figure(r"Newton \(trust-ncg\): \d+ calls, (\d+) steps", said) < figure(
        r"L-BFGS: \d+ calls, (\d+) steps", said
    )


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A program as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return __import__(name)


def local_loss(weights: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The networks of examples/models/regressors.py, written again: one task's loss for weights [1761]."""
    w1, b1, w2, b2, w3, b3 = weights.split([40, 40, 1600, 40, 40, 1])
    hidden = torch.tanh(torch.tanh(x @ w1[None] + b1) @ w2.reshape(40, 40) + b2)
    return mse_loss(hidden @ w3[:, None] + b3, y)


@pytest.mark.parametrize("second_order", [False, True])
def test_a_meta_gradient_is_that_of_torch(served: Served, monkeypatch: pytest.MonkeyPatch, second_order: bool) -> None:
    maml = module("maml", monkeypatch)
    start = np.random.default_rng(0).normal(scale=0.3, size=1761)
    task = maml.waves(np.random.default_rng(1))
    with pb.connect(served.target) as client, client.session(models=["regressors"]):
        loss, gradient = maml.meta_gradient(client.model("regressors"), start, task, second_order)
    weights = torch.from_numpy(start).requires_grad_()
    terms = []
    for x, y, query, answer in zip(*map(torch.from_numpy, task), strict=True):
        (inner,) = torch.autograd.grad(local_loss(weights, x, y), weights, create_graph=second_order)
        terms.append(local_loss(weights - maml.INNER_RATE * inner, query, answer))
    expected = torch.stack(terms).mean()
    (wanted,) = torch.autograd.grad(expected, weights)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, wanted.numpy(), rtol=1e-9, atol=1e-12)


def test_without_a_server(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(EXAMPLES / "saliency.py"),
        "--target",
        "localhost:1",
        "--output",
        str(tmp_path / "no.png"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "no server at localhost:1: start one with `make serve-examples`\n"
    assert not (tmp_path / "no.png").exists()


def test_the_page_shows_every_program() -> None:
    page = GALLERY.read_text()
    assert len(PROGRAMS) == 8
    for name in PROGRAMS:
        assert f"(gallery/{name}.png)" in page
        assert f"examples/{name}.py" in page
        assert (GALLERY.parent / "gallery" / f"{name}.png").stat().st_size < 60_000
