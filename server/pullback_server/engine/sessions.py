"""The sessions of a worker: a tape for each, and the memory in which an op's tensors come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pullback_server.engine.core import Engine
from pullback_server.engine.tape import Tape, TapeResult
from pullback_server.job import TensorRef
from pullback_server.ops import Call, Grad, Operand, Put, SessionJob


class Sessions:
    """Tapes by session."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tapes: dict[int, Tape] = {}

    def run(self, job: SessionJob, tensors: Sequence[torch.Tensor]) -> TapeResult:
        """Runs one op. `tensors` by payload index; the tape may keep them. Raises Fault."""
        tape = self._tapes.get(job.session)
        if tape is None:
            tape = self._tapes[job.session] = Tape(self._engine, job.session, job.budget)
        return tape.run(job, tensors)

    def end(self, session: int) -> None:
        """Frees everything that a session holds."""
        tape = self._tapes.pop(session, None)
        if tape is not None:
            tape.close()


def op_references(job: SessionJob) -> Iterator[TensorRef]:
    """Every tensor that came with an op."""
    for operand in _operands(job):
        if operand.value is not None:
            yield operand.value


def _operands(job: SessionJob) -> Iterator[Operand]:
    match job.op:
        case Put(values):
            yield from values
        case Call() as call:
            yield from call.inputs
            yield from call.targets
            yield from call.parameters
        case Grad() as grad:
            yield from (operand for operand in grad.grad_outputs if operand is not None)
