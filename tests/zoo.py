"""Models of every kind that the tests host. Importing this registers nothing and draws nothing: see hosting.loading."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from pullback_server import model, spec

F32, F64 = "float32", "float64"


def seeded(module_factory: Any, *arguments: Any, **keywords: Any) -> nn.Module:
    """A module whose weights are the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20240607)
        built: nn.Module = module_factory(*arguments, **keywords)
        for buffer in built.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.1 * torch.rand_like(buffer))
    return built


# Functions of tensors.


@model("identity", batch_axis=0)
def identity(x: torch.Tensor) -> torch.Tensor:
    """Returns its input itself."""
    return x


@model("cube", batch_axis=0)
def cube(x: torch.Tensor) -> torch.Tensor:
    """x ** 3."""
    return x**3


@model("square_sum")
def square_sum(x: torch.Tensor) -> torch.Tensor:
    """A real scalar."""
    return (x * x).sum()


@model("mixed", inputs={"x": spec(F64, ["n"]), "y": spec(F64, ["n"]), "scale": spec(F64, [])})
def mixed(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor | None = None) -> dict[str, Any]:
    """Several inputs, one of them optional; nested outputs, one of them an integer and one None."""
    z = torch.sin(x) * y**2
    if scale is not None:
        z = z * scale
    return {"product": z, "parts": (x * y, x.sum()), "count": torch.tensor(x.shape[0]), "nothing": None}


@model("pair", outputs=["wide", "narrow"])
def pair(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A tuple; the first output is wider than the input, the second narrower."""
    return torch.cat([x, x**2]), torch.exp(x[:1])


@model("holomorphic", inputs={"z": spec("complex128", ["n"])})
def holomorphic(z: torch.Tensor) -> torch.Tensor:
    """Complex to complex."""
    return z**2 + torch.exp(0.5j * z)


@model("modulus", inputs={"z": spec("complex128", ["n"])})
def modulus(z: torch.Tensor) -> torch.Tensor:
    """Complex to real, and not holomorphic."""
    return (z * z.conj()).real.sum() + z.imag.sin().sum()


@model("in_place")
def in_place(x: torch.Tensor) -> torch.Tensor:
    """Writes into its input."""
    x.mul_(2)
    x[..., 0] += 1
    return x.sin() * x


@model("views")
def views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Results that are views of the input."""
    return {"same": x, "turned": x.t(), "row": x[0], "flipped": x.conj()}


@model("raises")
def raises(x: torch.Tensor) -> torch.Tensor:
    """Raises."""
    raise ValueError(f"no good: {list(x.shape)}")


@model("leaves")
def leaves(x: torch.Tensor) -> torch.Tensor:
    """Tries to end the process."""
    raise SystemExit(3)


@model("no_tensor")
def no_tensor(x: torch.Tensor) -> Any:
    """Returns no tensor."""
    return {"a": None, "b": []}


@model("a_number")
def a_number(x: torch.Tensor) -> Any:
    """Returns a number."""
    return x, 3.0


@model("detached")
def detached(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """One output is not differentiable."""
    return {"kept": x * 2, "cut": x.detach() * 3, "rank": x.argsort()}


@model("half_used")
def half_used(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Does not depend on y."""
    return x.exp() + y.shape[0]


@model("not_finite")
def not_finite(x: torch.Tensor) -> torch.Tensor:
    """NaN, infinities, and gradients that are."""
    return torch.log(x)


@model("noisy")
def noisy(x: torch.Tensor) -> torch.Tensor:
    """Draws random numbers whatever the mode."""
    return x * torch.rand_like(x)


@model("force", inputs={"x": spec(F64, ["n", 3])})
def force(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Differentiates inside: an energy and its force."""
    if not x.requires_grad:
        x = x.requires_grad_()
    distance = (x[:, None] - x[None]).square().sum(-1) + 1.0
    energy = distance.log().sum()
    (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
    return {"energy": energy, "force": -gradient}


@model("stop_gradient", inputs={"x": spec(F64, ["n"])}, intended={"gradient": "its weight is a constant"})
def stop_gradient(x: torch.Tensor) -> torch.Tensor:
    """A weight that is a constant for reverse mode, though forward mode would go through it."""
    with torch.no_grad():
        weight = torch.softmax(x, 0)
    return weight * x


# Backwards of one's own.


class StraightThrough(torch.autograd.Function):
    """Rounds; its gradient is that of the identity. The old style."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Reversal(torch.autograd.Function):
    """The identity; its gradient is negated. The new style."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


class Cubed(torch.autograd.Function):
    """x ** 3, right to every order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class CubedOnce(torch.autograd.Function):
    """x ** 3 with a backward that says that it cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class CubedNumpy(torch.autograd.Function):
    """x ** 3 with a backward in numpy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.detach().numpy() ** 2 * gradient.detach().numpy())


class ExpHidden(torch.autograd.Function):
    """exp(x) with a backward that uses a tensor hidden on ctx."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.result = x.exp()
        return ctx.result.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * ctx.result


_N = {"x": spec(F64, ["n"])}


@model("straight_through", inputs=_N, batch_axis=0, intended={"gradient": "straight-through"})
def straight_through(x: torch.Tensor) -> torch.Tensor:
    """The custom gradient is not the true one."""
    return StraightThrough.apply(x) + x.sin()


@model("reversal", inputs=_N, intended={"gradient": "the opposite, for an adversary"})
def reversal(x: torch.Tensor) -> torch.Tensor:
    """The custom gradient is the opposite of the true one."""
    return Reversal.apply(x) * 3


@model("custom_right", inputs=_N)
def custom_right(x: torch.Tensor) -> torch.Tensor:
    """A custom backward with a derivative that the probe can prove."""
    return Cubed.apply(x) + x.sin()


@model("custom_unprobed")
def custom_unprobed(x: torch.Tensor) -> torch.Tensor:
    """The same, without specs to probe it."""
    return Cubed.apply(x) + x.sin()


@model("once", inputs=_N)
def once(x: torch.Tensor) -> torch.Tensor:
    """First order only: once_differentiable."""
    return CubedOnce.apply(x) + x.sin()


@model("in_numpy", inputs=_N)
def in_numpy(x: torch.Tensor) -> torch.Tensor:
    """First order only: a backward in numpy."""
    return CubedNumpy.apply(x) + x.sin()


@model("hidden", inputs=_N)
def hidden(x: torch.Tensor) -> torch.Tensor:
    """First order only: a tensor hidden on ctx."""
    return ExpHidden.apply(x) + x.sin()


# Modules.


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


class Words(nn.Module):
    """Token ids in, logits out; a mask may be given."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        found = torch.tanh(self.embedding(ids))
        if mask is not None:
            found = found * mask.unsqueeze(-1)
        logits: torch.Tensor = self.head(found.mean(1))
        return logits


class Recurrent(nn.Module):
    """An LSTM or a GRU, and what it returns."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = kind(3, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        return self.cell(x)


class Conv(nn.Module):
    """Convolution, batch normalisation, pooling, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found = torch.nn.functional.softplus(self.norm(self.conv(image)))
        logits: torch.Tensor = self.head(self.drop(found.mean((2, 3))))
        return logits


@model("mlp", inputs={"input": spec(F32, ["batch", 784])}, batch_axis=0)
def mlp() -> nn.Module:
    """784-256-10, as in the benchmarks."""
    return seeded(lambda: nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)))


@model("small", inputs={"input": spec(F64, ["batch", 3])}, batch_axis=0)
def small() -> nn.Module:
    """A smooth network in double precision, 3 to 2."""
    return seeded(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))).double()


@model("tied", inputs={"x": spec(F64, ["batch", 3])}, batch_axis=0)
def tied() -> nn.Module:
    """Two layers that share a weight."""
    return seeded(Tied).double()


@model("words", inputs={"ids": spec("int64", ["batch", "length"], low=0, high=10)})
def words() -> nn.Module:
    """An embedding of integers, with an optional mask."""
    return seeded(Words).double()


@model("lstm", inputs={"x": spec(F64, ["batch", "time", 3])})
def lstm() -> nn.Module:
    """An LSTM: nested outputs."""
    return seeded(Recurrent, nn.LSTM).double()


@model("gru", inputs={"x": spec(F64, ["batch", "time", 3])})
def gru() -> nn.Module:
    """A GRU."""
    return seeded(Recurrent, nn.GRU).double()


@model("conv", inputs={"image": spec(F64, ["batch", 2, "height", "width"])}, batch_axis=0)
def conv() -> nn.Module:
    """A convolutional network with batch normalisation and dropout."""
    return seeded(Conv).double()


@model("transformer", inputs={"src": spec(F64, ["batch", "length", 4])}, batch_axis=0)
def transformer() -> nn.Module:
    """A stock encoder layer."""
    return seeded(nn.TransformerEncoderLayer, 4, 2, 8, dropout=0.1, batch_first=True).double()


@model("compiled", inputs={"input": spec(F64, ["batch", 3])})
def compiled() -> nn.Module:
    """Compiled inside the factory."""
    return torch.compile(  # type: ignore[return-value]
        seeded(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))).double(), backend="aot_eager"
    )
