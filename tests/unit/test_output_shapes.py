"""Shapes of outputs, learned at load: what is claimed holds wherever it was not looked at, or nothing is claimed."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.unit import engine_jobs as jobs
from tests.unit import source_items as items
from torch import nn

from pullback_server import Gate, spec
from pullback_server.engine import Engine
from pullback_server.engine.shape_fit import common, fit
from pullback_server.engine.sources import registration_of
from pullback_server.fleet.seam import StartError
from pullback_server.fleet.signatures import by_name, check_equal, weakest
from pullback_server.hosting import Registration
from pullback_server.job import SpecRecord, Verdict

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message=".*torch.jit.*")
Tensor = torch.Tensor
F32, F64, I64, BOOL = "float32", "float64", "int64", "bool"
CPU = torch.device("cpu")
_NO_GATE = Gate(enabled=False)


# What a few points let one say.


@st.composite
def _dimension(draw: st.DrawFn) -> tuple[Callable[[Mapping[str, int]], int], int | str]:
    """A dimension as a polynomial of degree one in each of three extents; and what may be said of it."""
    chosen = draw(st.sampled_from(("constant", "extent", "affine", "product")))
    if chosen == "constant":
        value = draw(st.integers(0, 8))
        return lambda extents: value, value
    if chosen == "extent":
        name = draw(st.sampled_from("abc"))
        return lambda extents: extents[name], name
    if chosen == "affine":
        first, *factors = draw(st.tuples(*[st.integers(-3, 3)] * 4))
        right: int | str = ""
        if not any(factors):
            right = first
        elif first == 0 and sorted(factors) == [0, 0, 1]:
            right = "abc"[factors.index(1)]
        return lambda e: first + sum(f * e[n] for f, n in zip(factors, "abc", strict=True)), right
    powers = draw(st.tuples(*[st.integers(0, 1)] * 3).filter(lambda powers: sum(powers) > 1))
    return lambda e: math.prod(e[n] ** p for p, n in zip(powers, "abc", strict=True)), ""


@given(st.lists(_dimension(), max_size=4), st.permutations([2, 3, 5]))
def test_constants_and_extents_are_told_and_nothing_else(dimensions: Any, base: list[int]) -> None:
    start = dict(zip("abc", base, strict=True))
    points = [start, *({**start, name: value} for name in "abc" for value in (2, 3, 5)), {"a": 7, "b": 11, "c": 13}]
    found = fit([(extents, tuple(one(extents) for one, _ in dimensions)) for extents in points])
    assert found == tuple(right for _, right in dimensions)


@given(
    st.lists(
        st.tuples(st.fixed_dictionaries(dict.fromkeys("ab", st.integers(0, 3))), st.lists(st.integers(0, 3))),
        max_size=6,
    )
)
def test_whatever_is_told_holds_at_every_point(points: Any) -> None:
    points = [(extents, tuple(shape)) for extents, shape in points]
    found = fit(points)
    assert (found is None) == (len({len(shape) for _, shape in points}) != 1)
    for extents, shape in points:
        for axis, said in enumerate(found or ()):
            assert said == "" or shape[axis] == (extents[said] if isinstance(said, str) else said)


def test_what_two_claims_both_say() -> None:
    assert common(("n", 3, "", 2), ("n", 4, 5, 2)) == ("n", "", "", 2)
    assert common(("n",), ("n", 1)) is None
    assert common(None, ()) is None
    assert fit([({"n": 2, "m": 2}, (2,))]) == ("",), "either, or a constant"
    assert fit([({}, (3, 0))]) == (3, 0)


# Of models.


def told(target: Any, **more: Any) -> list[tuple[int | str, ...] | None]:
    host = jobs.host_factory(target, **more) if more.pop("factory", False) else jobs.host_function(target, **more)
    (signature,) = host.engine.signatures()
    return [output.shape for output in signature.outputs]


MATRIX = {"x": spec(F64, ["rows", "columns"])}


def _two(x: Tensor, y: Tensor) -> Tensor:
    return x[:, None] * y


def _several(x: Tensor) -> dict[str, Any]:
    return {"same": x * 1, "parts": (x.sum(0), x.sum()), "stacked": torch.stack([x, x]), "more": torch.cat([x, x])}


def _flag(x: Tensor, upwards: Tensor) -> Tensor:
    return x.sum(0) if upwards else x


def _numpy(x: Tensor) -> Tensor:
    # Nothing of torch's sees this look.
    return x * 1 if x.detach().numpy().max() > 0.5 else x[:1] * 1


def _tolist(x: Tensor) -> Tensor:
    return x[: sum(value > 0 for value in x.flatten().tolist())] * 1


def _packed(x: Tensor, lengths: Tensor) -> Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0]


def _even(x: Tensor) -> Tensor:
    if len(x) % 2:
        raise ValueError("an even number of rows is needed")
    return x.reshape(2, -1).sum(0), x * 1  # type: ignore[return-value]


def _square(x: Tensor) -> Tensor:
    if x.shape[0] != x.shape[1]:
        raise ValueError("not square")
    return x.T * 1


def _optional(x: Tensor, y: Tensor | None = None) -> Tensor:
    return x * 1 if y is None else x[:, None] * y


def _either(x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> Tensor:
    return x.sum(0) if (y is None) != (z is None) else x * 1


def _more_outputs(x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
    return {"x": x * 1} if y is None else {"x": x * 1, "y": y * 1}


MODELS: dict[str, tuple[Any, dict[str, Any], list[tuple[int | str, ...] | None]]] = {
    "elementwise": (lambda x: x.sin(), MATRIX, [("rows", "columns")]),
    "transposed": (lambda x: x.T * 1, MATRIX, [("columns", "rows")]),
    "a sum": (lambda x: x.sum(), MATRIX, [()]),
    "a sum over an axis": (lambda x: x.sum(1), MATRIX, [("rows",)]),
    "a constant": (lambda x: x.new_ones(4) * x.sum(), MATRIX, [(4,)]),
    "an empty constant": (lambda x: x.new_ones(0, 3) * x.sum(), MATRIX, [(0, 3)]),
    "all pairs": (lambda x: x @ x.T, MATRIX, [("rows", "rows")]),
    "one extent twice": (_two, {"x": spec(F64, ["n"]), "y": spec(F64, ["n", "n"])}, [("n", "n")]),
    "two inputs": (_two, {"x": spec(F64, ["n"]), "y": spec(F64, ["m"])}, [("n", "m")]),
    "several outputs": (
        _several, MATRIX,
        [("rows", "columns"), ("columns",), (), (2, "rows", "columns"), ("", "columns")],
    ),
    "one more": (lambda x: torch.cat([x, x[:1]]), MATRIX, [("", "columns")]),
    "flattened": (lambda x: x.flatten() * 1, MATRIX, [("",)]),
    "fixed extents": (lambda x: x @ x.new_ones(5, 2), {"x": spec(F64, [3, 5])}, [(3, 2)]),
    "no axes": (lambda x: x * 2, {"x": spec(F64, [])}, [()]),
    # What small extents alone would not show.
    "cut at 8": (lambda x: x[:8] * 1, MATRIX, [("", "columns")]),
    "cut at 512": (lambda x: x[:512] * 1, {"x": spec(F64, ["n"])}, [("",)]),
    "strides": (lambda x: x[::16] * 1, {"x": spec(F64, ["n", 3])}, [("", 3)]),
    "blocks of 100": (lambda x: x.new_ones(len(x) // 100 + 1) * x.sum(), {"x": spec(F64, ["n"])}, [("",)]),
    "squeezed": (lambda x: x.squeeze() * 1, MATRIX, [None]),
    "broadcast": (lambda x: x * x.new_ones(1, 4), {"x": spec(F64, ["rows", "any"])}, [None]),
    # What depends on values.
    "nonzero": (lambda x: x[x != 0] * 1, MATRIX, [None]),
    "nonzero, but summed": (lambda x: x[x != 0].sum(), MATRIX, [()]),
    "one of many": (lambda x: x[x == x.max()].squeeze() * 1, MATRIX, [None]),
    "unique": (lambda x: torch.unique(x.detach()) * x.sum(), MATRIX, [None]),
    "packed": (_packed, {"x": spec(F64, ["n", "t", 3]), "lengths": spec(I64, ["n"], low=1, high=2)}, [None]),
    "a branch": (lambda x: x * 1 if x.sum() > -1e9 else x.sum(), MATRIX, [None]),
    "in numpy": (_numpy, MATRIX, [("", "columns")]),
    "in a list": (_tolist, MATRIX, [("", "columns")]),
    "a flag": (_flag, {**MATRIX, "upwards": spec(BOOL, [])}, [None]),
    "a length": (lambda x, k: x[: int(k)] * 1, {**MATRIX, "k": spec(I64, [], low=1, high=9)}, [None]),
    # Indices are values that shapes do not depend on.
    "an index": (lambda x, at: x[at], {"x": spec(F64, [4]), "at": spec(I64, ["n"], low=0, high=3)}, [("n",)]),
    # Where some extents do not suit the model.
    "even": (_even, MATRIX, [("",), ("rows", "columns")]),
    "square": (_square, MATRIX, [None]),
    "too long": (lambda x: x * torch.arange(40.0)[torch.arange(len(x))], {"x": spec(F64, ["n"])}, [("n",)]),
    "at most 3": (lambda x: x * torch.arange(3.0)[torch.arange(len(x))], {"x": spec(F64, ["n"])}, [None]),
    # Inputs that may be left out.
    "optional": (_optional, {"x": spec(F64, ["n"]), "y": spec(F64, ["m"])}, [None]),
    "optional, and undeclared": (_optional, {"x": spec(F64, ["n"])}, [None]),
    "one of two": (_either, {**MATRIX, "y": spec(F64, []), "z": spec(F64, [])}, [None]),
    "undeclared": (lambda x: x * 1, {}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_of_models(name: str) -> None:
    target, inputs, expected = MODELS[name]
    assert told(target, inputs=inputs, gate=_NO_GATE) == expected


def test_what_is_told_holds_for_other_extents() -> None:
    """At every mix of a few extents that were not looked at."""
    for name, (target, inputs, expected) in MODELS.items():
        if all(shape is None for shape in expected) or name in ("in numpy", "in a list"):
            continue
        host = jobs.host_function(target, inputs=inputs, gate=_NO_GATE)
        (signature,) = host.engine.signatures()
        names = sorted({e for record in signature.inputs for e in record.shape or () if isinstance(e, str)})
        for values in itertools.product((1, 6, 19), repeat=len(names)):
            extents = dict(zip(names, values, strict=True))
            if name == "even" and extents["rows"] % 2:
                continue
            given = {}
            for record in signature.inputs:
                shape = [extents[e] if isinstance(e, str) else e for e in record.shape or ()]
                given[record.name] = torch.zeros(shape, dtype=torch.int64 if record.dtype == 9 else torch.float64)
            found = host("evaluate", "f", given).outputs
            for output in signature.outputs:
                came = found[output.name].shape
                assert output.shape is not None and len(came) == len(output.shape), name
                for extent, size in zip(output.shape, came, strict=True):
                    assert extent == "" or size == (extents[extent] if isinstance(extent, str) else extent), name


def test_other_names_of_outputs_are_as_before() -> None:
    host = jobs.host_function(_more_outputs, inputs={"x": spec(F64, ["n"]), "y": spec(F64, ["m"])})
    (signature,) = host.engine.signatures()
    assert [(output.name, output.shape) for output in signature.outputs] == [("x", None), ("y", None)]


def test_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTM(3, 4, batch_first=True)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Any:
            found, (h, _) = self.inner(x)
            return {"every": found, "last": self.norm(found[:, -1]), "state": h}

    given = {"x": spec(F32, ["batch", "time", 3])}
    assert told(Net, factory=True, inputs=given, batch_axis=0) == [
        ("batch", "time", 4), ("batch", 4), (1, "batch", 4),
    ]  # fmt: skip


def test_a_dtype_that_follows_the_input_is_any() -> None:
    given = {"x": spec(None, ["n"])}
    host = jobs.host_function(lambda x: (x * 1, torch.ones(2), x.argsort()), inputs=given)
    (signature,) = host.engine.signatures()
    assert [(output.dtype, output.shape) for output in signature.outputs] == [(0, ("n",)), (12, (2,)), (9, ("n",))]
    weight = torch.ones(3)
    host = jobs.host_function(lambda x: x @ weight, inputs={"x": spec(None, ["n", 3])})
    (signature,) = host.engine.signatures()
    assert [output.dtype for output in signature.outputs] == [12], "the others do not suit it"


def test_a_result_of_another_shape_is_answered() -> None:
    host = jobs.host_function(lambda x: x[:5000] * 1, inputs={"x": spec(F64, ["n"])})
    (signature,) = host.engine.signatures()
    # So far nobody looks; it is what samples showed.
    assert [output.shape for output in signature.outputs] == [("n",)]
    reply = host("vjp", "f", {"x": torch.ones(6000, dtype=torch.float64)}, wrt=["x"],
                 cotangents={"output": torch.ones(5000, dtype=torch.float64)})  # fmt: skip
    assert reply.outputs["output"].shape == (5000,)
    gradient = reply.grads["x"]
    assert gradient is not None and gradient.sum() == 5000


def test_state_is_left_as_it_was() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x.mul_(2) + self.calls

    host = jobs.host_factory(Counting, inputs={"x": spec(F64, ["n"])})
    assert [one.shape for signature in host.engine.signatures() for one in signature.outputs] == [("n",)]
    assert host("evaluate", "f", {"x": torch.ones(3, dtype=torch.float64)}).outputs["output"].tolist() == [3, 3, 3]


# Of other sources.


def test_exported_programs(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=2, max=100)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()
    program = torch.export.export(net, (items.real(4, 3),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    item = items.make_item(tmp_path, {"kind": "pt2"})
    signature = Engine(CPU).load(registration_of(item, {}, CPU))
    (given,), (output,) = signature.inputs, signature.outputs
    assert given.shape is not None and isinstance(given.shape[0], str)
    assert output.shape == (given.shape[0], 4)


def test_torchscript(tmp_path: Path) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.t() * 2, x.sum(0)

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if bool(x.sum() > -1e9) else x[:1]

    for kind, expected in ((Net, [("columns", "rows"), ("columns",)]), (Looks, [None])):
        directory = tmp_path / kind.__name__
        directory.mkdir()
        torch.jit.script(kind()).save(str(directory / "model.pt"))  # type: ignore[no-untyped-call]
        shape = {"x": {"dtype": F64, "shape": ["rows", "columns"]}}
        item = items.make_item(directory, {"kind": "torchscript"}, inputs=shape)
        signature = Engine(CPU).load(registration_of(item, {}, CPU))
        assert [output.shape for output in signature.outputs] == expected


# Carried on.


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


@pytest.mark.parametrize("target", [lambda x: x.T * 1, lambda x: _Square.apply(x).T])
def test_a_verdict_carries_them(target: Any) -> None:
    registration = Registration("f", target, kind="function", inputs=MATRIX)
    first, second = Engine(CPU), Engine(CPU)
    signature = first.load(registration)
    verdict: Verdict = first.verdict("f", "1")
    assert second.load(registration, verdict).outputs == signature.outputs
    assert [output.shape for output in signature.outputs] == [("columns", "rows")]


def test_workers_that_learned_less_hold_the_same_model() -> None:
    registration = Registration("f", lambda x: (x * 1, x.sum()), kind="function", inputs=MATRIX)
    knows = Engine(CPU).load(registration)
    less = Engine(CPU).load(registration)
    less.outputs = [SpecRecord("output_0", 13), knows.outputs[1]]
    check_equal("cpu-1", by_name([less]), by_name([knows]))
    for one, other in ((knows, less), (less, knows)):
        merged = weakest(by_name([one]), by_name([other]))["f"]["1"]
        assert merged.outputs == [SpecRecord("output_0", 13), SpecRecord("output_1", 13, ())]
    other = Engine(CPU).load(registration)
    other.outputs = [SpecRecord("another", 13), knows.outputs[1]]
    with pytest.raises(StartError, match="not what the others hold"):
        check_equal("cpu-1", by_name([other]), by_name([knows]))


def test_a_free_extent_has_a_name() -> None:
    with pytest.raises(ValueError, match="name"):
        spec(F64, ["n", ""])
