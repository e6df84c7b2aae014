"""Models that misbehave, and plain ones to misuse; test_bad_input hosts them."""

import asyncio
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pullback_server import model, spec

ROWS = {"x": spec("float64", ["n", 3])}
VECTOR = {"x": spec("float64", ["n"])}


class Unprintable(Exception):
    """Raises when its message is asked for."""

    def __str__(self) -> str:
        raise RuntimeError("no message for you")


class BackwardRaises(torch.autograd.Function):
    """The identity, until it is differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError("the backward gave up")


class BackwardMisshapes(torch.autograd.Function):
    """Returns a gradient of another shape than its input's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros(7, dtype=grad.dtype)


# ---- models that work


@model("cube", inputs=ROWS, outputs=["y"])
def cube(x: Tensor) -> Tensor:
    return x**3


@model("energy", inputs=VECTOR, outputs=["e"])
def energy(x: Tensor) -> Tensor:
    return (x**3).sum()


@model("pair", inputs={"first": spec("float64", ["n"]), "second": spec("float64", ["n"])}, outputs=["p"])
def pair(first: Tensor, second: Tensor) -> Tensor:
    return first * second


@model("two", inputs=VECTOR)
def two(x: Tensor) -> dict[str, Tensor]:
    return {"square": x * x, "total": x.sum(), "index": x.argmax()}


@model("ignores", inputs={"used": spec("float64", ["n"]), "spare": spec("float64", ["n"])}, outputs=["y"])
def ignores(used: Tensor, spare: Tensor) -> Tensor:
    return used * used


@model("anything", outputs=["y"])
def anything(x: Tensor) -> Tensor:
    return x * 2


@model("spectrum", inputs={"z": spec("complex128", ["n"])}, outputs=["y"])
def spectrum(z: Tensor) -> Tensor:
    return (z * z).sum()


@model("widen", inputs=VECTOR, outputs=["y"])
def widen(x: Tensor) -> Tensor:
    """A small input, an output over the limit of the tests' server."""
    return x.sum() * torch.ones(1 << 18, dtype=x.dtype)


@model("slow", inputs=VECTOR, outputs=["y"], gate=False)
def slow(x: Tensor) -> Tensor:
    """Takes as many seconds as it is told, at most two."""
    time.sleep(min(max(float(x.detach().sum()), 0.0), 2.0))
    return x * x


class Lookup(nn.Module):
    """Ten rows of four; integer input, and a parameter whose name an input has too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4, dtype=torch.float64)
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        return self.table(ids) * scale * self.scale


@model("lookup", inputs={"ids": spec("int64", ["n"], low=0, high=9), "scale": spec("float64", [])}, outputs=["y"])
def lookup() -> nn.Module:
    return Lookup()


# ---- outputs that need no grad


@model("index", inputs=VECTOR, outputs=["y"])
def index(x: Tensor) -> Tensor:
    return x.argmax()


@model("detached", inputs=VECTOR, outputs=["y"])
def detached(x: Tensor) -> Tensor:
    return x.detach().sum()


@model("no_grad", inputs=VECTOR, outputs=["y"])
def no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.sum()


# ---- models that raise


@model("raises")
def raises(x: Tensor) -> Tensor:
    raise ValueError("the pressure is negative")


@model("raises_at_length")
def raises_at_length(x: Tensor) -> Tensor:
    raise ValueError("begin " + "x" * 100_000)


@model("raises_in_many_lines")
def raises_in_many_lines(x: Tensor) -> Tensor:
    raise ValueError("one\ntwo\r\nthree\x00four")


@model("raises_beyond_unicode")
def raises_beyond_unicode(x: Tensor) -> Tensor:
    raise ValueError("lone surrogate \udcff and wide \U0001f525" + "\u00e9" * 5_000)


@model("raises_unprintably")
def raises_unprintably(x: Tensor) -> Tensor:
    raise Unprintable


#: What code between a model and its caller might take for a word of its own.
KINDS = [
    StopIteration,
    StopAsyncIteration,
    GeneratorExit,
    EOFError,
    BrokenPipeError,
    ConnectionResetError,
    InterruptedError,
    TimeoutError,
    asyncio.CancelledError,
    KeyError,
    MemoryError,
]


@model("raises_kind", inputs={"kind": spec("int64", []), "x": spec("float64", ["n"])}, outputs=["y"])
def raises_kind(kind: Tensor, x: Tensor) -> Tensor:
    raise KINDS[int(kind)]("of some kind")


@model("recurses")
def recurses(x: Tensor) -> Tensor:
    return recurses(x)


@model("exits")
def exits(x: Tensor) -> Tensor:
    raise SystemExit(3)


@model("interrupts")
def interrupts(x: Tensor) -> Tensor:
    raise KeyboardInterrupt


@model("backward_raises", inputs=VECTOR, outputs=["y"])
def backward_raises(x: Tensor) -> Tensor:
    result: Tensor = BackwardRaises.apply(x)
    return result


@model("backward_misshapes", gate=False, inputs=VECTOR, outputs=["y"])
def backward_misshapes(x: Tensor) -> Tensor:
    result: Tensor = BackwardMisshapes.apply(x)
    return result


# ---- models that return what is no tensor


class Empty(NamedTuple):
    inside: None
    also: tuple[None, ...]


@model("returns_none")
def returns_none(x: Tensor) -> None:
    return None


@model("returns_text")
def returns_text(x: Tensor) -> str:
    return "a result"


@model("returns_float")
def returns_float(x: Tensor) -> float:
    return float(x.detach().sum())


@model("returns_nested_none")
def returns_nested_none(x: Tensor) -> dict[str, Any]:
    return {"a": {"b": None}, "c": [None, Empty(None, (None,))]}


@model("returns_nothing_in_particular")
def returns_empty(x: Tensor) -> tuple[()]:
    return ()


@model("returns_a_tensor_and_text")
def returns_a_tensor_and_text(x: Tensor) -> tuple[Tensor, str]:
    return x * 2, "a result"


@model("returns_itself")
def returns_itself(x: Tensor) -> list[Any]:
    result: list[Any] = [x]
    result.append(result)
    return result


@model("returns_sparse")
def returns_sparse(x: Tensor) -> Tensor:
    return x.to_sparse()


@model("returns_meta")
def returns_meta(x: Tensor) -> Tensor:
    return torch.empty(3, device="meta")


@model("returns_too_few", outputs=["a", "b"])
def returns_too_few(x: Tensor) -> Tensor:
    return x


# ---- models that leave torch in another state


@model("upsets_torch", inputs=VECTOR, outputs=["y"])
def upsets_torch(x: Tensor) -> Tensor:
    """What one call sets, the next must not meet."""
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    return x


@model("draws", inputs=VECTOR, outputs=["y"])
def draws(x: Tensor) -> Tensor:
    """A tensor of the default dtype's zeros times the input, plus noise."""
    return x * torch.rand(3) + torch.zeros(3)
