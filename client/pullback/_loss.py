"""A loss that follows a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pullback._arrays import Array, as_array, is_array
from pullback._naming import by_name
from pullback.errors import BadName
from pullback_wire.v1 import function_pb2


class Loss:
    """A loss of torch.nn.functional with its options, for the `loss` argument of a RemoteModel's methods.

    name: its name in torch, e.g. "cross_entropy".
    bindings: which output of the model feeds which tensor argument, by argument, e.g. {"input": "logits"}; needed
        only for a model with several outputs, whose only output would feed the first argument.
    options: as torch names them. Arrays and lists are tensor arguments (weight=[0.1, 0.9]: a list of floats is
        float32); None stands for torch's default; all others are plain options (reduction="sum").

        pb.Loss("cross_entropy", reduction="sum", label_smoothing=0.1, weight=class_weights)

    Raises TypeError for an option that is neither, ValueError for a number that cannot travel (NaN, infinities).
    """

    def __init__(self, name: str, /, *, bindings: Mapping[str, str] | None = None, **options: Any) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(f"a loss is named as in torch.nn.functional, not {name!r}")
        self.name = name
        self.bindings = dict(bindings or {})
        self.options: dict[str, bool | float | str] = {}
        self.tensors: dict[str, Array] = {}
        for option, value in options.items():
            if is_array(value) or isinstance(value, list | tuple):
                self.tensors[option] = as_array(value, f"{name}({option}=)")
            elif value is not None:
                self.options[option] = _plain(value, f"{name}({option}=)")

    def __repr__(self) -> str:
        arguments = [repr(self.name)]
        if self.bindings:
            arguments.append(f"bindings={self.bindings!r}")
        arguments += [f"{name}={value!r}" for name, value in self.options.items()]
        arguments += [f"{name}=<{array.dtype}{list(array.shape)}>" for name, array in self.tensors.items()]
        return f"Loss({', '.join(arguments)})"

    def message(self) -> function_pb2.Loss:
        """The contract's message, without the tensors."""
        loss = function_pb2.Loss(name=self.name, bindings=self.bindings)
        if self.options:
            loss.options.update(self.options)
        return loss


def _plain(value: Any, field: str) -> bool | float | str:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return value
    if not isinstance(value, int | float):
        raise TypeError(f"{field} is a {type(value).__name__}, expected a number, a str, a bool or an array")
    # Numbers travel as float64.
    if not math.isfinite(value) or float(value) != value:
        raise ValueError(f"{field} is {value}, which cannot travel")
    return float(value)


def resolve_loss(
    loss: str | Loss | None, target: Any, targets: Mapping[str, Any] | None
) -> tuple[Loss | None, dict[str, Array]]:
    """The loss of a call, and the tensors of its targets.

    Raises BadName for one that is given twice, TypeError and ValueError as `as_array` does.
    """
    if loss is not None and not isinstance(loss, Loss):
        loss = Loss(loss)
    given: dict[str, Array] = {} if loss is None else dict(loss.tensors)
    named = by_name(targets, "targets")
    if target is not None:
        single = {"target": as_array(target, "target")}
        if "target" in named:
            raise BadName("'target' is given both as target= and in targets=")
        named = {**single, **named}
    for name, array in named.items():
        if name in given:
            raise BadName(f"{name!r} is given both with the loss and in targets=")
        given[name] = array
    return loss, given
