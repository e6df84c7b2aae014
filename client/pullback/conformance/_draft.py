"""A request of GradientService before it is sent: the message, its payloads, and what it says in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pullback_wire import GRADIENT_METHODS, TensorWriter, dtype_name, encode_message
from pullback_wire.framing import Buffer

#: Every call names it, so that a model which draws random numbers draws the same ones each time.
SEED = 20_240_607
_TENSORS = ("inputs", "targets", "parameters", "cotangents", "tangents")


@dataclass
class Draft:
    """method: of GradientService. note: what is odd about it, in words."""

    method: str
    message: Any
    payloads: list[Buffer] = field(default_factory=list)
    note: str = ""

    def encode(self) -> bytes:
        """As bytes."""
        return encode_message(self.message, self.payloads)

    @property
    def words(self) -> str:
        """The request in words, for people."""
        message = self.message
        said = [f"{self.method} of {message.function.model!r}"]
        if message.function.HasField("loss"):
            said[0] += f" followed by {message.function.loss.name}"
        for name in _TENSORS:
            tensors = getattr(message, name, ())
            if tensors:
                said.append(f"{name} " + ", ".join(_tensor(tensor) for tensor in tensors))
        if getattr(message, "wrt", ()):
            said.append(f"wrt {', '.join(message.wrt)}")
        options = ("allow_unused", "cotangents_batched", "max_norm", "return_cotangent_derivatives")
        said += [f"{name} {getattr(message, name)}" for name in options if getattr(message, name, None)]
        if message.results.omit_outputs:
            said.append("outputs omitted")
        if message.results.dtype:
            said.append(f"results as {dtype_name(message.results.dtype)}")
        if self.note:
            said.append(self.note)
        return "; ".join(said)


def _tensor(tensor: Any) -> str:
    shape = list(tensor.shape)
    return f"{tensor.name} {dtype_name(tensor.dtype)} {shape if len(shape) <= 6 else f'of {len(shape)} axes'}"


def draft(
    method: str,
    model: str,
    *,
    version: str = "",
    seed: int | None = SEED,
    loss: str = "",
    loss_options: Mapping[str, Any] | None = None,
    bindings: Mapping[str, str] | None = None,
    tensors: Mapping[str, Mapping[str, np.ndarray] | Sequence[tuple[str, np.ndarray]]] | None = None,
    note: str = "",
    omit_outputs: bool = False,
    result_dtype: int = 0,
    **fields: Any,
) -> Draft:
    """A request; tensors: by field ("inputs", "cotangents", ...), then by name. fields: others, by name."""
    message: Any = GRADIENT_METHODS[method].request()
    message.function.model = model
    message.function.version = version
    if seed is not None:
        message.function.seed = seed
    if loss:
        message.function.loss.name = loss
        if loss_options:
            message.function.loss.options.update(loss_options)
        message.function.loss.bindings.update(bindings or {})
    writer = TensorWriter()
    for name, arrays in (tensors or {}).items():
        pairs = arrays.items() if isinstance(arrays, Mapping) else arrays
        getattr(message, name).extend([writer.add(key, array) for key, array in pairs])
    if omit_outputs:
        message.results.omit_outputs = True
    if result_dtype:
        message.results.dtype = result_dtype
    for name, value in fields.items():
        if value is None:
            continue
        if isinstance(value, list | tuple):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return Draft(method, message, list(writer.payloads), note)
