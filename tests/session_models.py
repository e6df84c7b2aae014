"""Models that the session tests host and also run locally: what is here is both the server's and the oracle's.

Importing registers nothing and draws nothing (see zoo.py). `local(name)` gives the very function or a module with the
very weights that a worker has.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from pullback_server import model, spec

F64 = "float64"
_N = {"x": spec(F64, ["n"])}
#: What the tests run locally, by the name that it is hosted under.
LOCAL: dict[str, Callable[[], Any]] = {}


def local(name: str) -> Any:
    """What is hosted as `name`: a function of tensors, or a fresh module with the same weights."""
    return LOCAL[name]()


def function(name: str, **settings: Any) -> Callable[[Any], Any]:
    """Hosts a function of tensors."""

    def register(body: Any) -> Any:
        LOCAL[name] = lambda: body
        return model(name, **settings)(body)

    return register


def module(name: str, **settings: Any) -> Callable[[Any], Any]:
    """Hosts a factory; its weights are the same in every process, and float64 unless it says otherwise."""

    def register(factory: Any) -> Any:
        def build() -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(31)
                built: nn.Module = factory()
                for buffer in built.buffers():
                    if buffer.is_floating_point():
                        buffer.add_(0.1 * torch.rand_like(buffer))
            return built

        build.__doc__ = factory.__doc__
        LOCAL[name] = build
        return model(name, **settings)(build)

    return register


# Functions of one's own.


class Square(torch.autograd.Function):
    """x ** 2 with its own backward, right to every order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class SquareOnce(Square):
    """The same, which says that its backward cannot be differentiated."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class SquareNumpy(Square):
    """The same with a backward in numpy: its derivative is zero without any error."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * x.detach().numpy() * gradient.detach().numpy())


class SquareDetached(Square):
    """The same with a part of the backward under no_grad: what is left is a wrong second derivative with a graph."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            slope = 2 * x
        return slope * gradient


class ExpHidden(torch.autograd.Function):
    """exp(x) with a backward that uses a tensor hidden on ctx."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.result = x.exp()
        return ctx.result.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * ctx.result


class Round(torch.autograd.Function):
    """Straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


@function("square", inputs=_N)
def square(x: torch.Tensor) -> torch.Tensor:
    """The mission's MyFunction; its spec lets the probe prove the second order."""
    return Square.apply(x)


@function("square_any")
def square_any(x: torch.Tensor) -> torch.Tensor:
    """The same without a spec: first order only."""
    return Square.apply(x)


@function("square_once", inputs=_N)
def square_once(x: torch.Tensor) -> torch.Tensor:
    """Once differentiable, beside something smooth: the sum has a graph whatever the first does."""
    return SquareOnce.apply(x) + x.sin()


@function("square_numpy", inputs=_N)
def square_numpy(x: torch.Tensor) -> torch.Tensor:
    """A backward in numpy, beside something smooth."""
    return SquareNumpy.apply(x) + x.sin()


@function("square_detached", inputs=_N)
def square_detached(x: torch.Tensor) -> torch.Tensor:
    """A backward half under no_grad, beside something smooth."""
    return SquareDetached.apply(x) + x.sin()


@function("exp_hidden", inputs=_N)
def exp_hidden(x: torch.Tensor) -> torch.Tensor:
    """A tensor hidden on ctx, beside something smooth."""
    return ExpHidden.apply(x) + x.sin()


@function("rounded", inputs=_N, intended={"gradient": "straight-through"})
def rounded(x: torch.Tensor) -> torch.Tensor:
    """A straight-through estimator: the gradient as written is not that of the forward."""
    return Round.apply(x) * x


@function("hooked", inputs=_N, intended={"gradient": "what hooks make of it"})
def hooked(x: torch.Tensor) -> torch.Tensor:
    """A hook that rewrites the gradient with a detached value."""
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda g: g * x.detach())
    return y * y


@function("hooked_smooth", inputs=_N, intended={"gradient": "what hooks make of it"})
def hooked_smooth(x: torch.Tensor) -> torch.Tensor:
    """A hook that scales the gradient, differentiably."""
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda g: g * 3)
    return y * y


# Functions that return, write into or cut what they are given.


@function("same")
def same(x: torch.Tensor) -> torch.Tensor:
    """Its input itself."""
    return x


@function("glimpses")
def glimpses(x: torch.Tensor) -> dict[str, Any]:
    """Views of the input, one of them twice."""
    first = x.reshape(-1)[:2]
    return {"first": first, "again": first, "turned": x.mT if x.ndim > 1 else x, "both": (x, x * 2)}


@function("smooth")
def smooth(x: torch.Tensor) -> torch.Tensor:
    """Anything in, the same shape out."""
    return torch.tanh(x) * x


@function("fork_two", outputs=["sine", "product"])
def fork_two(x: torch.Tensor, y: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Two outputs, an optional second input."""
    return x.sin(), x * x if y is None else x * y


@function("writes_into_a_copy")
def writes_into_a_copy(x: torch.Tensor) -> torch.Tensor:
    """In-place work of its own."""
    y = x.clone()
    y.mul_(2)
    y[..., :1] += x[..., :1]
    return y.sin_()


@function("writes_into_its_input")
def writes_into_its_input(x: torch.Tensor) -> torch.Tensor:
    """Doubles what it was given."""
    x.mul_(2)
    return x.sin() * x


@function("writes_behind")
def writes_behind(x: torch.Tensor) -> torch.Tensor:
    """Doubles what it was given, where no version counter sees it."""
    x.data.mul_(2)
    return x.sin()


@function("partly_cut")
def partly_cut(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """One output without gradients, one of integers."""
    return {"kept": x**3, "cut": x.detach() * 3, "rank": x.argsort()}


@function("modulus")
def modulus(z: torch.Tensor) -> torch.Tensor:
    """Complex to real, not holomorphic."""
    return (z * z.conj()).real.sum() + z.imag.sin().sum() + z.abs().sum()


@function("holomorphic")
def holomorphic(z: torch.Tensor) -> torch.Tensor:
    """Complex to complex."""
    return z**2 + torch.exp(0.5j * z)


@function("takes_a_moment")
def takes_a_moment(x: torch.Tensor) -> torch.Tensor:
    """Slow enough to be killed in."""
    time.sleep(0.7)
    return x * 2


# Modules.


class SimpleNN(nn.Module):
    """10-5-1, as in the issue."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 5)
        self.fc2 = nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc2(torch.relu(self.fc1(x)))
        return result


class Noisy(nn.Module):
    """Dropout and batch normalisation, whose modes and statistics matter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.drop(torch.tanh(self.norm(self.fc(x))))
        return result


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return result


class Checkpointed(nn.Module):
    """Recomputes its middle in the backward, and drops in it: the mask must be the forward's."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 3)
        self.drop = nn.Dropout(0.5)
        self.reentrant = reentrant

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.drop(self.fc2(torch.tanh(self.fc1(x))))
        return result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = checkpoint(self.middle, x, use_reentrant=self.reentrant)
        return result.sin()


class WritesIntoItself(nn.Module):
    """Counts its calls in a buffer, and writes into a parameter's data."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        with torch.no_grad():
            self.weight.mul_(2)
        return x * self.weight * self.calls


class Words(nn.Module):
    """Token ids in, logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(torch.tanh(self.embedding(ids)).mean(1))
        return result


class Picture(nn.Module):
    """Two convolutions with pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 2, stride=2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.second(nn.functional.softplus(self.first(image))).square().mean((2, 3))


class Attention(nn.Module):
    """Self-attention by the fused call, whose fast kernels have no second order."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


@module("simple")
def simple() -> nn.Module:
    """SimpleNN in double precision."""
    return SimpleNN().double()


@module("classifier")
def classifier() -> nn.Module:
    """Logits."""
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


@module("linear")
def linear() -> nn.Module:
    """3 to 3, for random programs."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@module("noisy")
def noisy() -> nn.Module:
    """Dropout and batch normalisation."""
    return Noisy().double()


@module("tied")
def tied() -> nn.Module:
    """A shared weight."""
    return Tied().double()


@module("checkpointed")
def checkpointed() -> nn.Module:
    """Non-reentrant checkpointing."""
    return Checkpointed(reentrant=False).double()


@module("checkpointed_reentrant")
def checkpointed_reentrant() -> nn.Module:
    """Reentrant checkpointing."""
    return Checkpointed(reentrant=True).double()


@module("writes_into_itself")
def writes_into_itself() -> nn.Module:
    """In-place changes of a buffer and of a parameter."""
    return WritesIntoItself()


@module("words", inputs={"ids": spec("int64", ["batch", "length"], low=0, high=10)})
def words() -> nn.Module:
    """An embedding."""
    return Words().double()


@module("picture")
def picture() -> nn.Module:
    """Convolutions."""
    return Picture().double()


@module("attention")
def attention() -> nn.Module:
    """Fused attention."""
    return Attention().double()


@module("lstm")
def lstm() -> nn.Module:
    """Nested outputs."""
    return nn.LSTM(3, 4, batch_first=True).double()


@module("rnn")
def rnn() -> nn.Module:
    """A plain recurrent network."""
    return nn.RNN(3, 4, batch_first=True).double()


@module("encoder")
def encoder() -> nn.Module:
    """A stock encoder layer."""
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True).double()
