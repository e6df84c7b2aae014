"""The README's code and the example programs do what they say."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pullback_server import Server

ROOT = Path(__file__).parents[2]


def test_the_first_example_of_the_readme(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    models, client, stateless, module = blocks[:4]
    file = tmp_path / "models.py"
    file.write_text(models)
    names: dict[str, Any] = {}
    exec(models, names)
    energy = names["energy"]
    with Server(file, threads=1) as server:
        exec(client.replace("localhost:8470", server.target), names)
        remote = names["energy"].item(), names["x"].grad.numpy()
        exec(stateless, names)
        exec(module, names)
        layered = names["layer"](torch.from_numpy(names["positions"])).item()
    x = torch.from_numpy(names["positions"]).requires_grad_()
    value = energy(x)
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    (curvature,) = torch.autograd.grad((gradient * torch.from_numpy(names["direction"])).sum(), x, retain_graph=True)
    (stiffness,) = torch.autograd.grad(gradient.pow(2).sum(), x)
    assert remote[0] == layered == names["energy"] == value.item()
    np.testing.assert_allclose(remote[1], stiffness.numpy(), rtol=1e-10)
    np.testing.assert_allclose(names["grads"]["x"], gradient.detach().numpy(), rtol=1e-10)
    np.testing.assert_allclose(names["curvature"], curvature.numpy(), rtol=1e-8)


def test_vibrations() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "vibrations.py")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "energy at rest -16.505384" in done.stdout


def test_newton() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "newton.py")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "right on 98." in done.stdout


def test_wgan_gp() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "wgan_gp.py"), "--steps", "12"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    estimates = re.findall(r"Wasserstein estimate (-?\d\.\d+)", done.stdout)
    assert len(estimates) == 2, done.stdout
    assert float(estimates[1]) > float(estimates[0])


@pytest.mark.slow
def test_train_digits_conv(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "train_digits_conv.py"), "--repository", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert re.search(r"accuracy 0\.9[5-9]\d when served", done.stdout)
    assert (tmp_path / "digits-conv" / "1" / "weights.safetensors").exists()
