"""`Tape`: what a worker does with the ops of one session, remote autograd as torch.autograd does it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from pullback_server import ops
from pullback_server.engine._dtypes import WIRE
from pullback_server.engine.call import model_error, out_of_memory, text_of
from pullback_server.engine.core import Engine
from pullback_server.engine.guards import Ambience
from pullback_server.engine.health import Signs, Subject, examine
from pullback_server.engine.retained import Ledger
from pullback_server.engine.tape_call import Caller
from pullback_server.engine.tape_grad import grad
from pullback_server.engine.tape_state import Afford, Cause, Dependency, Handles, Made, Operands, merged
from pullback_server.engine.thrift import thrift
from pullback_server.faults import Fault
from pullback_server.job import HealthRecord, TensorRef
from pullback_wire import Reason
from pullback_wire.operations import OPERATIONS

__all__ = ["Tape", "TapeResult"]


@dataclass
class TapeResult:
    """What an op came to. `TensorRef.payload` of the outcome is an index into `tensors`."""

    outcome: ops.SessionOutcome
    tensors: list[torch.Tensor]
    #: What its health is read from when the device is done; None: it was not looked at.
    signs: Signs | None = None


#: Whose health was looked at, and what for.
_Looked = tuple[tuple[str, HealthRecord], Signs | None]


class Tape:
    """The tensors and graphs of one session."""

    def __init__(self, engine: Engine, session: int, budget: int) -> None:
        self.session = session
        self._engine = engine
        self._ledger = Ledger()
        self._afford = Afford(self._ledger, budget)
        self._handles = Handles(self._ledger)
        self._caller = Caller(engine, self._handles, self._ledger)
        self._retained = 0

    @property
    def live(self) -> int:
        """How many handles are held."""
        return len(self._handles.held)

    @property
    def retained(self) -> int:
        """How many bytes they and the graphs behind them hold."""
        return self._retained

    def close(self) -> None:
        """Drops everything."""
        self._handles.clear()
        self._caller.close()
        self._ledger.close()
        self._retained = 0

    def run(self, job: ops.SessionJob, tensors: Sequence[torch.Tensor]) -> TapeResult:
        """Runs one op.

        tensors: by payload index, on the engine's device; the session may keep them.

        Raises Fault; after it the session is as if the op had not been, but for operands that it stored, graphs that a
        backward freed and handles that are marked as failed.
        """
        begin = time.perf_counter()
        self._afford.budget = job.budget
        self._handles.release(job.release)
        try:
            with Ambience():
                result = self._run(job, tensors)
        except BaseException as error:
            # What the op had come to must be gone before it is told what the session holds.
            _clear_frames(error)
            fault = self._failed(job, error)
            if fault.reason in (Reason.INTERNAL, Reason.MODEL_ERROR):
                try:
                    raise fault from (error.__cause__ if fault is error else error)
                finally:
                    del fault
        else:
            result.outcome.timings["tape"] = time.perf_counter() - begin
            return result
        if fault.reason is Reason.OUT_OF_MEMORY and self._engine.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            raise fault.with_traceback(None) from None
        finally:
            # A frame that knows the exception that knows the frame would keep the op's tensors until the next
            # collection of garbage.
            del fault

    def _failed(self, job: ops.SessionJob, error: BaseException) -> Fault:
        """Marks what a failed op should have made; what to tell of it."""
        if isinstance(error, Dependency):
            cause = error.cause
            fault = Fault(Reason.DEPENDENCY_FAILED, str(cause))
        else:
            fault = error if isinstance(error, Fault) else self._explained(error)
            cause = Cause(job.number, type(job.op).__name__.lower(), fault.reason.value, fault.message)
        self._handles.fail(_makes(job.op), cause, isinstance(job.op, ops.Call))
        self._ledger.dropped(1)
        self._retained = self._ledger.total()
        return fault

    def _explained(self, error: BaseException) -> Fault:
        if out_of_memory(error):
            return Fault(Reason.OUT_OF_MEMORY, f"memory of {self._engine.device} ran out: {text_of(error)}")
        if isinstance(error, Exception):
            return Fault(Reason.INTERNAL, f"{type(error).__name__}: {text_of(error)}")
        return model_error("the code of a model", error)

    def _run(self, job: ops.SessionJob, tensors: Sequence[torch.Tensor]) -> TapeResult:
        op = job.op
        operands = Operands(self._handles, tensors)
        self._keep(op, operands)
        if isinstance(op, ops.Call) and isinstance(op.callee, ops.Operation):
            self._check_in_place(op, op.callee, operands, job.max_result_bytes)
        fetch: Sequence[int] = ()
        fetch_below = 0
        made: Made
        looked: _Looked | None = None
        match op:
            case ops.Call():
                self._handles.check_free(op.handles)
                made = self._caller.call(op, operands, job.number, self._afford)
                if isinstance(op.callee, ops.Model):
                    looked = self._looked_at(self._caller.label, Subject(_tensors_of(made)))
                fetch, fetch_below = op.fetch, op.fetch_below
            case ops.Grad():
                self._handles.check_free(op.handles)
                made = grad(op, operands, self._ledger, self._afford)
                label = merged(self._handles[handle].lineage for handle in op.outputs).label
                looked = self._looked_at(label, Subject((), _tensors_of(made)))
                fetch, fetch_below = op.fetch, op.fetch_below
            case ops.Put():
                made = [(value.keep, value.name, self._handles[value.keep]) for value in op.values]
            case ops.Get():
                made = [(handle, "", self._handles[handle]) for handle in op.handles]
                fetch = op.handles
            case ops.Parameters():
                self._handles.check_free(op.handles)
                made = self._caller.parameters(op)
            case ops.Release():
                made = []
            case ops.Broken():
                record = op.fault
                raise Fault(Reason[record.reason], record.message, record.field, record.retry_after)
        # What was changed in place cannot be taken back, so nothing about it is refused any more.
        in_place = isinstance(op, ops.Call) and any(held is not None and held.handle for _, _, held in made)
        if not isinstance(op, (ops.Put, ops.Get)):
            self._note(made, refuse=not in_place)
        shared = self._handles.memory(op) if isinstance(op, ops.Call) else {}
        result = self._result(made, fetch, fetch_below, job.max_result_bytes, shared)
        for handle, _, held in made:
            if held is not None and held.handle == 0:
                self._handles.store(handle, held)
        self._retained = self._ledger.total()
        outcome = result.outcome
        outcome.live, outcome.retained, outcome.graphs = self.live, self._retained, self._handles.graphs
        if looked is not None:
            (outcome.model, outcome.limits), result.signs = looked
        if self._engine.device.type == "cuda":
            result.outcome.device_memory = torch.cuda.memory_allocated(self._engine.device)
        return result

    def _looked_at(self, label: tuple[str, HealthRecord], subject: Subject) -> _Looked | None:
        if not (self._engine.gradient_health and label[1].enabled):
            return None
        signs = thrift.look(label[0], lambda: examine(subject))
        return None if signs is None else (label, signs)

    def _keep(self, op: ops.Op, operands: Operands) -> None:
        """Stores the op's own tensors that are to be kept. Raises Fault, having stored none."""
        kept = list(_kept(op))
        if not kept:
            return
        self._handles.check_free([operand.keep for operand, _ in kept])
        leaves = [(operand.keep, operands.leaf(operand, field)) for operand, field in kept]
        self._afford(sum(held.tensor.untyped_storage().nbytes() for _, held in leaves))
        for handle, held in leaves:
            self._handles.store(handle, held)

    def _check_in_place(self, op: ops.Call, callee: ops.Operation, operands: Operands, limit: int) -> None:
        """What may be refused about an operation in place, before it has changed anything. Raises Fault, Dependency."""
        operation = OPERATIONS.get(callee.name)
        if operation is None or not operation.in_place or not op.inputs:
            return
        fresh = [operand for operand in op.inputs if not operand.handle and not operand.keep]
        self._afford(sum(operands.leaf(operand, "inputs").tensor.nbytes for operand in fresh))
        target = operands.take(op.inputs[0], "inputs")
        if target.handle in op.fetch and target.tensor.nbytes > limit:
            raise Fault(
                Reason.RESULT_TOO_LARGE,
                f"the values asked for have {target.tensor.nbytes} bytes, at most {limit} are allowed",
                "fetch",
            )

    def _note(self, made: Made, refuse: bool) -> None:
        """Notes what an op made. Raises Fault (SESSION_BUDGET)."""
        tensors = [held.tensor for _, _, held in made if held is not None]
        for tensor in tensors:
            self._ledger.note(tensor)
        self._ledger.note_graph(tensors)
        if (
            refuse
            and self._ledger.bound > self._afford.budget
            and (held := self._ledger.settle()) > self._afford.budget
        ):
            raise self._afford.over(self._retained, held)

    def _result(
        self, made: Made, fetch: Sequence[int], fetch_below: int, limit: int, shared: Mapping[int, int]
    ) -> TapeResult:
        """The answer, with the values that were asked for. Raises Fault (RESULT_TOO_LARGE)."""
        wanted = set(fetch)
        total = 0
        if wanted:
            total = sum(held.tensor.nbytes for handle, _, held in made if held is not None and handle in wanted)
            if total > limit:
                raise Fault(
                    Reason.RESULT_TOO_LARGE,
                    f"the values asked for have {total} bytes, at most {limit} are allowed; read fewer at a time",
                    "fetch",
                )
        records: list[ops.HandleRecord] = []
        values: list[torch.Tensor] = []
        for handle, name, held in made:
            if held is None:
                records.append(ops.HandleRecord(handle, name, 0, (), False, True))
                continue
            tensor = held.tensor
            number, shape, ref = WIRE[tensor.dtype], tuple(tensor.shape), None
            fetched = handle in wanted
            if not fetched and fetch_below > 0 and (size := tensor.nbytes) <= fetch_below and total + size <= limit:
                fetched, total = True, total + size
            if fetched:
                ref = TensorRef(name, number, shape, len(values))
                values.append(tensor.detach())
            # A tensor that was changed in place is the operand itself.
            shares = shared.get(tensor.untyped_storage()._cdata, 0) if shared and not held.handle else 0
            records.append(ops.HandleRecord(handle, name, number, shape, tensor.requires_grad, False, ref, shares))
        return TapeResult(ops.SessionOutcome(records, 0, 0, {}), values)


def _tensors_of(made: Made) -> list[torch.Tensor]:
    return [held.tensor for _, _, held in made if held is not None]


def _clear_frames(error: BaseException) -> None:
    """Lets go of what the frames hold that an exception came through; their lines stay, for the log."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            traceback.clear_frames(found.__traceback__)
            waiting += [found.__cause__, found.__context__]


def _kept(op: ops.Op) -> Iterator[tuple[ops.Operand, str]]:
    """The operands that are stored before the op runs, and what to call them."""
    groups: list[tuple[str, Sequence[ops.Operand | None]]] = []
    match op:
        case ops.Put():
            for index, value in enumerate(op.values):
                yield value, f"tensors[{index}]"
        case ops.Call():
            groups = [("inputs", op.inputs), ("targets", op.targets), ("parameters", op.parameters)]
        case ops.Grad():
            groups = [("grad_outputs", op.grad_outputs)]
        case _:
            pass
    for what, operands in groups:
        for index, operand in enumerate(operands):
            if operand is not None and operand.keep and not operand.handle:
                yield operand, f"{what}[{operand.name or index}]"


def _makes(op: ops.Op) -> list[int]:
    """The handles that an op would have made. What it was to store before it ran comes first."""
    match op:
        case ops.Get() | ops.Release():
            return []
        case ops.Put():
            return [value.keep for value in op.values]
        case ops.Call() | ops.Grad():
            return [operand.keep for operand, _ in _kept(op)] + op.handles
        case _:
            return op.handles
