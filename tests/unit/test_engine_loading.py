"""Loading: what a registration may be, and the sentence when it cannot be."""

from __future__ import annotations

import importlib.util
import sys
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pullback_server import spec
from pullback_server.engine import Engine
from pullback_server.hosting import Registration
from pullback_server.hosting.loading import LoadError
from pullback_wire import Reason

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("engine_jobs", HERE / "engine_jobs.py")
assert _spec is not None and _spec.loader is not None
jobs = sys.modules.setdefault("engine_jobs", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(jobs)

torch.set_num_threads(1)
Tensor = torch.Tensor


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def load(target: Any, **more: Any) -> Any:
    host = jobs.Host(Registration("f", target, **more))
    return host, host.engine.signatures()[0]


def test_a_signature() -> None:
    host, found = load(
        lambda: nn.Sequential(nn.Linear(3, 2)),
        inputs={"input": spec("float32", ["batch", 3], low=-1, high=1)},
        version="4",
        description="text",
        batch_axis=0,
    )
    assert (found.name, found.version, found.description, found.batch_axis) == ("f", "4", "text", 0)
    (record,) = found.inputs
    assert (record.name, record.shape, record.optional, record.minimum, record.maximum) == (
        "input",
        ("batch", 3),
        False,
        -1,
        1,
    )
    assert record.dtype == jobs.WIRE[torch.float32]
    assert [(p.name, p.shape) for p in found.parameters] == [("0.weight", (2, 3)), ("0.bias", (2,))]
    assert found.parameter_count == 8 and found.device == "cpu"
    assert [(o.name, o.dtype) for o in found.outputs] == [("output", jobs.WIRE[torch.float32])]
    assert "mse_loss" in {loss.name for loss in found.losses}
    assert found == host.engine.signatures()[0]


def test_versions() -> None:
    host = jobs.Host(Registration("f", lambda x: x, version="9"), Registration("f", lambda x: x * 2, version="10"))
    x = real(2)
    assert torch.equal(host("evaluate", "f", {"x": x}, version="").outputs["output"], 2 * x)
    assert torch.equal(host("evaluate", "f", {"x": x}, version="9").outputs["output"], x)


class Module(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.parametrize(
    "target", [Module, Module(), lambda: Module(), lambda x: x * 2], ids=["class", "instance", "factory", "function"]
)
def test_what_may_be_registered(target: Any) -> None:
    host, _ = load(target)
    x = real(2)
    assert torch.equal(host("evaluate", "f", {"x": x}).outputs["output"], 2 * x)


def positional(x: Tensor, y: Tensor, /, z: Tensor | None = None) -> Tensor:
    return x + 10 * y + (0 if z is None else 100 * z)


def keyword(x: Tensor, *, y: Tensor) -> Tensor:
    return x + 10 * y


def spread(*xs: Tensor) -> Tensor:
    return xs[0] + 10 * xs[1]


def anything(x: Tensor, **more: Tensor) -> Tensor:
    return x + 10 * more["y"]


def options(x: Tensor, scale: float = 1.0, y: Tensor | None = None, flag: bool = False) -> Tensor:
    return x * scale + (0 if y is None else 10 * y)


def before(first: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    return (0 if first is None else first) + 10 * y  # type: ignore[operator]


DECLARED = {"x": spec(), "y": spec()}


@pytest.mark.parametrize(
    ("function", "inputs", "names"),
    [
        (positional, {}, ["x", "y", "z"]),
        (keyword, {}, ["x", "y"]),
        (spread, DECLARED, ["x", "y"]),
        (anything, DECLARED, ["x", "y"]),
        (options, {}, ["x", "y"]),
    ],
)
def test_arguments_of_every_kind(function: Any, inputs: Any, names: list[str]) -> None:
    host, found = load(function, kind="function", inputs=inputs)
    assert [record.name for record in found.inputs] == names
    x, y = real(2), real(2)
    for given in ({"x": x, "y": y}, {"y": y, "x": x}):
        reply = host("vjp", "f", given, wrt=["y", "x"], cotangents={"output": torch.ones_like(x)})
        torch.testing.assert_close(reply.outputs["output"], x + 10 * y)
        assert reply.grads["y"].tolist() == [10, 10] and reply.grads["x"].tolist() == [1, 1]


def test_a_gap_before_an_optional_input() -> None:
    host, _ = load(before, kind="function")
    y = real(2)
    torch.testing.assert_close(host("evaluate", "f", {"y": y}).outputs["output"], 10 * y)


def test_a_gap_that_cannot_be_expressed() -> None:
    def function(x: Tensor | None = None, y: Tensor | None = None, /) -> Tensor:
        return y  # type: ignore[return-value]

    host, _ = load(function, kind="function")
    with jobs.refused(Reason.BAD_NAME, "'x' must be given"):
        host("evaluate", "f", {"y": real(2)})


def test_hooks_before_a_forward_get_the_inputs_by_position() -> None:
    def factory() -> nn.Module:
        module = Module()
        module.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        return module

    host, _ = load(factory)
    x = real(2)
    torch.testing.assert_close(host("evaluate", "f", {"x": x}).outputs["output"], 2 * (x + 1))


Named = namedtuple("Named", ["first", "second"])


@dataclass
class Data:
    first: Any
    second: Any


@pytest.mark.parametrize(
    ("make", "declared", "names"),
    [
        (lambda x: x, None, ["output"]),
        (lambda x: x, ("y",), ["y"]),
        (lambda x: (x, x), None, ["output_0", "output_1"]),
        (lambda x: [x, None, x], None, ["output_0", "output_2"]),
        (lambda x: (x, x), ("a", "b"), ["a", "b"]),
        (lambda x: (x, (x, {"k": x})), None, ["output_0", "output_1.0", "output_1.1.k"]),
        (lambda x: {"a": x, 3: (x, x)}, None, ["a", "3.0", "3.1"]),
        (lambda x: Named(x, (x,)), None, ["first", "second.0"]),
        (lambda x: Data(x, None), None, ["first"]),
        (lambda x: OrderedDict(b=x, a=x), None, ["b", "a"]),
    ],
)
def test_names_of_outputs(make: Any, declared: Any, names: list[str]) -> None:
    host, _ = load(make, kind="function", outputs=declared)
    assert list(host("evaluate", "f", {"x": real(2)}).outputs) == names


@pytest.mark.parametrize(
    ("make", "declared", "part"),
    [
        (lambda x: (x, x), ("a",), "2 outputs, 1 are declared"),
        (lambda x: x, ("a", "b"), "one tensor, 2 outputs"),
        (lambda x: {"a.b": x, "a": {"b": x}}, None, "two outputs called 'a.b'"),
        (lambda x: None, None, "no tensor but None"),
        (lambda x: (), None, "an empty tuple"),
        (lambda x: {"a": "text"}, None, "a str as 'a'"),
    ],
)
def test_results_that_cannot_be_named(make: Any, declared: Any, part: str) -> None:
    host, _ = load(make, kind="function", outputs=declared)
    with jobs.refused(Reason.MODEL_ERROR, part):
        host("evaluate", "f", {"x": real(2)})


def test_a_sparse_gradient_becomes_dense() -> None:
    host, _ = load(lambda: nn.Embedding(5, 2, sparse=True).double())
    ids, v = torch.tensor([1, 1, 4]), real(3, 2)
    expected = torch.zeros(5, 2, dtype=torch.float64).index_add(0, ids, v)
    for more in ({}, {"max_norm": 1e9}):
        reply = host("vjp", "f", {"input": ids}, wrt=["param:weight"], cotangents={"output": v}, **more)
        torch.testing.assert_close(reply.grads["param:weight"], expected)


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def fails() -> nn.Module:
    raise FileNotFoundError("weights.bin")


def leaves() -> nn.Module:
    raise SystemExit(2)


@pytest.mark.parametrize(
    ("target", "more", "parts"),
    [
        (fails, {}, ["its factory failed", "FileNotFoundError: weights.bin"]),
        (leaves, {}, ["SystemExit"]),
        (lambda: 3, {}, ["returned a int", "nn.Module"]),
        (lambda: lambda x: x, {}, ["function"]),
        (Lazy, {}, ["'layer.weight'", "not initialised"]),
        (lambda *xs: xs[0], {"kind": "function"}, ["*args", "declared"]),
        (lambda x: x, {"inputs": {"y": spec()}}, ["'y' is declared", "'x'"]),
        (options, {"kind": "factory"}, ["its factory failed", "TypeError"]),
    ],
)
def test_what_cannot_be_loaded(target: Any, more: Any, parts: list[str]) -> None:
    with pytest.raises(LoadError) as caught:
        load(target, **more)
    assert "model 'f'" in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_an_argument_that_is_no_tensor() -> None:
    def function(x: Tensor, count: int) -> Tensor:
        return x * count

    with pytest.raises(LoadError, match="'count'"):
        load(function, kind="function")


def test_specs_that_fit_no_input_say_so_and_do_not_stop_loading() -> None:
    def function(x: Tensor) -> Tensor:
        raise ValueError("never fits")

    _, found = load(function, inputs={"x": spec("float32", ["n"])})
    assert found.orders.reverse == 1 and "never fits" in found.orders.evidence


def test_a_factory_that_draws_its_weights_gives_every_worker_the_same_ones() -> None:
    def factory() -> nn.Module:
        return nn.Linear(3, 2)

    registration = Registration("random", factory, inputs={"input": spec("float32", [3])})
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    engines = [Engine(torch.device("cpu")) for _ in range(2)]
    answers = []
    for engine in engines:
        engine.load(registration)
        torch.rand(3)
        answers.append(engine._models["random"]["1"].parameters["weight"].detach().clone())
    assert torch.equal(*answers)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), before)
