"""Requests of GradientService, from what a RemoteModel's methods were given."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pullback._anomaly import is_anomaly_enabled
from pullback._arrays import Array, result_dtype
from pullback._info import ModelInfo
from pullback._loss import Loss, resolve_loss
from pullback._naming import Inputs, bare_input, by_name, name_cotangents, name_inputs, name_tangents, wrt_names
from pullback_wire import GRADIENT_METHODS, Method, TensorWriter
from pullback_wire.framing import Buffer
from pullback_wire.v1 import function_pb2


@dataclass(frozen=True)
class Common:
    """What every call can be given; the arguments of RemoteModel's methods by the same names."""

    loss: str | Loss | None
    target: Any
    targets: Mapping[str, Any] | None
    parameters: Mapping[str, Any] | None
    train: bool
    seed: int | None
    result_dtype: Any
    detect_anomaly: bool = False
    timeout: float | None = None


class Draft:
    """A request that is filled in field by field.

    name: the RPC's; model, version: whose; info: asked only where names are missing.

    Every method raises BadName, TypeError or ValueError for arguments that make no request.
    """

    inputs: Inputs

    def __init__(
        self, name: str, model: str, version: str, common: Common, info: Callable[[], Awaitable[ModelInfo]]
    ) -> None:
        self.method: Method = GRADIENT_METHODS[name]
        self._model, self._version = model, version
        self._common = common
        self._ask = info
        #: The signature that told names, where any were missing.
        self.named_by: ModelInfo | None = None
        self._writer = TensorWriter()
        self._has_loss = False
        # One of six types with most fields in common; each method here is called for those that have its field.
        message: Any = self.method.request()
        self.message = message

    async def fill(self, inputs: Any) -> None:
        """Everything but what only some of the RPCs take. To be called first."""
        common = self._common
        self.inputs = await name_inputs(inputs, self._info)
        loss, targets = resolve_loss(common.loss, common.target, common.targets)
        self._has_loss = loss is not None
        self.message.function.CopyFrom(_function(self._model, self._version, loss, common))
        number = result_dtype(common.result_dtype)
        if number:
            self.message.results.dtype = number
        self._add(self.message.inputs, self.inputs.arrays)
        self._add(self.message.targets, targets)
        self._add(self.message.parameters, by_name(common.parameters, "parameters"))

    async def _info(self) -> ModelInfo:
        self.named_by = await self._ask()
        return self.named_by

    @property
    def payloads(self) -> Sequence[Buffer]:
        """The tensors' bytes. They are the caller's own arrays, so they must be sent before anything changes them."""
        return self._writer.payloads

    def _add(self, field: Any, arrays: Mapping[str, Array]) -> None:
        field.extend([self._writer.add(name, array) for name, array in arrays.items()])

    def omit_outputs(self) -> None:
        """The outputs will not travel back."""
        self.message.results.omit_outputs = True

    def wrt(self, wrt: str | Sequence[str] | None, allow_unused: bool) -> None:
        """What to differentiate with respect to."""
        self.message.wrt.extend(wrt_names(wrt))
        self.message.allow_unused = allow_unused

    async def cotangents(self, cotangents: Any) -> None:
        """One cotangent for each output that is pulled back."""
        self._add(self.message.cotangents, await name_cotangents(cotangents, self._has_loss, self._info))

    def tangents(self, tangents: Any) -> list[str]:
        """Tangents, in the structure of the inputs or by name. Returns their names."""
        named = name_tangents(tangents, self.inputs)
        self._add(self.message.tangents, named)
        return list(named)

    def wrt_with_tangents(self, tangents: Sequence[str]) -> list[str] | None:
        """What an absent wrt means when tangents name more than inputs: every differentiable input, and those.

        None: they name inputs alone, so that an empty wrt covers them.
        """
        more = [name for name in tangents if bare_input(name) not in self.inputs.arrays]
        return [*(f"input:{name}" for name in self.inputs.differentiable()), *more] if more else None


def _function(model: str, version: str, loss: Loss | None, common: Common) -> function_pb2.Function:
    function = function_pb2.Function(model=model, version=version)
    if loss is not None:
        function.loss.CopyFrom(loss.message())
    set_mode(function, common.train, common.seed)
    function.detect_anomaly = common.detect_anomaly or is_anomaly_enabled()
    return function


def set_mode(function: function_pb2.Function, train: bool, seed: int | None) -> None:
    """Train mode, and the seed. Raises ValueError for a seed that is none."""
    if train:
        function.mode = function_pb2.MODE_TRAIN
    if seed is None and train:
        # Drawn here, before the first attempt, so that another attempt repeats the same random numbers. Not drawn in
        # eval mode, where it would only keep the call from being merged with others.
        seed = secrets.randbits(63)
    if seed is not None:
        seed = operator.index(seed)
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}, expected 0 to 2**64 - 1")
        function.seed = seed
