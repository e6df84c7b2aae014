"""Every derivative of every kind of model, against torch itself in double precision."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pullback_server.hosting.loading import load_source

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


def complex_(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.complex128)


#: model -> inputs, and what to differentiate by.
CASES: dict[str, tuple[Callable[[], dict[str, Tensor]], list[str]]] = {
    "identity": (lambda: {"x": real(2, 3)}, ["x"]),
    "cube": (lambda: {"x": real(2, 3)}, ["x"]),
    "square_sum": (lambda: {"x": real(4)}, ["x"]),
    "mixed": (lambda: {"x": real(3), "y": real(3)}, ["y", "x"]),
    "pair": (lambda: {"x": real(3)}, ["x"]),
    "holomorphic": (lambda: {"z": complex_(3)}, ["z"]),
    "modulus": (lambda: {"z": complex_(3)}, ["z"]),
    "in_place": (lambda: {"x": real(2, 3)}, ["x"]),
    "views": (lambda: {"x": real(2, 3)}, ["x"]),
    "detached": (lambda: {"x": real(3)}, ["x"]),
    "force": (lambda: {"x": real(4, 3)}, ["x"]),
    "stop_gradient": (lambda: {"x": real(4)}, ["x"]),
    "straight_through": (lambda: {"x": real(4)}, ["x"]),
    "reversal": (lambda: {"x": real(4)}, ["x"]),
    "custom_right": (lambda: {"x": real(4)}, ["x"]),
    "small": (lambda: {"input": real(2, 3)}, ["input", "param:0.weight", "param:2.bias"]),
    "tied": (lambda: {"x": real(2, 3)}, ["param:first.weight", "x"]),
    "words": (
        lambda: {"ids": torch.tensor([[1, 4, 4], [10, 0, 2]]), "mask": torch.rand(2, 3, dtype=torch.float64)},
        ["mask", "param:embedding.weight"],
    ),
    "lstm": (lambda: {"x": real(2, 3, 3)}, ["x", "param:cell.weight_hh_l0"]),
    "gru": (lambda: {"x": real(2, 3, 3)}, ["x", "param:cell.bias_ih_l0"]),
    "conv": (lambda: {"image": real(2, 2, 4, 4)}, ["image", "param:conv.weight", "param:norm.weight"]),
    "transformer": (lambda: {"src": real(2, 3, 4)}, ["src", "param:self_attn.in_proj_weight"]),
    "compiled": (lambda: {"input": real(2, 3)}, ["input", "param:0.weight"]),
}
COMPLEX = {"holomorphic", "modulus"}


@pytest.fixture(scope="module")
def host() -> Any:
    torch.manual_seed(0)
    return jobs.Host(*(ZOO[name] for name in CASES))


class Local:
    """The same function in plain torch, on a module of its own."""

    def __init__(self, name: str) -> None:
        target = ZOO[name].target
        self.inputs, self.wrt = CASES[name]
        torch.manual_seed(len(name))
        self.values = self.inputs()
        code = target() if not self._is_function(target) else target
        if isinstance(code, nn.Module):
            code = getattr(code, "_orig_mod", code).eval()
        self.code = code
        self.order = ZOO[name].outputs

    @staticmethod
    def _is_function(target: Any) -> bool:
        return bool(target.__code__.co_argcount)

    def stands(self) -> list[Tensor]:
        found = []
        for name in self.wrt:
            if name.startswith("param:"):
                found.append(dict(self.code.named_parameters())[name.removeprefix("param:")])
            else:
                self.leaves[name] = self.values[name].clone().requires_grad_()
                found.append(self.leaves[name])
        return found

    def forward(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """What stands for wrt, and the outputs."""
        self.leaves: dict[str, Tensor] = {}
        stands = self.stands()
        given = {name: self.leaves.get(name, value) for name, value in self.values.items()}
        # Not the leaf itself, so that the model may write into it.
        with sdpa_kernel(SDPBackend.MATH):
            result = self.code(**{name: value.clone() for name, value in given.items()})
        return stands, dict(named(result, self.order))


def named(result: Any, declared: Any) -> list[tuple[str, Tensor]]:
    if isinstance(result, Tensor):
        return [("output", result)]
    if isinstance(result, tuple):
        names = declared or [f"output_{index}" for index in range(len(result))]
        pairs = list(zip(names, result, strict=True))
    else:
        pairs = list(result.items())
    found = []
    for name, value in pairs:
        if isinstance(value, Tensor):
            found.append((name, value))
        elif value is not None:
            found += [(f"{name}.{index}", child) for index, child in enumerate(value)]
    return found


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, check_stride=False)


def cotangents_for(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)
        for name, tensor in outputs.items()
        if tensor.requires_grad
    }


def tangents_for(local: Local, stands: list[Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {
        name: torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)
        for name, tensor in zip(local.wrt, stands, strict=True)
    }


def both(local: Local, moving: set[str] | None = None) -> Any:
    """VJP, H and J t in plain torch: outputs, v, t, gradients, H, J t."""
    stands, outputs = local.forward()
    v = cotangents_for(outputs)
    t = tangents_for(local, stands)
    if moving is not None:
        t = {name: tangent for name, tangent in t.items() if name in moving}
    leaves = [value.clone().requires_grad_() for value in v.values()]
    gradients = torch.autograd.grad([outputs[name] for name in v], stands, leaves, create_graph=True)
    dot = sum(
        (gradient.conj() * t[name]).real.sum() for name, gradient in zip(local.wrt, gradients, strict=True) if name in t
    )
    derived = torch.autograd.grad(dot, [*stands, *leaves], allow_unused=True)
    derived = [torch.zeros_like(like) if d is None else d for d, like in zip(derived, [*stands, *leaves], strict=True)]
    count = len(stands)
    return outputs, v, t, gradients, derived[:count], dict(zip(v, derived[count:], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_vjp(host: Any, name: str) -> None:
    local = Local(name)
    outputs, v, _, gradients, _, _ = both(local)
    reply = host("vjp", name, local.values, wrt=local.wrt, cotangents=v)
    assert list(reply.grads) == local.wrt
    for label, expected in zip(local.wrt, gradients, strict=True):
        close(reply.grads[label], expected.detach())
    assert list(reply.outputs) == list(outputs)
    for label, expected in outputs.items():
        close(reply.outputs[label], expected.detach())


@pytest.mark.parametrize("name", CASES)
def test_evaluate(host: Any, name: str) -> None:
    local = Local(name)
    _, outputs = local.forward()
    reply = host("evaluate", name, local.values)
    for label, expected in outputs.items():
        close(reply.outputs[label], expected.detach())


@pytest.mark.parametrize("name", CASES)
def test_jvp(host: Any, name: str) -> None:
    local = Local(name)
    outputs, v, t, gradients, _, pushed = both(local)
    reply = host("jvp", name, local.values, wrt=local.wrt, tangents=t)
    assert list(reply.grads) == list(outputs)
    for label, output in outputs.items():
        if output.requires_grad:
            close(reply.grads[label], pushed[label])
        else:
            assert reply.grads[label] is None
        close(reply.outputs[label], output.detach())
    # The adjoint test.
    left = sum((g.conj() * t[n]).real.sum() for n, g in zip(local.wrt, gradients, strict=True)).detach()
    right = sum((v[n].conj() * reply.grads[n]).real.sum() for n in v)
    close(left, right)


@pytest.mark.parametrize("name", list(CASES))
def test_hvp(host: Any, name: str) -> None:
    local = Local(name)
    outputs, v, t, gradients, hvps, pushed = both(local)
    reply = host("hvp", name, local.values, wrt=local.wrt, cotangents=v, tangents=t)
    for label, gradient, hvp in zip(local.wrt, gradients, hvps, strict=True):
        close(reply.grads[label], gradient.detach())
        assert reply.hvps[label] is not None
        close(reply.hvps[label], hvp)
    assert list(reply.cotangent_derivatives) == list(v)
    for label, expected in pushed.items():
        close(reply.cotangent_derivatives[label], expected)
    for label, expected in outputs.items():
        close(reply.outputs[label], expected.detach())


@pytest.mark.parametrize("name", ["mixed", "small", "tied", "lstm", "transformer", "conv"])
def test_hvp_along_a_part_has_mixed_terms_for_all(host: Any, name: str) -> None:
    local = Local(name)
    _, v, t, _, hvps, _ = both(local, {local.wrt[0]})
    reply = host("hvp", name, local.values, wrt=local.wrt, cotangents=v, tangents=t)
    for label, hvp in zip(local.wrt, hvps, strict=True):
        close(reply.hvps[label], hvp)
    assert any(bool(hvp.any()) for hvp in hvps[1:])


@pytest.mark.parametrize("name", [name for name in CASES if name not in COMPLEX])
def test_jacobian(host: Any, name: str) -> None:
    local = Local(name)
    stands, outputs = local.forward()
    reply = host("jacobian", name, local.values, wrt=local.wrt)
    differentiable = [label for label, tensor in outputs.items() if tensor.is_floating_point()]
    assert list(reply.blocks) == [(row, column) for row in differentiable for column in local.wrt]
    for row in differentiable:
        tensor = outputs[row]
        if not tensor.requires_grad:
            assert all(reply.blocks[row, column] is None for column in local.wrt)
            continue
        rows = [
            torch.autograd.grad(element, stands, retain_graph=True, allow_unused=True) for element in tensor.reshape(-1)
        ]
        for index, column in enumerate(local.wrt):
            parts = [part[index] for part in rows]
            if all(part is None for part in parts):
                assert reply.blocks[row, column] is None
                continue
            expected = torch.stack([torch.zeros_like(stands[index]) if p is None else p for p in parts])
            close(reply.blocks[row, column], expected.reshape(*tensor.shape, *stands[index].shape))


@pytest.mark.parametrize("name", ["small", "tied", "conv", "lstm"])
def test_hessian_of_a_loss(host: Any, name: str) -> None:
    local = Local(name)
    local.wrt = local.wrt[:2]
    stands, outputs = local.forward()
    label = next(iter(outputs))
    target = torch.full_like(outputs[label], 0.3).detach()
    loss = torch.nn.functional.mse_loss(outputs[label], target)
    gradients = torch.autograd.grad(loss, stands, create_graph=True)
    reply = host(
        "hessian",
        name,
        local.values,
        wrt=local.wrt,
        loss="mse_loss",
        targets={"target": target},
        bindings={"input": label},
    )
    close(reply.outputs["loss"], loss.detach())
    for row, gradient in zip(local.wrt, gradients, strict=True):
        close(reply.grads[row], gradient.detach())
        for column, stand in zip(local.wrt, stands, strict=True):
            expected = torch.stack(
                [torch.autograd.grad(part, stand, retain_graph=True)[0] for part in gradient.reshape(-1)]
            )
            close(reply.blocks[row, column], expected.reshape(*gradient.shape, *stand.shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_dtypes_stay(host: Any, dtype: torch.dtype) -> None:
    x, v, t = (torch.randn(3).to(dtype) for _ in range(3))
    reply = host("hvp", "cube", {"x": x}, wrt=["x"], cotangents={"output": v}, tangents={"x": t})
    wide = [tensor.to(torch.complex128 if dtype.is_complex else torch.float64) for tensor in (x, v, t)]
    a, b, c = wide
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-5}
    for actual, expected in (
        (reply.outputs["output"], a**3),
        (reply.grads["x"], (3 * a**2).conj() * b),
        (reply.hvps["x"], (6 * a).conj() * b * c.conj()),
        (reply.cotangent_derivatives["output"], 3 * a**2 * c),
    ):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.to(a.dtype), expected, **tolerance)


def test_many_cotangents_at_once(host: Any) -> None:
    local = Local("small")
    stands, outputs = local.forward()
    v = real(5, 2, 2)
    reply = host("vjp", "small", local.values, wrt=local.wrt, cotangents={"output": v}, batched=True)
    for k in range(5):
        gradients = torch.autograd.grad(outputs["output"], stands, v[k], retain_graph=True)
        for label, gradient in zip(local.wrt, gradients, strict=True):
            close(reply.grads[label][k], gradient)


def test_many_cotangents_where_a_backward_cannot_be_vectorised() -> None:
    host = jobs.Host(ZOO["in_numpy"])
    x, v = real(4), real(3, 4)
    reply = host("vjp", "in_numpy", {"x": x}, wrt=["x"], cotangents={"output": v}, batched=True)
    close(reply.grads["x"], (3 * x**2 + x.cos()) * v)
    reply = host("jacobian", "in_numpy", {"x": x}, wrt=["x"])
    close(reply.blocks["output", "x"], torch.diag(3 * x**2 + x.cos()))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 1, 3)])
def test_shapes(host: Any, shape: tuple[int, ...]) -> None:
    x, v, t = real(*shape), real(*shape), real(*shape)
    close(host("vjp", "cube", {"x": x}, wrt=["x"], cotangents={"output": v}).grads["x"], 3 * x**2 * v)
    close(host("jvp", "cube", {"x": x}, wrt=["x"], tangents={"x": t}).grads["output"], 3 * x**2 * t)
    reply = host("hvp", "cube", {"x": x}, wrt=["x"], cotangents={"output": v}, tangents={"x": t})
    close(reply.hvps["x"], 6 * x * v * t)
    block = host("jacobian", "cube", {"x": x}, wrt=["x"]).blocks["output", "x"]
    assert block.shape == shape + shape
    close(block.reshape(x.numel(), x.numel()), torch.diag((3 * x**2).reshape(-1)))
    hessian = host("hessian", "square_sum", {"x": x}, wrt=["x"]).blocks["x", "x"]
    close(hessian.reshape(x.numel(), x.numel()), 2 * torch.eye(x.numel(), dtype=x.dtype))


def test_jacobian_in_several_chunks(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pullback_server.engine.dense._CHUNK_ROWS", 2)
    x = real(5)
    close(host("jacobian", "cube", {"x": x}, wrt=["x"]).blocks["output", "x"], torch.diag(3 * x**2))


def test_a_linear_function_has_a_second_derivative_of_zeros(host: Any) -> None:
    x, v, t = real(2, 3), real(2, 3), real(2, 3)
    reply = host("hvp", "identity", {"x": x}, wrt=["x"], cotangents={"output": v}, tangents={"x": t})
    close(reply.hvps["x"], torch.zeros(2, 3, dtype=torch.float64))
    close(reply.cotangent_derivatives["output"], t)


def test_results_travel_in_the_dtype_asked_for(host: Any) -> None:
    x, v = real(3), real(3)
    number = jobs.WIRE[torch.bfloat16]
    reply = host("vjp", "detached", {"x": x}, wrt=["x"], cotangents={"kept": v}, result_dtype=number)
    assert reply.grads["x"].dtype == reply.outputs["kept"].dtype == torch.bfloat16
    assert reply.outputs["rank"].dtype == torch.int64
    close(reply.grads["x"].double(), (2 * v).bfloat16().double())
    reply = host(
        "vjp", "holomorphic", {"z": complex_(2)}, wrt=["z"], cotangents={"output": complex_(2)}, result_dtype=number
    )
    assert reply.grads["z"].dtype == torch.complex128


def test_outputs_may_be_omitted(host: Any) -> None:
    reply = host("vjp", "cube", {"x": real(2)}, wrt=["x"], cotangents={"output": real(2)}, return_outputs=False)
    assert reply.outputs == {} and len(reply.raw.tensors) == 1


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("maximum", [0.0, 0.5, 1e9])
def test_clipping_is_torchs(host: Any, maximum: float, batched: bool) -> None:
    local = Local("small")
    rows = 3 if batched else 1
    v = real(rows, 2, 2)
    reply = host(
        "vjp",
        "small",
        local.values,
        wrt=local.wrt,
        cotangents={"output": v if batched else v[0]},
        batched=batched,
        max_norm=maximum,
    )
    assert len(reply.norms) == rows
    for k in range(rows):
        stands, outputs = local.forward()
        leaves = [stand.detach().clone().requires_grad_() for stand in stands]
        for leaf, gradient in zip(leaves, torch.autograd.grad(outputs["output"], stands, v[k]), strict=True):
            leaf.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(leaves, maximum)
        assert reply.norms[k] == pytest.approx(float(norm), rel=1e-12)
        for label, leaf in zip(local.wrt, leaves, strict=True):
            close(reply.grads[label][k] if batched else reply.grads[label], leaf.grad)


def test_clipping_of_complex_gradients(host: Any) -> None:
    z = complex_(3)
    plain = host("vjp", "modulus", {"z": z}, wrt=["z"]).grads["z"]
    reply = host("vjp", "modulus", {"z": z}, wrt=["z"], max_norm=0.25)
    assert reply.norms == [pytest.approx(float(torch.linalg.vector_norm(plain)))]
    close(reply.grads["z"], plain * 0.25 / (reply.norms[0] + 1e-6))
    assert reply.grads["z"].dtype == torch.complex128


def test_the_norm_of_half_precision_gradients_does_not_overflow(host: Any) -> None:
    x = torch.full((100,), 100.0, dtype=torch.float16)
    v = torch.full((100,), 2.0, dtype=torch.float16)
    reply = host("vjp", "cube", {"x": x}, wrt=["x"], cotangents={"output": v}, max_norm=1000.0)
    assert reply.norms == [pytest.approx(600000, rel=1e-3)]
    assert reply.grads["x"].dtype == torch.float16 and reply.grads["x"].tolist() == [pytest.approx(100, rel=1e-3)] * 100


def test_nan_and_inf_are_values() -> None:
    host = jobs.Host(ZOO["not_finite"])
    x = torch.tensor([0.0, -1.0, float("inf"), float("nan"), 1.0])
    reply = host("vjp", "not_finite", {"x": x}, wrt=["x"], cotangents={"output": torch.ones(5)}, max_norm=None)
    leaf = x.clone().requires_grad_()
    expected = torch.log(leaf)
    (gradient,) = torch.autograd.grad(expected, leaf, torch.ones(5))
    torch.testing.assert_close(reply.outputs["output"], expected.detach(), equal_nan=True)
    torch.testing.assert_close(reply.grads["x"], gradient, equal_nan=True)


def test_a_penalty_on_gradients(host: Any) -> None:
    """d/dx sum(g * x) with g = df/dx: what is silently wrong wherever a gradient has lost its graph."""
    local = Local("small")
    x = local.values["input"]
    v = real(2, 2)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(local.code(leaf), leaf, v, create_graph=True)
    (expected,) = torch.autograd.grad((g * leaf).sum(), leaf)
    reply = host("hvp", "small", {"input": x}, wrt=["input"], cotangents={"output": v}, tangents={"input": x})
    close(reply.hvps["input"] + reply.grads["input"], expected)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_and_any_number_of_cotangents(data: Any) -> None:
    """f(x, y) = sin(x) * y + x.sum(), over shapes that broadcast, with K cotangents."""
    shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=3)))
    narrow = tuple(data.draw(st.sampled_from([extent, 1])) for extent in shape)
    count = data.draw(st.integers(1, 3))

    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.sin(x) * y + x.sum()

    x, y, v = real(*shape), real(*narrow), real(count, *shape)
    host = jobs.host_function(function)
    reply = host("vjp", "f", {"x": x, "y": y}, wrt=["y", "x"], cotangents={"output": v}, batched=True)
    for k in range(count):
        leaves = [y.clone().requires_grad_(), x.clone().requires_grad_()]
        expected = torch.autograd.grad(function(leaves[1], leaves[0]), leaves, v[k])
        close([reply.grads["y"][k], reply.grads["x"][k]], list(expected))
    t = {"x": real(*shape), "y": real(*narrow)}
    pushed = host("jvp", "f", {"x": x, "y": y}, wrt=["x", "y"], tangents=t).grads["output"]
    close((v[0] * pushed).sum(), (reply.grads["x"][0] * t["x"]).sum() + (reply.grads["y"][0] * t["y"]).sum())
