"""Every loss of torch.nn.functional: its answer is torch's, each argument matters, and bad ones are refused."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pullback_server.engine.losses import LOSSES, records
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


def unit(*shape: int) -> Tensor:
    return 0.1 + 0.8 * torch.rand(shape, dtype=torch.float64)


def sign(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape).double() * 2 - 1


def classes(*shape: int) -> Tensor:
    return torch.randint(0, 4, shape)


#: loss -> the model's output, targets, and for each option or optional tensor a value that changes the answer.
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "binary_cross_entropy": (lambda: unit(3, 4), {"target": lambda: unit(3, 4)}, {"weight": lambda: unit(3, 4)}),
    "binary_cross_entropy_with_logits": (
        lambda: real(3, 4),
        {"target": lambda: unit(3, 4)},
        {"weight": lambda: unit(3, 4), "pos_weight": lambda: unit(4)},
    ),
    "cosine_embedding_loss": (
        lambda: real(3, 4),
        {"input2": lambda: real(3, 4), "target": lambda: torch.tensor([1.0, -1.0, -1.0])},
        {"margin": -0.9},
    ),
    "cross_entropy": (
        lambda: real(3, 4),
        {"target": lambda: torch.tensor([0, 1, 3])},
        {"weight": lambda: unit(4), "ignore_index": 1.0, "label_smoothing": 0.2},
    ),
    "ctc_loss": (
        lambda: real(6, 2, 4).log_softmax(-1),
        {
            "targets": lambda: torch.tensor([[1, 2], [3, 1]]),
            "input_lengths": lambda: torch.tensor([6, 5]),
            "target_lengths": lambda: torch.tensor([2, 2]),
        },
        {"blank": 2.0, "zero_infinity": None},
    ),
    "gaussian_nll_loss": (
        lambda: real(3, 4),
        {"target": lambda: real(3, 4), "var": lambda: unit(3, 4)},
        {"full": True, "eps": 0.5},
    ),
    "hinge_embedding_loss": (lambda: unit(3, 4), {"target": lambda: sign(3, 4)}, {"margin": 2.0}),
    "huber_loss": (
        lambda: 3 * real(3, 4),
        {"target": lambda: real(3, 4)},
        {"delta": 0.3, "weight": lambda: unit(3, 4)},
    ),
    "kl_div": (
        lambda: real(3, 4).log_softmax(-1),
        {"target": lambda: real(3, 4).softmax(-1)},
        {"log_target": True},
    ),
    "l1_loss": (lambda: real(3, 4), {"target": lambda: real(3, 4)}, {"weight": lambda: unit(3, 4)}),
    "linear_cross_entropy": (
        lambda: real(3, 5),
        {"linear_weight": lambda: real(4, 5), "target": lambda: torch.tensor([0, 1, 3])},
        {
            "linear_bias": lambda: real(4),
            "weight": lambda: unit(4),
            "ignore_index": 1.0,
            "label_smoothing": 0.2,
        },
    ),
    "margin_ranking_loss": (
        lambda: real(4),
        {"input2": lambda: real(4), "target": lambda: sign(4)},
        {"margin": 5.0},
    ),
    "mse_loss": (lambda: real(3, 4), {"target": lambda: real(3, 4)}, {"weight": lambda: unit(3, 4)}),
    "multi_margin_loss": (
        lambda: real(3, 4),
        {"target": lambda: classes(3)},
        {"p": 2.0, "margin": 3.0, "weight": lambda: unit(4)},
    ),
    "multilabel_margin_loss": (
        lambda: real(2, 4),
        {"target": lambda: torch.tensor([[3, 0, -1, 1], [1, -1, 0, 0]])},
        {},
    ),
    "multilabel_soft_margin_loss": (
        lambda: real(3, 4),
        {"target": lambda: (sign(3, 4) + 1) / 2},
        {"weight": lambda: unit(4)},
    ),
    "nll_loss": (
        lambda: real(3, 4).log_softmax(-1),
        {"target": lambda: torch.tensor([0, 1, 3])},
        {"weight": lambda: unit(4), "ignore_index": 1.0},
    ),
    "poisson_nll_loss": (
        lambda: unit(3, 4),
        {"target": lambda: 3 + unit(3, 4)},
        {"log_input": False, "full": True, "eps": None},
    ),
    "smooth_l1_loss": (lambda: 3 * real(3, 4), {"target": lambda: real(3, 4)}, {"beta": 0.2}),
    "soft_margin_loss": (lambda: real(3, 4), {"target": lambda: sign(3, 4)}, {}),
    "triplet_margin_loss": (
        lambda: real(3, 4),
        {"positive": lambda: real(3, 4), "negative": lambda: 0.1 * real(3, 4)},
        {"margin": 9.0, "p": 3.0, "eps": 0.5, "swap": True},
    ),
    "triplet_margin_with_distance_loss": (
        lambda: real(3, 4),
        {"positive": lambda: real(3, 4), "negative": lambda: 0.1 * real(3, 4)},
        {"margin": 9.0, "swap": True},
    ),
}


@pytest.fixture(scope="module")
def host() -> Any:
    return jobs.host_function(lambda x: x)


def drawn(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)
    output, targets, _ = CASES[name]
    return output(), {argument: value() for argument, value in targets.items()}


def local(name: str, x: Tensor, targets: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    value = getattr(F, name)(**{LOSSES[name].tensors[0]: leaf}, **targets, **options)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def test_the_table_has_every_loss_of_torch() -> None:
    found = {
        name
        for name, function in vars(F).items()
        if inspect.isfunction(function)
        and not name.startswith("_")
        and (name.endswith("_loss") or "cross_entropy" in name or name == "kl_div")
    }
    assert found == set(LOSSES) == {record.name for record in records()}
    assert found <= set(CASES)


def test_every_argument_of_every_loss_has_a_case() -> None:
    for name, loss in LOSSES.items():
        _, targets, extras = CASES[name]
        assert set(loss.tensors[1:]) == set(targets), name
        assert {*loss.optional, *loss.options} - {"reduction"} == set(extras), name


@pytest.mark.parametrize("name", LOSSES)
def test_the_answer_is_torchs(host: Any, name: str) -> None:
    x, targets = drawn(name)
    values = set()
    for reduction in ("mean", "sum", "none", None):
        options = {} if reduction is None else {"reduction": reduction}
        value, gradient = local(name, x, targets, **options)
        ones = {"cotangents": {"loss": torch.ones_like(value)}} if value.ndim else {}
        reply = host("vjp", "f", {"x": x}, wrt=["x"], loss=name, options=options, targets=targets, **ones)
        torch.testing.assert_close(reply.outputs, {"loss": value})
        torch.testing.assert_close(reply.grads["x"], gradient)
        assert bool(gradient.any())
        values.add(tuple(value.reshape(-1).tolist()))
    assert len(values) == 3


@pytest.mark.parametrize(("name", "extra"), [(name, extra) for name in LOSSES for extra in CASES[name][2]])
def test_every_option_and_optional_tensor_changes_the_answer(host: Any, name: str, extra: str) -> None:
    x, targets = drawn(name)
    given = CASES[name][2][extra]
    if given is None:
        # It shows in corner cases only: there must be such a case.
        if extra == "zero_infinity":
            targets["input_lengths"] = torch.tensor([6, 1])
            given = True
        else:
            x, given = torch.zeros_like(x), 0.5
    options: dict[str, Any] = {}
    tensors = dict(targets)
    if callable(given):
        tensors[extra] = given()
    else:
        options[extra] = given
    if name == "poisson_nll_loss" and extra == "eps":
        options["log_input"] = False
    plain, _ = local(name, x, targets)
    typed = {k: int(v) if k in ("ignore_index", "p", "blank") else v for k, v in options.items()}
    value, gradient = local(name, x, tensors, **typed)
    assert not torch.allclose(plain, value, equal_nan=True)
    reply = host("vjp", "f", {"x": x}, wrt=["x"], loss=name, options=options, targets=tensors)
    torch.testing.assert_close(reply.outputs["loss"], value)
    torch.testing.assert_close(reply.grads["x"], gradient)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"cross_entropy", "nll_loss"}))
def test_targets_can_be_differentiated_by(host: Any, name: str) -> None:
    x, targets = drawn(name)
    floating = [argument for argument, tensor in targets.items() if tensor.is_floating_point()]
    if not floating:
        pytest.skip("class indices only")
    argument = floating[0]
    if name in ("hinge_embedding_loss", "soft_margin_loss"):
        reason = Reason.UNUSED_INPUT if name.startswith("hinge") else Reason.NOT_DIFFERENTIABLE
        with jobs.refused(reason, "target"):
            host("vjp", "f", {"x": x}, wrt=["target:target"], loss=name, targets=targets)
        return
    leaf = targets[argument].clone().requires_grad_()
    value = getattr(F, name)(**{LOSSES[name].tensors[0]: x}, **(targets | {argument: leaf}))
    (gradient,) = torch.autograd.grad(value, leaf)
    reply = host("vjp", "f", {"x": x}, wrt=[f"target:{argument}"], loss=name, targets=targets)
    torch.testing.assert_close(reply.grads[f"target:{argument}"], gradient)


def test_two_outputs_feed_two_arguments() -> None:
    host = jobs.host_function(lambda x: {"mean": x * 2, "var": x.exp()})
    x, target = real(5), real(5)
    leaf = x.clone().requires_grad_()
    value = F.gaussian_nll_loss(leaf * 2, target, leaf.exp())
    (gradient,) = torch.autograd.grad(value, leaf)
    common: dict[str, Any] = {"wrt": ["x"], "loss": "gaussian_nll_loss", "targets": {"target": target}}
    reply = host("vjp", "f", {"x": x}, bindings={"input": "mean", "var": "var"}, **common)
    torch.testing.assert_close(reply.grads["x"], gradient)
    with jobs.refused(Reason.BAD_NAME, "'mean', 'var'", field="loss.bindings"):
        host("vjp", "f", {"x": x}, **common | {"targets": {"target": target, "var": target}})
    with jobs.refused(Reason.BAD_NAME, "'meen'", "did you mean 'mean'", field="loss.bindings[input]"):
        host("vjp", "f", {"x": x}, bindings={"input": "meen", "var": "var"}, **common)
    with jobs.refused(Reason.BAD_NAME, "did you mean 'input'", field="loss.bindings[inputs]"):
        host("vjp", "f", {"x": x}, bindings={"inputs": "mean", "var": "var"}, **common)


@pytest.mark.parametrize("kind", ["int32", "int16", "uint8"])
def test_class_indices_of_any_integer_type(host: Any, kind: str) -> None:
    x, targets = drawn("cross_entropy")
    value, _ = local("cross_entropy", x, targets)
    small = {"target": targets["target"].to(getattr(torch, kind))}
    reply = host("evaluate", "f", {"x": x}, loss="cross_entropy", targets=small)
    torch.testing.assert_close(reply.outputs["loss"], value)


@pytest.mark.parametrize(
    ("loss", "targets", "reason", "parts", "field"),
    [
        ("mse", {"target": real(3, 4)}, Reason.LOSS_NOT_FOUND, ["'mse'", "did you mean 'mse_loss'"], "loss.name"),
        ("mse_loss", {}, Reason.BAD_NAME, ["needs targets[target]"], "targets[target]"),
        ("mse_loss", {"targets": real(3, 4)}, Reason.BAD_NAME, ["did you mean 'target'"], "targets[targets]"),
        ("mse_loss", {"input": real(3, 4), "target": real(3, 4)}, Reason.BAD_NAME, ["feeds 'input'"], "targets[input]"),
        ("mse_loss", {"target": real(4)}, Reason.BAD_TENSOR, ["[3, 4]", "[4]"], "targets[target].shape"),
        ("l1_loss", {"target": real(3, 1)}, Reason.BAD_TENSOR, ["[3, 4]", "[3, 1]"], "targets[target].shape"),
        ("kl_div", {"target": real(1, 4)}, Reason.BAD_TENSOR, ["[3, 4]", "[1, 4]"], "targets[target].shape"),
        (
            "gaussian_nll_loss",
            {"target": real(4), "var": unit(3, 4)},
            Reason.BAD_TENSOR,
            ["[3, 4]", "[4]"],
            "targets[target].shape",
        ),
        (
            "cross_entropy",
            {"target": torch.tensor([0, 4, 1])},
            Reason.VALUE_OUT_OF_RANGE,
            ["targets[target][1] is 4", "0 to 3"],
            "targets[target]",
        ),
        (
            "cross_entropy",
            {"target": torch.tensor([0, -1, 1])},
            Reason.VALUE_OUT_OF_RANGE,
            ["-1", "ignore_index -100"],
            "targets[target]",
        ),
        ("nll_loss", {"target": torch.tensor([9, 0, 1])}, Reason.VALUE_OUT_OF_RANGE, ["9"], "targets[target]"),
        ("multi_margin_loss", {"target": torch.tensor([9, 0, 1])}, Reason.VALUE_OUT_OF_RANGE, ["9"], "targets[target]"),
        (
            "multilabel_margin_loss",
            {"target": torch.full((3, 4), -2)},
            Reason.VALUE_OUT_OF_RANGE,
            ["-2", "-1 to 3"],
            "targets[target]",
        ),
        ("cross_entropy", {"target": torch.tensor([0, 1])}, Reason.BAD_TENSOR, ["cross_entropy", "[2]"], "targets"),
        (
            "gaussian_nll_loss",
            {"target": real(3, 4), "var": -unit(3, 4)},
            Reason.VALUE_OUT_OF_RANGE,
            ["var"],
            "targets[var]",
        ),
    ],
)
def test_bad_targets(host: Any, loss: str, targets: Any, reason: Any, parts: list[str], field: str) -> None:
    with jobs.refused(reason, *parts, field=field):
        host("vjp", "f", {"x": real(3, 4)}, wrt=["x"], loss=loss, targets=targets)


def test_an_ignored_index_is_in_range(host: Any) -> None:
    target = torch.tensor([0, -100, 2])
    x = real(3, 4)
    reply = host("evaluate", "f", {"x": x}, loss="cross_entropy", targets={"target": target})
    torch.testing.assert_close(reply.outputs["loss"], F.cross_entropy(x, target))
    with jobs.refused(Reason.VALUE_OUT_OF_RANGE, "-100"):
        options = {"ignore_index": 2.0}
        host("evaluate", "f", {"x": x}, loss="cross_entropy", targets={"target": target}, options=options)


@pytest.mark.parametrize(
    ("loss", "options", "parts"),
    [
        ("mse_loss", {"reduction": "avg"}, ["'avg'", "none, mean, sum"]),
        ("mse_loss", {"reduction": "batchmean"}, ["'batchmean'", "none, mean, sum"]),
        ("mse_loss", {"reduction": 1.0}, ["1.0"]),
        ("mse_loss", {"size_average": True}, ["'size_average'"]),
        ("mse_loss", {"delta": 1.0}, ["'delta'"]),
        ("huber_loss", {"delt": 1.0}, ["did you mean 'delta'"]),
        ("huber_loss", {"delta": 0.0}, ["more than 0"]),
        ("huber_loss", {"delta": True}, ["True", "float"]),
        ("huber_loss", {"delta": "1"}, ["'1'", "float"]),
        ("smooth_l1_loss", {"beta": -1.0}, ["0 or more"]),
        ("kl_div", {"log_target": 1.0}, ["1.0", "bool"]),
        ("poisson_nll_loss", {"full": None}, ["None", "bool"]),
    ],
)
def test_bad_options(host: Any, loss: str, options: dict[str, Any], parts: list[str]) -> None:
    x = unit(3, 4)
    with jobs.refused(Reason.BAD_OPTION, *parts, field=f"loss.options[{next(iter(options))}]"):
        host("vjp", "f", {"x": x}, wrt=["x"], loss=loss, options=options, targets={"target": x})


def test_an_integer_option_must_be_one(host: Any) -> None:
    x, targets = drawn("cross_entropy")
    for value in (1.5, float("nan"), float("inf"), "1"):
        with jobs.refused(Reason.BAD_OPTION, "int", field="loss.options[ignore_index]"):
            options = {"ignore_index": value}
            host("vjp", "f", {"x": x}, wrt=["x"], loss="cross_entropy", options=options, targets=targets)
    with jobs.refused(Reason.BAD_OPTION, "0 to 1", field="loss.options[label_smoothing]"):
        options = {"label_smoothing": 2.0}
        host("vjp", "f", {"x": x}, wrt=["x"], loss="cross_entropy", options=options, targets=targets)


def test_ctc_is_checked_before_the_kernel_reads_beyond_its_classes(host: Any) -> None:
    x, targets = drawn("ctc_loss")
    for argument, tensor, field in (
        ("targets", torch.tensor([[1, 99], [3, 1]]), "targets[targets]"),
        ("input_lengths", torch.tensor([7, 5]), "targets[input_lengths]"),
        ("target_lengths", torch.tensor([3, 2]), "targets[target_lengths]"),
    ):
        with jobs.refused(Reason.VALUE_OUT_OF_RANGE, field=field):
            host("vjp", "f", {"x": x}, wrt=["x"], loss="ctc_loss", targets=targets | {argument: tensor})
    with jobs.refused(Reason.BAD_OPTION, "0 to 3"):
        host("vjp", "f", {"x": x}, wrt=["x"], loss="ctc_loss", targets=targets, options={"blank": 4.0})


def test_targets_without_a_loss(host: Any) -> None:
    with jobs.refused(Reason.BAD_NAME, "without a loss"):
        host("evaluate", "f", {"x": real(3)}, targets={"target": real(3)})
