"""One job computed piece by piece, some rows at a time, which takes less memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
import torch

from pullback_server.engine._dtypes import differentiable
from pullback_server.engine.attempt import attempt
from pullback_server.engine.backward import gradients
from pullback_server.engine.call import Call, Forward
from pullback_server.engine.cotangents import Pull, cotangents
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.merged import mergeable, separable
from pullback_server.engine.results import EngineResult, Results
from pullback_server.engine.reverse import finish_vjp
from pullback_server.job import BlockRef, GradRef, Job, Outcome, TensorRef

Tensors = Sequence[torch.Tensor]
Compute = Callable[[Job, HostedModel, Tensors], EngineResult]


class InOne(Exception):
    """This job can only be computed in one."""


def pieceable(job: Job, hosted: HostedModel) -> int:
    """The rows of a job that can be computed piece by piece; 0 where it cannot."""
    if job.kind == "vjp":
        return separable(job, hosted)
    if job.loss is not None and job.kind != "evaluate":
        return 0
    return mergeable(job, hosted) if job.kind != "evaluate" else separable(job, hosted)


def in_pieces(job: Job, hosted: HostedModel, tensors: Tensors, most: int, compute: Compute) -> EngineResult:
    """Computes at most `most` rows at a time. compute: the job of one piece.

    Raises InOne where that cannot be; and what `compute` raises.
    """
    rows, axis = pieceable(job, hosted), hosted.registration.batch_axis
    if axis is None or rows <= most:
        raise InOne
    sizes = [min(most, rows - start) for start in range(0, rows, most)]
    if job.kind == "vjp" or job.loss is not None:

        def work(call: PieceCall) -> EngineResult:
            return _vjp(call) if job.kind == "vjp" else _evaluate(call)

        return attempt(job, hosted, lambda: PieceCall(job, hosted, tensors, sizes), work)
    return _joined(job, rows, axis, [compute(*piece) for piece in _jobs(job, hosted, tensors, sizes, axis)])
