"""Derivatives by the Open Inference Protocol: against local torch in float64, and our own RPCs bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.inference_wire import Caller, arrays, infer

import pullback
from pullback_wire.inference import open_inference_pb2 as pb

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 3))
V = RNG.normal(size=(4, 3))


@pytest.fixture(scope="module")
def caller(zoo: str) -> Iterator[Caller]:
    yield Caller(zoo)


@pytest.fixture(scope="module")
def ours(zoo: str) -> Iterator[pullback.Client]:
    with pullback.connect(zoo) as client:
        yield client


def refused(call: Callable[[], object], code: str, *parts: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    message = caught.value.details() or ""
    assert caught.value.code().name == code, message
    for part in parts:
        assert part in message, message


# VJPs.


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(0, 4), max_size=3), raw=st.booleans(), by_name=st.booleans(), seed=st.integers(0, 99))
def test_vjp_of_any_shape(caller: Caller, shape: list[int], raw: bool, by_name: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # `cube` has a batch axis.
    x, v = rng.normal(size=(2, *shape)), rng.normal(size=(2, *shape))
    model, parameters = ("cube@vjp", {}) if by_name else ("cube", {"pullback_vjp": "true"})
    found = caller.infer(model, {"x": x, "grad_output:output": v}, raw=raw, parameters=parameters)
    assert list(found) == ["output", "grad:x"]
    np.testing.assert_allclose(found["output"], x**3, rtol=1e-14)
    np.testing.assert_allclose(found["grad:x"], 3 * x**2 * v, rtol=1e-14)


def test_several_outputs_and_inputs(caller: Caller, ours: pullback.Client) -> None:
    inputs = {"x": X[0], "y": X[1], "scale": np.array(1.5)}
    cotangents = {"product": V[0], "parts.0": V[1], "parts.1": np.array(2.0)}
    found = caller.infer("mixed@vjp", inputs | {f"grad_output:{name}": value for name, value in cotangents.items()})
    outputs, grads = ours.model("mixed").vjp(inputs, cotangents)
    assert list(found) == [*outputs, *(f"grad:{name}" for name in grads)]
    for name, value in {**outputs, **{f"grad:{name}": grad for name, grad in grads.items()}}.items():
        np.testing.assert_array_equal(found[name], value)
    x, y, scale = (torch.tensor(value, requires_grad=True) for value in inputs.values())
    value = (torch.sin(x) * y**2 * scale * torch.tensor(V[0]) + x * y * torch.tensor(V[1])).sum() + 2 * x.sum()
    for name, expected in zip(inputs, torch.autograd.grad(value, (x, y, scale)), strict=True):
        np.testing.assert_allclose(found[f"grad:{name}"], expected.numpy(), rtol=1e-12)


def test_a_real_scalar_needs_no_cotangent(caller: Caller) -> None:
    found = caller.infer("square_sum@vjp", {"x": X})
    np.testing.assert_allclose(found["grad:x"], 2 * X)
    refused(lambda: caller.infer("cube@vjp", {"x": X}), "INVALID_ARGUMENT", "'grad_output:NAME'")


def test_what_is_asked_for_is_what_is_computed(caller: Caller) -> None:
    inputs = {"x": X[0], "y": X[1], "grad_output:product": V[0]}
    whole = caller.infer("mixed@vjp", inputs)
    found = caller.infer("mixed@vjp", inputs, outputs=["grad:y"])
    assert list(found) == ["grad:y"]
    np.testing.assert_array_equal(found["grad:y"], whole["grad:y"])
    assert list(caller.infer("mixed@vjp", inputs, outputs=["grad:y", "count", "grad:x"])) == [
        "grad:y",
        "count",
        "grad:x",
    ]
    assert list(caller.infer("mixed@vjp", inputs, outputs=["product"])) == ["product"]
    assert list(caller.infer("mixed@vjp", inputs, parameters={"wrt": "y"})) == [*list(whole)[:4], "grad:y"]
    for outputs, parameters in ((["grad:z"], {}), (["grad:x"], {"wrt": "y"}), (["grad:*"], {}), (["hvp:x"], {})):
        refused(lambda o=outputs, p=parameters: caller.infer("mixed@vjp", inputs, outputs=o, parameters=p),
                "INVALID_ARGUMENT")  # fmt: skip
    # It was no parameter that said so.
    refused(lambda: caller.infer("mixed@vjp", inputs, outputs=["grad:z"]), "INVALID_ARGUMENT", "outputs: ", "'z'")
    refused(
        lambda: caller.infer("mixed@vjp", inputs, parameters={"wrt": "count"}), "INVALID_ARGUMENT", "parameters[wrt]"
    )


def test_cotangents_that_do_not_fit(caller: Caller) -> None:
    for name, value, *parts in (
        ("output", V[:2], "inputs[1].shape", "[2, 3]"),
        ("output", V.astype("f4"), "inputs[1].datatype"),
        ("outputs", V, "inputs[1]", "outputs"),
    ):
        refused(
            lambda name=name, value=value: caller.infer("cube@vjp", {"x": X, f"grad_output:{name}": value}),
            "INVALID_ARGUMENT", *parts,
        )  # fmt: skip


def test_unused_inputs(caller: Caller) -> None:
    inputs = {"x": X, "y": X, "grad_output:output": V}
    refused(lambda: caller.infer("half_used@vjp", inputs), "FAILED_PRECONDITION", "'y'")
    answer = caller.call("ModelInfer", infer("half_used@vjp", inputs, parameters={"allow_unused": True}))
    assert list(arrays(answer)) == ["output", "grad:x"]
    assert answer.parameters["unused"].string_param == "y"


def test_several_cotangents_at_once(caller: Caller) -> None:
    v = RNG.normal(size=(5, 4, 3))
    found = caller.infer("cube@vjp", {"x": X, "grad_output:output": v}, parameters={"is_grads_batched": True})
    np.testing.assert_allclose(found["grad:x"], 3 * X**2 * v)


def test_clipping(caller: Caller) -> None:
    request = infer("square_sum@vjp", {"x": X}, parameters={"max_norm": 1.0})
    answer = caller.call("ModelInfer", request)
    norm = np.linalg.norm(2 * X)
    assert answer.parameters["norm"].double_param == pytest.approx(norm, rel=1e-12)
    np.testing.assert_allclose(arrays(answer)["grad:x"], 2 * X / (norm + 1e-6), rtol=1e-9)
    refused(lambda: caller.infer("square_sum@vjp", {"x": X}, parameters={"max_norm": -1}), "INVALID_ARGUMENT",
            "parameters[max_norm]")  # fmt: skip


# Losses.


def test_the_gradient_of_a_loss(caller: Caller, ours: pullback.Client) -> None:
    classes, weight = np.array([0, 1, 1, 0]), np.array([1.0, 2.5])
    inputs = {"input": X, "target": classes, "target:weight": weight}
    parameters = {"loss": "cross_entropy", "loss:label_smoothing": 0.1, "loss:reduction": "sum", "wrt": "input, *"}
    found = caller.infer("small@vjp", inputs, parameters=parameters)
    loss = pullback.Loss("cross_entropy", label_smoothing=0.1, reduction="sum", weight=weight)
    value, grads = ours.model("small").value_and_grad(X, loss=loss, target=classes, wrt=["input", "*"])
    np.testing.assert_array_equal(found.pop("loss"), value)
    assert set(found) == {f"grad:{name}" for name in grads}
    for name, grad in grads.items():
        np.testing.assert_array_equal(found[f"grad:{name}"], grad)
    # Each of its arguments counts.
    plain = caller.infer("small@vjp", {"input": X, "target": classes}, parameters={"loss": "cross_entropy"})
    assert not np.allclose(plain["grad:input"], found["grad:input"])
    # And forward alone.
    forward = caller.infer("small", {"input": X, "target:target": classes}, parameters={"loss": "cross_entropy"})
    np.testing.assert_array_equal(forward["loss"], plain["loss"])


def test_losses_that_do_not_fit(caller: Caller) -> None:
    classes = np.array([0, 1, 1, 0])
    for inputs, parameters, code, *parts in (
        ({"target": classes}, {"loss": "crossentropy"}, "NOT_FOUND", "parameters[loss]", "'cross_entropy'"),
        ({}, {"loss": "cross_entropy"}, "INVALID_ARGUMENT", "target"),
        ({"target": classes}, {}, "INVALID_ARGUMENT", "inputs[1].name"),
        ({"target:target": classes}, {}, "INVALID_ARGUMENT", "no loss"),
        ({"target": classes}, {"loss": "cross_entropy", "loss:smoothing": 0.1}, "INVALID_ARGUMENT", "smoothing"),
        ({"target": classes}, {"loss:reduction": "sum"}, "INVALID_ARGUMENT", "no loss"),
        ({"target": classes}, {"los": "cross_entropy"}, "INVALID_ARGUMENT", "'loss'"),
    ):
        refused(
            lambda i=inputs, p=parameters: caller.infer("small@vjp", {"input": X, **i}, parameters=p), code, *parts
        )  # fmt: skip


def test_which_output_feeds_the_loss(caller: Caller) -> None:
    inputs = {"x": X[0], "target": V[0, :1]}
    parameters = {"loss": "mse_loss", "bind:input": "narrow"}
    found = caller.infer("pair@vjp", inputs, parameters=parameters)
    x = torch.tensor(X[0], requires_grad=True)
    loss = torch.nn.functional.mse_loss(torch.exp(x[:1]), torch.tensor(V[0, :1]))
    np.testing.assert_allclose(found["loss"], loss.item())
    np.testing.assert_allclose(found["grad:x"], torch.autograd.grad(loss, x)[0].numpy(), rtol=1e-12)


def test_given_parameters(caller: Caller, ours: pullback.Client) -> None:
    bias = RNG.normal(size=5)
    name = "0.bias"
    refused(lambda: caller.infer("small", {"input": X, "param:nothing": bias}), "INVALID_ARGUMENT", "'nothing'")
    plain, given_ = caller.infer("small", {"input": X}), ours.model("small").evaluate(X, parameters={name: bias})
    found = caller.infer("small", {"input": X, f"param:{name}": bias})
    np.testing.assert_array_equal(found["output"], given_)
    assert not np.allclose(found["output"], plain["output"])


# Second derivatives.


def test_hvp(caller: Caller, ours: pullback.Client) -> None:
    tangent = RNG.normal(size=X.shape)
    inputs = {"x": X, "grad_output:output": V, "tangent:x": tangent}
    found = caller.infer("cube@hvp", inputs)
    assert list(found) == ["output", "grad:x", "hvp:x"]
    np.testing.assert_allclose(found["hvp:x"], 6 * X * V * tangent, rtol=1e-12)
    expected = ours.model("cube").hvp(X, tangent, V)
    np.testing.assert_array_equal(found["hvp:x"], expected.hvps)
    only = caller.infer("cube", inputs, outputs=["jvp:output", "hvp:x"], parameters={"pullback_hvp": True})
    assert list(only) == ["jvp:output", "hvp:x"]
    np.testing.assert_allclose(only["jvp:output"], 3 * X**2 * tangent, rtol=1e-12)


def test_hvp_of_what_was_not_moved(caller: Caller) -> None:
    """Mixed terms: what moves belongs to what is differentiated, whether it is asked for or not."""
    tangent = RNG.normal(size=3)
    inputs = {"x": X[0], "y": X[1], "grad_output:product": V[0], "tangent:y": tangent}
    whole = caller.infer("mixed@hvp", inputs)
    found = caller.infer("mixed@hvp", inputs, outputs=["hvp:x"])
    np.testing.assert_array_equal(found["hvp:x"], whole["hvp:x"])
    np.testing.assert_allclose(found["hvp:x"], np.cos(X[0]) * 2 * X[1] * V[0] * tangent, rtol=1e-12)


def test_an_order_that_is_not_promised_is_refused(caller: Caller) -> None:
    metadata = caller.call("ModelMetadata", pb.ModelMetadataRequest(name="once"))
    x = np.ones(3)
    inputs = {metadata.inputs[0].name: x}
    output = next(iter(caller.infer("once", inputs).items()))
    inputs |= {f"grad_output:{output[0]}": np.ones_like(output[1])}
    assert f"grad:{metadata.inputs[0].name}" in caller.infer("once@vjp", inputs)
    inputs[f"tangent:{metadata.inputs[0].name}"] = x
    refused(lambda: caller.infer("once@hvp", inputs), "FAILED_PRECONDITION", "order")
    refused(lambda: caller.infer("cube@hvp", {"x": X, "grad_output:output": V}), "INVALID_ARGUMENT", "tangent")


# Ways to say it.


def test_two_derivatives_at_once_are_refused(caller: Caller) -> None:
    inputs = {"x": X, "grad_output:output": V}
    for model, parameters in (
        ("cube@vjp", {"pullback_hvp": True}),
        ("cube", {"pullback_hvp": True, "pullback_vjp": True}),
    ):
        refused(
            lambda m=model, p=parameters: caller.infer(m, inputs, parameters=p), "INVALID_ARGUMENT", "two derivatives"
        )
    # Off is as though it were not there.
    assert list(caller.infer("cube", {"x": X}, parameters={"pullback_vjp": False})) == ["output"]
    refused(lambda: caller.infer("cube", inputs, parameters={"pullback_vjp": "maybe"}), "INVALID_ARGUMENT",
            "parameters[pullback_vjp]")  # fmt: skip


@pytest.mark.parametrize("key", ["wtr", "allow_unsed", "gradient", "reduction", "max_norm"])
def test_a_misspelt_option_of_a_derivative_is_not_passed_over(caller: Caller, key: str) -> None:
    inputs = {"x": X, "grad_output:output": V, "tangent:x": V}
    refused(lambda: caller.infer("cube@hvp", inputs, parameters={key: "x"}), "INVALID_ARGUMENT", f"parameters[{key}]")


def test_train_mode_and_seeds(caller: Caller) -> None:
    src = RNG.normal(size=(2, 3, 4))
    inputs = {"src": src}
    name, output = next(iter(caller.infer("transformer", inputs).items()))
    inputs[f"grad_output:{name}"] = RNG.normal(size=output.shape)
    grads = [
        caller.infer("transformer@vjp", inputs, parameters=parameters)["grad:src"]
        for parameters in ({}, {"train": True, "seed": 3}, {"train": "true", "seed": "3"}, {"train": True, "seed": 4})
    ]
    np.testing.assert_array_equal(grads[1], grads[2])
    assert not np.allclose(grads[0], grads[1])
    assert not np.allclose(grads[1], grads[3])
