"""detect_anomaly: calls that end well are as without it; those that do not name what made NaN, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.engine_jobs import WIRE, Host, Reply, host_factory, host_function, make_job, refused
from torch import nn
from torch.utils.checkpoint import checkpoint

from pullback_server.engine.exported import load_exported
from pullback_server.engine.merged import mergeable
from pullback_server.engine.scripted import load_scripted
from pullback_server.hosting import Compile, Options, Registration, TensorSpec
from pullback_server.job import BatchRecord
from pullback_server.scheduling import merging
from pullback_wire import Reason

torch.set_num_threads(1)
F64 = torch.float64
ONES = torch.ones(3, 4, dtype=F64)
#: Two of its twelve elements are zero, where a square root has no slope.
ZEROS = ONES.clone()
ZEROS[0, 1] = ZEROS[2, 2] = 0


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sqrt()


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Root()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(2.0 * x)


class Net(nn.Module):
    """sqrt in "head.norm", between operations of other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, dtype=F64))
        self.head = Head()
        self.last = nn.Linear(4, 4, dtype=F64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.head(x * self.scale)) + 1.0


@pytest.fixture(scope="module")
def net() -> Host:
    return host_factory(Net)


MADE = "made inf of finite numbers (gradient 0, shape (3, 4), 2 of 12 elements)"
ROOT = f"model 'f' version 1: the backward of SqrtBackward0 in module 'head.norm' {MADE}"


def found(host: Host, kind: str, **more: Any) -> None:
    host(kind, "f", {"x": ZEROS}, wrt=["x"], detect_anomaly=True, **more)


def test_a_backward_is_named_with_its_module(net: Host) -> None:
    with refused(Reason.NON_FINITE, ROOT, "gradients[x] has it", field=""):
        found(net, "vjp", cotangents={"output": ONES})


def test_in_a_forward(net: Host) -> None:
    with refused(
        Reason.NON_FINITE,
        "model 'f' version 1: the operation aten::sqrt in module 'head.norm' made nan of finite numbers (output 0, "
        "shape (3, 4), 1 of 12 elements); outputs[output] has it",
    ):
        bad = ONES.clone()
        bad[1, 1] = -1
        net("evaluate", "f", {"x": bad}, detect_anomaly=True)


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("vjp", {"cotangents": {"output": torch.stack([ONES, 2 * ONES])}, "batched": True}, "SqrtBackward0"),
        ("hvp", {"cotangents": {"output": ONES}, "tangents": {"x": ONES}}, "SqrtBackward0"),
        ("jvp", {"tangents": {"x": ONES}}, ""),
        ("jacobian", {}, "SqrtBackward0"),
        ("hessian", {"loss": "mse_loss", "targets": {"target": ONES}}, "SqrtBackward0"),
        ("vjp", {"loss": "mse_loss", "targets": {"target": ONES}}, "SqrtBackward0"),
    ],
)
def test_every_derivative_names_it(net: Host, kind: str, more: dict[str, Any], said: str) -> None:
    with refused(Reason.NON_FINITE, said, "module 'head.norm'", "of finite numbers"):
        found(net, kind, **more)


def test_a_jvp_in_forward_mode_and_by_two_backwards(net: Host) -> None:
    model = net.engine.find("f", "1")
    assert model.forward_mode
    for forward_mode in (True, False):
        model.forward_mode = forward_mode
        try:
            with refused(Reason.NON_FINITE, "in module 'head.norm' made", "tangents[output] has it"):
                found(net, "jvp", tangents={"x": ONES})
        finally:
            model.forward_mode = True


class DoubledOnly(torch.autograd.Function):
    """Right forward, and a backward that divides by zero where x is zero: in torch, or in numpy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return g * 2 * x / x


class InNumpy(DoubledOnly):
    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        with np.errstate(all="ignore"):
            return torch.from_numpy(g.numpy() * 2 * x.numpy() / x.numpy())


@pytest.mark.parametrize("function", [DoubledOnly, InNumpy])
def test_a_backward_of_the_models_own(function: type[torch.autograd.Function]) -> None:
    host = host_function(lambda x: function.apply(x) + 1)
    with refused(
        Reason.NON_FINITE,
        f"the backward of {function.__name__}Backward in its own code made nan of finite numbers (gradient 0",
        "2 of 12 elements",
    ):
        found(host, "vjp", cotangents={"output": ONES})


class Masked(nn.Module):
    """Attention weights with a mask of -inf. whole: a row that may look at nothing at all."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.attn = nn.Softmax(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
        if self.whole:
            mask = mask | (torch.arange(4) == 2)[:, None]
        scores = (x.T @ x).masked_fill(mask, float("-inf"))
        return self.attn(scores) @ x.T


def test_infinities_that_reach_nothing_are_left_alone() -> None:
    def run(**more: Any) -> Reply:
        return host("vjp", "f", {"x": ONES}, wrt=["x"], cotangents={"output": torch.ones(4, 3, dtype=F64)}, **more)

    host = host_factory(lambda: Masked(False))
    plain, looked = run(), run(detect_anomaly=True)
    assert torch.equal(plain.grads["x"], looked.grads["x"])
    host = host_factory(lambda: Masked(True))
    with refused(
        Reason.NON_FINITE,
        "aten::masked_fill in its own code put inf there, as it was told to (output 0, shape (4, 4), 9 of 16 elements)"
        "; of that the operation aten::_softmax in module 'attn' made nan (output 0, shape (4, 4), 4 of 16 elements)",
    ):
        run(detect_anomaly=True)


def test_a_dead_branch_is_found_where_its_gradient_comes_through() -> None:
    # The forward is finite; its gradient is 0 * inf.
    host = host_function(lambda x: torch.where(x > 0, x.sqrt(), torch.zeros_like(x)))
    out = host("evaluate", "f", {"x": ZEROS}, detect_anomaly=True)
    assert out.outputs["output"].isfinite().all()
    with refused(Reason.NON_FINITE, "the backward of SqrtBackward0 in its own code made nan of finite numbers"):
        found(host, "vjp", cotangents={"output": ONES})


def test_of_two_only_the_one_that_reaches_the_result() -> None:
    def code(x: torch.Tensor) -> torch.Tensor:
        (x - 5).log()
        return (x - 1).rsqrt()

    with refused(Reason.NON_FINITE, "the operation aten::rsqrt", "made inf"):
        host_function(code)("evaluate", "f", {"x": ONES}, detect_anomaly=True)


def test_an_overflow_on_the_way_to_nan_is_told() -> None:
    host = host_function(lambda x: (1e4 * x).exp() - (2e4 * x).exp())
    with refused(
        Reason.NON_FINITE,
        "the operation aten::exp in its own code made inf of finite numbers (output 0, shape (3, 4), 12 of 12 "
        "elements); of that the operation aten::sub in its own code made nan (output 0",
    ):
        host("evaluate", "f", {"x": ONES}, detect_anomaly=True)


@pytest.mark.parametrize("what", ["inputs", "cotangents", "targets", "parameters"])
def test_what_came_in_already(net: Host, what: str) -> None:
    bad = ONES.clone()
    bad[1, 2] = torch.nan
    more: dict[str, Any] = {"cotangents": {"output": ONES}}
    inputs, name = (
        {"x": ONES},
        {"inputs": "x", "cotangents": "output", "targets": "target", "parameters": "scale"}[what],
    )
    if what == "inputs":
        inputs = {"x": bad}
    elif what == "cotangents":
        more = {"cotangents": {"output": bad}}
    elif what == "targets":
        more = {"loss": "mse_loss", "targets": {"target": bad}}
    else:
        more |= {"parameters": {"scale": torch.full((4,), torch.nan, dtype=F64)}}
    with refused(Reason.NON_FINITE, f"{what}[{name}] holds nan already", field=f"{what}[{name}]"):
        net("vjp", "f", inputs, wrt=["x"], detect_anomaly=True, **more)


def test_weights_and_buffers_of_the_model() -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.BatchNorm1d(4, dtype=F64), nn.Linear(4, 2, dtype=F64))
        with torch.no_grad():
            model[0].running_mean[1] = torch.inf
        return model

    with refused(Reason.NON_FINITE, "the hosted buffer '0.running_mean' holds inf already"):
        host_factory(make)("evaluate", "f", {"input": ONES}, detect_anomaly=True)

    def broken() -> nn.Module:
        model = nn.Linear(4, 2, dtype=F64)
        with torch.no_grad():
            model.bias[0] = torch.nan
        return model

    with refused(Reason.NON_FINITE, "the hosted parameter 'bias' holds nan already"):
        host_factory(broken)("evaluate", "f", {"input": ONES}, detect_anomaly=True)


def test_a_loss_is_named() -> None:
    host = host_function(lambda x: x * 1.0)
    with refused(Reason.NON_FINITE, "in the loss 'kl_div' made", "model 'f' version 1", "outputs[loss] has it"):
        host(
            "vjp",
            "f",
            {"x": ONES * 1e308},
            loss="kl_div",
            targets={"target": ONES * 10},
            wrt=["x"],
            options={"reduction": "sum"},
            detect_anomaly=True,
        )


def test_what_a_narrower_result_cannot_hold(net: Host) -> None:
    host = host_function(lambda x: x * 1.0)
    with refused(Reason.NON_FINITE, "in the dtype that results were asked for", field="results.dtype"):
        host("evaluate", "f", {"x": ONES * 1e30}, result_dtype=WIRE[torch.float16], detect_anomaly=True)


def test_outputs_that_are_not_returned_do_not_matter() -> None:
    host = host_function(lambda x: {"a": x * 1.0, "b": x.log()})
    more: dict[str, Any] = {"wrt": ["x"], "cotangents": {"a": ONES}}
    result = host("vjp", "f", {"x": ZEROS}, return_outputs=False, detect_anomaly=True, **more)
    assert torch.equal(result.grads["x"], ONES)
    with refused(Reason.NON_FINITE, "aten::log", "outputs[b]"):
        host("vjp", "f", {"x": ZEROS}, detect_anomaly=True, **more)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Head()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-untyped-call]
        return found


@pytest.mark.parametrize(
    "registration",
    [
        Registration("f", Checkpointed, kind="factory"),
        Registration("f", Net, kind="factory", options=Options(checkpoint=["head"])),
    ],
    ids=["by the model", "by its options"],
)
def test_recomputed_modules(registration: Registration) -> None:
    with refused(Reason.NON_FINITE, "the backward of SqrtBackward0 in module", ".norm' made inf of finite numbers"):
        found(Host(registration), "vjp", cotangents={"output": ONES})


class Noisy(nn.Module):
    """Draws from all generators that a model may draw from; `root`: a NaN where a drawn number is below a half."""

    def __init__(self, root: bool) -> None:
        super().__init__()
        self.root = root
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4, dtype=F64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.rand_like(x) + float(np.random.rand())
        y = self.norm(self.drop(x)) + noise
        return (noise - 1.0).sqrt() + y if self.root else y.sin()


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("evaluate", {}),
        ("vjp", {"cotangents": {"output": ONES}}),
        ("vjp", {"cotangents": {"output": torch.stack([ONES, 2 * ONES, ZEROS])}, "batched": True}),
        ("hvp", {"cotangents": {"output": ONES}, "tangents": {"x": ONES}}),
        ("jvp", {"tangents": {"x": ONES}}),
        ("jacobian", {}),
    ],
)
def test_what_is_well_is_the_same_to_the_bit(kind: str, more: dict[str, Any], train: bool, seed: int | None) -> None:
    host = host_factory(lambda: Noisy(False))
    # The first call after seeded ones (those of the probe) has numpy's generator seeded anew.
    host("evaluate", "f", {"x": ONES})
    results = []
    wrt = [] if kind == "evaluate" else ["x"]
    for detect in (False, True, False):
        torch.manual_seed(3)
        np.random.seed(3)
        results.append(
            host(kind, "f", {"x": ONES * 0.3}, wrt=wrt, train=train, seed=seed, detect_anomaly=detect, **more)
        )
        state = torch.get_rng_state()
        results[-1].raw.outcome.timings = {"state": float(state.double().sum())}
    first, *others = results
    for other in others:
        assert other.raw.outcome.timings == first.raw.outcome.timings
        assert all(torch.equal(a, b) for a, b in zip(first.raw.tensors, other.raw.tensors, strict=True))
    module = host.engine.find("f", "1").module
    assert module is not None and int(module.norm.num_batches_tracked) == 0


@pytest.mark.parametrize("seed", [None, 7])
def test_the_second_computation_draws_the_same_numbers(seed: int | None) -> None:
    host = host_factory(lambda: Noisy(True))
    with refused(Reason.NON_FINITE, "the operation aten::sqrt in its own code made nan of finite numbers"):
        for _ in range(20):
            host("evaluate", "f", {"x": ONES}, seed=seed, train=True, detect_anomaly=True)
            if seed is not None:
                seed += 1


def test_a_model_that_computes_other_things_each_time() -> None:
    count = iter(range(1000))
    host = host_function(lambda x: x / (0.0 if next(count) % 2 == 0 else 1.0), inputs={})
    with refused(Reason.NON_FINITE, "the same call computed once more", "is finite: the model computes other things"):
        for _ in range(2):
            host("evaluate", "f", {"x": ONES}, detect_anomaly=True)


def test_nothing_of_it_stays(net: Host) -> None:
    module = net.engine.find("f", "1").module
    assert module is not None
    before = nn.Module.__call__, torch.autograd._engine_run_backward  # type: ignore[attr-defined]
    state = {name: dict(vars(child)) for name, child in module.named_modules()}
    with refused(Reason.NON_FINITE, "SqrtBackward0"):
        found(net, "vjp", cotangents={"output": ONES})
    assert before == (nn.Module.__call__, torch.autograd._engine_run_backward)  # type: ignore[attr-defined]
    for name, child in module.named_modules():
        assert vars(child).keys() == state[name].keys()
        assert not child._forward_hooks and not child._forward_pre_hooks
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert all(not parameter.requires_grad for parameter in module.parameters())


def test_scripted_and_exported_models(tmp_path: Path) -> None:
    scripted = tmp_path / "model.pt"
    torch.jit.script(Net()).save(scripted)
    exported = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(Net(), (ONES,)), exported)
    cpu = torch.device("cpu")
    registrations = {
        "its TorchScript": load_scripted("f", scripted, "model 'f'", cpu),
        "its graph (a .pt2 file has no modules)": load_exported("f", exported, "model 'f'", cpu),
    }
    for said, registration in registrations.items():
        with refused(Reason.NON_FINITE, f"the backward of SqrtBackward0 in {said} made inf of finite numbers"):
            found(Host(registration), "vjp", cotangents={"output": ONES})


@pytest.mark.parametrize("place", ["input", "param"])
def test_rows_that_are_computed_piece_by_piece(place: str) -> None:
    host = host_factory(
        Net, inputs={"x": TensorSpec("float64", ("b", 4))}, batch_axis=0, options=Options(micro_batch=2)
    )
    wrt = {"input": ["x"], "param": ["param:scale"]}[place]
    more: dict[str, Any] = {"wrt": wrt, "cotangents": {"output": ONES}}
    plain, looked = (host("vjp", "f", {"x": ONES}, detect_anomaly=detect, **more) for detect in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain.raw.tensors, looked.raw.tensors, strict=True))
    with refused(Reason.NON_FINITE, "the backward of SqrtBackward0 in module 'head.norm' made inf of finite"):
        host("vjp", "f", {"x": ZEROS}, detect_anomaly=True, **more)


def test_it_is_never_merged() -> None:
    host = host_function(lambda x: x.sqrt(), inputs={"x": TensorSpec("float64", ("b", 4))}, batch_axis=0)
    for detect, rows in ((False, 3), (True, 0)):
        job, _ = make_job("vjp", "f", {"x": ONES}, wrt=["x"], cotangents={"output": ONES}, detect_anomaly=detect)
        assert mergeable(job, host.engine.find("f", "1")) == rows
        (signature,) = host.engine.signatures()
        signature.batch = BatchRecord(max_rows=64, max_bytes=1 << 20, inputs=["x"])
        assert (merging.mergeable(job, signature) is None) is detect


def test_and_never_by_a_compiled_plan() -> None:
    ran = []

    def code(x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            ran.append(x)
        return x.sqrt()

    host = host_function(
        code,
        inputs={"x": TensorSpec("float64", ("b", 4))},
        batch_axis=0,
        options=Options(compile=Compile(rows=(3,))),
    )
    assert host.engine.find("f", "1").plans is not None, host.engine.find("f", "1").plan
    for detect in (False, True):
        ran.clear()
        host("vjp", "f", {"x": ONES}, wrt=["x"], cotangents={"output": ONES}, detect_anomaly=detect)
        assert bool(ran) is detect


@pytest.mark.parametrize(
    "code",
    [
        lambda x: x.abs().pow(1.5).sum(),
        lambda x: torch.func.grad(lambda y: y.abs().pow(1.5).sum())(x).sum(),
        lambda x: torch.func.jacrev(lambda y: y.abs().sqrt())(x).sum(),
        lambda x: torch.func.jvp(lambda y: y.abs().sqrt(), (x,), (torch.ones_like(x),))[1].sum(),
    ],
    ids=["abs", "func.grad", "func.jacrev", "func.jvp"],
)
def test_zeros_without_memory_and_tensors_that_torch_func_wraps(code: Any) -> None:
    """Those that second derivatives and forward mode make of constants, and those inside of torch.func."""
    host = host_function(code)
    more = {"wrt": ["x"], "tangents": {"x": ONES}, "detect_anomaly": True}
    with refused(Reason.NON_FINITE, "of finite numbers"):
        host("hvp", "f", {"x": ZEROS}, **more)
    assert host("hvp", "f", {"x": ONES + 1}, **more).hvps["x"] is not None


def test_parts_of_one_memory_are_told_apart() -> None:
    def rows(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        out[0] = x[0].log()
        out[1] = x[1].sqrt()
        out[2] = (x[2] * 1e308).exp()
        return out

    host = host_function(rows)
    signs = torch.tensor([[-1.0], [-1.0], [0.0]], dtype=F64)
    for factors, name in (((1, 1, 1), "aten::log"), ((-1, 1, 1), "aten::sqrt"), ((-1, -1, 1), "")):
        x = signs * torch.tensor(factors, dtype=F64)[:, None]
        if name:
            with refused(Reason.NON_FINITE, f"the operation {name} in its own code made nan of finite numbers"):
                host("evaluate", "f", {"x": x}, detect_anomaly=True)
        else:
            host("evaluate", "f", {"x": x}, detect_anomaly=True)


def test_of_one_memory_what_was_written_over_is_gone() -> None:
    def mended(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        out[0] = x[0].log()
        out[1] = x[1].sqrt()
        out[0] = 1.0
        return out

    with refused(Reason.NON_FINITE, "the operation aten::sqrt in its own code made nan of finite numbers"):
        host_function(mended)("evaluate", "f", {"x": -ONES[:2]}, detect_anomaly=True)
