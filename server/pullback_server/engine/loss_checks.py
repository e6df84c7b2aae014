"""What a loss's tensors must satisfy before a kernel sees them.

A class index out of range is a device-side assert on CUDA, which costs the worker; a shape that broadcasts is an answer
to another question (torch only warns).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pullback_server.engine._dtypes import differentiable
from pullback_server.faults import Fault
from pullback_wire import Reason

_PAIR = (("input", "target"),)
_TRIPLE = (("anchor", "positive", "negative"),)
#: Groups of arguments whose shapes must be equal, by loss.
SAME_SHAPE: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(
        (
            "binary_cross_entropy",
            "binary_cross_entropy_with_logits",
            "hinge_embedding_loss",
            "huber_loss",
            "kl_div",
            "l1_loss",
            "mse_loss",
            "multilabel_margin_loss",
            "multilabel_soft_margin_loss",
            "poisson_nll_loss",
            "smooth_l1_loss",
            "soft_margin_loss",
        ),
        _PAIR,
    ),
    "margin_ranking_loss": (("input1", "input2", "target"),),
    "cosine_embedding_loss": (("input1", "input2"),),
    "triplet_margin_loss": _TRIPLE,
    "triplet_margin_with_distance_loss": _TRIPLE,
}
#: Arguments that hold class indices, by loss.
CLASS_INDICES: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("target",),
    "linear_cross_entropy": ("target",),
    "nll_loss": ("target",),
    "multi_margin_loss": ("target",),
    "multilabel_margin_loss": ("target",),
    "ctc_loss": ("targets", "input_lengths", "target_lengths"),
}


def same_shape(loss: str, group: tuple[str, ...], arguments: Mapping[str, torch.Tensor]) -> None:
    """Raises Fault when the shapes of a group differ."""
    first, *others = group
    shape = arguments[first].shape
    for name in others:
        if arguments[name].shape != shape:
            raise Fault(
                Reason.BAD_TENSOR,
                f"{loss} takes {first!r} and {name!r} of one shape; {first!r} is {list(shape)}, {name!r} is "
                f"{list(arguments[name].shape)}",
                f"targets[{name}].shape",
            )


def check_range(
    tensor: torch.Tensor, low: float | None, high: float | None, field: str, ignored: int | None = None
) -> None:
    """Raises Fault when an element lies outside; NaN lies nowhere."""
    if not tensor.numel() or tensor.is_complex():
        return
    values = tensor.detach()
    if values.dtype not in _COMPARABLE:
        values = values.double() if values.is_floating_point() else values.to("cpu", torch.int64)
    # One pass where all is well; NaN makes both comparisons false, and is looked at more closely.
    least, most = torch.aminmax(values) if values.dtype != torch.bool else torch.aminmax(values.byte())
    if (low is None or least.item() >= low) and (high is None or most.item() <= high):
        return
    outside = torch.zeros((), dtype=torch.bool, device=values.device)
    if low is not None:
        outside = outside | (values < low)
    if high is not None:
        outside = outside | (values > high)
    if ignored is not None:
        outside = outside & (values != ignored)
    if bool(outside.any()):
        shape = outside.shape
        position = int(outside.reshape(-1).int().argmax())
        index = [int(i) for i in torch.unravel_index(torch.tensor(position), shape)] if shape else []
        but = "" if ignored is None else f" or ignore_index {ignored}"
        raise Fault(
            Reason.VALUE_OUT_OF_RANGE,
            f"{field}{index} is {values.reshape(-1)[position].item()}, expected {_interval(low, high)}{but}",
            field,
        )


def _interval(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high:g}"
    return f"{low:g} or more" if high is None else f"{low:g} to {high:g}"


_COMPARABLE = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64}
)

Arguments = Mapping[str, torch.Tensor]
Options = Mapping[str, Any]


def _classes(arguments: Arguments, options: Options) -> None:
    target = arguments["target"]
    if "linear_weight" in arguments:
        count = arguments["linear_weight"].shape[0] if arguments["linear_weight"].ndim else 0
    else:
        logits = arguments["input"]
        count = logits.shape[min(1, logits.ndim - 1)] if logits.ndim else 0
    if differentiable(target.dtype):
        return
    ignored = options.get("ignore_index")
    check_range(target, 0, count - 1, "targets[target]", None if ignored is None else int(ignored))


def _multilabel(arguments: Arguments, _: Options) -> None:
    classes = arguments["input"].shape[-1] if arguments["input"].ndim else 1
    check_range(arguments["target"], -1, classes - 1, "targets[target]")


def _probabilities(arguments: Arguments, _: Options) -> None:
    for name in ("input", "target"):
        values = arguments[name].detach()
        # NaN too: on CUDA it is a device-side assert.
        if not values.is_complex() and not bool(((values >= 0) & (values <= 1)).all()):
            raise Fault(
                Reason.VALUE_OUT_OF_RANGE,
                f"{name!r} of binary_cross_entropy has elements from {values.min().item():g} to "
                f"{values.max().item():g}, expected 0 to 1",
                "function.loss" if name == "input" else f"targets[{name}]",
            )


def _gaussian(arguments: Arguments, _: Options) -> None:
    expected, target = arguments["input"].shape, arguments["target"].shape
    fits = len(expected) == len(target) and all(b in (a, 1) for a, b in zip(expected, target, strict=True))
    if not fits:
        raise Fault(
            Reason.BAD_TENSOR,
            f"gaussian_nll_loss takes 'target' of the shape of 'input' {list(expected)}, or with 1 in places; it is "
            f"{list(target)}",
            "targets[target].shape",
        )
    variance = arguments["var"]
    if not variance.is_complex() and bool((variance < 0).any()):
        raise Fault(
            Reason.VALUE_OUT_OF_RANGE, "targets[var] has a negative element, expected 0 or more", "targets[var]"
        )


def _ctc(arguments: Arguments, options: Options) -> None:
    logits = arguments["log_probs"]
    if not logits.ndim:
        return
    classes, steps = logits.shape[-1], logits.shape[0]
    if not 0 <= options["blank"] < classes:
        raise Fault(
            Reason.BAD_OPTION,
            f"loss.options[blank] is {options['blank']}, expected 0 to {classes - 1}",
            "loss.options[blank]",
        )
    check_range(arguments["targets"], 0, classes - 1, "targets[targets]")
    check_range(arguments["input_lengths"], 0, steps, "targets[input_lengths]")
    targets = arguments["targets"]
    longest = targets.shape[-1] if targets.ndim else 0
    check_range(arguments["target_lengths"], 0, longest, "targets[target_lengths]")


#: Checks by loss, of its arguments and options.
CHECKS: dict[str, Callable[[Arguments, Options], None]] = {
    "cross_entropy": _classes,
    "linear_cross_entropy": _classes,
    "nll_loss": _classes,
    "multi_margin_loss": _classes,
    "multilabel_margin_loss": _multilabel,
    "binary_cross_entropy": _probabilities,
    "gaussian_nll_loss": _gaussian,
    "ctc_loss": _ctc,
}
