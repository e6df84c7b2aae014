"""Which jobs may be computed in one: those for one function, by rows that have nothing to do with each other."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from pullback_server.job import Job, Signature, TensorRef
from pullback_server.scheduling.queue import Lane

#: Jobs of which it is remembered how they may be merged.
_SEEN = 256
_KINDS = frozenset(("evaluate", "vjp", "jvp", "hvp"))


class Mergeable(NamedTuple):
    """key: equal for jobs that may be merged. rows: of this one."""

    key: Hashable
    rows: int


def mergeable(job: Job, signature: Signature) -> Mergeable | None:
    """How a job may be merged with others; None: not at all.

    Never merged: what is seeded, in train mode, has parameters of its own or differentiates by parameters or targets
    (their gradients are sums over rows), has many cotangents, looks for anomalies, or brings as many rows as one
    computation should have.
    """
    batch, axis = signature.batch, signature.batch_axis
    if batch.max_rows < 2 or axis is None or job.kind not in _KINDS:
        return None
    if job.train or job.seed is not None or job.parameters or job.batched or not job.inputs or job.detect_anomaly:
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


class MergeRules:
    """Where jobs wait: those that may be merged in one lane. enabled: whether any may."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._seen: dict[int, tuple[Job, Signature, Mergeable | None]] = {}
        #: Models whose requests turned out not to be mergeable, whatever was declared and probed, and why.
        self._refused: dict[tuple[str, str], str] = {}

    def why_not(self, model: tuple[str, str]) -> str:
        """Why a model's jobs are not merged, whatever its signature says; empty: nothing stands against it."""
        return self._refused.get(model, "") if self._enabled else "the server was started without batching"

    def refuse(self, model: tuple[str, str], why: str) -> bool:
        """A model's jobs must not be merged any more. Returns whether that is news."""
        news = model not in self._refused
        self._refused.setdefault(model, why)
        return news

    def forget(self, model: tuple[str, str]) -> None:
        """Forgets a model that is no more, by its name and id."""
        self._refused.pop(model, None)
        for number in [number for number, (job, _, _) in self._seen.items() if (job.model, job.version) == model]:
            del self._seen[number]

    def lane(self, job: Job, signature: Signature | None, *, alone: bool = False) -> tuple[Lane, int]:
        """Where a job waits, and its rows. alone: it must not be merged."""
        model = (job.model, job.version)
        if not alone and signature is not None and not self.why_not(model):
            found = self._mergeable(job, signature)
            if found is not None:
                batch = signature.batch
                return Lane(found.key, model, None, batch.max_rows, batch.max_bytes, batch.max_delay), found.rows
        axis = None if signature is None else signature.batch_axis
        shape = job.inputs[0].shape if job.inputs else ()
        rows = shape[axis] if axis is not None and axis < len(shape) else 1
        return Lane(("alone", model), model, None), max(rows, 1)

    def _mergeable(self, job: Job, signature: Signature) -> Mergeable | None:
        """`mergeable`, of jobs that come again and again as one object (see rpc/known.py)."""
        known = self._seen.get(id(job))
        if known is not None and known[0] is job and known[1] is signature:
            return known[2]
        found = mergeable(job, signature)
        self._seen[id(job)] = (job, signature, found)
        if len(self._seen) > _SEEN:
            del self._seen[next(iter(self._seen))]
        return found
