"""Batches: what members are computed together comes to what each comes to alone, whatever the others are."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from pullback_server import Gate, spec
from pullback_server.engine import merged
from pullback_server.engine.batches import BatchResult
from pullback_server.engine.results import EngineResult
from pullback_server.faults import Fault
from pullback_server.hosting import Registration
from pullback_server.hosting.loading import load_source
from pullback_server.hosting.options import Batching, Options
from pullback_server.job import Batch
from pullback_wire import Reason

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("engine_jobs", HERE / "engine_jobs.py")
assert _spec is not None and _spec.loader is not None
jobs = sys.modules.setdefault("engine_jobs", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(jobs)

torch.set_num_threads(1)
Tensor = torch.Tensor
Made = tuple[Any, list[Tensor]]

ZOO = {registration.name: registration for registration in load_source(str(HERE.parent / "zoo.py"))}
ROWS = [(1, 1), (3, 1, 4), (2, 5, 1, 1, 7)]


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class TwoHeads(nn.Module):
    """Two outputs, one of them complex; a mask that may be given."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        found = torch.tanh(self.body(x)) * scale[:, None]
        if mask is not None:
            found = found * mask
        head = self.head(found)
        return {"head": head, "wave": torch.exp(1j * head[:, :1]), "rank": head.argmax(1)}


def two_heads(**options: Any) -> Registration:
    return Registration(
        "heads",
        lambda: TwoHeads().double(),
        inputs={
            "x": spec("float64", ["n", 3]),
            "scale": spec("float64", ["n"]),
            "mask": spec("bool", ["n", 4]),
        },
        batch_axis=0,
        options=Options(**options),
    )


@pytest.fixture(scope="module")
def host() -> Any:
    return jobs.Host(ZOO["small"], ZOO["tied"], ZOO["conv"], ZOO["transformer"], ZOO["straight_through"], two_heads())


def run(host: Any, made: Sequence[Made], shadow: int = -1, merges: int | None = None) -> BatchResult:
    """A batch as a worker would run it. merges: how many members must have been computed in one; None: all."""
    batch = Batch([job for job, _ in made], [len(t) for _, t in made], [0.0] * len(made), shadow)
    before = [[t.clone() for t in tensors] for _, tensors in made]
    found = host.engine.run_batch(batch, [tensors for _, tensors in made])
    for (_, tensors), originals in zip(made, before, strict=True):
        for tensor, original in zip(tensors, originals, strict=True):
            assert torch.equal(tensor, original) or bool(tensor.isnan().any())
    assert found.merged == (len(made) if merges is None else merges), (found.merged, found.refused)
    return found


def alone(host: Any, made: Made) -> EngineResult | Fault:
    job, tensors = made
    try:
        return host.engine.run(msgspec.structs.replace(job, copy_inputs=True), [t.clone() for t in tensors])
    except Fault as fault:
        return fault


def agree(a: EngineResult | Fault, b: EngineResult | Fault, tol: float = 1e-11) -> None:
    if isinstance(a, Fault) or isinstance(b, Fault):
        assert isinstance(a, Fault) and isinstance(b, Fault), (a, b)
        assert (a.reason, a.message, a.field) == (b.reason, b.message, b.field)
        return
    first, second = jobs.unpack(a), jobs.unpack(b)
    assert first.norms == pytest.approx(second.norms)
    for name in ("outputs", "grads", "hvps", "cotangent_derivatives"):
        left, right = getattr(first, name), getattr(second, name)
        assert list(left) == list(right)
        for key, expected in right.items():
            if expected is None:
                assert left[key] is None
            else:
                assert left[key].dtype == expected.dtype
                torch.testing.assert_close(left[key], expected, rtol=tol, atol=tol, equal_nan=True)


def check(host: Any, made: Sequence[Made], **more: Any) -> BatchResult:
    found = run(host, made, **more)
    for result, one in zip(found.members, made, strict=True):
        agree(result, alone(host, one))
    return found


def small(kind: str, rows: int, model: str = "small", **more: Any) -> Made:
    x = real(rows, 3)
    name = "x" if model == "tied" else "input"
    out = 3 if model == "tied" else 2
    given: dict[str, Any] = {} if kind == "evaluate" else {"wrt": [name]}
    if kind in ("vjp", "hvp") and "loss" not in more:
        given["cotangents"] = {"output": real(rows, out)}
    if kind in ("jvp", "hvp"):
        given["tangents"] = {name: real(rows, 3)}
    return jobs.make_job(kind, model, {name: x}, **(given | more))


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("kind", ["evaluate", "vjp", "jvp", "hvp"])
@pytest.mark.parametrize("model", ["small", "tied"])
def test_every_kind(host: Any, model: str, kind: str, rows: tuple[int, ...]) -> None:
    check(host, [small(kind, n, model) for n in rows])


@pytest.mark.parametrize("kind", ["evaluate", "vjp", "jvp", "hvp"])
def test_other_modules(host: Any, kind: str) -> None:
    for model, name, shape, out in (("conv", "image", (2, 4, 5), (4,)), ("transformer", "src", (5, 4), (5, 4))):
        made = []
        for rows in (1, 3, 2):
            given: dict[str, Any] = {} if kind == "evaluate" else {"wrt": [name]}
            if kind in ("vjp", "hvp"):
                given["cotangents"] = {"output": real(rows, *out)}
            if kind in ("jvp", "hvp"):
                given["tangents"] = {name: real(rows, *shape)}
            made.append(jobs.make_job(kind, model, {name: real(rows, *shape)}, **given))
        check(host, made)


@pytest.mark.parametrize("kind", ["evaluate", "vjp", "jvp", "hvp"])
@pytest.mark.parametrize("masked", [False, True])
def test_several_inputs_and_outputs(host: Any, kind: str, masked: bool) -> None:
    made = []
    for rows in (2, 1, 4):
        inputs = {"x": real(rows, 3), "scale": real(rows)} | ({"mask": torch.rand(rows, 4) > 0.5} if masked else {})
        given: dict[str, Any] = {} if kind == "evaluate" else {"wrt": ["scale", "x"]}
        if kind in ("vjp", "hvp"):
            given["cotangents"] = {"wave": torch.randn(rows, 1, dtype=torch.complex128), "head": real(rows, 2)}
        if kind == "jvp":
            given["tangents"] = {"x": real(rows, 3), "scale": real(rows)}
        if kind == "hvp":
            given["tangents"] = {"x": real(rows, 3)}
        made.append(jobs.make_job(kind, "heads", inputs, **given))
    check(host, made)


LOSSES: list[tuple[str, dict[str, Any], Any]] = [
    ("cross_entropy", {}, lambda n: {"target": torch.randint(0, 2, (n,))}),
    ("cross_entropy", {"ignore_index": 1}, lambda n: {"target": torch.randint(0, 2, (n,))}),
    ("cross_entropy", {"label_smoothing": 0.1}, lambda n: {"target": real(n, 2).softmax(1)}),
    ("cross_entropy", {}, lambda n: {"target": torch.randint(0, 2, (n,)), "weight": real(2).abs()}),
    ("nll_loss", {}, lambda n: {"target": torch.randint(0, 2, (n,)), "weight": real(2).abs()}),
    ("mse_loss", {}, lambda n: {"target": real(n, 2)}),
    ("mse_loss", {}, lambda n: {"target": real(n, 2), "weight": real(n, 2).abs()}),
    ("huber_loss", {"delta": 0.5}, lambda n: {"target": real(n, 2)}),
    ("kl_div", {"log_target": True}, lambda n: {"target": real(n, 2)}),
    ("binary_cross_entropy_with_logits", {}, lambda n: {"target": torch.rand(n, 2).double()}),
    ("multi_margin_loss", {}, lambda n: {"target": torch.randint(0, 2, (n,))}),
    ("gaussian_nll_loss", {}, lambda n: {"target": real(n, 2), "var": real(n, 2).abs() + 0.1}),
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss[0]}{loss[1]}")
@pytest.mark.parametrize("kind", ["evaluate", "vjp", "jvp", "hvp"])
def test_losses(host: Any, kind: str, loss: tuple[str, dict[str, Any], Any], reduction: str) -> None:
    name, options, targets = loss
    for rows in ROWS[1:]:
        made = []
        for n in rows:
            one = targets(n)
            shape = (n,) if "target" in one and one["target"].ndim == 1 else (n, 2)
            if name == "cross_entropy":
                shape = (n,)
            more: dict[str, Any] = {"loss": name, "options": options | {"reduction": reduction}, "targets": one}
            if reduction == "none" and kind in ("vjp", "hvp"):
                more["cotangents"] = {"loss": real(*shape)}
            made.append(small(kind, n, **more))
        if name == "multi_margin_loss" and kind in ("jvp", "hvp"):
            # It has neither, which each is told.
            check(host, made, merges=0)
            continue
        found = check(host, made)
        assert all(isinstance(member, EngineResult) for member in found.members)


def test_batchmean_and_bindings(host: Any) -> None:
    made = []
    for n in (2, 1, 3):
        more = {"loss": "kl_div", "options": {"reduction": "batchmean"}, "targets": {"target": real(n, 2).softmax(1)}}
        made.append(small("vjp", n, **more))
    check(host, made)
    made = []
    for n in (2, 1, 3):
        inputs = {"x": real(n, 3), "scale": real(n)}
        more = {"loss": "mse_loss", "bindings": {"target": "head"}, "targets": {"input": real(n, 2)}}
        made.append(jobs.make_job("vjp", "heads", inputs, wrt=["x"], **more))
    check(host, made)


def test_what_members_may_differ_in(host: Any) -> None:
    f32 = jobs.WIRE[torch.float32]
    made = [
        small("vjp", 2, max_norm=0.1),
        small("vjp", 3, return_outputs=False),
        small("vjp", 1, result_dtype=f32),
        small("vjp", 4, max_norm=5.0, result_dtype=f32, return_outputs=False),
        small("vjp", 2, allow_unused=True),
    ]
    found = check(host, made)
    assert found.members[2].tensors[0].dtype == torch.float32  # type: ignore[union-attr]


def test_not_all_cotangent_derivatives(host: Any) -> None:
    check(host, [small("hvp", n, return_cotangent_derivatives=False) for n in (1, 2)])


# Faults.


def test_a_fault_is_its_own(host: Any) -> None:
    good = [small("vjp", 2), small("vjp", 3)]
    bad = [
        small("vjp", 2, cotangents={"output": real(3, 2)}),
        small("vjp", 3, cotangents={"output": real(3, 2).float()}),
        small("vjp", 2, cotangents={"outputs": real(2, 2)}),
        small("vjp", 2, max_result_bytes=8),
        small("vjp", 2, max_norm=-1.0),
        small("vjp", 2, wrt=["inputs"]),
    ]
    for one in bad:
        found = check(host, [good[0], one, good[1]])
        assert isinstance(found.members[1], Fault) and not found.refused
    check(host, [good[0], *bad, good[1]])
    # Everybody's cotangents are missing: no member has a result, and nothing stands against merging.
    found = check(host, [small("vjp", n, cotangents={}) for n in (2, 3)])
    assert not found.refused and all(isinstance(member, Fault) for member in found.members)
    check(host, good)


def test_a_bad_class_index_is_its_own(host: Any) -> None:
    def one(n: int, *classes: int) -> Made:
        return small("vjp", n, loss="cross_entropy", targets={"target": torch.tensor(classes)})

    found = check(host, [one(2, 0, 1), one(3, 0, 2, 1), one(1, 1), one(2, 0, 1, 1)])
    assert [isinstance(member, Fault) for member in found.members] == [False, True, False, True]
    assert found.members[1].reason is Reason.VALUE_OUT_OF_RANGE  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["jvp", "hvp"])
def test_a_bad_tangent_is_its_own(host: Any, kind: str) -> None:
    found = check(host, [small(kind, 2), small(kind, 3, tangents={"input": real(2, 3)}), small(kind, 1)])
    assert isinstance(found.members[1], Fault)


def test_ranges_are_checked_for_each() -> None:
    host = jobs.host_function(lambda x: x**2, inputs={"x": spec("float64", ["n"], low=0, high=1)}, batch_axis=0)
    made = [jobs.make_job("evaluate", "f", {"x": x}) for x in (torch.ones(2).double(), 2 * torch.ones(1).double())]
    found = check(host, made)
    assert isinstance(found.members[1], Fault) and "inputs[x][0]" in found.members[1].message


@pytest.mark.parametrize("kind", ["evaluate", "vjp", "hvp"])
def test_nan_stays_with_whom_it_came_from(host: Any, kind: str) -> None:
    made = [small(kind, 2), small(kind, 3), small(kind, 1)]
    made[1][1][0][1] = float("nan")
    found = check(host, made)
    for index in (0, 2):
        assert not any(bool(t.isnan().any()) for t in found.members[index].tensors)  # type: ignore[union-attr]


def test_what_the_model_raises_for_one(host: Any) -> None:
    def picky(x: Tensor) -> Tensor:
        if bool((x == 7).any()):
            raise ValueError("not seven")
        return x.sin()

    host = jobs.host_function(picky, inputs={"x": spec("float64", ["n"])}, batch_axis=0)
    made = [jobs.make_job("evaluate", "f", {"x": x}) for x in (real(2), torch.full((1,), 7.0).double(), real(3))]
    found = check(host, made, merges=0)
    assert [isinstance(member, Fault) for member in found.members] == [False, True, False]
    fault = found.members[1]
    assert isinstance(fault, Fault) and fault.reason is Reason.MODEL_ERROR and fault.__traceback__ is None
    assert "picky" in "".join(fault.__notes__)
    assert not found.refused


def test_a_model_that_cannot_be_merged_after_all() -> None:
    def moody(x: Tensor) -> Tensor:
        if x.shape[0] == 17:
            raise ValueError("not 17")
        return x.sin()

    host = jobs.host_function(moody, inputs={"x": spec("float64", ["n"])}, batch_axis=0)
    made = [jobs.make_job("evaluate", "f", {"x": real(n)}) for n in (10, 7)]
    found = check(host, made, merges=0)
    assert "not 17" in found.refused
    assert host.engine.signatures()[0].batch.max_rows == 0
    assert run(host, made, merges=0).refused == found.refused


@pytest.mark.parametrize("generator", ["torch", "python", "numpy"])
def test_randomness_is_not_shared(generator: str) -> None:
    import random

    import numpy as np

    draw = {"torch": lambda: torch.rand(()), "python": random.random, "numpy": lambda: float(np.random.rand())}[
        generator
    ]

    def noisy(x: Tensor) -> Tensor:
        # At load it does not show.
        return x * (1 + draw() if x.shape[0] == 20 else 1)

    host = jobs.host_function(noisy, inputs={"x": spec("float64", ["n"])}, batch_axis=0)
    made = [jobs.make_job("evaluate", "f", {"x": real(n)}) for n in (12, 8)]
    assert "random" in check(host, made, merges=0).refused


def test_writes_into_inputs_and_state() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            x[:, 0] *= 2
            return x.sin()

    host = jobs.host_factory(Writes, inputs={"x": spec("float64", ["n", 3])}, batch_axis=0)
    for kind in ("evaluate", "vjp"):
        more = {"wrt": ["x"]} if kind == "vjp" else {}
        made = [
            jobs.make_job(kind, "f", {"x": real(n, 3)}, **more, cotangents={"output": real(n, 3)} if more else None)
            for n in (1, 2)
        ]
        check(host, made)
    assert not host.engine.find("f", "1").module.count


# The shadow.


def test_the_shadow(host: Any) -> None:
    for kind in ("evaluate", "vjp", "jvp", "hvp"):
        found = check(host, [small(kind, n) for n in (1, 2, 3)], shadow=1)
        assert not found.refused


def test_the_shadow_sees_rows_that_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def coupled(x: Tensor) -> Tensor:
        # At load it does not show.
        return x + (1e-2 * x.mean() if 20 <= x.shape[0] < 30 else 0)

    host = jobs.host_function(coupled, inputs={"x": spec("float64", ["n"])}, batch_axis=0)
    made = [jobs.make_job("evaluate", "f", {"x": real(n)}) for n in (15, 9, 2)]
    found = run(host, made, shadow=0, merges=0)
    for result, one in zip(found.members, made, strict=True):
        agree(result, alone(host, one))
    assert "output 'output' [15]" in found.refused and "of its norm" in found.refused


def counting(monkeypatch: pytest.MonkeyPatch, host: Any) -> list[int]:
    """The rows of every job that is computed alone."""
    rows: list[int] = []
    real_run = host.engine.run

    def run_alone(job: Any, tensors: Any) -> Any:
        rows.append(job.inputs[0].shape[0])
        return real_run(job, tensors)

    monkeypatch.setattr(host.engine, "run", run_alone)
    return rows


def test_the_first_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    host = jobs.Host(ZOO["small"])
    seen = counting(monkeypatch, host)
    for kind in ("evaluate", "vjp"):
        for expected in ([1], [3], [2], [1], [], []):
            run(host, [small(kind, n) for n in (1, 2, 3)])
            assert seen == expected
            seen.clear()
    # Whoever is asked for counts.
    for shadow, expected in ((2, [3]), (1, [2]), (-1, [2]), (-1, [1]), (-1, []), (2, [3])):
        run(host, [small("jvp", n) for n in (1, 2, 3)], shadow=shadow)
        assert seen == expected
        seen.clear()


def test_the_first_do_not_depend_on_each_other_unseen() -> None:
    def coupled(x: Tensor) -> Tensor:
        return x + (1e-2 * x.mean() if 20 <= x.shape[0] < 30 else 0)

    host = jobs.host_function(coupled, inputs={"x": spec("float64", ["n"])}, batch_axis=0)
    made = [jobs.make_job("evaluate", "f", {"x": real(n)}) for n in (15, 9, 2)]
    assert "of its norm" in check(host, made, merges=0).refused


def test_faults_are_checked(monkeypatch: pytest.MonkeyPatch, host: Any) -> None:
    def classes(n: int, most: int) -> Made:
        return small("vjp", n, loss="cross_entropy", targets={"target": torch.full((n,), most)})

    host = jobs.Host(ZOO["small"])
    seen = counting(monkeypatch, host)
    for _ in range(6):
        # They are the same alone.
        assert not run(host, [classes(1, 0), classes(2, 5), classes(3, 0), classes(4, 0)]).refused
    assert seen.count(2) == 4
    real_together = merged.together

    def unfair(*given: Any) -> Any:
        return [*real_together(*given)[:-1], Fault(Reason.MODEL_ERROR, "not today")]

    for shadow in (-1, 1):
        host = jobs.Host(ZOO["small"])
        made = [small("vjp", n) for n in (2, 3)]
        with monkeypatch.context() as patch:
            patch.setattr("pullback_server.engine.batches.together", unfair)
            found = check(host, made, merges=0, shadow=shadow)
        assert "it fails: not today" in found.refused


def test_a_fault_leaves_others_their_forward_mode(host: Any) -> None:
    """Of an infinite input forward mode makes another NaN than two backwards."""

    def one(n: int, first: float, target: int) -> Made:
        job, tensors = small("jvp", n, loss="cross_entropy", options={"reduction": "none"}, targets=classes(n, target))
        tensors[0][0, 0] = first
        return job, tensors

    def classes(n: int, target: int) -> dict[str, Tensor]:
        return {"target": torch.full((n,), target)}

    found = check(host, [one(2, float("inf"), 0), one(3, 0.0, 9), one(2, 1.0, 1), one(1, 0.0, -5)])
    assert [isinstance(member, Fault) for member in found.members] == [False, True, False, True]
    assert not found.refused


def test_members_that_move_different_things(host: Any) -> None:
    made = []
    for rows, moved in ((2, "x"), (1, "scale"), (3, "x"), (2, "scale")):
        inputs = {"x": real(rows, 3), "scale": real(rows)}
        given = {"cotangents": {"head": real(rows, 2)}, "tangents": {moved: torch.ones_like(inputs[moved])}}
        made.append(jobs.make_job("hvp", "heads", inputs, wrt=["scale", "x"], **given))
    check(host, made)


# Memory.


def test_members_are_split_where_memory_runs_out(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real_together = merged.together

    def short(jobs: Any, *rest: Any) -> Any:
        if sum(job.inputs[0].shape[0] for job in jobs) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        return real_together(jobs, *rest)

    monkeypatch.setattr("pullback_server.engine.batches.together", short)
    made = [small("vjp", n) for n in (2, 2, 1, 3, 5)]
    found = check(host, made, merges=2)
    assert found.splits == 3 and not found.refused


# Padding.


def test_padding() -> None:
    seen: list[int] = []

    class Seeing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.shape[0])
            return x.sin() * x

    options = Options(batching=Batching(pad_to=(4, 16)))
    host = jobs.host_factory(Seeing, inputs={"x": spec("float64", ["n", 2])}, batch_axis=0, options=options)
    plain = jobs.host_factory(Seeing, inputs={"x": spec("float64", ["n", 2])}, batch_axis=0)
    # Else members are computed alone as well.
    host.engine.find("f", "1").checked_batches |= {f"{kind} EngineResult": 4 for kind in ("evaluate", "vjp")}
    for rows, padded in (((1, 2), 4), ((2, 2), 4), ((3, 4), 16), ((9, 8), 17), ((3,), 4), ((5,), 16)):
        for kind, loss in itertools.product(("evaluate", "vjp"), (None, "mse_loss")):
            made = []
            for n in rows:
                more: dict[str, Any] = {"wrt": ["x"]} if kind == "vjp" else {}
                if loss:
                    more |= {"loss": loss, "targets": {"target": real(n, 2)}}
                elif kind == "vjp":
                    more["cotangents"] = {"output": real(n, 2)}
                made.append(jobs.make_job(kind, "f", {"x": real(n, 2)}, **more))
            seen.clear()
            found = run(host, made, merges=len(rows) if len(rows) > 1 else 0)
            assert seen == [padded]
            for result, one in zip(found.members, made, strict=True):
                agree(result, alone(plain, one))


def test_members_that_must_go_alone(host: Any) -> None:
    made = [
        small("vjp", 2),
        small("vjp", 3, seed=1),
        small("vjp", 1, train=True),
        small("vjp", 2, parameters={"0.bias": real(5)}),
        small("vjp", 2, wrt=["input", "param:0.bias"]),
        small("vjp", 2, batched=True, cotangents={"output": real(3, 2, 2)}),
        small("vjp", 4),
    ]
    check(host, made, merges=2)


# One request, piece by piece.


class Wide(nn.Module):
    """Notes how many rows it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[0])
        found: Tensor = self.layers(x)
        return found


def wide(**options: Any) -> Any:
    # Both have the same weights: loading begins at a seed of the model's name.
    return jobs.host_factory(Wide, inputs={"x": spec("float64", ["n", 3])}, batch_axis=0, options=Options(**options))


PIECES: list[tuple[str, dict[str, Any]]] = [
    ("evaluate", {}),
    ("evaluate", {"parameters": {"layers.0.bias": real(5)}}),
    ("vjp", {"wrt": ["x"]}),
    ("vjp", {"wrt": ["x"], "return_outputs": False, "max_norm": 0.1}),
    ("vjp", {"wrt": ["param:layers.0.weight", "x", "param:layers.2.bias"]}),
    ("vjp", {"wrt": ["param:layers.0.bias"], "parameters": {"layers.0.bias": real(5), "layers.2.weight": real(2, 5)}}),
    ("jvp", {"wrt": ["x"]}),
    ("hvp", {"wrt": ["x"]}),
]


@pytest.mark.parametrize("rows", [2, 7, 9])
@pytest.mark.parametrize("which", range(len(PIECES)))
def test_pieces(which: int, rows: int) -> None:
    kind, more = PIECES[which]
    given = dict(more)
    if kind in ("vjp", "hvp"):
        given["cotangents"] = {"output": real(rows, 2)}
    if kind in ("jvp", "hvp"):
        given["tangents"] = {"x": real(rows, 3)}
    made = jobs.make_job(kind, "f", {"x": real(rows, 3)}, **given)
    host, whole = wide(micro_batch=3), wide()
    agree(alone(host, made), alone(whole, made))
    host.engine.find("f", "1").module.seen.clear()
    alone(host, made)
    assert max(host.engine.find("f", "1").module.seen) == min(rows, 3)


def test_pieces_that_do_not_add_up() -> None:
    """The gradients of a parameter that a hook clips are clipped once."""

    class Clipped(Wide):
        def __init__(self) -> None:
            super().__init__()
            self.layers[0].weight.register_hook(lambda gradient: gradient.clamp(-1e-2, 1e-2))

    def hosts(**options: Any) -> Any:
        return jobs.host_factory(
            Clipped,
            inputs={"x": spec("float64", ["n", 3])},
            batch_axis=0,
            options=Options(**options),
            gate=Gate(intended={"gradient": "clipped"}),
        )

    host, whole = hosts(micro_batch=3), hosts()
    seen = host.engine.find("f", "1").module.seen
    for wrt, rows in (["param:layers.0.weight", "x"], 7), (["x"], 3):
        made = jobs.make_job("vjp", "f", {"x": real(7, 3)}, wrt=wrt, cotangents={"output": real(7, 2)})
        expected = alone(whole, made)
        seen.clear()
        agree(alone(host, made), expected)
        assert max(seen) == rows


def test_narrow_sums_of_pieces() -> None:
    """What is added up in few bits loses what the later pieces add."""

    def narrow(**options: Any) -> Any:
        inputs = {"input": spec("bfloat16", ["n", 4])}
        return jobs.host_factory(
            lambda: nn.Linear(4, 2).bfloat16(), inputs=inputs, batch_axis=0, options=Options(**options)
        )

    x, v = torch.randn(1024, 4) + 1, torch.randn(1024, 2) + 0.5
    x, v = x.bfloat16(), v.bfloat16()
    made = jobs.make_job("vjp", "f", {"input": x}, wrt=["param:weight"], cotangents={"output": v})
    expected = v.double().T @ x.double()
    for host in (narrow(), narrow(micro_batch=1)):
        found = jobs.unpack(host.engine.run(*made)).grads["param:weight"]
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss[0]}{loss[1]}")
@pytest.mark.parametrize("kind", ["evaluate", "vjp"])
def test_losses_of_pieces(kind: str, loss: tuple[str, dict[str, Any], Any], reduction: str) -> None:
    name, options, targets = loss
    one = targets(7)
    given: dict[str, Any] = {"loss": name, "options": options | {"reduction": reduction}, "targets": one}
    if kind == "vjp":
        given["wrt"] = ["x", "param:layers.0.weight"]
        for target in ("var", "target", "weight"):
            # torch has no derivative of every loss by its target.
            if target in one and one[target].is_floating_point() and name in ("mse_loss", "gaussian_nll_loss"):
                given["wrt"] = [*given["wrt"], f"target:{target}"]
                break
        if reduction == "none":
            single = one["target"].ndim == 1 or name in ("cross_entropy", "multi_margin_loss")
            given["cotangents"] = {"loss": real(7) if single else real(7, 2)}
    made = jobs.make_job(kind, "f", {"x": real(7, 3)}, **given)
    host, whole = wide(micro_batch=3), wide()
    expected = alone(whole, made)
    agree(alone(host, made), expected)
    assert isinstance(expected, EngineResult)
    host.engine.find("f", "1").module.seen.clear()
    alone(host, made)
    assert max(host.engine.find("f", "1").module.seen) == 3


def test_faults_of_pieces() -> None:
    host, whole = wide(micro_batch=3), wide()
    x = {"x": real(7, 3)}
    good: dict[str, Any] = {"wrt": ["x"], "cotangents": {"output": real(7, 2)}}
    tangents = {"x": real(7, 3)}
    for kind, more in (
        ("vjp", good | {"cotangents": {}}),
        ("vjp", good | {"cotangents": {"output": real(6, 2)}}),
        ("vjp", good | {"cotangents": {"output": real(7, 2).float()}}),
        ("vjp", good | {"cotangents": {"other": real(7, 2)}}),
        ("vjp", good | {"max_result_bytes": 100}),
        ("vjp", good | {"loss": "mse_loss", "targets": {"target": real(7, 3)}, "cotangents": {}}),
        ("vjp", good | {"loss": "cross_entropy", "targets": {"target": torch.full((7,), 2)}, "cotangents": {}}),
        ("jvp", {"wrt": ["x"], "tangents": {"x": real(6, 3)}}),
        ("hvp", good | {"tangents": tangents, "cotangents": {"output": real(6, 2)}}),
        ("hvp", good | {"tangents": tangents, "max_result_bytes": 200}),
        ("evaluate", {"max_result_bytes": 20}),
        ("evaluate", {"targets": {"target": real(7, 2)}}),
    ):
        made = jobs.make_job(kind, "f", x, **more)
        expected = alone(whole, made)
        assert isinstance(expected, Fault), kind
        agree(alone(host, made), expected)


def test_what_is_not_computed_in_pieces() -> None:
    host, whole = wide(micro_batch=3), wide()
    x = {"x": real(7, 3)}
    target = {"target": real(7, 2)}
    for kind, more in (
        ("vjp", {"wrt": ["x"], "batched": True, "cotangents": {"output": real(2, 7, 2)}}),
        ("vjp", {"wrt": ["x"], "seed": 1, "cotangents": {"output": real(7, 2)}}),
        ("hvp", {"wrt": ["x"], "loss": "mse_loss", "targets": target, "tangents": {"x": real(7, 3)}}),
        (
            "hvp",
            {
                "wrt": ["param:layers.0.bias"],
                "cotangents": {"output": real(7, 2)},
                "tangents": {"param:layers.0.bias": real(5)},
            },
        ),
    ):
        made = jobs.make_job(kind, "f", x, **more)
        agree(alone(host, made), alone(whole, made))


def test_pieces_where_memory_runs_out() -> None:
    class Hungry(Wide):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] > self.most:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
            return super().forward(x)

        most = 1000

    host = jobs.host_factory(Hungry, inputs={"x": spec("float64", ["n", 3])}, batch_axis=0)
    whole = wide()
    model = host.engine.find("f", "1").module
    for kind, more in (
        ("evaluate", {}),
        ("vjp", {"wrt": ["x", "param:layers.0.bias"], "cotangents": {"output": real(20, 2)}}),
        ("vjp", {"wrt": ["x"], "loss": "mse_loss", "targets": {"target": real(20, 2)}}),
        ("jvp", {"wrt": ["x"], "tangents": {"x": real(20, 3)}}),
        ("hvp", {"wrt": ["x"], "tangents": {"x": real(20, 3)}, "cotangents": {"output": real(20, 2)}}),
    ):
        made = jobs.make_job(kind, "f", {"x": real(20, 3)}, **more)
        for model.most, splits in ((20, 0), (10, 1), (7, 2), (3, 3), (1, 4)):
            found = alone(host, made)
            agree(found, alone(whole, made))
            assert isinstance(found, EngineResult) and found.outcome.splits == splits
        model.most = 0
        with jobs.refused(Reason.OUT_OF_MEMORY, "does not fit the memory of cpu"):
            host.engine.run(*made)
    model.most = 3
    made = jobs.make_job("vjp", "f", {"x": real(20, 3)}, wrt=["x"], cotangents={"output": real(20, 2)}, seed=1)
    with jobs.refused(Reason.OUT_OF_MEMORY, "does not fit the memory of cpu"):
        host.engine.run(*made)
    # Of a batch: first the members are parted, then the rows of one.
    members = [
        jobs.make_job("vjp", "f", {"x": real(n, 3)}, wrt=["x"], cotangents={"output": real(n, 2)}) for n in (2, 5, 1)
    ]
    found = run(host, members, merges=0)
    for result, one in zip(found.members, members, strict=True):
        agree(result, alone(whole, one))
    assert found.splits == 3
