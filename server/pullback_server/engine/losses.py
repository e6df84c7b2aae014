"""Losses of torch.nn.functional: one table, its arguments and options read from torch's own signatures."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pullback_server.engine._names import unknown_name
from pullback_server.engine.loss_checks import CHECKS, CLASS_INDICES, SAME_SHAPE, check_range, same_shape
from pullback_server.faults import Fault, listed
from pullback_server.job import LossCall, LossRecord
from pullback_wire import Reason

__all__ = ["LOSSES", "PreparedLoss", "check_range", "prepare", "records"]

_NAMES = (
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cosine_embedding_loss",
    "cross_entropy",
    "ctc_loss",
    "gaussian_nll_loss",
    "hinge_embedding_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "linear_cross_entropy",
    "margin_ranking_loss",
    "mse_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "poisson_nll_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
    "triplet_margin_with_distance_loss",
)
#: Deprecated, or no data: a caller cannot send a function.
_LEFT_OUT = frozenset({"size_average", "reduce", "distance_function", "options"})
_REDUCTIONS = ("none", "mean", "sum")


@dataclass(frozen=True)
class Option:
    """An option of a loss: its type and torch's default."""

    kind: type
    default: Any


@dataclass(frozen=True)
class Loss:
    """A loss: its tensor arguments (the first is fed by the model), those that may be left out, and its options."""

    name: str
    function: Callable[..., torch.Tensor]
    tensors: tuple[str, ...]
    optional: tuple[str, ...]
    options: Mapping[str, Option]

    @property
    def reductions(self) -> tuple[str, ...]:
        return (*_REDUCTIONS, "batchmean") if self.name == "kl_div" else _REDUCTIONS


def _read(name: str) -> Loss:
    function = getattr(F, name)
    tensors: list[str] = []
    optional: list[str] = []
    options: dict[str, Option] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in _LEFT_OUT:
            continue
        annotation = str(parameter.annotation)
        if "Tensor" in annotation:
            (tensors if parameter.default is parameter.empty else optional).append(parameter.name)
            continue
        default = parameter.default
        # `margin: float = 0` is a float for torch; `ignore_index: int | None = None` an int.
        words = annotation.replace("<class '", "").replace("'>", "")
        kind = next((kind for kind in (bool, float, int, str) if kind.__name__ in words), type(default))
        options[parameter.name] = Option(kind, default)
    return Loss(name, function, tuple(tensors), tuple(optional), options)


#: Every loss by name, as far as this torch has it.
LOSSES: dict[str, Loss] = {name: _read(name) for name in _NAMES if hasattr(F, name)}


@functools.cache
def records() -> list[LossRecord]:
    """The table for a signature."""
    return [LossRecord(loss.name, loss.tensors, loss.optional, tuple(loss.options)) for loss in LOSSES.values()]


def _option(loss: Loss, name: str, value: Any) -> Any:
    option = loss.options[name]
    field = f"loss.options[{name}]"
    expected = option.kind.__name__
    if name == "reduction":
        if value not in loss.reductions:
            raise Fault(Reason.BAD_OPTION, f"{field} is {value!r}, expected one of {', '.join(loss.reductions)}", field)
        return value
    if value is None and option.default is None:
        return None
    if option.kind is bool or isinstance(value, bool):
        fits = isinstance(value, bool) and option.kind is bool
    elif option.kind in (int, float):
        # All numbers of a protobuf Struct are floats.
        fits = isinstance(value, (int, float)) and (
            option.kind is float or (math.isfinite(value) and value == int(value) and abs(value) < 2**63)
        )
    else:
        fits = isinstance(value, option.kind)
    if not fits:
        raise Fault(Reason.BAD_OPTION, f"{field} is {value!r}, expected {expected} as torch's {loss.name}", field)
    return option.kind(value)


_BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "label_smoothing": (lambda value: 0 <= value <= 1, "0 to 1"),
    "beta": (lambda value: value >= 0, "0 or more"),
    "delta": (lambda value: value > 0, "more than 0"),
    "eps": (lambda value: value > 0, "more than 0"),
}


@dataclass
class PreparedLoss:
    """A loss with its options, for one call."""

    loss: Loss
    options: dict[str, Any]
    bindings: Mapping[str, str]

    def apply(
        self, outputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], owner: str
    ) -> torch.Tensor:
        """The loss of a model's outputs. Raises Fault before a kernel meets what it cannot take."""
        loss = self.loss
        arguments = dict(targets)
        for argument, output in self._feeds(outputs, owner).items():
            if output not in outputs:
                raise unknown_name("output", output, outputs, f"loss.bindings[{argument}]", owner)
            arguments[argument] = outputs[output]
        for group in SAME_SHAPE.get(loss.name, ()):
            same_shape(loss.name, group, arguments)
        for name in CLASS_INDICES.get(loss.name, ()):
            # torch wants int64; other integers say the same.
            tensor = arguments[name]
            if not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool:
                arguments[name] = tensor.long()
        if loss.name in CHECKS:
            CHECKS[loss.name](arguments, {n: self.options.get(n, o.default) for n, o in loss.options.items()})
        try:
            return loss.function(**arguments, **self.options)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            text = str(error)
            if "is not differentiable with respect to" in text:
                raise Fault(Reason.NOT_DIFFERENTIABLE, text, "wrt") from error
            option = next((name for name in self.options if name in text), None)
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in arguments.items())
            raise Fault(
                Reason.BAD_OPTION if option else Reason.BAD_TENSOR,
                f"torch's {loss.name} refuses ({shapes}): {text}",
                f"loss.options[{option}]" if option else "targets",
            ) from error

    def _feeds(self, outputs: Mapping[str, torch.Tensor], owner: str) -> Mapping[str, str]:
        if self.bindings:
            return self.bindings
        if len(outputs) > 1:
            raise Fault(
                Reason.BAD_NAME,
                f"loss.bindings is empty and {owner} has {len(outputs)} outputs ({listed(outputs)}); say which of them "
                f"feeds {self.loss.tensors[0]!r} of {self.loss.name}",
                "loss.bindings",
            )
        return {self.loss.tensors[0]: next(iter(outputs))}


def prepare(call: LossCall, targets: Mapping[str, torch.Tensor]) -> PreparedLoss:
    """Checks a loss's name, options and tensor arguments. Raises Fault."""
    loss = LOSSES.get(call.name)
    if loss is None:
        raise unknown_name("loss", call.name, LOSSES, "loss.name", "torch.nn.functional", Reason.LOSS_NOT_FOUND)
    known = loss.tensors + loss.optional
    for argument in call.bindings:
        if argument not in known:
            raise unknown_name("tensor argument", argument, known, f"loss.bindings[{argument}]", loss.name)
    fed = set(call.bindings) or {loss.tensors[0]}
    for name in targets:
        if name not in known:
            raise unknown_name("tensor argument", name, known, f"targets[{name}]", loss.name)
        if name in fed:
            raise Fault(
                Reason.BAD_NAME,
                f"targets[{name}] is given, but the model's output feeds {name!r} of {loss.name}",
                f"targets[{name}]",
            )
    for name in loss.tensors:
        if name not in fed and name not in targets:
            raise Fault(
                Reason.BAD_NAME,
                f"{loss.name} needs targets[{name}], which the request does not have; it has {listed(targets)}",
                f"targets[{name}]",
            )
    options = {}
    for name, value in call.options.items():
        if name not in loss.options:
            raise unknown_name("option", name, loss.options, f"loss.options[{name}]", loss.name, Reason.BAD_OPTION)
        options[name] = _option(loss, name, value)
        if name in _BOUNDS and not _BOUNDS[name][0](options[name]):
            field = f"loss.options[{name}]"
            raise Fault(Reason.BAD_OPTION, f"{field} is {value}, expected {_BOUNDS[name][1]}", field)
    if loss.name == "multi_margin_loss" and options.get("p", 1) not in (1, 2):
        raise Fault(Reason.BAD_OPTION, f"loss.options[p] is {options['p']}, expected 1 or 2", "loss.options[p]")
    return PreparedLoss(loss, options, call.bindings)
