"""What depends on the device: run on the CPU here, and with `pytest -m gpu` on CUDA."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import pullback as pb
from pullback_server import Server

ROOT = Path(__file__).parents[2]
LIMIT = 600 << 20


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param != "cpu" and not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture(scope="module")
def client(device: str) -> Iterator[pb.Client]:
    with (
        Server(ROOT / "tests" / "zoo.py", devices=device, threads=1) as server,
        pb.connect(server.target, timeout=120) as client,
    ):
        yield client


def test_every_model_is_on_the_device(client: pb.Client, device: str) -> None:
    for info in client.models():
        assert tuple(info.devices) == (device,)


@pytest.mark.parametrize("name", ["lstm", "transformer", "conv"])
def test_second_order_where_the_fast_kernels_have_only_the_first(client: pb.Client, name: str) -> None:
    """cuDNN's recurrent kernels and fused attention have no second derivative; other kernels must have been chosen."""
    model = client.model(name)
    (spec, *_) = model.info.inputs
    shape = tuple(4 if isinstance(extent, str) else extent for extent in spec.shape or ())
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=shape), rng.normal(size=shape)
    assert spec.dtype == "float64"
    outputs = model.evaluate(x)
    v = (
        {key: np.ones_like(value) for key, value in outputs.items()}
        if isinstance(outputs, dict)
        else np.ones_like(outputs)
    )
    step = 1e-5
    above, below = (model.vjp(x + sign * step * t, v).gradients for sign in (1, -1))
    found = model.hvp(x, t, v).hvps
    np.testing.assert_allclose(found, (above - below) / (2 * step), rtol=1e-4, atol=1e-6)


def test_large_tensors_through_segments(device: str) -> None:
    size = 64 << 20 if device != "cpu" else 2 << 20
    with (
        Server(ROOT / "benchmarks" / "models.py", devices=device, threads=1, max_message_bytes=LIMIT) as server,
        pb.connect(server.target, timeout=120, max_message_bytes=LIMIT) as client,
    ):
        identity = client.model("identity")
        for seed in range(3):
            x = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
            np.testing.assert_array_equal(identity.evaluate(x), x)


def test_a_class_out_of_range_never_reaches_a_kernel(client: pb.Client) -> None:
    model = client.model("mlp")
    (spec, *_) = model.info.inputs
    shape = tuple(2 if isinstance(extent, str) else extent for extent in spec.shape or ())
    x = np.zeros(shape, spec.dtype)
    with pytest.raises(pb.errors.ValueOutOfRange):
        model.value_and_grad(x, loss="cross_entropy", target=np.full(shape[:-1], 10**6))
    assert np.isfinite(model.evaluate(x)).all()


@pytest.mark.parametrize("name", ["lstm", "transformer", "conv"])
def test_sessions_on_the_device(client: pb.Client, name: str) -> None:
    """A penalty on a gradient, through a held graph, against a difference of first gradients."""
    model = client.model(name)
    (spec, *_) = model.info.inputs
    shape = tuple(4 if isinstance(extent, str) else extent for extent in spec.shape or ())
    rng = np.random.default_rng(1)
    x, t = rng.normal(size=shape), rng.normal(size=shape)

    def total(leaf: pb.Tensor) -> pb.Tensor:
        made = model(leaf)
        parts = list(made.values()) if isinstance(made, dict) else [made]
        sums = [part.sum() for part in parts if part.requires_grad]
        return sum(sums[1:], sums[0])

    leaf = client.tensor(x, requires_grad=True)
    (gradient,) = pb.autograd.grad(total(leaf), leaf, create_graph=True)
    assert gradient is not None
    (gradient * t).sum().backward()
    step = 1e-5
    moved = []
    for sign in (1, -1):
        other = client.tensor(x + sign * step * t, requires_grad=True)
        total(other).backward()
        assert other.grad is not None
        moved.append(other.grad.numpy())
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad.numpy(), (moved[0] - moved[1]) / (2 * step), rtol=1e-4, atol=1e-6)


def test_large_tensors_of_a_session(client: pb.Client) -> None:
    """By chunks, and through memory that is used again while the session's graph lives."""
    x = np.random.default_rng(2).standard_normal(1 << 20)
    leaf = client.tensor(x, requires_grad=True)
    y = (leaf**3).sum()
    for seed in range(4):
        other = np.random.default_rng(seed).standard_normal(1 << 20)
        np.testing.assert_array_equal(client.tensor(other).clone().numpy(), other)
    y.backward()
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad.numpy(), 3 * x**2, rtol=1e-14)
