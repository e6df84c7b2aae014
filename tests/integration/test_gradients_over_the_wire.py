"""Derivatives through the whole stack, against local torch in float64 and against finite differences.

Conventions: y = f(x), J = dy/dx; a VJP is J^H v in torch's convention; <a, b> = Re sum(conj(a) b).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import zoo as models
from tests.both_clients import connecting
from torch import Tensor, nn

import pullback as pb
from pullback_server import Server, model, spec
from pullback_server.hosting.spec import registrations_of

Array = np.ndarray
Arrays = dict[str, Array]


# ---- the oracle


def local(name: str) -> Callable[..., Any]:
    """The zoo's model in this process: the function, or the module that its factory builds, in eval mode."""
    for value in vars(models).values():
        for registration in registrations_of(value) if callable(value) else ():
            if registration.name == name:
                built = value() if registration.kind == "factory" or not value.__code__.co_argcount else value
                return built.eval() if isinstance(built, nn.Module) else built
    raise LookupError(name)


def leaves_of(value: Any) -> list[Tensor]:
    """Tensors of a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [leaf for child in value for leaf in leaves_of(child)]
    return []


def differentiable(tensor: Tensor | Array) -> bool:
    if isinstance(tensor, Tensor):
        return tensor.is_floating_point() or tensor.is_complex()
    return tensor.dtype.kind in "fc"


@dataclass
class Oracle:
    """f as autograd sees it here: values of inputs and parameters in, outputs that need grad out."""

    target: Callable[..., Any]
    inputs: Arrays

    def run(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        inputs = {name: values.get(name, torch.as_tensor(array)) for name, array in self.inputs.items()}
        inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        parameters = {name: tensor for name, tensor in values.items() if name not in self.inputs}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            if isinstance(self.target, nn.Module):
                return leaves_of(torch.func.functional_call(self.target, parameters, kwargs=inputs))
            return leaves_of(self.target(**inputs))

    def start(self, wrt: Sequence[str]) -> dict[str, Tensor]:
        """Fresh leaves for inputs and parameters."""
        given = {name: torch.as_tensor(self.inputs[name]) for name in wrt if name in self.inputs}
        if isinstance(self.target, nn.Module):
            given |= {name: tensor for name, tensor in self.target.named_parameters() if name in wrt}
        return {name: given[name].detach().clone().requires_grad_() for name in wrt}

    def vjp(self, wrt: Sequence[str], v: Sequence[Array]) -> Arrays:
        leaves = self.start(wrt)
        outputs = [output for output in self.run(leaves) if output.requires_grad]
        found = torch.autograd.grad(outputs, list(leaves.values()), [torch.as_tensor(each) for each in v])
        return {name: gradient.detach().numpy() for name, gradient in zip(leaves, found, strict=True)}

    def hvp(self, wrt: Sequence[str], v: Sequence[Array], t: Arrays) -> tuple[Arrays, Arrays, list[Array]]:
        """(VJP, d<VJP, t>/dx, d<VJP, t>/dv)."""
        leaves = self.start(wrt)
        outputs = [output for output in self.run(leaves) if output.requires_grad]
        cotangents = [torch.as_tensor(each).requires_grad_() for each in v]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents, create_graph=True)
        along = sum(
            (gradient * torch.as_tensor(t[name]).conj()).sum().real
            for name, gradient in zip(leaves, gradients, strict=True)
            if name in t
        )
        found = torch.autograd.grad(along, [*leaves.values(), *cotangents], materialize_grads=True)
        numbers = [each.numpy() for each in found]
        return (
            {name: gradient.detach().numpy() for name, gradient in zip(leaves, gradients, strict=True)},
            dict(zip(leaves, numbers[: len(leaves)], strict=True)),
            numbers[len(leaves) :],
        )


def inner(left: Mapping[str, Array], right: Mapping[str, Array]) -> float:
    return float(sum(np.sum(np.conj(left[name]) * right[name]).real for name in right))


def like(array: Array, rng: np.random.Generator) -> Array:
    drawn = rng.standard_normal(array.shape)
    if array.dtype.kind == "c":
        drawn = drawn + 1j * rng.standard_normal(array.shape)
    return np.asarray(drawn).astype(array.dtype)


# ---- what is differentiated


@dataclass(frozen=True)
class Subject:
    """A model of the zoo at a point.

    second: whether second order must be there ("yes"), must be refused ("no"), or may be either, but right ("may").
    """

    name: str
    inputs: Arrays
    wrt: tuple[str, ...]
    second: str = "yes"
    forward: str = "yes"


_rng = np.random.default_rng(7)


def draw(*shape: int) -> Array:
    return np.asarray(_rng.standard_normal(shape))


def complex_(*shape: int) -> Array:
    return draw(*shape) + 1j * draw(*shape)


WORDS = {"ids": np.array([[1, 4, 10], [0, 1, 1]]), "mask": np.abs(draw(2, 3))}
SUBJECTS = [
    Subject("cube", {"x": draw(4, 3)}, ("x",)),
    Subject("square_sum", {"x": draw(5)}, ("x",)),
    Subject("mixed", {"x": draw(4), "y": draw(4)}, ("x", "y")),
    Subject("mixed", {"x": draw(4), "y": draw(4), "scale": draw()}, ("scale", "x", "y")),
    Subject("mixed", {"x": draw(4), "y": draw(4), "scale": draw()}, ("y",)),
    Subject("pair", {"x": draw(3)}, ("x",)),
    Subject("holomorphic", {"z": complex_(4)}, ("z",)),
    Subject("modulus", {"z": complex_(4)}, ("z",)),
    Subject("in_place", {"x": draw(2, 3)}, ("x",)),
    Subject("force", {"x": draw(4, 3)}, ("x",)),
    Subject("stop_gradient", {"x": draw(5)}, ("x",)),
    Subject("straight_through", {"x": draw(5)}, ("x",), "may", "may"),
    Subject("reversal", {"x": draw(5)}, ("x",), "may", "may"),
    Subject("custom_right", {"x": draw(5)}, ("x",), "yes", "may"),
    Subject("custom_unprobed", {"x": draw(5)}, ("x",), "may", "may"),
    Subject("once", {"x": draw(5)}, ("x",), "no", "may"),
    Subject("in_numpy", {"x": draw(5)}, ("x",), "no", "may"),
    Subject("hidden", {"x": draw(5)}, ("x",), "no", "may"),
    Subject("small", {"input": draw(4, 3)}, ("input",)),
    Subject("small", {"input": draw(4, 3)}, ("input", "0.weight", "0.bias", "2.weight", "2.bias")),
    Subject("tied", {"x": draw(2, 3)}, ("x", "first.weight", "second.bias")),
    Subject("words", WORDS, ("mask", "embedding.weight", "head.bias")),
    Subject("words", {"ids": WORDS["ids"]}, ("embedding.weight",)),
    Subject("lstm", {"x": draw(2, 3, 3)}, ("x", "cell.weight_hh_l0")),
    Subject("gru", {"x": draw(2, 3, 3)}, ("x", "cell.weight_ih_l0")),
    Subject("conv", {"image": draw(2, 2, 4, 3)}, ("image", "conv.weight", "norm.weight")),
    Subject("transformer", {"src": draw(2, 3, 4)}, ("src", "self_attn.in_proj_weight")),
    Subject("compiled", {"input": draw(2, 3)}, ("input",), "may", "may"),
]


def subject_id(subject: Subject) -> str:
    return f"{subject.name}-{'+'.join(subject.wrt)}"


every_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=subject_id)


@pytest.fixture(scope="module", params=["sync", pytest.param("aio", marks=pytest.mark.slow)])
def client(zoo: str, request: pytest.FixtureRequest) -> Iterator[pb.Client]:
    with connecting(request.param) as connect, connect(zoo, timeout=60) as client:
        yield client


@dataclass
class Case:
    """A subject with everything random that its tests share."""

    subject: Subject
    remote: pb.RemoteModel
    oracle: Oracle
    names: list[str] = field(default_factory=list)
    v: list[Array] = field(default_factory=list)
    t: Arrays = field(default_factory=dict)

    @property
    def cotangents(self) -> Arrays:
        return dict(zip(self.names, self.v, strict=True))

    def vjp(self) -> Arrays:
        return self.oracle.vjp(self.subject.wrt, self.v)


@pytest.fixture
def case(subject: Subject, client: pb.Client) -> Case:
    rng = np.random.default_rng(len(subject.name))
    remote = client.model(subject.name)
    # The oracle of a compiled model is the module inside.
    target = local(subject.name)
    oracle = Oracle(getattr(target, "_orig_mod", target), subject.inputs)
    outputs = remote.evaluate(subject.inputs)
    outputs = outputs if isinstance(outputs, dict) else {"output": outputs}
    leaves = oracle.start(subject.wrt)
    expected = oracle.run(leaves)
    for (name, got), wanted in zip(outputs.items(), expected, strict=True):
        np.testing.assert_allclose(got, wanted.detach().numpy(), rtol=1e-10, atol=1e-12, err_msg=name)
    case = Case(subject, remote, oracle)
    case.names = [name for name, wanted in zip(outputs, expected, strict=True) if wanted.requires_grad]
    case.v = [like(outputs[name], rng) for name in case.names]
    case.t = {name: like(leaf.detach().numpy(), rng) for name, leaf in leaves.items()}
    return case


def dict_of(gradients: Any, wrt: Sequence[str]) -> dict[str, Any]:
    """Gradients by name, however many there are."""
    return gradients if isinstance(gradients, dict) else {wrt[0]: gradients}


def same(got: Mapping[str, Any], wanted: Mapping[str, Array], rtol: float = 1e-8) -> None:
    assert list(got) == list(wanted)
    for name, array in wanted.items():
        assert got[name] is not None, f"{name} came back as unused"
        assert got[name].dtype == array.dtype, name
        np.testing.assert_allclose(got[name], array, rtol=rtol, atol=1e-10, err_msg=name)


# ---- each derivative of each model


def test_signatures_tell_the_shapes_of_outputs(client: pb.Client) -> None:
    """Learned at load; None where an extent is free, and nothing more is known of it."""
    shapes = {
        name: {one.name: one.shape for one in client.model(name).info.outputs}
        for name in ("mlp", "lstm", "force", "mixed", "words", "compiled")
    }
    assert shapes["mlp"] == {"output": ("batch", 10)}
    lstm = {"output_0": ("batch", "time", 4), "output_1.0": (1, "batch", 4), "output_1.1": (1, "batch", 4)}
    assert shapes["lstm"] == lstm
    assert shapes["force"] == {"energy": (), "force": ("n", 3)}
    assert shapes["mixed"] == {"product": ("n",), "parts.0": ("n",), "parts.1": (), "count": ()}
    assert shapes["words"] == {"output": None}, "it has an optional input of an unknown shape"
    assert shapes["compiled"] == {"output": ("batch", 2)}
    assert "(output: float32[batch, 10])" in repr(client.model("mlp").info)


@every_subject
def test_vjp(case: Case) -> None:
    wrt = list(case.subject.wrt)
    same(dict_of(case.remote.vjp(case.subject.inputs, case.cotangents, wrt=wrt).gradients, wrt), case.vjp())


@every_subject
def test_several_cotangents_at_once_are_each_alone(case: Case) -> None:
    wrt = list(case.subject.wrt)
    rng = np.random.default_rng(0)
    rows = [{name: like(array, rng) for name, array in case.cotangents.items()} for _ in range(3)]
    stacked = {name: np.stack([row[name] for row in rows]) for name in case.names}
    got = dict_of(case.remote.vjp(case.subject.inputs, stacked, wrt=wrt, batched=True).gradients, wrt)
    alone = [case.oracle.vjp(wrt, [row[name] for name in case.names]) for row in rows]
    same(got, {name: np.stack([one[name] for one in alone]) for name in wrt})


@every_subject
def test_jvp_is_the_adjoint_of_vjp(case: Case) -> None:
    """<v, J t> = <J^H v, t>, for each output, against this process's J^H v."""
    try:
        got = case.remote.jvp(case.subject.inputs, case.t).tangents
    except pb.errors.OrderUnavailable as error:
        assert case.subject.forward == "may", error
        return
    got = got if isinstance(got, dict) else {case.names[0]: got}
    left = inner({name: got[name] for name in case.names}, case.cotangents)
    right = inner(case.vjp(), case.t)
    np.testing.assert_allclose(left, right, rtol=1e-8, atol=1e-10)
    _, _, wanted = case.oracle.hvp(case.subject.wrt, case.v, case.t) if case.subject.second != "no" else ({}, {}, None)
    if wanted is not None:
        same({name: got[name] for name in case.names}, dict(zip(case.names, wanted, strict=True)))


@every_subject
def test_hvp(case: Case) -> None:
    wrt = list(case.subject.wrt)
    try:
        got = case.remote.hvp(case.subject.inputs, case.t, case.cotangents, wrt=wrt, cotangent_derivatives=True)
    except pb.errors.OrderUnavailable as error:
        assert case.subject.second in ("no", "may"), error
        return
    assert case.subject.second != "no", "second order cannot be right here"
    gradients, hvps, pushed = case.oracle.hvp(wrt, case.v, case.t)
    same(dict_of(got.gradients, wrt), gradients)
    same(dict_of(got.hvps, wrt), hvps)
    by_output = got.cotangent_derivatives
    by_output = by_output if isinstance(by_output, dict) else {case.names[0]: by_output}
    same(by_output, dict(zip(case.names, pushed, strict=True)))


@every_subject
def test_hvp_is_the_slope_of_vjp(case: Case) -> None:
    """Finite differences of this process's VJP, which know nothing of double backward."""
    wrt = list(case.subject.wrt)
    try:
        got = dict_of(case.remote.hvp(case.subject.inputs, case.t, case.cotangents, wrt=wrt).hvps, wrt)
    except pb.errors.OrderUnavailable:
        return
    if case.subject.name == "stop_gradient" or any(name not in case.subject.inputs for name in wrt):
        pytest.skip("a constant of the model's own making is one to second order too; moves inputs only")
    step = 1e-6
    direction = {name: like(case.subject.inputs[name], np.random.default_rng(5)) for name in wrt}

    def slope(sign: float) -> float:
        moved = {
            **case.subject.inputs,
            **{name: case.subject.inputs[name] + sign * step * direction[name] for name in wrt},
        }
        return inner(Oracle(case.oracle.target, moved).vjp(wrt, case.v), case.t)

    np.testing.assert_allclose(inner(got, direction), (slope(1) - slope(-1)) / (2 * step), rtol=1e-5, atol=1e-6)


@every_subject
def test_hvp_moves_one_and_returns_all(case: Case) -> None:
    """A tangent for the last of wrt alone: the mixed terms of all others."""
    wrt = list(case.subject.wrt)
    one = {wrt[-1]: case.t[wrt[-1]]}
    try:
        got = case.remote.hvp(case.subject.inputs, one, case.cotangents, wrt=wrt)
    except pb.errors.OrderUnavailable:
        assert case.subject.second in ("no", "may")
        return
    same(dict_of(got.hvps, wrt), case.oracle.hvp(wrt, case.v, one)[1])


DENSE = {"square_sum", "small", "tied", "words", "conv", "transformer", "hidden"}
REAL = [subject for subject in SUBJECTS if all(array.dtype.kind != "c" for array in subject.inputs.values())]


@pytest.mark.parametrize("subject", REAL, ids=subject_id)
def test_jacobian(case: Case) -> None:
    wrt = list(case.subject.wrt)
    got = case.remote.jacobian(case.subject.inputs, wrt=wrt)
    blocks = got if isinstance(got, dict) else {(case.names[0], wrt[0]): got}
    for at, row in enumerate(case.names):
        rows = []
        for index in np.ndindex(case.v[at].shape):
            v = [np.zeros_like(each) for each in case.v]
            v[at][index] = 1
            rows.append(case.oracle.vjp(wrt, v))
        for name in wrt:
            wanted = np.stack([one[name] for one in rows]).reshape(case.v[at].shape + rows[0][name].shape)
            block = blocks[row, name]
            if block is None:
                np.testing.assert_array_equal(wanted, 0)
            else:
                assert block.shape == wanted.shape
                np.testing.assert_allclose(block, wanted, rtol=1e-8, atol=1e-10, err_msg=f"{row} by {name}")


@pytest.mark.parametrize(
    "subject",
    [
        each
        for each in SUBJECTS
        if each.name in ("square_sum", "small", "tied", "words", "conv", "transformer", "hidden")
    ],
    ids=subject_id,
)
def test_hessian(case: Case) -> None:
    """Of the sum of squares of the outputs, as mse_loss against zeros."""
    wrt = [name for name in case.subject.wrt if case.t[name].size <= 50]
    loss: dict[str, Any] = {}
    if case.subject.name != "square_sum":
        zeros = np.zeros_like(case.v[0])
        loss = {"loss": pb.Loss("mse_loss", reduction="sum"), "target": zeros}

    def scalar(*values: Tensor) -> Tensor:
        (output,) = case.oracle.run(dict(zip(wrt, values, strict=True)))
        return output if case.subject.name == "square_sum" else (output**2).sum()

    try:
        outputs, gradients, got = case.remote.hessian(case.subject.inputs, wrt=wrt, return_outputs=True, **loss)
    except pb.errors.OrderUnavailable:
        assert case.subject.second != "yes"
        return
    assert case.subject.second != "no"
    leaves = tuple(leaf.detach() for leaf in case.oracle.start(wrt).values())
    wanted = torch.autograd.functional.hessian(scalar, leaves)
    blocks = got if isinstance(got, dict) else {(wrt[0], wrt[0]): got}
    for row, name in enumerate(wrt):
        for column, other in enumerate(wrt):
            np.testing.assert_allclose(blocks[name, other], wanted[row][column].detach(), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(outputs, scalar(*leaves).detach(), rtol=1e-10)
    gradient = torch.autograd.functional.jacobian(scalar, leaves)
    same(dict_of(gradients, wrt), {name: each.detach().numpy() for name, each in zip(wrt, gradient, strict=True)})


# ---- backwards that are not what they seem


class Straight(torch.autograd.Function):
    """floor, whose gradient is twice the cotangent: neither true nor the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.floor()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Cubed(torch.autograd.Function):
    """x ** 3. `how` says how its backward knows x: "saved" is right to every order, "hidden" only to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: str) -> Tensor:
        ctx.how, ctx.hidden = how, x.detach().clone()
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x = ctx.saved_tensors[0] if ctx.how == "saved" else ctx.hidden
        if ctx.how == "no_grad":
            with torch.no_grad():
                return gradient * 3 * x**2, None
        return gradient * 3 * x**2, None


class Hidden(torch.autograd.Function):
    """The same, always hidden."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.hidden = x.detach().clone()
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3 * ctx.hidden**2


N = {"x": spec("float64", ["n"])}
#: Not the derivative of the forward.
AS_WRITTEN = {"gradient": "to be taken as it is written"}


@model("floored", inputs=N, outputs=["y"], intended=AS_WRITTEN)
def floored(x: Tensor) -> Tensor:
    return Straight.apply(x) * x


@model("hidden", inputs=N, outputs=["y"])
def hidden(x: Tensor) -> Tensor:
    return Cubed.apply(x, "hidden") + x.sin()


@model("without_grad", inputs=N, outputs=["y"])
def without_grad(x: Tensor) -> Tensor:
    return Cubed.apply(x, "no_grad") + x.sin()


@model("hidden_far_out", inputs=N, outputs=["y"])
def hidden_far_out(x: Tensor) -> Tensor:
    """Where a probe looks, operations of torch alone."""
    return (Hidden.apply(x) if x[0] > 50 else x**3) + x.sin()


@model("another_far_out", inputs=N, outputs=["y"])
def another_far_out(x: Tensor) -> Tensor:
    """Where a probe looks, another Function, which is right."""
    return (Hidden.apply(x) if x[0] > 50 else Cubed.apply(x, "saved")) + x.sin()


@model("hook_hides", inputs=N, outputs=["y"], intended=AS_WRITTEN)
def hook_hides(x: Tensor) -> Tensor:
    """A tensor hook whose factor is a constant to double backward: no Function is in the graph."""
    h = x**3
    if h.requires_grad:
        scale = h.detach()
        h.register_hook(lambda gradient: gradient * scale)
    return h + x.sin()


@model("hook_detaches", inputs=N, outputs=["y"], intended=AS_WRITTEN)
def hook_detaches(x: Tensor) -> Tensor:
    """A tensor hook that gives a gradient with no history."""
    h = x**3
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient.detach() * 2)
    return h + x.sin()


@model("hook_scales", inputs=N, outputs=["y"], intended=AS_WRITTEN)
def hook_scales(x: Tensor) -> Tensor:
    """A harmless tensor hook: torch operations of the gradient."""
    h = x**3
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * 2)
    return h + x.sin()


@model("hook_normalises", inputs=N, outputs=["y"], intended=AS_WRITTEN)
def hook_normalises(x: Tensor) -> Tensor:
    """A hook whose factor is a number: the backward is not linear in the cotangent."""
    h = x**3
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient / float(gradient.detach().norm() + 1))
    return h + x.sin()


@model("node_hook", inputs=N, outputs=["y"], intended=AS_WRITTEN)
def node_hook(x: Tensor) -> Tensor:
    """The same as hook_hides, with the hook on the graph's node instead of the tensor."""
    h = x**3
    if h.grad_fn is not None:
        scale = h.detach()
        h.grad_fn.register_hook(lambda gradients, _: (gradients[0] * scale,))
    return h + x.sin()


@model("node_prehook", inputs=N, outputs=["y"], intended=AS_WRITTEN)
def node_prehook(x: Tensor) -> Tensor:
    """And before the node."""
    h = x**3
    if h.grad_fn is not None:
        scale = h.detach()
        h.grad_fn.register_prehook(lambda gradients: (gradients[0] * scale,))
    return h + x.sin()


@model("hook_far_out", inputs=N, outputs=["y"])
def hook_far_out(x: Tensor) -> Tensor:
    """A hook where no probe looks."""
    h = x**3
    if h.requires_grad and x[0] > 50:
        scale = h.detach()
        h.register_hook(lambda gradient: gradient * scale)
    return h + x.sin()


@model("one_function_two_ways", inputs=N, outputs=["y"])
def one_function_two_ways(x: Tensor) -> Tensor:
    """Where a probe looks, the same Function, used rightly."""
    return Cubed.apply(x, "hidden" if x[0] > 50 else "saved") + x.sin()


@model("hook_on_the_input", inputs=N, outputs=["y"], intended=AS_WRITTEN)
def hook_on_the_input(x: Tensor) -> Tensor:
    """The hook sits on the leaf that is differentiated."""
    if x.requires_grad:
        scale = x.detach().exp()
        x.register_hook(lambda gradient: gradient * scale)
    return x**3


class Hooked(nn.Module):
    """A full backward hook that hides the layer's input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Tanh()
        self.layer.register_full_backward_hook(self.hook)
        self.last: Tensor | None = None

    def hook(self, module: nn.Module, inputs: Any, outputs: Any) -> tuple[Tensor]:
        assert self.last is not None
        return (inputs[0] * self.last,)

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach().exp()
        result: Tensor = self.layer(x)
        return result * x


@model("module_hook", inputs=N, outputs=["y"], intended=AS_WRITTEN)
def module_hook() -> nn.Module:
    return Hooked()


@model("checkpointed", inputs=N, outputs=["y"])
def checkpointed(x: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    result: Tensor = checkpoint(lambda z: z.sin() * z**2, x, use_reentrant=False)
    return result * x


@model("checkpointed_reentrant", inputs=N, outputs=["y"])
def checkpointed_reentrant(x: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    result: Tensor = checkpoint(lambda z: z.sin() * z**2, x, use_reentrant=True)
    return result * x


@model("saved_elsewhere", inputs=N, outputs=["y"])
def saved_elsewhere(x: Tensor) -> Tensor:
    """Saved tensors come back as copies without history where the hooks say so."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy):
        return x.cos() * x**2


@model("func_inside", inputs=N, outputs=["y"])
def func_inside(x: Tensor) -> Tensor:
    return torch.func.grad(lambda z: (z**3 * z.sin()).sum())(x) * x


@model("detaches", inputs=N, outputs=["y"], intended=AS_WRITTEN)
def detaches(x: Tensor) -> Tensor:
    return x.detach() ** 2 * x.sin()


@model("linear", inputs=N, outputs=["y"])
def linear(x: Tensor) -> Tensor:
    return 3 * x


@model("kinked", inputs=N, outputs=["y"])
def kinked(x: Tensor) -> Tensor:
    return x.relu() + x.abs()


@model("twice_the_same", inputs=N, outputs=["first", "second"])
def twice_the_same(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x**3
    return y, y


@model("itself_and_more", inputs=N, outputs=["x", "y"])
def itself_and_more(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x**2


ODD = [
    floored, hidden, without_grad, hidden_far_out, another_far_out, one_function_two_ways, hook_hides, hook_detaches,
    hook_scales, hook_normalises, hook_far_out, node_hook, node_prehook, hook_on_the_input, module_hook, checkpointed,
    checkpointed_reentrant, saved_elsewhere, func_inside, detaches, linear, kinked, twice_the_same, itself_and_more,
]  # fmt: skip
#: Those which are smooth compositions of torch's own operations: nothing stands against their second order.
PLAIN = {"detaches", "linear", "kinked", "twice_the_same", "itself_and_more", "func_inside", "hook_scales"}


class Stateful(nn.Module):
    """Writes to its buffers and its weights while it runs, and answers from them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight + self.calls


class Rescaling(Stateful):
    """Writes into its weight."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(2)
        return x * self.weight


@model("counting", inputs=N, outputs=["y"])
def counting() -> nn.Module:
    return Stateful()


@model("rescaling", inputs=N, outputs=["y"], intended=AS_WRITTEN)
def rescaling() -> nn.Module:
    return Rescaling()


class Spectral(nn.Module):
    """Power iteration moves buffers in train mode."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3).double())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


@model("spectral", inputs={"x": spec("float64", ["n", 3])}, outputs=["y"])
def spectral() -> nn.Module:
    return Spectral()


@pytest.fixture(scope="module")
def odd() -> Iterator[pb.Client]:
    with (
        Server(*ODD, counting, rescaling, spectral, threads=1, devices="cpu:1") as server,
        pb.connect(server.target, timeout=60) as client,
    ):
        yield client


NEAR = np.array([0.3, -0.7, 1.1])
FAR = np.array([51.0, -0.7, 1.1])
V = np.array([1.0, -2.0, 0.5])
T = np.array([0.2, 1.0, -0.4])
odd_models = pytest.mark.parametrize("name", [each.__name__ for each in ODD])
points = pytest.mark.parametrize("x", [NEAR, FAR], ids=["near", "far"])


def first_order(name: str, x: Array, v: Array) -> Array:
    """The VJP as this process computes it, of all outputs."""
    target = {each.__name__: each for each in ODD}[name]
    built: Any = target() if name == "module_hook" else target
    leaf = torch.from_numpy(x.copy()).requires_grad_()
    outputs = leaves_of(built(leaf.clone() if name != "hook_on_the_input" else leaf))
    cotangents = [torch.from_numpy(v)] * len(outputs)
    if name == "checkpointed_reentrant":
        torch.autograd.backward(outputs, cotangents)
        assert leaf.grad is not None
        return leaf.grad.numpy()
    (gradient,) = torch.autograd.grad(outputs, leaf, cotangents)
    return gradient.detach().numpy()


def of_all_outputs(name: str, v: Array) -> Any:
    outputs = {"twice_the_same": ("first", "second"), "itself_and_more": ("x", "y")}.get(name, ("y",))
    return dict.fromkeys(outputs, v)


@points
@odd_models
def test_a_backward_is_taken_as_written(odd: pb.Client, name: str, x: Array) -> None:
    try:
        got = odd.model(name).vjp(x, of_all_outputs(name, V)).gradients
    except pb.errors.PullbackError:
        # torch itself refuses autograd.grad through a reentrant checkpoint.
        assert name == "checkpointed_reentrant"
        return
    np.testing.assert_allclose(got, first_order(name, x, V), rtol=1e-10)


@points
@odd_models
def test_many_cotangents_are_pulled_back_as_each_alone(odd: pb.Client, name: str, x: Array) -> None:
    """Whatever a backward does to a cotangent, its neighbours in the batch, or in a Jacobian, do not show."""
    rows = np.array([V, 10 * V, -T, np.zeros(3)])
    try:
        got = odd.model(name).vjp(x, of_all_outputs(name, rows), batched=True).gradients
        jacobian = odd.model(name).jacobian(x)
    except pb.errors.PullbackError as error:
        assert name == "checkpointed_reentrant", error
        return
    np.testing.assert_allclose(got, [first_order(name, x, row) for row in rows], rtol=1e-10)
    if not isinstance(jacobian, dict):
        np.testing.assert_allclose(jacobian, [first_order(name, x, e) for e in np.eye(3)], rtol=1e-10, atol=1e-12)


@points
@odd_models
def test_second_order_is_right_or_refused(odd: pb.Client, name: str, x: Array) -> None:
    """Right: the slope of the VJP as written, in x and in v.

    Twice, for what a first call may have taught the server.
    """
    if name == "detaches":
        pytest.skip("a constant of the model's own making is one to second order too")
    for _ in range(2):
        try:
            got = odd.model(name).hvp(x, T, of_all_outputs(name, V), cotangent_derivatives=True)
        except pb.errors.PullbackError as error:
            assert name not in PLAIN, error
            assert isinstance(error, pb.errors.OrderUnavailable) or name == "checkpointed_reentrant"
            continue
        step = 1e-6
        along = np.array(
            [
                (first_order(name, x + e, V) @ T - first_order(name, x - e, V) @ T) / (2 * step)
                for e in step * np.eye(len(x))
            ]
        )
        np.testing.assert_allclose(got.hvps, along, rtol=1e-5, atol=1e-6)
        pushed = got.cotangent_derivatives
        total = sum(pushed.values()) if isinstance(pushed, dict) else pushed
        np.testing.assert_allclose(total, [first_order(name, x, e) @ T for e in np.eye(len(x))], rtol=1e-8, atol=1e-10)


@points
@odd_models
def test_a_jvp_is_the_adjoint_of_the_backward_as_written_or_refused(odd: pb.Client, name: str, x: Array) -> None:
    try:
        got = odd.model(name).jvp(x, T).tangents
    except pb.errors.PullbackError as error:
        assert name not in PLAIN, error
        assert isinstance(error, pb.errors.OrderUnavailable) or name == "checkpointed_reentrant"
        return
    total = sum(got.values()) if isinstance(got, dict) else got
    np.testing.assert_allclose(total @ V, first_order(name, x, V) @ T, rtol=1e-8, atol=1e-10)


@odd_models
def test_what_the_signature_denies_is_refused(odd: pb.Client, name: str) -> None:
    """Model.orders: derivatives that are not promised come back as ORDER_UNAVAILABLE, where the probe looked."""
    remote = odd.model(name)
    if remote.info.max_order == 1:
        with pytest.raises(pb.errors.PullbackError):
            remote.hvp(NEAR, T, of_all_outputs(name, V))
    if not remote.info.forward_mode:
        with pytest.raises(pb.errors.PullbackError):
            remote.jvp(NEAR, T)


def test_the_second_order_of_a_linear_function_is_zero_and_not_unused(odd: pb.Client) -> None:
    got = odd.model("linear").hvp(NEAR, T, V)
    np.testing.assert_array_equal(got.hvps, np.zeros(3))
    np.testing.assert_allclose(got.gradients, 3 * V)


def test_buffers_that_a_call_writes_are_its_own(odd: pb.Client) -> None:
    remote = odd.model("counting")
    answers = [remote.evaluate(NEAR), remote.vjp(NEAR, V).outputs, remote.evaluate(NEAR, train=True)]
    answers += [remote.evaluate(NEAR), remote.jvp(NEAR, T).outputs, remote.hvp(NEAR, T, V).outputs]
    for answer in answers:
        np.testing.assert_array_equal(answer, NEAR + 1)


def test_weights_that_a_model_writes_are_not_the_hosted_ones(odd: pb.Client) -> None:
    """Stateless calls never change the hosted weights; refusing such a model would do as well."""
    remote = odd.model("rescaling")
    answers: list[Any] = []
    for call in (remote.evaluate, lambda x: remote.vjp(x, V).outputs, remote.evaluate):
        try:
            answers.append(call(NEAR))
        except pb.errors.ModelError:
            answers.append(None)
    for answer in answers:
        if answer is not None:
            np.testing.assert_array_equal(answer, 2 * NEAR)


def test_power_iteration_in_train_mode_leaves_the_hosted_buffers(odd: pb.Client) -> None:
    remote, x = odd.model("spectral"), np.ones((2, 3))
    before = remote.evaluate(x)
    trained = [remote.vjp(x, np.ones((2, 3)), train=True, seed=1) for _ in range(3)]
    for one in trained[1:]:
        np.testing.assert_array_equal(one.outputs, trained[0].outputs)
        np.testing.assert_array_equal(one.gradients, trained[0].gradients)
    np.testing.assert_array_equal(remote.evaluate(x), before)


# ---- modes and seeds

IMAGE = np.random.default_rng(11).standard_normal((3, 2, 5, 4))
LOGITS = np.random.default_rng(12).standard_normal((3, 4))


def test_a_seed_repeats_the_dropout_mask(client: pb.Client) -> None:
    remote = client.model("conv")
    first, again, other = (remote.vjp(IMAGE, LOGITS, train=True, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.outputs, again.outputs)
    np.testing.assert_array_equal(first.gradients, again.gradients)
    assert (first.outputs != other.outputs).any()
    assert (first.gradients != other.gradients).any()
    unseeded = [remote.evaluate(IMAGE, train=True) for _ in range(2)]
    assert (unseeded[0] != unseeded[1]).any()


@pytest.mark.parametrize("name", ["conv", "transformer"])
def test_every_kind_of_call_draws_the_same_mask_under_one_seed(client: pb.Client, name: str) -> None:
    """Finite differences of evaluate under the seed agree with VJP, JVP, Jacobian and HVP under it."""
    remote, rng = client.model(name), np.random.default_rng(1)
    x = IMAGE if name == "conv" else rng.standard_normal((2, 3, 4))
    mode: dict[str, Any] = {"train": True, "seed": 2**63 + 11}
    y = remote.evaluate(x, **mode)
    v, t, u = like(y, rng), like(x, rng), like(x, rng)
    step = 1e-6
    outputs, gradient = remote.vjp(x, v, **mode)
    np.testing.assert_array_equal(outputs, y)
    slope = (remote.evaluate(x + step * t, **mode) - remote.evaluate(x - step * t, **mode)) / (2 * step)
    np.testing.assert_allclose(np.sum(gradient * t), np.sum(slope * v), rtol=1e-5, atol=1e-7)
    outputs, pushed = remote.jvp(x, t, **mode)
    np.testing.assert_array_equal(outputs, y)
    np.testing.assert_allclose(pushed, slope, rtol=1e-4, atol=1e-7)
    jacobian = remote.jacobian(x, **mode)
    np.testing.assert_allclose(np.tensordot(jacobian, t, t.ndim), pushed, rtol=1e-8, atol=1e-10)
    bent = remote.hvp(x, t, v, cotangent_derivatives=True, **mode)
    # The kernels of higher order differ, so the last digits may.
    np.testing.assert_allclose(bent.outputs, y, rtol=1e-10)
    np.testing.assert_allclose(bent.gradients, gradient, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(bent.cotangent_derivatives, pushed, rtol=1e-8, atol=1e-10)
    ahead, behind = (remote.vjp(x + sign * step * u, v, **mode).gradients for sign in (1, -1))
    np.testing.assert_allclose(np.sum(bent.hvps * u), np.sum((ahead - behind) * t) / (2 * step), rtol=1e-4, atol=1e-6)


def test_batch_normalisation_in_train_mode_uses_the_batch_and_moves_nothing(client: pb.Client) -> None:
    remote = client.model("conv")
    before = remote.evaluate(IMAGE)
    shifted = IMAGE + 100
    for call in (remote.evaluate, lambda x, **mode: remote.vjp(x, LOGITS, **mode)):
        call(shifted, train=True, seed=1)
    remote.jvp(shifted, IMAGE, train=True, seed=1)
    remote.hvp(shifted, IMAGE, LOGITS, train=True, seed=1)
    np.testing.assert_array_equal(remote.evaluate(IMAGE), before)
    # The batch's statistics take a constant shift of all pixels out, but for the padding at the rim.
    assert np.abs(remote.evaluate(shifted) - before).max() > 1


def test_randomness_of_one_call_is_not_a_neighbours(client: pb.Client) -> None:
    """The same seed, from many threads among unseeded calls, draws the same numbers."""
    remote, x = client.model("noisy"), np.ones(64)
    wanted = remote.evaluate(x, seed=9)
    failures: list[str] = []

    def call(seeded: bool) -> None:
        for _ in range(10):
            got = remote.evaluate(x, seed=9 if seeded else None)
            if (got == wanted).all() != seeded:
                failures.append("seeded" if seeded else "unseeded")

    threads = [threading.Thread(target=call, args=(at % 2 == 0,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---- arrays of every make

BASE = np.arange(24, dtype="float64").reshape(4, 6) / 7 - 1
MAKES: dict[str, Array] = {
    "contiguous": BASE,
    "transposed": BASE.T,
    "Fortran": np.asfortranarray(BASE),
    "every other": BASE[::2, ::3],
    "reversed": BASE[::-1, ::-1],
    "an inner block": BASE[1:3, 2:5],
    "broadcast": np.broadcast_to(BASE[0], (4, 6)),
    "unaligned": np.frombuffer(b"\0" + BASE.tobytes(), "u1")[1:].view("f8").reshape(4, 6),
    "read-only": np.frombuffer(BASE.tobytes()).reshape(4, 6),
    "big-endian": BASE.astype(">f8"),
    "big-endian and transposed": BASE.astype(">f8").T,
    "0-d": np.array(1.5),
    "empty": np.zeros((0, 3)),
    "empty inside": np.zeros((2, 0, 3)),
    "one axis": BASE[:, 1],
    "many axes": BASE.reshape((1, 2, 1, 2, 1, 2, 3, 1)),
}


@pytest.mark.parametrize("make", MAKES)
def test_arrays_of_every_make(client: pb.Client, make: str) -> None:
    x = MAKES[make]
    kept = x.copy()
    v = MAKES[make][...] * 0.5 + 1
    v = v.astype(x.dtype)
    outputs, gradient = client.model("cube").vjp(x, v)
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_allclose(outputs, kept.astype("f8") ** 3, rtol=1e-14)
    np.testing.assert_allclose(gradient, 3 * kept.astype("f8") ** 2 * v.astype("f8"), rtol=1e-14)
    for result in (outputs, gradient):
        assert result.dtype == np.dtype("float64") and result.dtype.isnative
        assert result.shape == x.shape
        assert (result.flags.writeable and result.flags.aligned and result.flags.owndata) or result.size == 0
    pushed = client.model("cube").jvp(x, v).tangents
    np.testing.assert_allclose(pushed, gradient, rtol=1e-14)


@pytest.mark.parametrize("make", MAKES)
def test_a_model_that_writes_into_its_input_keeps_the_callers_and_the_graphs(client: pb.Client, make: str) -> None:
    x = MAKES[make]
    if x.ndim == 0 or x.size == 0:
        pytest.skip("it writes to x[..., 0]")
    kept, v = x.copy(), np.ones_like(x)
    remote = client.model("in_place")
    wanted = Oracle(models.in_place, {"x": kept.astype("f8")})
    for _ in range(2):
        got = remote.vjp(x, v).gradients
        np.testing.assert_allclose(got, wanted.vjp(["x"], [v.astype("f8")])["x"], rtol=1e-10)
        bent = remote.hvp(x, v, v)
        np.testing.assert_allclose(bent.hvps, wanted.hvp(["x"], [v.astype("f8")], {"x": v.astype("f8")})[1]["x"])
    np.testing.assert_array_equal(x, kept)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_and_any_slice(client: pb.Client, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    x = np.random.default_rng(len(shape)).standard_normal(shape)
    x = x.transpose(data.draw(st.permutations(range(x.ndim))))
    x = x[tuple(slice(None, None, data.draw(st.sampled_from([1, 2, -1]))) for _ in shape)]
    if data.draw(st.booleans()):
        x = x.astype(">f8")
    outputs, gradient = client.model("cube").vjp(x, x)
    np.testing.assert_allclose(outputs, x.astype("f8") ** 3)
    np.testing.assert_allclose(gradient, 3 * x.astype("f8") ** 3)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1, 1)])
def test_dense_derivatives_of_few_and_no_elements(client: pb.Client, shape: tuple[int, ...]) -> None:
    x = draw(*shape)
    got = client.model("cube").jacobian(x)
    assert got.shape == shape + shape
    np.testing.assert_allclose(got.reshape(x.size, x.size), np.diag(3 * x.reshape(-1) ** 2))
    got = client.model("square_sum").hessian(x)
    assert got.shape == shape + shape
    np.testing.assert_allclose(got.reshape(x.size, x.size), 2 * np.eye(x.size))


FLOATS = ["float16", "float32", "float64", "complex64", "complex128", "bfloat16"]


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_are_computed_and_returned_as_they_are(client: pb.Client, dtype: str) -> None:
    numpy_dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    kind = getattr(torch, dtype)
    x = torch.from_numpy(draw(5) + (1j * draw(5) if "complex" in dtype else 0)).to(kind).requires_grad_()
    v = torch.from_numpy(draw(5) + (1j * draw(5) if "complex" in dtype else 0)).to(kind)

    def array(tensor: Tensor) -> Array:
        tensor = tensor.detach()
        if dtype == "bfloat16":
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    y = models.cube(x)
    (wanted,) = torch.autograd.grad(y, x, v)
    remote = client.model("cube")
    outputs, gradient = remote.vjp(array(x), array(v))
    assert outputs.dtype == gradient.dtype == numpy_dtype
    np.testing.assert_array_equal(outputs, array(y))
    np.testing.assert_array_equal(gradient, array(wanted))
    np.testing.assert_array_equal(remote.vjp(x, v).gradients, array(wanted))
    pushed = remote.jvp(array(x), array(v)).tangents
    assert pushed.dtype == numpy_dtype


NARROW = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]


@pytest.mark.parametrize("dtype", NARROW)
def test_float8_travels_bit_by_bit(client: pb.Client, dtype: str) -> None:
    every = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, dtype))
    got = client.model("identity").evaluate(every)
    assert got.dtype == every.dtype
    np.testing.assert_array_equal(got.view(np.uint8), every.view(np.uint8))


@pytest.mark.parametrize("dtype", NARROW[:4])
def test_vjp_of_float8(client: pb.Client, dtype: str) -> None:
    x = np.array([1, 2, 0.5, -3]).astype(getattr(ml_dtypes, dtype))
    outputs, gradient = client.model("identity").vjp(x, x[::-1])
    assert outputs.dtype == gradient.dtype == x.dtype
    np.testing.assert_array_equal(gradient.astype("f4"), x[::-1].astype("f4"))


@pytest.mark.parametrize("dtype", ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", ">i4", ">u8"])
def test_integers_travel(client: pb.Client, dtype: str) -> None:
    x = np.array([[0, 1, 1], [1, 0, 0]], dtype=dtype)
    if x.dtype.kind != "b":
        x[0, 1] = np.iinfo(dtype).max
        x[1, 2] = np.iinfo(dtype).min
    got = client.model("identity").evaluate(x.T)
    assert got.dtype == x.dtype.newbyteorder("=")
    np.testing.assert_array_equal(got, x.T)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_results_in_a_dtype_of_the_callers_choice(client: pb.Client, dtype: str) -> None:
    x, v = draw(4), draw(4)
    wanted = torch.from_numpy(3 * x**2 * v).to(getattr(torch, dtype)).double().numpy()
    outputs, gradient = client.model("cube").vjp(x, v, result_dtype=dtype)
    assert gradient.dtype == outputs.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
    np.testing.assert_array_equal(gradient.astype("f8"), wanted)
    z = complex_(3)
    assert client.model("holomorphic").vjp(z, z, result_dtype=dtype).gradients.dtype == np.complex128


def test_results_that_are_views_of_inputs_and_of_each_other(client: pb.Client) -> None:
    x = draw(3, 3)
    for _ in range(2):
        got = client.model("views").evaluate(x)
        for name, wanted in {"same": x, "turned": x.T, "row": x[0], "flipped": x}.items():
            np.testing.assert_array_equal(got[name], wanted)
        got["same"][:] = 0
        np.testing.assert_array_equal(got["flipped"], x)
    z = complex_(2, 2)
    np.testing.assert_array_equal(client.model("views").evaluate(z)["flipped"], z.conj())


# ---- given parameters, names


def test_given_parameters_are_used_once_and_the_hosted_ones_kept(client: pb.Client) -> None:
    remote, x = client.model("small"), draw(4, 3)
    before = remote.evaluate(x)
    parameters = {"0.weight": draw(5, 3), "2.bias": draw(2)}
    module = local("small")
    with torch.no_grad():
        for name, array in parameters.items():
            module.get_parameter(name).copy_(torch.from_numpy(array))  # type: ignore[attr-defined]
    oracle, v = Oracle(module, {"input": x}), draw(4, 2)
    wrt = ["input", "0.weight", "0.bias", "2.weight", "2.bias"]
    t = {"0.weight": draw(5, 3), "2.bias": draw(2)}
    outputs, gradients = remote.vjp(x, v, wrt=["*"], parameters=parameters)
    np.testing.assert_allclose(outputs, oracle.run({})[0].detach().numpy(), rtol=1e-12)
    same({name: gradients[name] for name in wrt}, oracle.vjp(wrt, [v]))
    bent = remote.hvp(x, t, v, wrt=wrt, parameters=parameters)
    same(bent.hvps, oracle.hvp(wrt, [v], t)[1])
    np.testing.assert_array_equal(remote.evaluate(x), before)


def test_a_tied_parameter_given_once_counts_twice(client: pb.Client) -> None:
    remote, x, v = client.model("tied"), draw(2, 3), draw(2, 3)
    weight = draw(3, 3)
    outputs, gradients = remote.vjp(x, v, wrt=["first.weight"], parameters={"first.weight": weight})
    leaf = torch.from_numpy(weight).requires_grad_()
    bias = dict(local("tied").named_parameters())["second.bias"]  # type: ignore[attr-defined]
    y = torch.tanh(torch.from_numpy(x) @ leaf.T) @ leaf.T + bias
    np.testing.assert_allclose(outputs, y.detach().numpy(), rtol=1e-12)
    wanted = torch.autograd.grad(y, leaf, torch.from_numpy(v))[0].numpy()
    np.testing.assert_allclose(dict_of(gradients, ["first.weight"])["first.weight"], wanted, rtol=1e-10)


def test_gradients_come_in_the_order_and_under_the_names_asked_for(client: pb.Client) -> None:
    remote, x, v = client.model("small"), draw(1, 3), draw(1, 2)
    got = remote.vjp(x, v, wrt=["2.*", "input", "param:0.bias"]).gradients
    assert list(got) == ["2.weight", "2.bias", "input", "0.bias"]


def test_unused_is_none_and_zero_is_zero(client: pb.Client) -> None:
    remote, x = client.model("half_used"), draw(3)
    assert remote.vjp((x, x), x, allow_unused=True).gradients[1] is None
    with pytest.raises(pb.errors.UnusedInput, match="y"):
        remote.vjp((x, x), x)


def test_only_the_outputs_with_a_cotangent_are_pulled_back(client: pb.Client) -> None:
    x = draw(3)
    got = client.model("pair").vjp(x, {"narrow": np.array([2.0])}).gradients
    np.testing.assert_allclose(got, [2 * np.exp(x[0]), 0, 0])


# ---- losses


@dataclass(frozen=True)
class LossCase:
    """A loss of the model "identity"; tensors in torch's order, the first fed by the model."""

    name: str
    input: Array
    tensors: Arrays
    options: dict[str, Any] = field(default_factory=dict)


def probabilities(*shape: int) -> Array:
    return 1 / (1 + np.exp(-draw(*shape)))


CLASSES = np.array([0, 2, 1, 2])
SIGNS = np.array([1.0, -1, 1, -1])
LOSS_CASES = [
    LossCase("mse_loss", draw(4, 3), {"target": draw(4, 3)}),
    LossCase("mse_loss", draw(4, 3), {"target": draw(4, 3)}, {"reduction": "sum"}),
    LossCase("mse_loss", draw(4, 3), {"target": draw(4, 3), "weight": probabilities(4, 3)}),
    LossCase("l1_loss", draw(4, 3), {"target": draw(4, 3)}),
    LossCase("smooth_l1_loss", draw(4, 3), {"target": draw(4, 3)}),
    LossCase("smooth_l1_loss", draw(4, 3), {"target": draw(4, 3)}, {"beta": 0.25}),
    LossCase("huber_loss", draw(4, 3), {"target": draw(4, 3)}, {"delta": 0.25}),
    LossCase("cross_entropy", draw(4, 3), {"target": CLASSES}),
    LossCase("cross_entropy", draw(4, 3), {"target": CLASSES}, {"reduction": "sum"}),
    LossCase("cross_entropy", draw(4, 3), {"target": CLASSES}, {"label_smoothing": 0.2}),
    LossCase("cross_entropy", draw(4, 3), {"target": CLASSES}, {"ignore_index": 2}),
    LossCase("cross_entropy", draw(4, 3), {"target": CLASSES, "weight": np.array([0.2, 3, 1])}),
    LossCase("cross_entropy", draw(4, 3), {"target": probabilities(4, 3)}),
    LossCase("nll_loss", draw(4, 3), {"target": CLASSES}),
    LossCase("nll_loss", draw(4, 3), {"target": CLASSES}, {"ignore_index": 0}),
    LossCase("binary_cross_entropy", probabilities(4), {"target": probabilities(4)}),
    LossCase("binary_cross_entropy_with_logits", draw(4), {"target": probabilities(4)}),
    LossCase("binary_cross_entropy_with_logits", draw(4), {"target": probabilities(4), "pos_weight": np.array(3.0)}),
    LossCase("kl_div", draw(4, 3), {"target": probabilities(4, 3)}, {"reduction": "batchmean"}),
    LossCase("kl_div", draw(4, 3), {"target": draw(4, 3)}, {"log_target": True, "reduction": "sum"}),
    LossCase("poisson_nll_loss", draw(4), {"target": probabilities(4)}),
    LossCase("poisson_nll_loss", probabilities(4), {"target": probabilities(4)}, {"log_input": False}),
    LossCase("gaussian_nll_loss", draw(4, 3), {"target": draw(4, 3), "var": probabilities(4, 3)}),
    LossCase("gaussian_nll_loss", draw(4, 3), {"target": draw(4, 3), "var": probabilities(4, 3)}, {"full": True}),
    LossCase("hinge_embedding_loss", draw(4), {"target": SIGNS}, {"margin": 2.0}),
    LossCase("soft_margin_loss", draw(4), {"target": SIGNS}),
    LossCase("multi_margin_loss", draw(4, 3), {"target": CLASSES}, {"p": 2, "margin": 0.5}),
    LossCase("multilabel_margin_loss", draw(2, 4), {"target": np.array([[3, 0, -1, 1], [1, -1, 0, 0]])}),
    LossCase("multilabel_soft_margin_loss", draw(2, 3), {"target": np.array([[1.0, 0, 1], [0, 0, 1]])}),
    LossCase("margin_ranking_loss", draw(4), {"input2": draw(4), "target": SIGNS}, {"margin": 0.3}),
    LossCase("cosine_embedding_loss", draw(4, 3), {"input2": draw(4, 3), "target": SIGNS}, {"margin": 0.1}),
    LossCase("triplet_margin_loss", draw(4, 3), {"positive": draw(4, 3), "negative": draw(4, 3)}, {"swap": True}),
    LossCase(
        "ctc_loss",
        np.log(probabilities(6, 2, 4)),
        {"targets": np.array([[1, 2], [3, 3]]), "input_lengths": np.array([6, 5]), "target_lengths": np.array([2, 2])},
    ),
]


@pytest.mark.parametrize("loss", LOSS_CASES, ids=lambda loss: f"{loss.name}-{loss.options}-{'+'.join(loss.tensors)}")
def test_losses_are_torchs_and_every_argument_counts(client: pb.Client, loss: LossCase) -> None:
    x = torch.from_numpy(loss.input).requires_grad_()
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in loss.tensors.items()}
    function = getattr(F, loss.name)
    wanted = function(x, **tensors, **loss.options)
    value, grads = client.model("identity").value_and_grad(
        loss.input, loss=pb.Loss(loss.name, **loss.options), targets=loss.tensors
    )
    np.testing.assert_allclose(value, wanted.detach().numpy(), rtol=1e-12)
    (gradient,) = torch.autograd.grad(wanted, x, create_graph=True)
    np.testing.assert_allclose(grads["x"], gradient.detach().numpy(), rtol=1e-10, atol=1e-14)
    assert np.abs(grads["x"]).max() > 0


def test_the_gradient_by_a_target(client: pb.Client) -> None:
    x, target = draw(3), draw(3)
    value, grads = client.model("cube").value_and_grad(x, loss="mse_loss", target=target, wrt=["x", "target:target"])
    np.testing.assert_allclose(value, np.mean((x**3 - target) ** 2))
    np.testing.assert_allclose(grads["x"], 2 * (x**3 - target) * 3 * x**2 / 3)
    (other,) = (grads[name] for name in grads if name != "x")
    np.testing.assert_allclose(other, -2 * (x**3 - target) / 3)


def test_an_unreduced_loss_takes_a_cotangent(client: pb.Client) -> None:
    x, target, v = draw(3), draw(3), draw(3)
    loss = pb.Loss("mse_loss", reduction="none")
    outputs, gradient = client.model("cube").vjp(x, v, loss=loss, target=target)
    np.testing.assert_allclose(outputs, (x**3 - target) ** 2)
    np.testing.assert_allclose(gradient, v * 2 * (x**3 - target) * 3 * x**2)


def test_a_loss_of_chosen_outputs(client: pb.Client) -> None:
    x, y = draw(3), draw(3)
    loss = pb.Loss("mse_loss", bindings={"input": "product", "target": "parts.0"}, reduction="sum")
    value, grads = client.model("mixed").value_and_grad({"x": x, "y": y}, loss=loss)
    a, b = (torch.from_numpy(each).requires_grad_() for each in (x, y))
    wanted = ((a.sin() * b**2 - a * b) ** 2).sum()
    np.testing.assert_allclose(value, wanted.detach())
    same(grads, dict(zip(["x", "y"], (each.numpy() for each in torch.autograd.grad(wanted, (a, b))), strict=True)))


def test_hvp_of_a_loss_with_respect_to_weights(client: pb.Client) -> None:
    """Gauss, Newton and friends: H t of cross_entropy over weights and inputs together, and of the weights alone."""
    x, target = draw(4, 3), np.array([0, 1, 1, 0])
    module = local("small")
    wrt = ["input", "0.weight", "2.bias"]
    oracle = Oracle(module, {"input": x})
    t = {"input": draw(4, 3), "0.weight": draw(5, 3), "2.bias": draw(2)}
    leaves = oracle.start(wrt)
    value = F.cross_entropy(oracle.run(leaves)[0], torch.from_numpy(target))
    gradients = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
    along = sum((gradient * torch.from_numpy(t[name])).sum() for name, gradient in zip(leaves, gradients, strict=True))
    wanted = torch.autograd.grad(along, list(leaves.values()))
    got = client.model("small").hvp(x, t, wrt=wrt, loss="cross_entropy", target=target)
    np.testing.assert_allclose(got.outputs, value.detach())
    same(got.hvps, {name: each.numpy() for name, each in zip(wrt, wanted, strict=True)})


# ---- many at once


def test_two_hundred_interleaved_calls_each_get_their_own_answer(client: pb.Client) -> None:
    failures: list[BaseException] = []
    module = local("small")
    lock = threading.Lock()

    def one(rng: np.random.Generator, kind: int) -> None:
        x, v = rng.standard_normal((3, 3)), rng.standard_normal((3, 3))
        if kind == 0:
            np.testing.assert_allclose(client.model("cube").vjp(x, v).gradients, 3 * x**2 * v)
        elif kind == 1:
            np.testing.assert_allclose(client.model("cube").hvp(x, v, x).hvps, 6 * x * v * x, rtol=1e-10, atol=1e-12)
        elif kind == 2:
            wanted = Oracle(models.in_place, {"x": x}).vjp(["x"], [v])["x"]
            np.testing.assert_allclose(client.model("in_place").vjp(x, v).gradients, wanted, rtol=1e-10)
        elif kind == 3:
            np.testing.assert_array_equal(client.model("identity").evaluate(x), x)
        else:
            got = client.model("small").vjp(x, v[:, :2]).gradients
            with lock:
                wanted = Oracle(module, {"input": x}).vjp(["input"], [v[:, :2]])["input"]
            np.testing.assert_allclose(got, wanted, rtol=1e-9)

    def caller(seed: int) -> None:
        try:
            rng = np.random.default_rng(seed)
            for number in range(25):
                one(rng, (number + seed) % 5)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures, failures[0]


def test_large_results_of_interleaved_calls_do_not_share_memory(client: pb.Client) -> None:
    """Past what travels inline: slots are reused while earlier results are still held."""
    remote = client.model("identity")
    held = []
    for number in range(12):
        x = np.full(100_000 + number, float(number))
        held.append((number, remote.vjp(x, x + 0.5)))
    for number, (outputs, gradient) in held:
        assert (outputs == number).all() and (gradient == number + 0.5).all()
