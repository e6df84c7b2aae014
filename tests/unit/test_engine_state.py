"""What a call leaves behind: nothing. Hosted modules, modes, buffers, random numbers, inputs."""

from __future__ import annotations

import gc
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pullback_server import spec
from pullback_server.engine import WritesInputs
from pullback_server.hosting.loading import load_source
from pullback_wire import Reason

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("engine_jobs", HERE / "engine_jobs.py")
assert _spec is not None and _spec.loader is not None
jobs = sys.modules.setdefault("engine_jobs", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(jobs)

torch.set_num_threads(1)
Tensor = torch.Tensor

ZOO = {registration.name: registration for registration in load_source(str(HERE.parent / "zoo.py"))}


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def state(host: Any, name: str) -> tuple[dict[str, Tensor], list[bool], list[bool]]:
    module = host.engine._models[name]["1"].module
    return (
        {key: value.clone() for key, value in module.state_dict().items()},
        [child.training for child in module.modules()],
        [parameter.requires_grad for parameter in module.parameters()],
    )


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["evaluate", "vjp", "jvp", "hvp", "jacobian", "hessian"])
def test_the_hosted_module_stays_as_it_was(kind: str, train: bool) -> None:
    host = jobs.Host(ZOO["conv"])
    before = state(host, "conv")
    image = real(2, 2, 4, 4)
    wrt = ["image", "param:norm.weight"]
    more: dict[str, Any] = {
        "evaluate": {},
        "vjp": {"cotangents": {"output": real(2, 4)}},
        "jvp": {"tangents": {"image": image, "param:norm.weight": real(3)}},
        "hvp": {"cotangents": {"output": real(2, 4)}, "tangents": {"image": image}},
        "jacobian": {},
        "hessian": {"loss": "mse_loss", "targets": {"target": real(2, 4)}, "wrt": ["param:norm.weight"]},
    }[kind]
    host(kind, "conv", {"image": image}, **{"wrt": wrt, "train": train, "seed": 1} | more)
    after = state(host, "conv")
    assert before[1:] == after[1:]
    for key, value in before[0].items():
        assert torch.equal(value, after[0][key]), key


def test_train_mode_is_torchs() -> None:
    host = jobs.Host(ZOO["conv"])
    image, v = real(4, 2, 4, 4), real(4, 4)
    module = ZOO["conv"].target()
    module.train()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        leaf = image.clone().requires_grad_()
        output = module(leaf)
    (gradient,) = torch.autograd.grad(output, leaf, v)
    for _ in range(2):
        reply = host("vjp", "conv", {"image": image}, wrt=["image"], cotangents={"output": v}, train=True, seed=5)
        close(reply.outputs["output"], output.detach())
        close(reply.grads["image"], gradient)


def test_a_submodule_that_stays_in_eval_mode_does_so() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.9)
            self.norm = nn.Linear(2, 2)

        def train(self, mode: bool = True) -> Stubborn:
            super().train(mode)
            self.drop.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x)

    host = jobs.host_factory(Stubborn)
    x = real(8)
    close(host("evaluate", "f", {"x": x}, train=True).outputs["output"], x)


class Counting(nn.Module):
    """Writes into its buffers in eval mode too: in place, and by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("last", torch.zeros(3, dtype=torch.float64))
        self.calls: Tensor
        self.last: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        found = x * self.calls + self.last
        self.last = x.detach() * 2
        return found


@pytest.mark.parametrize("kind", ["evaluate", "vjp", "jvp", "hvp"])
def test_calls_do_not_see_each_others_buffers(kind: str) -> None:
    host = jobs.host_factory(Counting)
    x, v = real(3), real(3)
    more: dict[str, Any] = {
        "evaluate": {},
        "vjp": {"wrt": ["x"], "cotangents": {"output": v}},
        "jvp": {"wrt": ["x"], "tangents": {"x": v}},
        "hvp": {"wrt": ["x"], "cotangents": {"output": v}, "tangents": {"x": v}},
    }[kind]
    for _ in range(3):
        reply = host(kind, "f", {"x": x}, **more)
        close(reply.outputs["output"], x)
    module = host.engine._models["f"]["1"].module
    assert float(module.calls) == 0 and not module.last.any()


class Rescaling(nn.Module):
    """Writes into its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight /= self.weight.norm()
        return x * self.weight


def test_a_model_that_normalises_its_parameter_goes_on_working() -> None:
    host = jobs.host_factory(Rescaling)
    x = real(3)
    for _ in range(3):
        reply = host("vjp", "f", {"x": x}, wrt=["x", "param:weight"], cotangents={"output": torch.ones_like(x)})
        close(reply.outputs["output"], x / 3**0.5)
        close(reply.grads["param:weight"], x)


def test_given_parameters_count_for_one_call_only() -> None:
    host = jobs.Host(ZOO["small"])
    x, v = real(2, 3), real(2, 2)
    plain = host("vjp", "small", {"input": x}, wrt=["input", "param:2.weight"], cotangents={"output": v})
    given = {"0.weight": real(5, 3), "2.weight": real(2, 5)}
    reply = host(
        "vjp", "small", {"input": x}, wrt=["input", "param:2.weight"], cotangents={"output": v}, parameters=given
    )
    module = ZOO["small"].target()
    leaf, weight = x.clone().requires_grad_(), given["2.weight"].clone().requires_grad_()
    output = torch.func.functional_call(module, given | {"2.weight": weight}, (leaf,))
    expected = torch.autograd.grad(output, [leaf, weight], v)
    close(reply.outputs["output"], output.detach())
    close(reply.grads["input"], expected[0])
    close(reply.grads["param:2.weight"], expected[1])
    again = host("vjp", "small", {"input": x}, wrt=["input", "param:2.weight"], cotangents={"output": v})
    close(again.grads["input"], plain.grads["input"])
    close(again.outputs["output"], plain.outputs["output"])


@pytest.mark.parametrize("name", ["lstm", "tied"])
def test_given_parameters_of_modules_that_hold_them_twice(name: str) -> None:
    host = jobs.Host(ZOO[name])
    x = real(2, 3, 3) if name == "lstm" else real(2, 3)
    label = "cell.weight_hh_l0" if name == "lstm" else "first.weight"
    module = ZOO[name].target()
    weight = torch.randn_like(dict(module.named_parameters())[label]).detach().requires_grad_()
    result = torch.func.functional_call(module, {label: weight}, (x,))
    output = result[0] if name == "lstm" else result
    v = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, weight, v, retain_graph=True)
    key = "output_0" if name == "lstm" else "output"
    plain = host("evaluate", name, {"x": x}).outputs[key]
    for _ in range(2):
        reply = host("vjp", name, {"x": x}, wrt=[f"param:{label}"], cotangents={key: v}, parameters={label: weight})
        close(reply.grads[f"param:{label}"], expected)
        close(reply.outputs[key], output.detach())
        close(host("evaluate", name, {"x": x}).outputs[key], plain)


def test_a_frozen_parameter_may_be_asked_for() -> None:
    def factory() -> nn.Module:
        module = nn.Linear(2, 2).double()
        module.weight.requires_grad_(False)
        return module

    host = jobs.host_factory(factory)
    x, v = real(3, 2), real(3, 2)
    reply = host("vjp", "f", {"input": x}, wrt=["param:weight"], cotangents={"output": v})
    close(reply.grads["param:weight"], v.T @ x)


class Adapting(nn.Module):
    """Takes a gradient step on its own parameter inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        inner = ((self.weight * x) ** 2).sum()
        (g,) = torch.autograd.grad(inner, self.weight, create_graph=True)
        return (self.weight - 0.1 * g) * x


def test_a_model_that_differentiates_by_its_own_parameters() -> None:
    host = jobs.host_factory(Adapting)
    x, v = real(2), real(2)
    local = Adapting()
    leaf = x.clone().requires_grad_()
    output = local(leaf)
    expected = torch.autograd.grad(output, [leaf, local.weight], v, create_graph=True)
    for _ in range(2):
        close(host("evaluate", "f", {"x": x}).outputs["output"], output.detach())
        reply = host("vjp", "f", {"x": x}, wrt=["x", "param:weight"], cotangents={"output": v})
        close(reply.grads["x"], expected[0].detach())
        close(reply.grads["param:weight"], expected[1].detach())
        weight = real(2)
        leaf = weight.clone().requires_grad_()
        inner = 2 * leaf * x**2
        (by_given,) = torch.autograd.grad((leaf - 0.1 * inner) * x, leaf, v)
        reply = host(
            "vjp", "f", {"x": x}, wrt=["param:weight"], cotangents={"output": v}, parameters={"weight": weight}
        )
        close(reply.grads["param:weight"], by_given)


def test_its_higher_derivatives() -> None:
    host = jobs.host_factory(Adapting)
    x, v, t = real(2), real(2), {"x": real(2), "param:weight": real(2)}
    local = Adapting()
    leaf, cotangent = x.clone().requires_grad_(), v.clone().requires_grad_()
    gradients = torch.autograd.grad(local(leaf), [leaf, local.weight], cotangent, create_graph=True)
    dot = (gradients[0] * t["x"]).sum() + (gradients[1] * t["param:weight"]).sum()
    expected = torch.autograd.grad(dot, [leaf, local.weight, cotangent])
    for _ in range(2):
        reply = host("hvp", "f", {"x": x}, wrt=list(t), cotangents={"output": v}, tangents=t)
        close(list(reply.hvps.values()), list(expected[:2]))
        close(host("jvp", "f", {"x": x}, wrt=list(t), tangents=t).grads["output"], expected[2])


def test_a_model_that_asks_its_input_to_require_grad() -> None:
    host = jobs.Host(ZOO["force"])
    job, tensors = jobs.make_job("evaluate", "force", {"x": real(3, 3)})
    host.engine.run(job, tensors)
    assert not tensors[0].requires_grad


# Models that write into their inputs.


def test_a_model_that_writes_into_its_input_is_found_out_once() -> None:
    host = jobs.Host(ZOO["in_place"])
    x, v = real(2, 3), real(2, 3)
    job, tensors = jobs.make_job("vjp", "in_place", {"x": x}, wrt=["x"], cotangents={"output": v})
    with pytest.raises(WritesInputs):
        host.engine.run(job, tensors)
    # Known by now: it gets a copy, and what was sent stays what it was.
    job, tensors = jobs.make_job("vjp", "in_place", {"x": x}, wrt=["x"], cotangents={"output": v})
    reply = jobs.unpack(host.engine.run(job, tensors))
    assert torch.equal(tensors[0], x)
    leaf = x.clone().requires_grad_()
    output = ZOO["in_place"].target(leaf.clone())
    close(reply.grads["x"], torch.autograd.grad(output, leaf, v)[0])


def test_a_model_that_writes_and_then_runs_out_of_memory() -> None:
    def function(x: Tensor) -> Tensor:
        x.add_(1)
        return torch.empty(1 << 60, dtype=torch.uint8) * x

    host = jobs.host_function(function)
    job, tensors = jobs.make_job("evaluate", "f", {"x": real()})
    with pytest.raises(WritesInputs):
        host.engine.run(job, tensors)


@pytest.mark.parametrize("kind", ["evaluate", "jacobian"])
def test_every_kind_finds_it_out(kind: str) -> None:
    host = jobs.Host(ZOO["in_place"])
    job, tensors = jobs.make_job(kind, "in_place", {"x": real(2, 3)}, wrt=["x"])
    with pytest.raises(WritesInputs):
        host.engine.run(job, tensors)


def test_a_model_that_writes_and_then_raises() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        y.add_(1)
        raise ValueError(f"saw {float(y)}")

    host = jobs.host_function(function)
    job, tensors = jobs.make_job("evaluate", "f", {"x": real(), "y": torch.tensor(5.0)})
    with pytest.raises(WritesInputs):
        host.engine.run(job, tensors)
    with jobs.refused(Reason.MODEL_ERROR, "saw 6.0"):
        host("evaluate", "f", {"x": real(), "y": torch.tensor(5.0)})


def test_writing_behind_autograds_back_does_not_reach_a_second_forward() -> None:
    """A write through .data is not counted; the JVP by two backwards must still start from the original."""

    def function(x: Tensor) -> Tensor:
        x.data.add_(1)
        with torch.no_grad():
            weight = x.detach() * 0 + 2
        return weight * x**2

    host = jobs.host_function(function)
    x, t = real(3), real(3)
    close(host("jvp", "f", {"x": x}, wrt=["x"], tangents={"x": t}).grads["output"], 4 * (x + 1) * t)


def test_results_that_are_views_of_inputs() -> None:
    host = jobs.Host(ZOO["views"])
    x = real(2, 3)
    reply = host("evaluate", "views", {"x": x})
    close(reply.outputs["turned"], x.t().contiguous())
    z = torch.randn(2, 3, dtype=torch.complex64)
    assert torch.equal(host("evaluate", "views", {"x": z}).outputs["flipped"], z.conj().resolve_conj())
    v = {"flipped": torch.randn(2, 3, dtype=torch.complex64)}
    reply = host("vjp", "views", {"x": z}, wrt=["x"], cotangents=v)
    assert torch.equal(reply.grads["x"], v["flipped"].conj().resolve_conj())


# Random numbers.


def test_a_seed_makes_a_call_reproducible_and_nothing_else() -> None:
    host = jobs.Host(ZOO["noisy"])
    x = torch.ones(4)

    def draw(**more: Any) -> list[float]:
        found: list[float] = host("evaluate", "noisy", {"x": x}, **more).outputs["output"].tolist()
        return found

    before = torch.random.get_rng_state()
    first = draw(seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == draw(seed=3) != draw(seed=4)
    assert first == draw(seed=3)
    assert draw(seed=2**64 - 1) != draw(seed=0)
    # Without a seed every call draws anew, seeded ones in between or not.
    loose = [draw(), draw()]
    draw(seed=3)
    loose.append(draw())
    assert len({tuple(values) for values in loose}) == 3
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert first == torch.rand(4).tolist()


def test_random_and_numpy_are_seeded_too() -> None:
    import random

    import numpy as np

    host = jobs.host_function(lambda x: x + random.random() + float(np.random.rand()))
    x = torch.zeros((), dtype=torch.float64)
    seeded = [float(host("evaluate", "f", {"x": x}, seed=s).outputs["output"]) for s in (1, 2, 1)]
    assert seeded[0] == seeded[2] != seeded[1]
    loose = []
    for _ in range(3):
        loose.append(float(host("evaluate", "f", {"x": x}).outputs["output"]))
        host("evaluate", "f", {"x": x}, seed=1)
    assert len(set(loose)) == 3


def test_a_model_that_seeds_does_not_decide_for_the_next_call() -> None:
    def function(x: Tensor) -> Tensor:
        noise = torch.rand(3)
        torch.manual_seed(0)
        return x + noise

    # As a worker does when it has loaded its models; another test may have left this very seed behind.
    torch.seed()
    host = jobs.host_function(function)
    found = {tuple(host("evaluate", "f", {"x": torch.zeros(3)}).outputs["output"].tolist()) for _ in range(4)}
    assert len(found) == 4


def test_what_user_code_switches_is_switched_back() -> None:
    def function(x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_autocast_enabled("cpu", True)
        raise ValueError

    host = jobs.host_function(function)
    with jobs.refused(Reason.MODEL_ERROR):
        host("evaluate", "f", {"x": real()})
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert not torch.is_autocast_enabled("cpu")
    assert torch.backends.mha.get_fastpath_enabled()


def test_probing_leaves_no_trace() -> None:
    state_before = torch.random.get_rng_state()
    host = jobs.Host(ZOO["custom_right"], ZOO["conv"], ZOO["noisy"])
    assert torch.equal(state_before, torch.random.get_rng_state())
    assert torch.get_default_dtype() == torch.float32
    host = jobs.host_factory(Counting, inputs={"x": spec("float64", [3])})
    assert float(host.engine._models["f"]["1"].module.calls) == 0


@pytest.mark.parametrize("kind", ["vjp", "hvp", "jvp"])
def test_graphs_and_inputs_are_let_go(kind: str) -> None:
    """The memory of the inputs is used for other calls as soon as the results have been copied."""
    host = jobs.Host(ZOO["lstm"])
    x, weight = real(2, 3, 3), real(16, 4)
    more: dict[str, Any] = {
        "vjp": {"cotangents": {"output_0": real(2, 3, 4)}},
        "hvp": {"cotangents": {"output_0": real(2, 3, 4)}, "tangents": {"x": x}},
        "jvp": {"tangents": {"x": x, "param:cell.weight_hh_l0": weight}},
    }[kind]
    more |= {"wrt": ["x", "param:cell.weight_hh_l0"], "parameters": {"cell.weight_hh_l0": weight}}
    job, tensors = jobs.make_job(kind, "lstm", {"x": x}, **more)
    memories = [bytearray(tensor.numpy().tobytes()) for tensor in tensors]
    before = [sys.getrefcount(memory) for memory in memories]
    gc.disable()
    try:
        shared = [
            torch.frombuffer(memory, dtype=tensor.dtype).reshape(tensor.shape)
            for memory, tensor in zip(memories, tensors, strict=True)
        ]
        result = host.engine.run(job, shared)
        del result, shared
        assert [sys.getrefcount(memory) for memory in memories] == before
    finally:
        gc.enable()


def test_a_call_for_input_gradients_records_nothing_for_parameters() -> None:
    host = jobs.Host(ZOO["small"], ZOO["conv"])
    for versions in host.engine._models.values():
        for hosted in versions.values():
            assert not any(parameter.requires_grad for parameter in hosted.parameters.values())


def test_outputs_do_not_depend_on_what_else_is_asked() -> None:
    """The encoder's fast path puts zeros at padded places; it would run in an Evaluate, and in nothing else."""
    host = jobs.host_factory(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1).double()
    )
    src, mask = real(2, 3, 4), torch.tensor([[False, False, True], [False, True, True]])
    inputs = {"src": src, "src_key_padding_mask": mask}
    plain = host("evaluate", "f", inputs).outputs["output"]
    with_gradient = host("vjp", "f", inputs, wrt=["src"], cotangents={"output": real(2, 3, 4)}).outputs["output"]
    assert bool(plain[0, 2].any())
    close(plain, with_gradient)


class CountingUnderNoGrad(Counting):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = torch.ones_like(x)
        return super().forward(x) * weight


def test_two_forwards_of_one_call_do_not_see_each_others_buffers() -> None:
    """A JVP by two backwards, after forward mode was found unfit."""
    x, t = real(3), real(3)
    for _ in range(2):
        host = jobs.host_factory(CountingUnderNoGrad)
        for _ in range(3):
            reply = host("jvp", "f", {"x": x}, wrt=["x"], tangents={"x": t})
            close(reply.outputs["output"], x)
            close(reply.grads["output"], t)
