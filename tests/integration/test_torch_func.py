"""pullback.torch.func: transforms of hosted models against torch.func's of the same functions here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests import zoo
from torch.autograd import forward_ad

import pullback as pb
from pullback.torch import RemoteModule, func
from pullback_server import Server, model, spec

F64 = torch.float64


@model("bilinear", inputs={"x": spec("float64", ["n"]), "y": spec("float64", ["n"]), "s": spec("float64", [])})
def bilinear(x: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return (x.sin() * y.exp()).sum() * s


@model("two", inputs={"x": spec("float64", ["n"]), "y": spec("float64", ["n"])})
def two(x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"wide": torch.outer(x, y), "narrow": x.prod()}


@model("cut", inputs={"x": spec("float64", ["n"])})
def cut(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"kept": x * 2, "cut": x.detach() * 3}


@pytest.fixture(scope="module")
def client() -> Iterator[pb.Client]:
    models = (bilinear, two, cut, zoo.holomorphic, zoo.modulus, zoo.small, zoo.once, zoo.noisy, zoo.mlp)
    with Server(*models, threads=1) as server, pb.connect(server.target, timeout=100) as found:
        yield found


def rand(*shape: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape) + dtype.is_complex))


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_gradients_and_hessians(client: pb.Client) -> None:
    remote, here = client.model("bilinear"), bilinear
    args = rand(3), rand(3).flip(0), torch.tensor(1.5, dtype=F64)
    for argnums in (0, 1, -1, (0, 2), (2, 1, 0)):
        same(func.grad(remote, argnums)(*args), torch.func.grad(here, argnums)(*args))
        same(func.grad_and_value(remote, argnums)(*args), torch.func.grad_and_value(here, argnums)(*args))
        same(func.jacrev(remote, argnums)(*args), torch.func.jacrev(here, argnums)(*args))
        same(func.hessian(remote, argnums)(*args), torch.func.hessian(here, argnums)(*args))
    same(func.grad(remote)(args[0], y=args[1], s=args[2]), torch.func.grad(here)(*args))
    v = rand(3) + 1, rand(3), torch.tensor(0.3, dtype=F64)
    same(func.hvp(remote, args, v), torch.autograd.functional.hvp(here, args, v))
    y, pull = func.vjp(remote, *args)
    same(y, here(*args))
    same(pull(torch.tensor(2.0, dtype=F64)), torch.func.vjp(here, *args)[1](torch.tensor(2.0, dtype=F64)))
    same(func.jvp(remote, args, v), torch.func.jvp(here, args, v))


def test_several_outputs(client: pb.Client) -> None:
    remote, here, args = client.model("two"), two, (rand(3), rand(3) + 1)
    y, pull = func.vjp(remote, *args)
    wanted, pull_here = torch.func.vjp(here, *args)
    same(y, wanted)
    v = {"wide": rand(3, 3), "narrow": torch.tensor(0.5, dtype=F64)}
    same(pull(v), pull_here(v))
    # They are told apart by name, whatever their order.
    same(pull({"narrow": v["narrow"], "wide": v["wide"]}), pull_here(v))
    same(func.jvp(remote, args, args), torch.func.jvp(here, args, args))
    # What does not depend on y is zeros, as in torch.func.
    same(func.jacrev(remote, (0, 1))(*args), torch.func.jacrev(here, (0, 1))(*args))


def test_complex(client: pb.Client) -> None:
    z, w = rand(4, dtype=torch.complex128), rand(2, 2, dtype=torch.complex128).ravel()
    f = zoo.holomorphic
    same(func.vjp(client.model("holomorphic"), z)[1](w), torch.func.vjp(f, z)[1](w))
    same(func.jvp(client.model("holomorphic"), (z,), (w,)), torch.func.jvp(f, (z,), (w,)))
    g = zoo.modulus
    same(func.grad(client.model("modulus"))(z), torch.func.grad(g)(z))
    same(func.hvp(client.model("modulus"), z, w), torch.autograd.functional.hvp(g, z, w))


def test_modules(client: pb.Client) -> None:
    local = zoo.small().double()
    module = RemoteModule(client.model("small"), parameters=True)
    x = rand(2, 3)
    with torch.no_grad():
        for p in [*module.parameters(), *local.parameters()]:
            p.add_(0.1)
        y, pull = func.vjp(module, x)
        v = torch.ones_like(y)
        same(y, local(x))
        same(pull(v), torch.func.vjp(local, x)[1](v))
    # The parameters require grad: in grad mode results would lack their graph.
    with pytest.raises(RuntimeError, match="no graph"):
        func.vjp(module, x)
    same(func.jacrev(module.requires_grad_(False))(x), torch.func.jacrev(local)(x))


def test_nothing_is_silently_without_a_graph(client: pb.Client) -> None:
    remote, x = client.model("modulus"), rand(4, dtype=torch.complex128)
    leaf = x.clone().requires_grad_()
    for call in (
        lambda: func.grad(remote)(leaf),
        lambda: func.hessian(client.model("small"))(rand(2, 3).requires_grad_()),
        lambda: func.jvp(remote, (x,), (leaf,)),
        lambda: func.hvp(remote, x, leaf),
        lambda: func.vjp(remote, x)[1](torch.tensor(1.0, dtype=F64, requires_grad=True)),
    ):
        with pytest.raises(RuntimeError, match="RemoteModule"):
            call()
    with torch.no_grad():
        assert not func.grad(remote)(leaf).requires_grad
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(RuntimeError, match=r"pullback\.torch\.func"):
            transform(lambda z: func.grad(remote)(z).abs().sum())(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        func.grad(remote)(forward_ad.make_dual(x, x))


def test_what_is_not_there(client: pb.Client) -> None:
    with pytest.raises(TypeError, match="RemoteModel"):
        func.grad(torch.sin)(rand(2))
    with pytest.raises(ValueError, match="argnums"):
        func.grad(client.model("bilinear"), 3)(rand(3), rand(3), rand(1)[0])
    with pytest.raises(pb.errors.OrderUnavailable):
        func.hessian(client.model("once"))(rand(1))
    with pytest.raises(pb.errors.MissingCotangent):
        func.grad(client.model("small"))(rand(2, 3))


def test_structures_are_those_of_torch(client: pb.Client) -> None:
    remote, args = client.model("two"), (rand(3), rand(3) + 1)
    y, pull = func.vjp(remote, *args)
    v = {"wide": rand(3, 3), "narrow": torch.tensor(0.5, dtype=F64)}
    # By position too, as RemoteModel has it; None is not pulled back.
    same(pull((v["narrow"], v["wide"])[:: 1 if next(iter(y)) == "narrow" else -1]), pull(v))
    same(pull({"wide": v["wide"], "narrow": None}), pull({"wide": v["wide"], "narrow": torch.zeros_like(v["narrow"])}))
    with pytest.raises(pb.errors.BadCotangent):
        func.vjp(client.model("modulus"), rand(2, dtype=torch.complex128))[1](1.0)
    # A tangent that was forgotten is none that stands still.
    for call in (
        lambda: func.jvp(remote, args, args[:1]),
        lambda: func.jvp(remote, args[0], args[0]),
        lambda: func.hvp(client.model("modulus"), rand(2, dtype=torch.complex128), ()),
    ):
        with pytest.raises(TypeError, match="tangents"):
            call()
    for wrong in ([0, 1], (), 1.0):
        with pytest.raises(TypeError, match="argnums"):
            func.jacrev(remote, wrong)(*args)  # type: ignore[arg-type]
    # What is cut off has zeros.
    x = rand(3)
    blocks = func.jacrev(client.model("cut"))(x)
    same(blocks, {"kept": 2 * torch.eye(3, dtype=F64), "cut": torch.zeros(3, 3, dtype=F64)})


def test_the_cotangents_meet_the_point_where_it_was(client: pb.Client) -> None:
    x = rand(5)
    torch.manual_seed(1)
    y, pull = func.vjp(client.model("noisy"), x)
    drawn = y / x
    x.zero_()
    (found,) = pull(torch.ones_like(y))
    same(found, drawn)
    array = np.full((1, 784), 0.1, np.float32)
    assert func.jacrev(client.model("mlp"))(array).dtype == torch.float32
