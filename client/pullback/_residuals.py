"""Outputs of a function as one vector of residuals, and their Jacobian."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pullback import errors
from pullback._arrays import Array
from pullback._function import Function
from pullback._packing import Packing
from pullback._points import Point, Row
from pullback_wire import wire_dtype
from pullback_wire.dtypes import COMPLEX, FLOATING

Outputs = Mapping[str, Array]


def number_among(model: str, outputs: Outputs) -> str:
    """The name of the output that is one real number. Raises MissingCotangent, ComplexUnsupported."""
    found = [name for name, array in outputs.items() if wire_dtype(array.dtype) in FLOATING | COMPLEX]
    if len(found) != 1 or outputs[found[0]].size != 1:
        shapes = ", ".join(f"{name or 'output'} {list(array.shape)}" for name, array in outputs.items())
        raise errors.MissingCotangent(
            f"model {model!r} returns {shapes}, and an objective is one real number: give a loss, or use residuals and "
            "jacobian"
        )
    if wire_dtype(outputs[found[0]].dtype) in COMPLEX:
        raise errors.ComplexUnsupported(f"model {model!r} returns a complex number, and an objective is a real one")
    return found[0]


def take_residuals(function: Function, point: Point, outputs: Outputs, targets: Outputs) -> None:
    """Sets a point's residuals, where they are not known. targets: that are subtracted. Raises PullbackError."""
    model = function.model.name
    if any(wire_dtype(array.dtype) in COMPLEX for array in outputs.values()):
        raise errors.ComplexUnsupported(
            f"model {model!r} has complex outputs, and residuals are real: host a function with a real view of them"
        )
    real = {name: array for name, array in outputs.items() if wire_dtype(array.dtype) in FLOATING}
    if not real:
        raise errors.NotDifferentiable(f"model {model!r} has no floating-point output")
    wanted = dict(targets)
    if len(real) == 1 and "target" in wanted:
        wanted = {next(iter(real)): wanted.pop("target"), **wanted}
    for name, target in wanted.items():
        if name not in real:
            raise errors.BadName(f"target {name!r} belongs to no output of model {model!r}, which has {list(real)}")
        if target.shape != real[name].shape or wire_dtype(target.dtype) in COMPLEX:
            raise errors.BadTensor(
                f"the target is {target.dtype}{list(target.shape)}, the output {real[name].dtype}"
                f"{list(real[name].shape)}"
            )
    point.rows = [Row(name, array.dtype, array.shape, array.size) for name, array in real.items()]
    if point.residuals is None:
        flat = _joined(list(real.values()), point.rows)
        if wanted:
            flat -= _joined([wanted.get(name) for name in real], point.rows)
        point.residuals = flat


def _joined(parts: Sequence[Array | None], rows: Sequence[Row]) -> Array:
    """One vector; None: zeros."""
    pairs = zip(parts, rows, strict=True)
    return np.concatenate([np.zeros(r.size) if p is None else np.asarray(p, np.float64).reshape(-1) for p, r in pairs])


def _split(vector: Array, rows: Sequence[Row]) -> list[Array]:
    parts = np.split(vector, np.cumsum([row.size for row in rows])[:-1])
    return [part.astype(row.dtype).reshape(row.shape) for part, row in zip(parts, rows, strict=True)]


def matrix(model: str, point: Point, packing: Packing, blocks: Mapping[tuple[str, str], Array | None]) -> Array:
    """The Jacobian [m, n] of its blocks by output and what varies. Raises UnusedInput."""
    # In the order of wrt.
    columns = dict(zip(dict.fromkeys(column for _, column in blocks), packing.variables, strict=True))
    rows = []
    for row in point.rows:
        here = {columns[column].key: block for (name, column), block in blocks.items() if row.name in ("", name)}
        # An output that is cut off from what varies has no blocks at all.
        strips = [
            np.zeros((row.size, one.count)) if block is None else block.reshape(row.size, one.count)
            for one in packing.variables
            for block in [here.get(one.key)]
        ]
        rows.append(np.concatenate(strips, axis=1, dtype=np.float64))
    for one in packing.variables:
        if all(block is None for (_, column), block in blocks.items() if columns[column] is one):
            raise errors.UnusedInput(
                f"model {model!r}: no output depends on {one.key!r}, which varies; leave it out of wrt"
            )
    return np.concatenate(rows)


def operator(function: Function, point: Point, packing: Packing) -> Any:
    """The Jacobian as a scipy LinearOperator, of products that are calls. Raises ImportError without scipy."""
    from scipy.sparse.linalg import LinearOperator  # type: ignore[import-untyped]

    rows = point.rows
    # What is only one has no name here.
    named = len(rows) > 1 or bool(rows[0].name)

    def forward(v: Any) -> Array:
        tangents = packing.tangents(np.asarray(v).reshape(-1))
        result = function.stateless("jvp", packing.named(point.x), tangents, return_outputs=False)
        moved = result.tangents if isinstance(result.tangents, dict) else {"": result.tangents}
        return _joined([moved.get(row.name) if named else moved[""] for row in rows], rows)

    #: Outputs that are no function of what varies; known once one was asked about.
    cut: set[str] = set()

    def backward(u: Any) -> Array:
        parts = _split(np.asarray(u).reshape(-1), rows)
        cotangents: Any = {row.name: part for row, part in zip(rows, parts, strict=True) if row.name not in cut}
        options = {"wrt": packing.wrt, "return_outputs": False, "allow_unused": True}
        given = cotangents if named else parts[0]
        try:
            result = function.stateless("vjp", packing.named(point.x), given, **options)
        except errors.NotDifferentiable:
            still = packing.tangents(np.zeros(packing.size))
            moved = function.stateless("jvp", packing.named(point.x), still, return_outputs=False).tangents
            if cut or not named or not isinstance(moved, dict):
                raise
            cut.update(name for name, part in moved.items() if part is None)
            if not cut:
                raise
            return backward(u)
        return packing.joined(list(result.gradients.values()))

    m, n = sum(row.size for row in rows), packing.size
    return LinearOperator((m, n), matvec=forward, rmatvec=backward, dtype=np.float64)
