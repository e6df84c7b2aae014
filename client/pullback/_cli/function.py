"""A call out of its options: the function, its inputs, cotangents and tangents, named and with dtypes."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

import pullback
from pullback._arrays import Array, is_differentiable, tensor_dtype
from pullback._cli.connecting import QUICK
from pullback._cli.given import ONES, Given
from pullback._cli.reading import Files, merged, tensor
from pullback._cli.usage import UsageError
from pullback._info import ModelInfo, TensorInfo

#: The only output of a model whose signature names none, and that of a loss.
_OUTPUT, _LOSS = "output", "loss"
#: Losses that take classes by their numbers, and as which arguments.
_INDEXED = (
    "cross_entropy", "ctc_loss", "linear_cross_entropy", "multi_margin_loss", "multilabel_margin_loss", "nll_loss"
)  # fmt: skip
_INDICES = ("target", "targets", "input_lengths", "target_lengths")
#: Seconds after which a model that is being loaded is asked for again.
_AGAIN = 1.0

Dtype = np.dtype[Any]


class Call:
    """The arguments of a RemoteModel's method, of a command line."""

    def __init__(self, model: pullback.RemoteModel, arguments: argparse.Namespace) -> None:
        self.info = _ready(model, arguments.timeout or QUICK)
        self._model = model
        self._arguments = arguments
        self._files = Files()
        if arguments.loss is None and (arguments.loss_target or arguments.loss_option or arguments.loss_binding):
            raise UsageError("--loss-target, --loss-option and --loss-binding need --loss")
        self.inputs = self._inputs()
        self._parameters = self._tensors(
            "--param", arguments.param, lambda: _none("--param"), _dtypes(self.info.parameters).get
        )

    def outputs(self) -> tuple[str, ...]:
        """Names of the function's outputs; empty: they are not known."""
        return (_LOSS,) if self._arguments.loss else tuple(one.name for one in self.info.outputs)

    def by_output(self, found: Any) -> dict[str, Array | None]:
        """What belongs to outputs, by name, one bare or several."""
        return found if isinstance(found, dict) else {(self.outputs() or (_OUTPUT,))[0]: found}

    def function(self) -> dict[str, Any]:
        """What every method is given beside the inputs."""
        arguments = self._arguments
        return {
            "loss": self._loss(),
            "targets": self._targets(),
            "parameters": self._parameters,
            "train": arguments.train,
            "seed": arguments.seed,
            "result_dtype": arguments.result_dtype,
            "detect_anomaly": arguments.detect_anomaly,
        }

    def cotangents(self) -> dict[str, Array] | None:
        """None: none are given."""
        outputs = self.outputs() or (_OUTPUT,)
        # A loss is computed in a dtype that no signature tells.
        dtypes = {} if self._arguments.loss else _dtypes(self.info.outputs)
        given = self._arguments.grad_output or ()
        if any(one.literal == ONES for one in given):
            if len(given) > 1:
                raise UsageError("argument --grad-output: ones are of all outputs, and another one is given")
            floating = {name: one for name, one in self.sample().items() if is_differentiable(one)}
            return {name: np.ones_like(one) for name, one in floating.items()}
        only, known = lambda: _only(outputs, "--grad-output"), self.outputs()
        return self._tensors("--grad-output", given, only, dtypes.get, known=known) or None

    def sample(self) -> dict[str, Array]:
        """The outputs, by a call of their own, in the dtypes that cotangents must have."""
        found = self._model.evaluate(self.inputs, **{**self.function(), "result_dtype": None, "detect_anomaly": False})
        return {name: one for name, one in self.by_output(found).items() if one is not None}

    def tangents(self) -> dict[str, Array]:
        """In the dtypes of what they move."""
        moved = {**_dtypes(self.info.parameters), **_dtypes(self.info.inputs)}
        moved |= {name: array.dtype for name, array in {**self._parameters, **self.inputs}.items()}
        given = self._arguments.tangent

        def dtype(name: str) -> Dtype | None:
            return moved.get(name.removeprefix("input:").removeprefix("param:"))

        return self._tensors("--tangent", given, lambda: _only(tuple(self.inputs), "--tangent"), dtype)

    def wrt(self) -> list[str] | None:
        """None: every floating-point or complex input."""
        return [name for names in self._arguments.wrt or () for name in names] or None

    def _inputs(self) -> dict[str, Array]:
        declared = _dtypes(self.info.inputs)
        required = tuple(one.name for one in self.info.inputs if not one.optional)
        candidates = required or tuple(one.name for one in self.info.inputs)
        only, known = lambda: _only(candidates, "--input"), [one.name for one in self.info.inputs]
        singles = self._tensors("--input", self._arguments.input, only, declared.get, known=known)
        groups = [("--input", singles)]
        for path in self._arguments.inputs or ():
            raw = self._files.all_of(path)
            groups.append(
                (
                    f"--inputs {path}",
                    {
                        name: self._tensor(one, None, declared.get(name), f"--inputs {path}: {name}", "--input", name)
                        for name, one in raw.items()
                    },
                )
            )
        return merged(groups)

    def _targets(self) -> dict[str, Array]:
        known = [one.dtype for one in self.info.outputs]
        floating = tensor_dtype(known[0]) if len(known) == 1 and known[0] else None

        def guess(name: str, value: Any) -> Dtype | None:
            # Class indices are integers; what is compared with the model's output has its dtype.
            indices = self._arguments.loss in _INDEXED and name in _INDICES
            return np.dtype(np.int64) if indices and _integers(value) else floating

        given = self._arguments.loss_target
        return self._tensors("--loss-target", given, lambda: "target", lambda name: None, guess)

    def _loss(self) -> pullback.Loss | None:
        arguments = self._arguments
        if arguments.loss is None:
            return None
        options = {name: _plain(value) for name, value in arguments.loss_option or ()}
        return pullback.Loss(arguments.loss, bindings=dict(arguments.loss_binding or ()), **options)

    def _tensors(
        self,
        option: str,
        given: Iterable[Given] | None,
        only: Callable[[], str],
        declared: Callable[[str], Dtype | None],
        guess: Callable[[str, Any], Dtype | None] = lambda name, value: None,
        known: Sequence[str] = (),
    ) -> dict[str, Array]:
        """Tensors by name.

        only: the name of one without. guess: the dtype of JSON where the signature says nothing. known: the names that
        there are; empty: they are not known.
        """
        groups: list[tuple[str, Mapping[str, Array]]] = []
        for one in given or ():
            name = only() if one.name is None else one.name
            raw = one.literal if one.path is None else self._files.one_of(one, name)
            dtype = declared(name) or (
                None if isinstance(raw, np.ndarray) else self._arguments.dtype or guess(name, raw)
            )
            if dtype is None and one.dtype is None and known and name not in known:
                raise ValueError(f"{option} {name}: {self.info.name} has none of this name; it has {', '.join(known)}")
            groups.append((option, {name: self._tensor(raw, one.dtype, dtype, f"{option} {name}", option, name)}))
        return merged(groups)

    def _tensor(
        self, raw: Any, asked: Dtype | None, declared: Dtype | None, field: str, option: str, name: str
    ) -> Array:
        return tensor(raw, asked, declared or self._arguments.dtype, field, f"{option} {name}:float64=...")


def _ready(model: pullback.RemoteModel, timeout: float) -> ModelInfo:
    """The signature, once the model is loaded."""
    until = time.monotonic() + timeout
    while (info := model.info).state == "loading" and time.monotonic() + _AGAIN < until:
        time.sleep(_AGAIN)
    if info.state != "ready":
        said = f": {info.state_reason}" if info.state_reason else ""
        raise ValueError(f"{info.name} version {info.version or '-'} cannot be called, it is {info.state}{said}")
    return info


def _dtypes(specs: Sequence[TensorInfo]) -> dict[str, Dtype]:
    return {one.name: tensor_dtype(one.dtype) for one in specs if one.dtype}


def _only(names: Sequence[str], option: str) -> str:
    if len(names) != 1:
        raise ValueError(f"{option}: say which is meant, as in NAME=...; there are {', '.join(names) or 'none known'}")
    return names[0]


def _none(option: str) -> str:
    raise ValueError(f"{option} needs a name, as in NAME=...")


def _integers(value: Any) -> bool:
    """Whether JSON holds integers alone."""
    # Not by recursion: nobody has counted yet how deep lists are nested.
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif type(one) is not int:
            return False
    return True


def _plain(value: str) -> Any:
    """A loss's option: JSON where it is some, else a word ("sum")."""
    try:
        return json.loads(value)
    except ValueError:
        return value
