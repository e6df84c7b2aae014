"""Row-independence: what is found out at load of models that declare a batch axis, and the best number of rows."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pullback_server import Gate, spec
from pullback_server.engine import Engine
from pullback_server.hosting import Registration
from pullback_server.hosting.loading import LoadError
from pullback_server.hosting.options import Batching, Options
from pullback_server.job import Signature

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("engine_jobs", HERE / "engine_jobs.py")
assert _spec is not None and _spec.loader is not None
jobs = sys.modules.setdefault("engine_jobs", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(jobs)

torch.set_num_threads(1)
Tensor = torch.Tensor

PLAIN = {"x": spec("float32", ["n", 6])}
DOUBLE = {"x": spec("float64", ["n", 6])}
IMAGES = {"x": spec("float32", ["n", 3, 8, 8])}
SEQUENCES = {"x": spec("float32", ["n", 5, 8])}
MASKED = {"x": spec("float32", ["n", 5, 8]), "mask": spec("bool", ["n", 5])}
WORDS = {"ids": spec("int64", ["n", 5], low=0, high=9)}


#: What these models do to gradients is another matter.
OFF = Gate(enabled=False)


def load(target: Any, inputs: Any, axis: int | None = 0, **more: Any) -> Signature:
    kind = "function" if getattr(target, "__name__", "") != "<lambda>" and not isinstance(target, type) else "factory"
    engine = Engine(torch.device("cpu"))
    return engine.load(Registration("m", target, kind=kind, inputs=inputs, batch_axis=axis, **more))  # type: ignore[arg-type]


class Wrapped(nn.Module):
    """A module that does what a function says, after some layers."""

    def __init__(self, *layers: nn.Module, then: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.layers(x))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        return found


class AcrossRows(nn.Module):
    """Attention along the wrong axis."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return found


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.gru(x)[0]
        return found


class Bagged(nn.Module):
    """An embedding; a mask that may be given."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        found = self.embedding(ids)
        if mask is not None:
            found = found * mask.unsqueeze(-1)
        return torch.tanh(found).sum(1)


class Clipped(torch.autograd.Function):
    """The identity; its gradient is scaled to norm 1, over everything."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / (gradient.norm() + 1e-6)


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 8), nn.Flatten(1)
    )


def chaotic(x: Tensor) -> Tensor:
    """What a step of rounding takes anywhere, in single precision."""
    for _ in range(30):
        x = 3.99 * x * (1 - x)
    return x


ACCEPTED: dict[str, tuple[Any, Any]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), PLAIN),
    "double": (lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double(), DOUBLE),
    "half": (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU()).bfloat16(), {"x": spec("bfloat16", ["n", 6])}),
    "conv, batch norm, group norm": (lambda: resnet(), IMAGES),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), {"src": spec("float32", ["n", 5, 8])}),
    "gru": (lambda: Recurrent(), SEQUENCES),
    "lstm cell": (lambda: nn.LSTMCell(6, 4), {"input": spec("float32", ["n", 6])}),
    "embedding": (lambda: Bagged(), WORDS),
    "embedding with a mask": (lambda: Bagged(), WORDS | {"mask": spec("float32", ["n", 5])}),
    "layer norm": (lambda: Wrapped(nn.LayerNorm(6), nn.GELU()), PLAIN),
    "instance norm": (lambda: nn.InstanceNorm2d(3), {"input": spec("float32", ["n", 3, 8, 8])}),
    "masked attention": (lambda: Masked(), MASKED),
    "softmax of a row": (lambda: Wrapped(nn.Linear(6, 4), nn.Softmax(1)), PLAIN),
    "sorted rows": (lambda: Wrapped(then=lambda x: x.sort(1).values), PLAIN),
    "largest of a row": (lambda: Wrapped(then=lambda x: x / x.abs().amax(1, keepdim=True)), PLAIN),
    "logarithm": (lambda: Wrapped(then=torch.log), {"x": spec("float32", ["n", 6], low=0.1, high=5)}),
    "in single precision all the same": (lambda: Wrapped(then=lambda x: x.float().sin()), DOUBLE),
    "steep": (lambda: Wrapped(nn.Linear(6, 6), nn.Softmax(1), then=lambda x: x**8 * 1e6), PLAIN),
    "integers out": (lambda: Wrapped(nn.Linear(6, 4), then=lambda x: (x, x.argmax(1))), PLAIN),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5)), {"input": spec("float32", ["n", 6])}),
    "chaotic": (lambda: Wrapped(nn.Linear(6, 6), nn.Sigmoid(), then=chaotic), PLAIN),
    "exact gelu and overflow": (lambda: Wrapped(then=torch.exp), PLAIN),
    "eigenvalues": (lambda: Wrapped(then=lambda x: torch.linalg.eigvalsh(x[:, :, None] * x[:, None])), DOUBLE),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_independent(name: str) -> None:
    target, inputs = ACCEPTED[name]
    if "x" in inputs and name in ("mlp", "double", "half", "conv, batch norm, group norm"):
        inputs = {"input": inputs["x"]}
    found = load(target, inputs)
    assert found.batch.max_rows > 0, found.batch
    assert "rows are independent" in found.batch.evidence


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def hidden(x: Tensor) -> Tensor:
    """The mean of all rows, where no graph shows it."""
    return x * (1 + 0.01 * x.detach().mean())


def unwatched(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().max()
    return x / scale


def ranked(x: Tensor) -> Tensor:
    return x.sort(0).values


def counted(x: Tensor) -> Tensor:
    return x * torch.arange(1, len(x) + 1, dtype=x.dtype)[:, None]


def noise(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return x + torch.randn(x.shape, generator=generator, dtype=x.dtype)


def total(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sin(), x.square().mean()


def guarded(x: Tensor) -> Tensor:
    """NaN in one row is NaN in all."""
    return x.sin() + 0 * x.sum()


def unique(x: Tensor) -> Tensor:
    return x / (len(x) / len(x.unique(dim=0)))


def few(x: Tensor) -> Tensor:
    return x * (1.0 if len(x) < 4 else 1.1)


def clipped(x: Tensor) -> Tensor:
    found: Tensor = Clipped.apply(x.sin())
    return found


def slightly(x: Tensor) -> Tensor:
    return x.sin() + 1e-5 * x.mean()


def any_full(x: Tensor, mask: Tensor) -> Tensor:
    return x * (2 if bool(mask.all(1).any()) else 1)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "mean of the rows": (centred, PLAIN, "output 'output'"),
    "detached mean": (hidden, PLAIN, "output 'output'"),
    "largest of all": (unwatched, PLAIN, "output 'output'"),
    "softmax over rows": (lambda: Wrapped(nn.Linear(6, 4), nn.Softmax(0)), PLAIN, "output 'output'"),
    "sum so far": (lambda: Wrapped(then=lambda x: x.cumsum(0)), PLAIN, "output 'output'"),
    "sorted": (ranked, PLAIN, "output 'output'"),
    "numbered": (counted, PLAIN, "output 'output'"),
    "noise of its own": (noise, PLAIN, "output 'output'"),
    "batch norm without statistics": (
        lambda: nn.BatchNorm1d(6, track_running_stats=False),
        {"input": spec("float32", ["n", 6])},
        "output 'output'",
    ),
    "batch norm in train mode": (
        lambda: Wrapped(then=lambda x: F.batch_norm(x, None, None, training=True)),
        IMAGES,
        "output 'output'",
    ),
    "a larger cotangent in another row": (
        lambda: Wrapped(nn.Linear(6, 6), then=bounded),
        PLAIN,
        "times 1e+06 in other",
    ),
    "a smaller cotangent in another row": (lambda: Wrapped(nn.Linear(6, 6), then=vanishing), PLAIN, "times 1e-06 in"),
    "a cotangent that is NaN in another row": (lambda: Wrapped(then=unless_nan), PLAIN, "times nan in other rows"),
    "a declared bound in another row": (
        lambda: Wrapped(then=lambda x: x * (2.0 if bool((x == 1).any()) else 1.0)),
        {"x": spec("float32", ["n", 6], low=-1, high=1)},
        "with the maximum in other rows",
    ),
    "other integers": (
        lambda: WithLengths(),
        {"x": spec("float32", ["n", 5]), "length": spec("int64", ["n"], low=0)},
        "for other integers",
    ),
    "groups of 16 rows": (lambda: Wrapped(then=in_groups), PLAIN, ", of "),
    "many equal rows": (lambda: Wrapped(then=crowded), PLAIN, "equal rows"),
    "attention across rows": (lambda: AcrossRows(), SEQUENCES, "output 'output'"),
    "NaN spreads": (guarded, PLAIN, "with nan in other rows"),
    "equal rows": (unique, PLAIN, "output 'output'"),
    "many rows": (few, PLAIN, "output 'output'"),
    "the backward looks at all": (clipped, PLAIN, "gradient of 'x'"),
    "by very little": (slightly, PLAIN, "output 'output'"),
    "by very little, in single precision": (
        lambda: Wrapped(then=lambda x: x.float().sin() + 1e-4 * x.float().mean()),
        PLAIN,
        "differs by",
    ),
    "masks": (any_full, {"x": spec("float32", ["n", 5]), "mask": spec("bool", ["n", 5])}, "output 'output'"),
    "with the mask only": (
        lambda: WithMask(),
        {"x": spec("float32", ["n", 5]), "mask": spec("float32", ["n", 5])},
        "output 'output'",
    ),
}


class WithLengths(nn.Module):
    """Divides by the longest of all."""

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        return x / length.max().clamp(min=3)


class Pulled(torch.autograd.Function):
    """The identity; a function says what its cotangent becomes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, become: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.become = become
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.become(gradient), None


def bounded(x: Tensor) -> Tensor:
    """The identity; clips its gradient to a norm over everything."""
    found: Tensor = Pulled.apply(x, lambda g: g * torch.clamp(1e3 / (g.norm() + 1e-9), max=1).nan_to_num(1))
    return found


def vanishing(x: Tensor) -> Tensor:
    """The identity; its gradient is another one where some of it is small."""
    found: Tensor = Pulled.apply(x, lambda g: g * (2 if bool(((g != 0) & (g.abs() < 1e-5)).any()) else 1))
    return found


def unless_nan(x: Tensor) -> Tensor:
    found: Tensor = Pulled.apply(x, lambda g: torch.zeros_like(g) if bool(g.isnan().any()) else g)
    return found


def in_groups(x: Tensor) -> Tensor:
    """Ghost batch norm."""
    return torch.cat([part - part.mean(0) if len(part) == 16 else part for part in x.split(16)])


def crowded(x: Tensor) -> Tensor:
    """Of equal rows only so many come through: a mixture of experts with a capacity."""
    _, which = x.unique(dim=0, return_inverse=True)
    before = (which[:, None] == which).tril(-1).sum(1, keepdim=True)
    return torch.where(before < 20, x, 0)


class WithMask(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x if mask is None else x * mask / mask.abs().max()


@pytest.mark.parametrize("name", REFUSED)
def test_dependent(name: str) -> None:
    target, inputs, what = REFUSED[name]
    with pytest.raises(LoadError) as caught:
        load(target, inputs, gate=OFF)
    text = str(caught.value)
    assert text.startswith("model 'm' declares batch_axis=0, but its rows depend on each other: "), text
    assert text.endswith("; leave batch_axis out") and what in text, text
    # Not declared, it does no harm.
    assert load(target, inputs, axis=None, gate=OFF).batch.max_rows == 0


@pytest.mark.parametrize(
    ("target", "inputs", "name"),
    [
        (total, PLAIN, "'output_1'"),
        (lambda: nn.GRU(8, 4, batch_first=True), {"input": SEQUENCES["x"]}, "'output_1'"),
        (lambda: Scaled(), PLAIN, "'scale'"),
        (lambda: Wrapped(then=lambda x: x.mean(0)), PLAIN, "'output'"),
        # As many as there are rows in the first sample.
        (lambda: Wrapped(then=lambda x: (x, torch.arange(11.0))), PLAIN, "'output_1'"),
    ],
)
def test_an_output_without_the_axis(target: Any, inputs: Any, name: str) -> None:
    found = load(target, inputs)
    assert found.batch.max_rows == 0 and f"output {name} does not have the batch axis" in found.batch.evidence
    with pytest.raises(LoadError, match="has micro_batch=2"):
        load(target, inputs, options=Options(micro_batch=2))


class Scaled(nn.Module):
    """Its temperature is one of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": x * self.scale.exp(), "scale": self.scale.exp()}


# Whether gradients by parameters are sums over rows.


class Quantised(torch.autograd.Function):
    """LSQ: the gradient of the step is divided by the elements."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor) -> Tensor:
        ctx.save_for_backward(x, step)
        return torch.round(x / step) * step

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, step = ctx.saved_tensors
        return g, (g * (torch.round(x / step) - x / step)).sum() / math.sqrt(x.numel())


class Lsq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Quantised.apply(x, self.step)
        return found


def hooked(hook: Callable[[Tensor], Tensor]) -> nn.Module:
    """A linear layer with a hook on a parameter. (A copy has none.)"""
    model = Wrapped(nn.Linear(6, 3))
    model.layers[0].weight.register_hook(hook)
    return model


ADDITIVE: dict[str, tuple[Any, Any, bool]] = {
    "linear": (lambda: Wrapped(nn.Linear(6, 3)), PLAIN, True),
    "no parameters": (lambda: Wrapped(), PLAIN, True),
    "unused": (lambda: Wrapped(nn.Linear(6, 3), then=lambda x: x.detach()), PLAIN, True),
    "bfloat16": (lambda: Wrapped(nn.Linear(6, 3)).bfloat16(), {"x": spec("bfloat16", ["n", 6])}, True),
    "normalised": (lambda: Wrapped(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()), IMAGES, True),
    "words": (lambda: Bagged(), WORDS, True),
    "sparse words": (lambda: nn.Embedding(10, 4, sparse=True), {"input": WORDS["ids"]}, True),
    "by frequency": (lambda: nn.Embedding(10, 4, scale_grad_by_freq=True), {"input": WORDS["ids"]}, False),
    # No two rows of a random sample have a word in common.
    "by frequency, of many": (
        lambda: nn.Embedding(30000, 4, scale_grad_by_freq=True),
        {"input": spec("int64", ["n"], low=0, high=29999)},
        False,
    ),
    "divided by elements": (lambda: Lsq(), PLAIN, False),
    "clipped by a hook": (lambda: hooked(lambda g: g.clamp(-100, 100)), PLAIN, False),
    "normalised by a hook": (lambda: hooked(lambda g: g / g.norm()), PLAIN, False),
    "scaled by a hook": (lambda: hooked(lambda g: 2 * g), PLAIN, True),
}


@pytest.mark.parametrize("name", ADDITIVE)
def test_additive(name: str) -> None:
    target, inputs, additive = ADDITIVE[name]
    host = jobs.host_factory(target, inputs=inputs, batch_axis=0, options=Options(micro_batch=2), gate=OFF)
    hosted = host.engine.find("f", "1")
    told = "gradients by parameters are always computed in one: that by" in hosted.batch.evidence
    assert (hosted.additive, told) == (additive, not additive), hosted.batch.evidence
    hosted.spoilt = True
    assert host.engine.find("f", "1").additive == additive


def test_another_axis() -> None:
    inputs = {"x": spec("float32", ["time", "n", 8])}
    assert load(lambda: AcrossRows(), inputs, axis=1).batch.max_rows > 0
    with pytest.raises(LoadError, match="batch_axis=1"):
        load(lambda: Masked(), {"x": spec("float32", [5, "n", 8]), "mask": spec("bool", [5, "n"])}, axis=1)


def test_what_cannot_be_probed() -> None:
    def doubled(x: Tensor, y: Tensor) -> Tensor:
        return x * y

    for inputs, why in (
        ({}, "no input declares"),
        ({"x": spec("float32", [4, 2]), "y": spec("float32", [4, 2])}, "no input declares"),
        ({"x": spec("float32", ["n", 2]), "y": spec("float32", [2])}, "the input 'y' does not declare 'n'"),
        ({"x": spec("float32", ["n", 2]), "y": spec("float32", ["m", 2])}, "the input 'y' does not declare 'n'"),
        ({"x": spec("float32", ["n", "n"]), "y": spec("float32", ["n", 2])}, "the input 'x' does not declare 'n'"),
        ({"x": spec("float32", ["n", 2]), "y": spec("float32", ["n", 3])}, "no sample input made the model run"),
    ):
        found = load(doubled, inputs)
        assert found.batch.max_rows == 0 and why in found.batch.evidence, found.batch


def test_randomness_is_no_error() -> None:
    def noisy(x: Tensor) -> Tensor:
        return x * torch.rand_like(x)

    calls: list[int] = []

    def changing(x: Tensor) -> Tensor:
        calls.append(1)
        return x * len(calls)

    assert "random" in load(noisy, PLAIN).batch.evidence
    assert "each time" in load(changing, PLAIN, gate=OFF).batch.evidence


def test_options() -> None:
    mlp, inputs = lambda: nn.Linear(6, 3), {"input": spec("float32", ["n", 6])}
    off = load(mlp, inputs, options=Options(batching=Batching(enabled=False)))
    assert off.batch.max_rows == 0 and "switched off" in off.batch.evidence
    # What is switched off is not checked, unless something else needs it.
    assert load(centred, PLAIN, options=Options(batching=Batching(enabled=False))).batch.max_rows == 0
    with pytest.raises(LoadError, match="depend on each other"):
        load(centred, PLAIN, options=Options(batching=Batching(enabled=False), micro_batch=2))
    with pytest.raises(LoadError, match="has micro_batch=2"):
        load(lambda: nn.Linear(6, 3), {}, options=Options(micro_batch=2))
    given = load(mlp, inputs, options=Options(batching=Batching(max_rows=7, max_bytes=1 << 20, max_delay=0.5)))
    assert (given.batch.max_rows, given.batch.max_bytes, given.batch.max_delay) == (7, 1 << 20, 0.5)
    assert load(mlp, inputs, options=Options(batching=Batching(max_rows=7), micro_batch=3)).batch.max_rows == 3
    small = load(mlp, inputs, options=Options(batching=Batching(max_bytes=100)))
    assert 1 <= small.batch.max_rows <= 4
    assert load(mlp, inputs, options=Options(hard_timeout=3.0)).hard_timeout == 3.0


def test_best_rows() -> None:
    found = load(lambda: nn.Linear(6, 3), {"input": spec("float32", ["n", 6])})
    assert found.batch.max_rows >= 64 and "times as fast as one by one" in found.batch.evidence

    def hungry(x: Tensor) -> Tensor:
        if len(x) > 16:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return x.sin()

    assert load(hungry, PLAIN).batch.max_rows <= 16


def test_what_was_found_outlives_the_model() -> None:
    host = jobs.host_factory(lambda: nn.Linear(6, 3), inputs={"input": spec("float32", ["n", 6])}, batch_axis=0)
    hosted = host.engine.find("f", "1")
    hosted.spoilt = True
    fresh = host.engine.find("f", "1")
    assert fresh is not hosted and (fresh.batch, fresh.batched_inputs) == (hosted.batch, frozenset({"input"}))
