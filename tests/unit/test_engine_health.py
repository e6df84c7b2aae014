"""The health of a call's numbers, held against what float64 makes of the same tensors."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.engine_jobs import Host, host_factory, host_function, make_job
from torch import nn

from pullback_server import spec
from pullback_server.engine import Engine, health
from pullback_server.engine.batches import BatchResult
from pullback_server.engine.health import Subject, examine, examine_rows
from pullback_server.engine.results import EngineResult
from pullback_server.faults import Fault
from pullback_server.hosting import GradientHealth, Options, Registration
from pullback_server.job import Batch, Health, Job

torch.set_num_threads(1)
F64 = torch.float64
ROWS = spec("float64", ["n", 5])

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
#: How far a norm in float32 may lie from the exact one.
TOLERANCE = 1e-5


def wide(tensor: torch.Tensor) -> torch.Tensor:
    dense = tensor.detach().to_dense()
    return dense.to(torch.complex128 if dense.is_complex() else F64)


def expected(
    outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], others: Sequence[torch.Tensor] = ()
) -> Health:
    """As written down: one element after the other."""
    found = [wide(g).reshape(-1) for g in gradients if g is not None]
    kept = [g for g in found if g.numel()]
    every = torch.cat([g.to(torch.complex128) for g in kept]) if kept else torch.zeros(0)
    largest = float(every.abs().max()) if kept else 0.0
    norm = largest * float((every / largest).abs().square().sum().sqrt()) if 0 < largest < math.inf else largest

    def bad(tensors: Sequence[torch.Tensor]) -> tuple[int, int]:
        values = [wide(tensor) for tensor in tensors]
        return sum(int(v.isnan().sum()) for v in values), sum(int(v.isinf().sum()) for v in values)

    g, o = bad([*found, *others]), bad(outputs)
    return Health(norm if kept else None, every.numel(), int((every == 0).sum()), *g, *o)


def check(actual: Health | None, wanted: Health, tolerance: float = TOLERANCE) -> None:
    assert actual is not None
    assert (actual.norm is None) == (wanted.norm is None)
    if actual.norm is not None and wanted.norm is not None:
        assert math.isnan(actual.norm) == math.isnan(wanted.norm)
        if not math.isnan(wanted.norm):
            assert actual.norm == pytest.approx(wanted.norm, rel=tolerance)
    for name in ("elements", "zeros", "gradient_nans", "gradient_infs", "output_nans", "output_infs"):
        assert getattr(actual, name) == getattr(wanted, name), name


def looked_at(outputs: Any = (), gradients: Any = (), others: Any = ()) -> Health | None:
    signs = examine(Subject(outputs, gradients, others))
    assert signs is not None
    return signs.read()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = [(10 * torch.randn(7, 5, dtype=torch.complex128)), torch.randn(3, dtype=torch.complex128)]
    gradients = [(g if dtype.is_complex else g.real).to(dtype) for g in made]
    gradients[0][0] = 0
    outputs = [torch.randn(4), torch.arange(3)]
    check(looked_at(outputs, [*gradients, None]), expected(outputs, gradients))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_squares_that_no_longer_fit(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for scale in (info.max / 4, info.tiny * 4):
        gradient = torch.tensor([0.5, -0.25, 0.0, 1.0], dtype=F64).mul(scale).to(dtype)
        check(looked_at(gradients=[gradient]), expected([], [gradient]))


numbers = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1e30, 1e-30]),
    st.floats(-9, 9, width=32),
)


@settings(deadline=None, max_examples=80)
@given(
    outputs=st.lists(st.lists(numbers, max_size=6), max_size=3),
    gradients=st.lists(st.one_of(st.none(), st.lists(numbers, max_size=6)), max_size=4),
    others=st.lists(st.lists(numbers, max_size=3), max_size=2),
    kinds=st.lists(st.sampled_from([torch.float32, torch.float64]), min_size=9, max_size=9),
)
def test_any_numbers(outputs: Any, gradients: Any, others: Any, kinds: list[torch.dtype]) -> None:
    def tensors(lists: Any, start: int) -> list[Any]:
        return [None if one is None else torch.tensor(one, dtype=kinds[start + i]) for i, one in enumerate(lists)]

    o, g, x = tensors(outputs, 0), tensors(gradients, 3), tensors(others, 7)
    check(looked_at(o, g, x), expected(o, g, x))


@pytest.mark.parametrize(
    "how", ["transposed", "expanded", "strided", "conjugated", "negated", "sparse", "empty", "large"]
)
def test_tensors_of_every_layout(how: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(6, 4).relu()
    gradient = {
        "transposed": lambda: x.T,
        "expanded": lambda: x[:, :1].expand(6, 50),
        "strided": lambda: x[::2, ::3],
        "conjugated": lambda: torch.randn(5, dtype=torch.complex64).conj(),
        "negated": lambda: torch.randn(5, dtype=torch.complex64).conj().imag,
        "sparse": lambda: torch.sparse_coo_tensor(
            torch.tensor([[0, 2, 2]]), torch.randn(3, 4), (9, 4), check_invariants=True
        ),
        "empty": lambda: torch.zeros(0, 3),
        "large": lambda: torch.randn(700_001).relu(),
    }[how]()
    check(looked_at([], [gradient, torch.ones(2)]), expected([], [gradient, torch.ones(2)]))


@settings(deadline=None, max_examples=50)
@given(
    data=st.data(),
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    absent=st.sets(st.integers(0, 4), max_size=3),
    axis=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64]),
    padding=st.integers(0, 2),
    rare=st.booleans(),
)
def test_members_of_a_batch_are_as_if_alone(
    data: Any, rows: list[int], absent: set[int], axis: int, dtype: torch.dtype, padding: int, rare: bool
) -> None:
    values = st.sampled_from([0.0, 1.0, -2.5, 3.0] + ([math.nan, math.inf, 1e-30, 3e38] if rare else []))
    total = sum(rows) + padding
    found: list[torch.Tensor | None] = [None]
    for shape in ([2, 3, 2], [1, 1, 1]):
        shape[axis] = total
        flat = data.draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)))
        found.append(torch.tensor(flat).reshape(shape).to(dtype))
    if axis == 0:
        found.append(torch.tensor(data.draw(st.lists(values, min_size=total, max_size=total))))
    starts = [sum(rows[:index]) for index in range(len(rows))]
    parts = [
        (start, count) for index, (start, count) in enumerate(zip(starts, rows, strict=True)) if index not in absent
    ]
    outputs = [torch.tensor(data.draw(st.lists(values, min_size=2, max_size=2))) for _ in parts]
    own = [[None if g is None else g.narrow(axis, *part) for g in found] for part in parts]
    signs = examine_rows(found, axis, parts, outputs, lambda index: Subject([outputs[index]], own[index]))
    assert len(signs) == len(parts)
    for index, one in enumerate(signs):
        assert one is not None
        check(one.read(), expected([outputs[index]], own[index]))


def test_what_cannot_be_looked_at_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_told", False)
    broken = torch.empty(3, device="meta")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            signs = examine(Subject([broken], [broken]))
            assert signs is None or signs.read() is None
        signs_of_rows = examine_rows([broken], 0, [(0, 1), (1, 2)], [], lambda _: Subject([]))
        assert [one and one.read() for one in signs_of_rows] == [None, None]
    assert len([record for record in caplog.records if "could not be looked at" in record.message]) == 1


# Jobs of every kind.


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)).double()


def of_rows(rows: int) -> dict[str, dict[str, Any]]:
    """What a job has besides its input of so many rows."""
    ones, tangents = torch.randn(rows, 2, dtype=F64), {"input": torch.randn(rows, 5, dtype=F64)}
    loss: dict[str, Any] = {"wrt": ["input"], "loss": "mse_loss", "targets": {"target": ones}}
    return {
        "evaluate": {},
        "vjp": {"wrt": ["input"], "cotangents": {"output": ones}},
        "vjp of a loss": loss,
        "vjp by parameters": loss | {"wrt": ["param:0.weight", "param:2.bias"]},
        "vjp of many": {"wrt": ["input"], "batched": True, "cotangents": {"output": torch.stack([ones, ones])}},
        "jvp": {"wrt": ["input"], "tangents": tangents},
        "hvp": loss | {"tangents": tangents},
        "jacobian": {"wrt": ["input"]},
        "hessian": loss,
    }


@pytest.mark.parametrize("what", list(of_rows(1)))
@pytest.mark.parametrize("micro", [None, 2])
def test_every_kind_of_job_tells_its_health_and_its_stages(what: str, micro: int | None) -> None:
    kind = what.partition(" ")[0]
    host = host_factory(network, batch_axis=0, inputs={"input": ROWS}, options=Options(micro_batch=micro))
    reply = host(kind, "f", {"input": torch.randn(4, 5, dtype=F64)}, **of_rows(4)[what])
    outcome = reply.raw.outcome
    gradients = list(reply.grads.values()) if kind in ("vjp", "hvp", "hessian") else []
    check(outcome.health, expected(list(reply.outputs.values()), gradients), 1e-12)
    assert outcome.timings["forward"] > 0
    assert (outcome.timings.get("backward", 0) > 0) == (kind != "evaluate")
    assert set(outcome.timings) <= {"copy_in", "forward", "backward"}


def test_norms_are_those_before_clipping() -> None:
    host = host_factory(network)
    given = {"input": torch.randn(4, 5, dtype=F64)}
    more: dict[str, Any] = {"wrt": ["input"], "cotangents": {"output": torch.ones(4, 2, dtype=F64)}}
    clipped = host("vjp", "f", given, max_norm=1e-3, **more).raw.outcome
    assert clipped.health == host("vjp", "f", given, **more).raw.outcome.health
    assert clipped.health is not None
    assert clipped.health.norm == pytest.approx(clipped.norms[0], rel=1e-12)


def logarithm(x: torch.Tensor) -> torch.Tensor:
    return torch.log(x)


@pytest.mark.parametrize("kind", ["vjp", "jvp", "jacobian"])
def test_what_is_not_finite_is_counted_where_it_is(kind: str) -> None:
    host = host_function(logarithm)
    x = torch.tensor([1.0, 0.0, -1.0, 2.0], dtype=F64)
    ones = torch.ones(4, dtype=F64)
    given = {"vjp": {"cotangents": {"output": ones}}, "jvp": {"tangents": {"x": ones}}, "jacobian": {}}
    more: dict[str, Any] = given[kind]
    found = host(kind, "f", {"x": x}, wrt=["x"], **more).raw.outcome.health
    assert found is not None
    # log 0 = -inf and log -1 = NaN; the slope at 0 is inf, and inf times 0 NaN in the Jacobian's other rows.
    assert (found.output_nans, found.output_infs, found.gradient_infs) == (1, 1, 1)
    assert found.gradient_nans == (3 if kind == "jacobian" else 0)
    assert found.norm == (math.inf if kind == "vjp" else None)


def test_outputs_that_are_not_sent_are_looked_at() -> None:
    host = host_function(logarithm)
    reply = host(
        "vjp", "f", {"x": torch.tensor([-1.0])}, wrt=["x"], cotangents={"output": torch.ones(1)}, return_outputs=False
    )
    assert reply.outputs == {}
    assert reply.raw.outcome.health is not None
    assert reply.raw.outcome.health.output_nans == 1


def test_unused_gradients_have_no_norm() -> None:
    host = host_function(lambda x, y: x * 2)
    one = torch.ones(2)
    reply = host("vjp", "f", {"x": one, "y": one}, wrt=["x", "y"], cotangents={"output": one}, allow_unused=True)
    check(reply.raw.outcome.health, expected([2 * one], [2 * one]))
    reply = host("vjp", "f", {"x": one, "y": one}, wrt=["y"], cotangents={"output": one}, allow_unused=True)
    check(reply.raw.outcome.health, expected([2 * one], []))


def test_embeddings_with_sparse_gradients() -> None:
    host = host_factory(lambda: nn.Embedding(9, 4, sparse=True).double())
    index = torch.tensor([1, 1, 5])
    reply = host("vjp", "f", {"input": index}, wrt=["param:weight"], cotangents={"output": torch.ones(3, 4, dtype=F64)})
    check(reply.raw.outcome.health, expected(list(reply.outputs.values()), list(reply.grads.values())), 1e-12)
    assert reply.raw.outcome.health is not None
    assert reply.raw.outcome.health.zeros == 28


class Odd(torch.Tensor):
    """A tensor whose own code must not be run for statistics."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(getattr(function, "__name__", ""))
        return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def test_the_code_of_another_kind_of_tensor_is_not_run() -> None:
    odd = torch.ones(3).as_subclass(Odd)
    Odd.seen.clear()
    signs = examine(Subject([odd], []))
    assert "norm" not in " ".join(Odd.seen)
    assert signs is not None
    assert signs.read() == Health()


def test_it_can_be_turned_off_for_a_model_and_for_a_server() -> None:
    off = Options(gradient_health=GradientHealth(enabled=False, vanishing_below=1.0))
    more: dict[str, Any] = {"wrt": ["x"], "cotangents": {"output": torch.ones(1)}}
    assert host_function(logarithm, options=off)("vjp", "f", {"x": torch.ones(1)}, **more).raw.outcome.health is None
    engine = Engine(torch.device("cpu"), gradient_health=False)
    signature = engine.load(Registration("f", logarithm, kind="function"))
    assert not signature.health.enabled
    assert engine.run(*make_job("vjp", "f", {"x": torch.ones(1)}, **more)).outcome.health is None


@pytest.mark.parametrize(
    "bad",
    [
        {"vanishing_below": 0},
        {"exploding_above": math.inf},
        {"vanishing_below": 2, "exploding_above": 1},
        {"vanishing_below": True},
    ],
)
def test_thresholds_that_cannot_be(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="gradient_health"):
        GradientHealth(**bad)


# Batches.


def batch(host: Host, jobs: list[tuple[Job, list[torch.Tensor]]]) -> BatchResult:
    counts = [len(tensors) for _, tensors in jobs]
    members = [job for job, _ in jobs]
    return host.engine.run_batch(Batch(members, counts, [math.inf] * len(jobs)), [tensors for _, tensors in jobs])


@pytest.mark.parametrize("what", ["evaluate", "vjp", "vjp of a loss", "jvp", "hvp"])
@pytest.mark.parametrize("bad", [False, True])
def test_merged_members_are_as_healthy_as_alone(what: str, bad: bool) -> None:
    host = host_factory(network, batch_axis=0, inputs={"input": ROWS})
    torch.manual_seed(5)
    jobs = []
    kind = what.partition(" ")[0]
    for rows in (1, 3, 2):
        x = torch.randn(rows, 5, dtype=F64)
        if bad and rows == 3:
            x[1, 2] = math.nan
        jobs.append(make_job(kind, "f", {"input": x}, **of_rows(rows)[what]))
    alone = [host.engine.run(job, [tensor.clone() for tensor in tensors]).outcome.health for job, tensors in jobs]
    found = batch(host, jobs)
    assert found.merged == 3, found.refused
    for member, lone in zip(found.members, alone, strict=True):
        assert isinstance(member, EngineResult)
        assert lone is not None
        check(member.outcome.health, lone, 1e-12)
    assert [one is not None and one.output_nans > 0 for one in alone] == [False, bad, False]
    assert found.timings["forward"] > 0
    assert (found.timings.get("backward", 0) > 0) == (kind != "evaluate")


def test_a_member_that_fails_costs_the_others_nothing() -> None:
    host = host_factory(network, batch_axis=0, inputs={"input": ROWS})
    # The second has a cotangent of two rows for its one.
    sizes = ((2, 2), (1, 2), (3, 3))
    jobs = [make_job("vjp", "f", {"input": torch.randn(n, 5, dtype=F64)}, **of_rows(v)["vjp"]) for n, v in sizes]
    alone = [host.engine.run(*jobs[index]).outcome.health for index in (0, 2)]
    found = batch(host, [(job, [t.clone() for t in tensors]) for job, tensors in jobs])
    assert isinstance(found.members[1], Fault)
    for index, lone in zip((0, 2), alone, strict=True):
        member = found.members[index]
        assert isinstance(member, EngineResult)
        assert lone is not None
        check(member.outcome.health, lone, 1e-12)


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_a_model_may_resize_what_it_returned() -> None:
    kept = torch.empty(0, dtype=F64)

    class IntoItsBuffer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            (x,) = ctx.saved_tensors
            with torch.no_grad():
                return torch.mul(2 * x, gradient, out=kept)

    host = host_function(lambda x: IntoItsBuffer.apply(x))
    for size in (3, 5, 70_000):
        x = torch.randn(size, dtype=F64)
        reply = host("vjp", "f", {"x": x}, wrt=["x"], cotangents={"output": torch.ones_like(x)})
        assert reply.raw.outcome.health is not None
        assert torch.equal(reply.grads["x"], 2 * x)  # type: ignore[arg-type]
