"""One attempt at a computation: the kernels it needs, and a model that is afterwards as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

from pullback_server.engine.call import Again, Call
from pullback_server.engine.guards import Ambience, compiled_code_as_written, plain_kernels, without_cudnn
from pullback_server.engine.hosted import HostedModel
from pullback_server.job import Job

C = TypeVar("C", bound=Call)
R = TypeVar("R")

_AS_THEY_ARE = contextlib.nullcontext()


def _kernels(job: Job, hosted: HostedModel) -> contextlib.AbstractContextManager[object]:
    """The kernels that have the derivatives asked for."""
    first_order = job.kind in ("evaluate", "vjp")
    plain = not first_order or job.batched
    no_cudnn = hosted.without_cudnn and job.kind != "evaluate" and not (job.kind == "vjp" and job.train)
    # Other tensors in the module's place would have it compiled anew.
    uncompiled = hosted.compiled and bool(job.parameters or job.train)
    if not (plain or no_cudnn or uncompiled):
        return _AS_THEY_ARE
    stack = contextlib.ExitStack()
    if no_cudnn:
        stack.enter_context(without_cudnn())
    if plain:
        stack.enter_context(plain_kernels())
    elif uncompiled:
        stack.enter_context(compiled_code_as_written())
    return stack


def attempt(job: Job, hosted: HostedModel, called: Callable[[], C], work: Callable[[C], R]) -> R:
    """Does some work with a call that `called` makes, both with the kernels that suit the job.

    Raises Again where the work must be done anew with what was learned about the model, and whatever the work raises.
    """
    hosted.watch_parameters(job.train)
    try:
        with Ambience(), _kernels(job, hosted), called() as call:
            found = work(call)
    finally:
        wrote = hosted.restore_state()
    if hosted.spoilt or (wrote and call.forwards > 1):
        raise Again
    return found
