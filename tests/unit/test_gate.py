"""Nothing whose gradient is wrong is served unless its operator said so; and nothing that is right is refused."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from pullback_server import Gate, spec
from pullback_server.engine import Engine
from pullback_server.engine.trial import job_by_everything
from pullback_server.faults import Fault
from pullback_server.hosting import Abilities, Registration
from pullback_server.hosting.gate import CHECKS
from pullback_server.hosting.loading import LoadError, load_source
from pullback_server.hosting.options import Options
from pullback_server.job import CheckRecord, Signature
from pullback_wire import Reason

torch.set_num_threads(1)
Tensor = torch.Tensor
N = {"x": spec("float64", ["n"])}
ROWS = {"x": spec("float32", ["n", 6])}
ROOT = Path(__file__).parent.parent.parent
NUMBER = r"(-?[\d.]+(?:e[-+]\d+)?)"


def load(target: Any, inputs: Any = None, *, gate: Gate | None = None, kind: str = "", **more: Any) -> Signature:
    kind = kind or (
        "factory" if isinstance(target, type) or getattr(target, "__name__", "") == "factory" else "function"
    )
    registration = Registration(
        "m",
        target,
        kind=kind,
        inputs=N if inputs is None else inputs,
        gate=gate or Gate(),
        **more,  # type: ignore[arg-type]
    )
    return Engine(torch.device("cpu")).load(registration)


def built(module: Callable[[], nn.Module], inputs: Any, **more: Any) -> Signature:
    return load(module, inputs, kind="factory", **more)


def checks(signature: Signature) -> dict[str, CheckRecord]:
    found = {check.name: check for check in signature.checks}
    assert tuple(found) == CHECKS, "one record for each check, in their order"
    return found


def outcomes(signature: Signature) -> dict[str, str]:
    return {name: check.outcome for name, check in checks(signature).items()}


def refused(target: Any, inputs: Any = None, **more: Any) -> str:
    with pytest.raises(LoadError) as caught:
        load(target, inputs, **more)
    text = str(caught.value)
    assert text.startswith("model 'm'"), text
    return text


def numbers(text: str) -> tuple[list[int], float, float]:
    """The element's index, its value by the backward, and by differences."""
    found = re.search(rf"element \[([\d, ]*)\] of .*? is {NUMBER}, and by central differences {NUMBER};", text)
    assert found is not None, text
    return [int(part) for part in found[1].split(",")], float(found[2]), float(found[3])


def own(forward: Callable[..., Tensor], backward: Callable[..., Any], once: bool = False) -> Callable[..., Tensor]:
    """A Function of its own."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            ctx.save_for_backward(*inputs)
            return forward(*inputs)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return backward(g, *ctx.saved_tensors)

    if once:
        Own.backward = staticmethod(once_differentiable(Own.backward))  # type: ignore[method-assign]
    return Own.apply  # type: ignore[no-any-return]


# Wrong gradients.


def test_the_wrong_input_saved() -> None:
    """`2 * g * input` with the wrong input saved."""
    function = own(lambda x, y: x**2 + y, lambda g, x, y: (2 * g * y, g))
    text = refused(lambda x, y: function(x, y), {"x": spec("float64", [4]), "y": spec("float64", [4])})
    (index,), analytical, numerical = numbers(text)
    assert "by the input 'x'" in text and 0 <= index < 4 and analytical != numerical
    assert 'intended={"gradient"' in text and "fix the backward" in text and "the input 'y'" not in text


ROUND = own(torch.round, lambda g, x: g)
WRONG: dict[str, Any] = {
    "straight through": (lambda x: ROUND(x) + x.sin(), None),
    "reversal": (lambda x: own(torch.clone, lambda g, x: -g)(x) * 3, None),
    "a factor is missing": (lambda x: own(lambda x: x**2, lambda g, x: g * x)(x), None),
    "clipped": (lambda x: own(torch.clone, lambda g, x: g.clamp(-0.1, 0.1))(x), None),
    "cut off": (lambda x: x.detach() * x, None),
    "a constant instead": (lambda x: own(torch.sin, lambda g, x: torch.ones_like(g))(x), None),
    "nothing instead": (lambda x: own(torch.sin, lambda g, x: torch.zeros_like(g))(x) + 0 * x, None),
    "a little off": (lambda x: own(torch.exp, lambda g, x: 1.001 * g * x.exp())(x), None),
    "tiny outputs": (lambda x: own(lambda x: 1e-19 * x**2, lambda g, x: 1e-19 * g * x)(x), None),
    "huge outputs": (lambda x: own(lambda x: 1e19 * x**2, lambda g, x: 1e19 * g * x)(x), None),
    "tiny inputs": (
        lambda x: own(lambda x: (1e9 * x) ** 2, lambda g, x: 1e18 * g * x)(x),
        {"x": spec("float64", ["n"], low=0, high=1e-9)},
    ),
    "the conjugate": (
        lambda z: own(lambda z: z**2, lambda g, z: 2 * g * z)(z),
        {"z": spec("complex128", ["n"])},
    ),
    "in half precision": (lambda x: own(torch.exp, lambda g, x: 2 * g * x.exp())(x), {"x": spec("float16", ["n"])}),
    "in single precision always": (
        lambda x: own(lambda x: x.float().exp(), lambda g, x: 2 * g * x.exp().to(g.dtype))(x),
        {"x": spec("float32", ["n"])},
    ),
    "beside integers": (
        lambda x, i: own(torch.clone, lambda g, x: 2 * g)(x)[i],
        {"x": spec("float64", [5]), "i": spec("int64", ["k"], low=0, high=4)},
    ),
    "only where it is given": (lambda x, y=None: x if y is None else x * ROUND(y), N | {"y": spec("float64", ["n"])}),
    "of one output": (lambda x: (x.sin(), own(torch.cos, lambda g, x: g * x.sin())(x), x.argmax()), None),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    target, inputs = WRONG[name]
    assert "is not the derivative of its outputs" in refused(target, inputs)
    found = load(target, inputs, gate=Gate(intended={"gradient": "as it should be"}))
    assert checks(found)["gradient"].outcome == "declared"
    assert checks(found)["gradient"].detail.startswith("as it should be (")
    off = load(target, inputs, gate=Gate(enabled=False))
    assert set(outcomes(off).values()) == {"skipped"}
    assert {check.detail for name, check in checks(off).items() if name != "rows"} == {"switched off by its gate"}


@pytest.mark.parametrize("shape", [[10_000], [100, 100], [1_000_000]])
def test_one_wrong_element_of_many(shape: list[int]) -> None:
    wrong = torch.ones(shape, dtype=torch.float64)
    place = [extent * 3 // 7 for extent in shape]
    wrong[tuple(place)] = -1
    function = own(lambda x: x.sin() * x, lambda g, x: g * wrong * (x.sin() + x * x.cos()))
    index, analytical, numerical = numbers(refused(lambda x: function(x), {"x": spec("float64", shape)}))
    assert index == place
    assert abs(analytical + numerical) < 1e-4 * abs(numerical)


class Scaled(nn.Module):
    """A parameter with a gradient of its own."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.function = own(lambda s, y: s * y, lambda g, s, y: (factor * (g * y).sum(0), g * s))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.function(self.scale, self.first(x))
        return found


def test_a_wrong_gradient_of_a_parameter() -> None:
    text = refused(lambda: Scaled(0.5), ROWS, kind="factory")
    index, analytical, numerical = numbers(text)
    assert "by the parameter 'scale'" in text and len(index) == 1
    assert abs(numerical - 2 * analytical) < 1e-4 * abs(numerical)
    assert outcomes(built(lambda: Scaled(1.0), ROWS))["gradient"] == "passed"


class Needed(torch.autograd.Function):
    """A product that confuses what needs a gradient when one of both does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g * (w if ctx.needs_input_grad[1] else x), (g * x).sum(0)


def test_what_else_requires_grad() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.5, -0.5, 2.0]))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = Needed.apply(x, self.w)
            return found

    assert "by the input 'x'" in refused(Model, {"x": spec("float32", ["n", 3])}, gate=Gate(points=4))


class Kept(nn.Module):
    """Its code finds a parameter elsewhere than in its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.5, -0.5, 2.0]))
        self.hidden = [self.w]


class KeptWrong(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.hidden[0] * self.w.detach()


class KeptRight(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.hidden[0] * self.w


def test_parameters_that_code_keeps_elsewhere_are_moved_where_they_are() -> None:
    inputs = {"x": spec("float32", ["n", 3])}
    assert "by the parameter 'w'" in refused(KeptWrong, inputs)
    found = outcomes(load(KeptRight, inputs))
    assert found["gradient"] == found["purity"] == "passed"


class Locked(nn.Module):
    """It cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y * y.detach()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_model_that_cannot_be_copied(dtype: str) -> None:
    text = refused(lambda: Locked().to(getattr(torch, dtype)), {"x": spec(dtype, ["n", 3])}, kind="factory")
    assert "by central differences" in text


SCALAR = {"x": spec("float64", [])}
BRANCHES: dict[str, Any] = {
    "below zero": (lambda x: x * (x.detach() if x < 0 else x), SCALAR),
    "above zero": (lambda x: x * (x.detach() if x > 0 else x), SCALAR),
    "a small place": (lambda x: x * (x.detach() if 0.6 < x < 0.7 else x), SCALAR),
    "many rows": (lambda x: x * (x.detach() if len(x) > 4 else x), {"x": spec("float64", ["n", 3])}),
    "one row": (lambda x: x * (x.detach() if len(x) == 1 else x), {"x": spec("float64", ["n", 3])}),
    "single precision": (lambda x: x * (x.detach() if x.dtype == torch.float32 else x), ROWS),
    "only y": (
        lambda x, y=None, z=None: x if y is None else x * y * (y.detach() if z is None else y * z),
        {name: spec("float64", [3]) for name in "xyz"},
    ),
    **{
        f"expert {k}": (
            lambda i, x, k=k: x * (x.detach() if i == k else x),
            {"i": spec("int64", [], low=0, high=3), "x": spec("float64", [3])},
        )
        for k in range(4)
    },
    **{
        f"flag {flag}": (
            lambda b, x, flag=flag: x * (x.detach() if bool(b) == flag else x),
            {"b": spec("bool", []), "x": spec("float64", [3])},
        )
        for flag in (False, True)
    },
}


@pytest.mark.parametrize("name", BRANCHES)
def test_wrong_on_a_branch(name: str) -> None:
    assert "is not the derivative of its outputs" in refused(*BRANCHES[name])


def test_what_is_slow_is_asked_for_its_gradient_first() -> None:
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.51)
        return x * x.detach()

    text = refused(slow, gate=Gate(seconds=6.0))
    assert "is not the derivative of its outputs" in text


def test_a_gradient_that_is_not_finite_is_noted() -> None:
    gradient = checks(load(lambda x: torch.where(x > -50, x, x.sqrt() * 0)))["gradient"]
    assert gradient.outcome == "noted" and "NaN" in gradient.detail


# Second order.


def test_second_order_that_is_wrong_is_not_promised() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.slope = 3 * x**2
            return x**3

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * ctx.slope

    once = own(lambda x: x**3, lambda g, x: 3 * g * x**2, once=True)
    for function in (Hidden.apply, once):
        found = load(lambda x: function(x) + x.sin())  # noqa: B023
        assert found.orders.reverse == 1
        assert outcomes(found) == dict.fromkeys(CHECKS, "passed") | {"second": "noted", "rows": "skipped"}
        assert "the probe at load failed" in checks(found)["second"].detail
    right = load(lambda x: own(lambda x: x**3, lambda g, x: 3 * g * x**2)(x))
    assert right.orders.reverse == 2 and outcomes(right)["second"] == "passed"


def test_second_order_of_torchs_own_operations() -> None:
    """The gradient is right; its own graph is cut off where no Function shows."""

    def cut(x: Tensor) -> Tensor:
        """exp(x), written so that the first derivative is right."""
        y = x.detach().exp()
        return y * (1 + x - x.detach())

    text = refused(cut)
    assert "its second derivative is not that of its gradient" in text and 'intended={"second"' in text
    found = checks(load(cut, gate=Gate(intended={"second": "a surrogate"})))
    assert found["gradient"].outcome == "passed" and found["second"].outcome == "declared"
    engine = Engine(torch.device("cpu"))
    gate = Gate(intended={"second": "a surrogate"})
    orders = engine.load(Registration("m", cut, kind="function", inputs=N, gate=gate)).orders
    assert orders.reverse == 1 and "a surrogate" in orders.evidence
    x = torch.ones(3, dtype=torch.float64)
    job, tensors = job_by_everything("hvp", engine.find("m", ""), {"x": x}, cotangents={"output": x})
    with pytest.raises(Fault, match="a surrogate") as caught:
        engine.run(job, tensors)
    assert caught.value.reason is Reason.ORDER_UNAVAILABLE


# Determinism and purity.


def test_randomness() -> None:
    found = checks(load(lambda x: x * torch.rand_like(x)))
    assert found["determinism"].outcome == found["gradient"].outcome == "passed"
    assert "draws random numbers" in found["determinism"].detail
    generator = torch.Generator()

    def noisy(x: Tensor) -> Tensor:
        return x * torch.rand(x.shape, dtype=x.dtype, generator=generator)

    assert "the same call with the same seed gives something else" in refused(noisy)
    for name in ("determinism", "purity"):
        declared = outcomes(load(noisy, gate=Gate(intended={name: "it dreams"})))
        assert declared == dict.fromkeys(CHECKS, "skipped") | {"determinism": "declared"}


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class LastSeen(nn.Module):
    """Keeps what it was given, and uses it for the next different input."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self.drift = 1.0

    def forward(self, x: Tensor) -> Tensor:
        now = x.detach().clone()
        if self.last is not None and not (self.last.shape == now.shape and torch.equal(self.last.float(), now.float())):
            self.drift += 1
        self.last = now
        return x * self.drift


@pytest.mark.parametrize(("module", "where"), [(Counting, "calls"), (LastSeen, "drift")])
def test_what_a_module_keeps(module: type[nn.Module], where: str) -> None:
    text = refused(module)
    assert repr(where) in text and 'intended={"purity"' in text
    found = outcomes(load(module, gate=Gate(intended={"purity": "a counter"})))
    assert found["purity"] == "declared" and found["determinism"] == "passed"


def test_what_a_function_keeps() -> None:
    calls: list[int] = []

    def counting(x: Tensor) -> Tensor:
        calls.append(1)
        return x * len(calls)

    assert "keeps something between calls" in refused(counting)


def test_buffers_are_no_trace() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    purity = checks(load(Buffered))["purity"]
    assert purity.outcome == "noted" and "buffers" in purity.detail


def test_a_cache_is_no_trace() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables: dict[int, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            table = self.tables.setdefault(len(x), torch.arange(len(x)))
            return x * table

    assert outcomes(load(Cached))["purity"] == "passed"


# Right models.


class Layers(nn.Module):
    def __init__(self, *layers: nn.Module, then: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.layers(x))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 512), nn.ReLU(), nn.Linear(512, 512), nn.Hardtanh(), nn.Linear(512, 3))


KINKS: dict[str, Any] = {
    "relu": wide,
    "abs and max": lambda: Layers(wide(), then=lambda y: y.abs().max(-1).values),
    "clamp": lambda: Layers(wide(), then=lambda y: y.clamp(-0.05, 0.05)),
    "sort, median": lambda: Layers(nn.Linear(6, 64), then=lambda y: (y.sort(-1).values, y.median(-1).values)),
    "steps": lambda: Layers(nn.Linear(6, 64), then=lambda y: y.floor() + y + y.sign() * y**2),
    "float inside": lambda: Layers(nn.Linear(6, 64), then=lambda y: y.float().sin()),
    "half inside": lambda: Layers(nn.Linear(6, 64), then=lambda y: y.half().sin()),
    "a mask of floats": lambda: Layers(nn.Linear(6, 6), then=lambda y: y * (y > 0).float()),
    "zeros at the start": lambda: Layers(nn.Linear(6, 3), then=lambda y: F.relu(y * 0) + y),
    "bfloat16": lambda: wide().bfloat16(),
    "half": lambda: wide().half(),
    "double": lambda: wide().double(),
}


@pytest.mark.parametrize("name", KINKS)
@pytest.mark.parametrize("seed", range(3))
def test_kinks_and_rounding_refuse_nothing(name: str, seed: int) -> None:
    def factory() -> nn.Module:
        torch.manual_seed(seed)
        found: nn.Module = KINKS[name]()
        return found

    dtype = {"bfloat16": "bfloat16", "half": "float16", "double": "float64"}.get(name, "float32")
    argument = "x" if isinstance(factory(), Layers) else "input"
    found = outcomes(built(factory, {argument: spec(dtype, ["n", 6])}))
    assert found["gradient"] == ("skipped" if name == "half inside" else "passed")
    assert found["determinism"] == found["purity"] == "passed"


def test_a_parameter_at_a_kink() -> None:
    class AtZero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            return x.sin() + torch.relu(self.gate * x) + self.gate.abs()

    gradient = checks(built(AtZero, ROWS))["gradient"]
    assert gradient.outcome == "skipped" and "'gate'" in gradient.detail


RIGHT: dict[str, Any] = {
    "complex": (lambda z: (z * z.conj()).real.sum() + (z**3).abs(), {"z": spec("complex64", ["n"])}),
    "integers": (
        lambda x, i: (x[i], i * 2, x.argmax()),
        {"x": spec("float32", [4]), "i": spec("int64", ["k"], high=3)},
    ),
    "unused": (lambda x, y: x.sin(), {"x": spec("float32", ["n"]), "y": spec("float32", ["n"])}),
    "a scalar": (lambda x: x.exp(), {"x": spec("float64", [])}),
    "empty": (lambda x: x.sin(), {"x": spec("float64", [0])}),
    "in place": (lambda x: x.mul_(2).sin() * x, {"x": spec("float32", ["n"])}),
    "bounded": (lambda x: x.log() + (1 - x).sqrt(), {"x": spec("float64", ["n"], low=0, high=1)}),
    "far off": (lambda x: (x - 1e6).sin(), {"x": spec("float64", ["n"], low=1e6, high=1e6 + 1)}),
    "times": (lambda x: (x - 1.7e9).sin(), {"x": spec("float64", [], low=1.7e9, high=1.7e9 + 1)}),
    "numpy's single precision": (
        lambda x: (
            own(lambda x: torch.from_numpy(np.sin(x.numpy(), dtype=np.float32)).double(), lambda g, x: g * x.cos())(x)
            + x
        ),
        {"x": spec("float64", ["n"])},
    ),
    "waves": (lambda x: x + 1e-6 * (1e7 * x).sin(), None),
    "differentiates itself": (
        lambda x: torch.autograd.grad((x.requires_grad_() ** 3).sum(), x, create_graph=True)[0],
        {"x": spec("float64", ["n"])},
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str) -> None:
    assert outcomes(load(*RIGHT[name]))["gradient"] == "passed"


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(10, 8, padding_idx=0), nn.Linear(8, 2)

    def forward(self, i: Tensor) -> Tensor:
        found: Tensor = self.linear(self.table(i))
        return found


@pytest.mark.parametrize("high", [1, 9, 999])
def test_what_a_padding_row_is_does_not_depend_on_the_tokens_drawn(high: int) -> None:
    rows = {"input": spec("int64", ["n", 64], low=0, high=high)}
    found = outcomes(built(lambda: nn.Embedding(high + 1, 4, padding_idx=0), rows))
    assert found["gradient"] == found["second"] == "passed"
    declared = Gate(intended={"gradient": "it pads"})
    assert checks(built(lambda: nn.Embedding(high + 1, 4, padding_idx=0), rows, gate=declared))["gradient"].outcome
    found = outcomes(built(Padded, {"i": spec("int64", ["n", 16], low=0, high=9)}))
    assert found["gradient"] == found["second"] == "passed"


def test_single_precision_far_off_is_not_refused() -> None:
    function = own(lambda x: torch.from_numpy(np.sin(x.numpy(), dtype=np.float32)).double(), lambda g, x: g * x.cos())
    found = outcomes(load(lambda x: function(x), {"x": spec("float64", ["n"], low=1000, high=1001)}))
    assert found["gradient"] in ("passed", "skipped")


def test_symmetric_matrices() -> None:
    square = {"x": spec("float64", [3, 3])}
    assert "(x + x.mH) / 2" in refused(lambda x: torch.linalg.eigvalsh(x), square)
    assert outcomes(load(lambda x: torch.linalg.eigvalsh(x + x.mT), square))["gradient"] == "passed"


@pytest.mark.parametrize("options", [{"autocast": "bfloat16"}, {"checkpoint": ("layers.0",)}, {"micro_batch": 2}])
def test_options(options: Any) -> None:
    def factory() -> nn.Module:
        return Layers(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 2))

    found = load(factory, ROWS, batch_axis=0, options=Options(**options))
    assert outcomes(found) == dict.fromkeys(CHECKS, "passed"), found.checks


SOURCES = ["tests/zoo.py", "tests/session_models.py", "benchmarks/models.py"]
SOURCES += [str(path.relative_to(ROOT)) for path in (ROOT / "examples" / "models").glob("*.py")]


@pytest.mark.parametrize("source", SOURCES)
def test_the_models_of_this_repository(source: str) -> None:
    for registration in load_source(str(ROOT / source)):
        found = outcomes(Engine(torch.device("cpu")).load(registration))
        declared = {name for name, outcome in found.items() if outcome == "declared"}
        assert declared - {"second"} == set(registration.gate.intended)


# When there is a gate.


def test_without_shapes() -> None:
    found = checks(load(lambda x: ROUND(x), {}))
    assert {check.outcome for check in found.values()} == {"skipped"}
    assert found["gradient"].detail == "not every input declares its shape"
    assert "every input that must be given needs a declared shape" in refused(
        lambda x: ROUND(x), {}, gate=Gate(enabled=True)
    )


def test_no_sample_runs() -> None:
    def picky(x: Tensor) -> Tensor:
        raise ValueError("never")

    assert "no sample input made it run" in checks(load(picky))["purity"].detail
    assert "never" in refused(picky, gate=Gate(enabled=True))


def test_other_sources() -> None:
    found = checks(load(lambda x: ROUND(x), source="pt2"))
    assert found["gradient"].outcome == "skipped" and "pt2" in found["gradient"].detail
    refused(lambda x: ROUND(x), source="pt2", gate=Gate(enabled=True))


def test_nothing_finite() -> None:
    gradient = checks(load(lambda x: torch.log(-x.abs())))["gradient"]
    assert gradient.outcome == "skipped" and "low and high" in gradient.detail


def test_a_slow_model() -> None:
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.1)
        return x.sin()

    found = load(slow, gate=Gate(seconds=1.0))
    assert outcomes(found)["determinism"] == "passed"
    assert "took longer than 1 s" in checks(found)["gradient"].detail
    assert found.gradient_seconds > 0.09


def test_declared_of_an_honest_model() -> None:
    gate = Gate(intended={"gradient": "I thought so"})
    with pytest.raises(LoadError, match="take that out"):
        built(lambda: nn.Linear(6, 2), {"input": spec("float32", ["n", 6])}, gate=gate)
    # Who knows what other inputs bring.
    gradient = checks(load(lambda x: own(torch.clone, lambda g, x: g.clamp(-99, 99))(x), gate=gate))["gradient"]
    assert gradient.outcome == "passed" and "I thought so" in gradient.detail


def test_dependent_rows_that_are_intended() -> None:
    def centred(x: Tensor) -> Tensor:
        return x - x.mean(0)

    assert "its rows depend on each other" in refused(centred, ROWS, batch_axis=0)
    intended = Gate(intended={"rows": "it compares them"})
    found = load(centred, ROWS, batch_axis=0, gate=intended)
    assert found.batch.max_rows == 0 and checks(found)["rows"].outcome == "declared"
    with pytest.raises(LoadError, match="leave batch_axis out"):
        load(centred, ROWS, batch_axis=0, gate=intended, options=Options(micro_batch=2))


def test_a_signature_tells() -> None:
    abilities = Abilities(train="it was exported for eval mode", notes=("Its batch is 2.",))
    found = built(
        lambda: nn.Linear(6, 2),
        {"input": spec("float32", ["n", 6])},
        abilities=abilities,
        source="pt2",
        digest="ab",
        revision=3,
    )
    assert found.limits == ["it was exported for eval mode", "Its batch is 2."]
    assert (found.memory, found.source, found.digest, found.id) == (4 * 14, "pt2", "ab", "1+3")
    assert found.gradient_seconds > 0
