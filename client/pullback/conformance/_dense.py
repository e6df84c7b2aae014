"""Checks of dense derivatives against the products that they stand for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pullback.conformance._check import Mismatch, Skip, expect_equal, of_model
from pullback.conformance._numbers import norm, same
from pullback.conformance._second import promises_second, second
from pullback.conformance._subject import Subject
from pullback.conformance._wire import Refused

#: Most elements of a dense block that is asked for.
_MOST = 1 << 16


def _sizes(subject: Subject) -> tuple[int, int]:
    rows = sum(array.size for array in subject.cotangents.values())
    return rows, sum(subject.inputs[name].size for name in subject.wrt)


@of_model(
    "jacobian.rows", "Contracted with v, the blocks of ComputeJacobian are J^T v; shape is the output's and then wrt's."
)
def jacobian(subject: Subject) -> None:
    subject.differentiates()
    rows, columns = _sizes(subject)
    if rows * columns > _MOST:
        raise Skip(f"its Jacobian has {rows * columns} elements")
    try:
        answer = subject.wire.ask(subject.draft("ComputeJacobian", wrt=subject.wrt, allow_unused=True))
    except Refused as refused:
        if subject.complex and refused.reason == "COMPLEX_UNSUPPORTED":
            raise Skip("it is complex, for which this is refused (COMPLEX_UNSUPPORTED)") from None
        raise
    if subject.complex:
        raise Mismatch("COMPLEX_UNSUPPORTED", "an answer")
    # An output that is floating-point and yet not differentiable may have blocks that say `unused`.
    blocks = {
        pair: block for pair, block in answer.blocks().items() if pair[0] in subject.cotangents or block is not None
    }
    expect_equal(list(blocks), [(row, column) for row in subject.cotangents for column in subject.wrt], "blocks")
    total: dict[str, np.ndarray | None] = {}
    for column in subject.wrt:
        shape = subject.inputs[column].shape
        added = np.zeros(shape)
        for row, v in subject.cotangents.items():
            block = blocks[row, column]
            if block is None:
                continue
            expect_equal(block.shape, v.shape + shape, f"shape of the block {row}, {column}:")
            added = added + np.tensordot(v.astype(np.float64), block.astype(np.float64), v.ndim)
        total[column] = added.astype(subject.inputs[column].dtype)
    same(total, subject.vjp(), subject.tolerance, "J^T v")


@of_model(
    "hessian.rows",
    "ComputeHessian has the gradient of a real scalar, and blocks whose rows, weighted with t, add up to ComputeHvp's.",
)
def hessian(subject: Subject) -> None:
    subject.differentiates()
    if not subject.scalar or len(subject.outputs) > 1:
        raise Skip("its output is not one real scalar (loss.hessian looks at a loss of it)")
    if subject.complex:
        raise Skip("it is complex")
    _hessian(subject, {})


@of_model("loss.hessian", "The same of a loss after the model.")
def loss_hessian(subject: Subject) -> None:
    subject.differentiates()
    if subject.complex or len(subject.outputs) > 1 or not subject.cotangents:
        raise Skip("it has not one real output")
    losses = {loss.name for loss in subject.model.losses}
    if "mse_loss" not in losses:
        raise Skip("the server has no mse_loss for it")
    ((_, output),) = subject.outputs.items()
    target = np.asarray(output * 0.5 + 0.25).astype(output.dtype)
    _hessian(subject, {"loss": "mse_loss", "targets": {"target": target}})


def _hessian(subject: Subject, more: dict[str, Any]) -> None:
    _, columns = _sizes(subject)
    if columns * columns > _MOST:
        raise Skip(f"its Hessian has {columns * columns} elements")
    try:
        answer = subject.wire.ask(subject.draft("ComputeHessian", wrt=subject.wrt, allow_unused=True, **more))
    except Refused as refused:
        if refused.reason not in ("ORDER_UNAVAILABLE", "UNSUPPORTED_BY_MODEL"):
            raise
        # The loss depends on the forward, its gradient on a backward that is another's: they have no Hessian.
        if "loss" in more and (intended := subject.declared("gradient")):
            raise Skip(intended) from None
        if promises_second(subject):
            raise
        raise Skip(f"it has no second derivative, and promises none ({refused.reason})") from None
    blocks = answer.blocks()
    expect_equal(list(blocks), [(row, column) for row in subject.wrt for column in subject.wrt], "blocks")
    tangents = subject.tangents()
    products = second(subject, tangents, cotangents={}, **more)
    same(answer.gradients(), products.gradients(), subject.tolerance, "gradient")
    hvps = products.gradients("hvps")
    total: dict[str, np.ndarray | None] = {}
    for column in subject.wrt:
        shape = subject.inputs[column].shape
        added = np.zeros(math.prod(shape))
        for row in subject.wrt:
            block, t = blocks[row, column], tangents[row]
            if block is None:
                continue
            expect_equal(block.shape, t.shape + shape, f"shape of the block {row}, {column}:")
            # d <gradient, t> / d column: a backward as written may have a Hessian that is not symmetric.
            added = added + t.astype(np.float64).reshape(-1) @ block.astype(np.float64).reshape(t.size, -1)
        total[column] = added.reshape(shape).astype(subject.inputs[column].dtype)
    filled = {name: np.zeros_like(subject.inputs[name]) if a is None else a for name, a in hvps.items()}
    same(total, filled, subject.tolerance, "H t", max(norm(answer.gradients()), norm(filled)))
