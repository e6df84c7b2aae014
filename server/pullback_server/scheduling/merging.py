"""Which jobs may be computed in one: those for one function, by rows that have nothing to do with each other."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from pullback_server.job import Job, Signature, TensorRef

_KINDS = frozenset(("evaluate", "vjp", "jvp", "hvp"))


class Mergeable(NamedTuple):
    """key: equal for jobs that may be merged. rows: of this one."""

    key: Hashable
    rows: int


def mergeable(job: Job, signature: Signature) -> Mergeable | None:
    """How a job may be merged with others; None: not at all.

    Never merged: what is seeded, in train mode, has parameters of its own or differentiates by parameters or targets
    (their gradients are sums over rows), has many cotangents, or brings as many rows as one computation should have.
    """
    batch, axis = signature.batch, signature.batch_axis
    if batch.max_rows < 2 or axis is None or job.kind not in _KINDS:
        return None
    if job.train or job.seed is not None or job.parameters or job.batched or not job.inputs:
        return None
    if any(wrt.place != "input" for wrt in job.wrt) or any(ref.name not in batch.inputs for ref in job.inputs):
        return None
    first = job.inputs[0].shape
    if len(first) <= axis:
        return None
    rows = first[axis]
    if not 0 < rows < batch.max_rows:
        return None
    inputs = _rowwise(job.inputs, axis, rows)
    tangents = _rowwise(job.tangents, axis, rows)
    cotangents = _rowwise(job.cotangents, axis, rows) if job.loss is None else _named(job.cotangents)
    if inputs is None or tangents is None or cotangents is None:
        return None
    loss = job.loss
    function = (
        None if loss is None else (loss.name, repr(sorted(loss.options.items())), tuple(sorted(loss.bindings.items())))
    )
    options = (job.allow_unused, job.return_cotangent_derivatives, tuple(wrt.name for wrt in job.wrt))
    targets = _named(job.targets)
    key = (job.model, job.version, job.kind, function, options, inputs, cotangents, tangents, targets)
    return Mergeable(key, rows)


def _rowwise(refs: Sequence[TensorRef], axis: int, rows: int) -> tuple[Hashable, ...] | None:
    """Names, dtypes and shapes of one row; None where a tensor does not have the rows."""
    found = []
    for name, dtype, shape in sorted((ref.name, ref.dtype, ref.shape) for ref in refs):
        if len(shape) <= axis or shape[axis] != rows:
            return None
        found.append((name, dtype, shape[:axis] + shape[axis + 1 :]))
    return tuple(found)


def _named(refs: Sequence[TensorRef]) -> tuple[Hashable, ...]:
    """Names, dtypes and numbers of axes: each job's loss looks at its own."""
    return tuple(sorted((ref.name, ref.dtype, len(ref.shape)) for ref in refs))
