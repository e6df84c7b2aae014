"""Triton's own client against a server, in an environment and a process of its own: `make test` makes it.

It needs protobuf below 7, and its descriptors have the names of ours.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from pullback_server import Server

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-triton/bin/python"
MODEL = ROOT / "examples/models/digits-conv"

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="tritonclient is not installed: make test")


@pytest.fixture(scope="module")
def local() -> torch.nn.Module:
    """The model as it was trained, here, in float64."""
    spec = importlib.util.spec_from_file_location("digits_conv_for_triton", MODEL / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: torch.nn.Module = module.DigitsConv()
    model.load_state_dict(load_file(MODEL / "1/weights.safetensors"))
    return model.eval().double()


def test_the_example_flow_and_gradients(local: torch.nn.Module, tmp_path: Path) -> None:
    digits = load_digits()
    x = (digits.images[:5] / 16).astype(np.float32)
    v = np.random.default_rng(0).normal(size=(5, 10)).astype(np.float32)
    target = digits.target[:5].astype(np.int64)
    np.savez(tmp_path / "in.npz", x=x, v=v, target=target)
    shutil.copytree(MODEL, tmp_path / "models/digits-conv")
    with Server(repository=str(tmp_path / "models"), threads=1) as server:
        command = [PYTHON, ROOT / "tests/triton_client.py", server.target, tmp_path / "in.npz", tmp_path / "out.npz"]
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "protos")}
        ran = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = dict(np.load(tmp_path / "out.npz"))

    inputs = torch.from_numpy(x).double().requires_grad_()
    cotangent = torch.from_numpy(v).double().requires_grad_()
    logits = local(inputs)
    (vjp,) = torch.autograd.grad(logits, inputs, cotangent, create_graph=True)
    (hvp,) = torch.autograd.grad(vjp.sum(), inputs)
    for name in ("infer", "async", "stream", "vjp_output", "aio_stream"):
        close(found.pop(name), logits)
    for name in ("vjp", "vjp_by_parameter", "aio_vjp"):
        close(found.pop(name), vjp)
    close(found.pop("hvp"), hvp)

    biases = {name: one for name, one in local.named_parameters() if name.endswith(".bias")}
    loss = torch.nn.functional.cross_entropy(local(inputs), torch.from_numpy(target), label_smoothing=0.1)
    expected = torch.autograd.grad(loss, [inputs, *biases.values()])
    close(found.pop("loss"), loss)
    close(found.pop("loss_grad"), expected[0])
    close(found.pop("norm"), torch.stack([one.norm() for one in expected]).norm())
    for name, one in zip(biases, expected[1:], strict=True):
        close(found.pop(f"grad:{name}"), one)
    assert not found


def close(found: np.ndarray, expected: torch.Tensor) -> None:
    values = expected.detach().numpy()
    assert found.shape == values.shape
    np.testing.assert_allclose(found, values, rtol=2e-4, atol=2e-5 * np.abs(values).max())
