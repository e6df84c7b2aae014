"""The grad_outputs of a Grad op, held against its outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pullback_server import ops
from pullback_server.engine._dtypes import describe, differentiable, name_of
from pullback_server.engine.tape_state import Held, Operands
from pullback_server.faults import Fault
from pullback_wire import Reason

#: Most rows of batched grad_outputs.
_MOST_ROWS = 65_536


def grad_outputs(op: ops.Grad, outputs: Sequence[Held], operands: Operands) -> tuple[list[Held | None], int | None]:
    """One for each output, None where torch makes it; and how many rows they have, None: no leading axis.

    Raises Fault, Dependency.
    """
    if op.grad_outputs and len(op.grad_outputs) != len(outputs):
        raise Fault(
            Reason.BAD_COTANGENT,
            f"{len(outputs)} outputs and {len(op.grad_outputs)} grad_outputs, expected as many or none",
            "grad_outputs",
        )
    rows: int | None = None
    values: list[Held | None] = []
    given = op.grad_outputs or [None] * len(outputs)
    for index, (operand, output) in enumerate(zip(given, outputs, strict=True)):
        field = f"grad_outputs[{index}]"
        if operand is None:
            _check_implicit(output, field)
            values.append(None)
            continue
        held = operands.take(operand, field)
        expected = list(output.tensor.shape)
        if op.batched:
            rows = _rows(held.tensor, rows, expected, field)
            expected = [rows, *expected]
        _check_like(held.tensor, output, expected, field)
        values.append(held)
    if op.batched and rows is None:
        raise Fault(Reason.BAD_COTANGENT, "is_grads_batched is set, but there are no grad_outputs", "is_grads_batched")
    return values, rows


def _check_implicit(output: Held, field: str) -> None:
    tensor = output.tensor
    if tensor.numel() != 1 or tensor.is_complex():
        raise Fault(
            Reason.MISSING_COTANGENT,
            f"{field} is missing: it may be left out only for a real scalar, but the output is {describe(tensor)}",
            field,
        )


def _rows(tensor: torch.Tensor, known: int | None, expected: list[int], field: str) -> int:
    """The extent of the leading axis."""
    if not tensor.ndim:
        raise Fault(
            Reason.BAD_COTANGENT,
            f"{field} has the shape [], expected a leading axis before {expected}, as is_grads_batched is set",
            f"{field}.shape",
        )
    rows = tensor.shape[0]
    if known is not None and known != rows:
        raise Fault(
            Reason.BAD_COTANGENT, f"{field} has {rows} rows, others have {known}, expected as many", f"{field}.shape"
        )
    if not 1 <= rows <= _MOST_ROWS:
        reason = Reason.RESULT_TOO_LARGE if rows else Reason.BAD_COTANGENT
        raise Fault(reason, f"{field} has {rows} rows, expected 1 to {_MOST_ROWS}", f"{field}.shape")
    return rows


def _check_like(tensor: torch.Tensor, output: Held, expected: list[int], field: str) -> None:
    like = output.tensor
    if list(tensor.shape) != expected:
        first = " (rows first)" if len(expected) > like.ndim else ""
        raise Fault(
            Reason.BAD_COTANGENT,
            f"{field} has the shape {list(tensor.shape)}, expected {expected} as its output{first}",
            f"{field}.shape",
        )
    mixed = tensor.dtype != like.dtype and (tensor.is_complex() or like.is_complex())
    # torch casts from one real dtype to another.
    if mixed or not differentiable(tensor.dtype):
        raise Fault(
            Reason.BAD_COTANGENT,
            f"{field} is {name_of(tensor.dtype)}, expected {name_of(like.dtype)} as its output",
            f"{field}.dtype",
        )
