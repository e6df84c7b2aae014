"""What calls return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pullback import errors
from pullback._arrays import Array
from pullback_wire import TensorReader, WireError
from pullback_wire.v1 import gradient_service_pb2 as pb
from pullback_wire.v1 import tensor_pb2


class Answered:
    """What an answer says of itself beside its elements.

    model_version: the version of the model that answered; empty where the server does not say.
    model_revision: how often that version had been loaded anew with other contents.
    """

    model_version: str = ""
    model_revision: int = 0


class _Vjp(NamedTuple):
    outputs: Any
    gradients: Any


class VjpResult(_Vjp, Answered):
    """The pair (outputs, gradients), with `.model_version` and `.model_revision` of what answered.

    norm: with max_norm, the 2-norm over all gradients before they were clipped: a float, or with batched cotangents a
        float64 array [K]; else None. It is not an element of the pair.
    """

    norm: float | Array | None = None

    def __new__(cls, outputs: Any, gradients: Any, norm: float | Array | None = None) -> VjpResult:
        self = super().__new__(cls, outputs, gradients)
        self.norm = norm
        return self


class _Jvp(NamedTuple):
    outputs: Any
    tangents: Any


class JvpResult(_Jvp, Answered):
    """The pair (outputs, tangents): J t has the structure of the outputs, None for one that is not differentiable.

    Has `.model_version` and `.model_revision` of what answered.
    """


class _Hvp(NamedTuple):
    outputs: Any
    gradients: Any
    hvps: Any
    cotangent_derivatives: Any


class HvpResult(_Hvp, Answered):
    """(outputs, gradients, hvps, cotangent_derivatives), with `.model_version` and `.model_revision` of what answered.

    With g(x, v) = Jᴴv: gradients = g, hvps = ∂Re⟨g, t⟩/∂x, cotangent_derivatives = ∂Re⟨g, t⟩/∂v = J t.

    gradients and hvps have one structure, that of the inputs or of wrt. cotangent_derivatives is None unless asked
    for; it is an array for one cotangent, else a dict by output.
    """


class _Jacobian(NamedTuple):
    outputs: Any
    jacobian: Any


class JacobianResult(_Jacobian, Answered):
    """The pair (outputs, jacobian), with `.model_version` and `.model_revision` of what answered."""


class _Hessian(NamedTuple):
    outputs: Any
    gradients: Any
    hessian: Any


class HessianResult(_Hessian, Answered):
    """(outputs, gradients, hessian): the value, the gradient and the Hessian of a scalar function at one point.

    Has `.model_version` and `.model_revision` of what answered.
    """


class Answer:
    """Reads the tensors of one response. Every array is writable, aligned and owns its memory.

    Each method raises WireError for an answer that contradicts itself.
    """

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader

    def outputs(self, tensors: Sequence[tensor_pb2.Tensor], wanted: bool = True) -> Any:
        """One output: an array; several: a dict by name; not wanted: None."""
        if not wanted:
            return None
        if not tensors:
            raise WireError("outputs are missing", "outputs")
        read = {tensor.name: self._reader.array(tensor, f"outputs[{index}]") for index, tensor in enumerate(tensors)}
        if len(read) != len(tensors):
            raise WireError("outputs have a name twice", "outputs")
        return next(iter(read.values())) if len(read) == 1 else read

    def named(self, gradients: Sequence[pb.Gradient], field: str) -> list[tuple[str, Array | None]]:
        """Derivatives by name; None: unused."""
        read = [(one.name, self._value(one, f"{field}[{index}].value")) for index, one in enumerate(gradients)]
        if len(dict(read)) != len(read):
            raise WireError(f"{field} have a name twice", field)
        return read

    def blocks(self, blocks: Sequence[pb.Block]) -> dict[tuple[str, str], Array | None]:
        """Blocks of a dense derivative by (row, column); None: unused."""
        read = {(one.row, one.column): self._value(one, f"blocks[{index}].value") for index, one in enumerate(blocks)}
        if len(read) != len(blocks):
            raise WireError("blocks have a pair of names twice", "blocks")
        return read

    def _value(self, one: pb.Gradient | pb.Block, field: str) -> Array | None:
        if one.unused:
            return None
        if not one.HasField("value"):
            raise WireError(f"{field} is missing", field)
        return self._reader.array(one.value, field)

    def finish(self) -> None:
        """Nothing may be left over."""
        self._reader.finish()


def by_output(named: Sequence[tuple[str, Array | None]]) -> Any:
    """Derivatives of outputs in the structure of outputs: one bare, several a dict by name."""
    return named[0][1] if len(named) == 1 else dict(named)


def only_block(blocks: dict[tuple[str, str], Array | None], one_column: bool) -> Any:
    """The block itself where there is one because one thing was differentiated by one thing; else all, by pair.

    Raises ProtocolError when the server sent several for one pair.
    """
    if not one_column or len({row for row, _ in blocks}) != 1:
        return blocks
    if len(blocks) != 1:
        raise errors.ProtocolError(f"one block was asked for, the server sent {', '.join(map(str, blocks))}")
    return next(iter(blocks.values()))
