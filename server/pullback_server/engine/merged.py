"""One computation for several jobs: their rows go through the model together, and each gets its own.

Each member is checked by a `Call` of its own, as if it were alone; the model sees one `MergedCall`, whose inputs are
theirs, one after the other along the batch axis. What it returns is cut apart again before the members' losses, so that
each loss is over its own rows, and all derivatives are one backward from all of that.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import msgspec
import torch

from pullback_server.engine._dtypes import WIRE, describe
from pullback_server.engine.attempt import attempt
from pullback_server.engine.backward import check_unused, gradients
from pullback_server.engine.call import Call, Forward
from pullback_server.engine.cotangents import Pull, cotangents
from pullback_server.engine.forward_mode import finish_jvp, movement, push
from pullback_server.engine.guards import generator_states
from pullback_server.engine.health import Subject, examine_rows
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.results import EngineResult, Results, add_seconds
from pullback_server.engine.reverse import finish_vjp
from pullback_server.engine.second import along, check_hvp_size, finish_hvp, first_backward, tangents
from pullback_server.engine.thrift import thrift
from pullback_server.faults import Fault
from pullback_server.job import Job, TensorRef
from pullback_wire import Reason


class Refused(Exception):
    """Why the model's requests must not be computed together."""


def separable(job: Job, hosted: HostedModel) -> int:
    """The rows of a job, where each of them can be computed apart; 0 where they cannot, as far as its shapes tell."""
    axis, names = hosted.registration.batch_axis, hosted.batched_inputs
    if axis is None or not names or job.kind not in _WORK:
        return 0
    if job.train or job.seed is not None or job.batched:
        return 0
    rows = {ref.shape[axis] if ref.name in names and len(ref.shape) > axis else 0 for ref in job.inputs}
    return rows.pop() if len(rows) == 1 else 0


def mergeable(job: Job, hosted: HostedModel) -> int:
    """The rows of a job that may be computed with others; 0 where it may not."""
    if job.parameters or job.detect_anomaly or any(wrt.place != "input" for wrt in job.wrt):
        return 0
    return separable(job, hosted)


def detached(error: BaseException) -> Fault:
    """A fault without its traceback, which would hold on to tensors; what the traceback said is a note on it."""
    if isinstance(error, Fault):
        fault = Fault(error.reason, error.message, error.field, error.retry_after)
    else:
        fault = Fault(Reason.INTERNAL, f"the worker failed: {type(error).__name__}: {error}")
    if fault.reason in (Reason.MODEL_ERROR, Reason.INTERNAL):
        fault.add_note("".join(traceback.format_exception(error)))
    return fault


class Member:
    """One of the jobs: its checks, its results, and what became of it. `number` tells it from the others.

    `with` it, its faults are its own.
    """

    def __init__(self, number: int, job: Job, rows: int) -> None:
        self.number = number
        self.job = job
        self.rows = rows
        self.results = Results(job)
        self.fault: Fault | None = None
        #: The tangents by the index in `wrt` of what they move.
        self.moved: dict[int, torch.Tensor] = {}
        #: Where its rows begin.
        self.first = 0
        #: The names of its outputs, as the merged call has them.
        self.names: dict[str, str] = {}

    def prepare(self, hosted: HostedModel, tensors: Sequence[torch.Tensor]) -> None:
        """Everything that is checked before a forward. Raises Fault."""
        self.call = Call(self.job, hosted, tensors)
        # A forward of its own, should one be needed, must not take place here.
        self.call.copies = False
        if self.job.kind == "jvp":
            self.moved = movement(self.call)
        elif self.job.kind == "hvp":
            self.moved = tangents(self.call)

    def __enter__(self) -> None:
        """Around what concerns this member alone: its fault is its own."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Fault):
            self.fault = detached(error)
            return True
        return False

    def outputs(self, of_all: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Its own among the outputs of a `MergedCall`."""
        return {name: of_all[key] for name, key in self.names.items()}

    def own(self, found: torch.Tensor | None, axis: int) -> torch.Tensor | None:
        """Its rows of a gradient by the merged inputs."""
        if found is None:
            return None
        dense = found if found.layout is torch.strided else found.to_dense()
        return dense.narrow(axis, self.first, self.rows)

    def pull(self, fw: Forward) -> Pull:
        """Its cotangents against its outputs. Raises Fault, and WritesInputs where a forward of its own is needed."""
        return cotangents(self.call, Forward(self.outputs(fw.outputs), self.call.wrt_values(), fw.witness))


class MergedCall(Call):
    """What the model sees of all members. Its outputs are theirs: "3/loss" is the loss of member 3."""

    def __init__(self, members: Sequence[Member], hosted: HostedModel, rows: int) -> None:
        """rows: as many as the model shall see; what the members do not have is made up. Raises Fault."""
        first = members[0].call
        axis = hosted.registration.batch_axis
        assert axis is not None
        self.axis = axis
        self.members = members
        self.rows = rows
        self._sizes = [member.rows for member in members]
        padding = rows - sum(self._sizes)
        merged = {name: [member.call.inputs[name] for member in members] for name in first.inputs}
        if padding:
            self._sizes.append(padding)
            for parts in merged.values():
                last = parts[-1].narrow(axis, members[-1].rows - 1, 1)
                parts.append(last.expand(*last.shape[:axis], padding, *last.shape[axis + 1 :]))
        tensors = [_joined(parts, axis) for parts in merged.values()]
        refs = [
            TensorRef(name, WIRE[tensor.dtype], tuple(tensor.shape), index)
            for index, (name, tensor) in enumerate(zip(merged, tensors, strict=True))
        ]
        start = 0
        for member in members:
            member.first = start
            start += member.rows
        job = msgspec.structs.replace(first.job, loss=None, inputs=refs, targets=[], cotangents=[], tangents=[])
        super().__init__(job, hosted, tensors)
        self.loss = first.loss
        self._seen: list[torch.Tensor] = []
        self.timings["copy_in"] += sum(member.call.timings["copy_in"] for member in members)

    def composed(
        self, outputs: dict[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The members' outputs, or losses. Raises Refused where they cannot be told apart."""
        parts: dict[str, Sequence[torch.Tensor]] = {}
        self._seen = list(outputs.values())
        for name, tensor in outputs.items():
            if tensor.ndim <= self.axis or tensor.shape[self.axis] != self.rows:
                raise Refused(f"its output {name!r} is {describe(tensor)} for {self.rows} rows")
            parts[name] = torch.split(tensor, self._sizes, self.axis)
        found: dict[str, torch.Tensor] = {}
        # What forward mode cannot do, reverse mode may: a fault of the first attempt at a JVP is nobody's.
        attempted = self.job.kind == "jvp" and self.hosted.forward_mode and self.forwards == 1
        for index, member in enumerate(self.members):
            with contextlib.nullcontext() if attempted else member:
                own = {name: shares[index] for name, shares in parts.items()}
                # As the member's own call would, with its own targets.
                own = member.call.composed(own, member.call.targets)
                member.names = {name: f"{member.number}/{name}" for name in own}
                found.update(zip(member.names.values(), own.values(), strict=True))
        if self.loss is not None:
            self._seen = list(found.values())
        return found

    def everything(self) -> Iterator[torch.Tensor]:
        """The outputs of the latest forward, everybody's in as few tensors as can be. To be asked for once."""
        seen, self._seen = self._seen, []
        if self.loss is not None and all(loss.ndim == 0 for loss in seen):
            seen = [torch.stack([loss.detach() for loss in seen])]
        yield from seen

    @property
    def fell_back(self) -> bool:
        """Whether a JVP in forward mode was given up."""
        return self.job.kind == "jvp" and self.hosted.forward_mode and self.forwards > 1

    @property
    def living(self) -> list[Member]:
        """Those to whom nothing has happened."""
        return [member for member in self.members if member.fault is None]


def _joined(parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    first = parts[0]
    if any(part.dtype != first.dtype for part in parts):
        # torch would promote them.
        raise Fault(Reason.INTERNAL, "the members of a batch have inputs of different dtypes")
    return torch.cat(list(parts), axis)


def together(
    jobs: Sequence[Job], hosted: HostedModel, tensors: Sequence[Sequence[torch.Tensor]], timings: dict[str, float]
) -> list[EngineResult | Fault]:
    """One attempt at several mergeable jobs: what each came to, which is its own fault or its result.

    tensors: of each job, by payload index. timings: seconds by stage are added to these.

    Raises Refused; whatever else it raises need not concern every member: they should be computed one by one.
    """
    members = [Member(number, job, mergeable(job, hosted)) for number, job in enumerate(jobs)]
    for member, given in zip(members, tensors, strict=True):
        with member:
            member.prepare(hosted, given)
    living = [member for member in members if member.fault is None]
    if living:
        rows = padded(sum(member.rows for member in living), jobs[0], hosted)
        call = attempt(
            living[0].job, hosted, lambda: MergedCall(living, hosted, rows), lambda call: _watched(call, timings)
        )
        if call.fell_back and 0 < len(call.living) < len(living):
            return _without(call.living, members, jobs, hosted, tensors, timings)
    return [member.results.finish() if member.fault is None else member.fault for member in members]


def _without(
    rest: Sequence[Member],
    members: Sequence[Member],
    jobs: Sequence[Job],
    hosted: HostedModel,
    tensors: Sequence[Sequence[torch.Tensor]],
    timings: dict[str, float],
) -> list[EngineResult | Fault]:
    """Computes the rest anew: a fault of another one may be why forward mode was not used for them."""
    numbers = [member.number for member in rest]
    again = together([jobs[i] for i in numbers], hosted, [tensors[i] for i in numbers], timings)
    found = dict(zip(numbers, again, strict=True))
    return [found.get(member.number) or member.fault or member.results.finish() for member in members]


def padded(rows: int, job: Job, hosted: HostedModel) -> int:
    """The rows to compute for so many of a job's kind."""
    if job.kind not in ("evaluate", "vjp"):
        return rows
    return next((size for size in hosted.registration.options.batching.pad_to if size >= rows), rows)


def _watched(call: MergedCall, timings: dict[str, float]) -> MergedCall:
    """The work itself; returns the call.

    Raises Refused where it draws random numbers: which member gets which would be chance.
    """
    device, foreign = call.device, not call.hosted.stock
    before = generator_states(device, foreign)
    _WORK[call.job.kind](call)
    if generator_states(device, foreign) != before:
        raise Refused("it draws random numbers")
    add_seconds(timings, call.timings)
    return call


def _evaluate(call: MergedCall) -> None:
    fw = call.forward()
    for member in call.living:
        with member:
            outputs = member.outputs(fw.outputs)
            member.results.check_size(outputs, ())
            member.results.add_outputs(outputs)
    _examine(call, call.living, (), (), lambda member: Subject(member.outputs(fw.outputs).values()))


def _pulls(call: MergedCall, fw: Forward, check: Callable[[Member, Pull], None]) -> dict[Member, Pull]:
    """The cotangents of everybody who has some that fit."""
    found = {}
    for member in call.living:
        with member:
            pull = member.pull(fw)
            check(member, pull)
            found[member] = pull
    return found


def _vjp(call: MergedCall) -> None:
    fw = call.forward()
    pulls = _pulls(call, fw, lambda member, pull: member.results.check_size(pull.fw.outputs, pull.fw.wrt))
    if not pulls:
        return
    begin = time.perf_counter()
    outputs = [output for pull in pulls.values() for output in pull.outputs]
    values = [value for pull in pulls.values() for value in pull.cotangents]
    found = gradients(call, outputs, fw.wrt, values)
    _examine(call, pulls, found, (), lambda m: Subject(pulls[m].fw.outputs.values(), _own(call, m, found)))
    for member, pull in pulls.items():
        with member:
            finish_vjp(member.call, member.results, pull.fw, [member.own(g, call.axis) for g in found])
    call.timings["backward"] = time.perf_counter() - begin


def _hvp(call: MergedCall) -> None:
    moved = _moved(call)
    fw = call.forward(watch=True)
    pulls = _pulls(call, fw, lambda member, pull: check_hvp_size(member.job, member.results, pull))
    if not pulls:
        return
    begin = time.perf_counter()
    outputs = [output for pull in pulls.values() for output in pull.outputs]
    values = [value.detach().requires_grad_() for pull in pulls.values() for value in pull.cotangents]
    found, _ = first_backward(call, fw, outputs, values, proof=True)
    derived = along(call, found, moved, [*fw.wrt, *values])
    count, start = len(fw.wrt), len(fw.wrt)
    subjects: dict[Member, Subject] = {}
    for member, pull in pulls.items():
        stop = start + len(pull.cotangents)
        with member:
            own = [member.own(gradient, call.axis) for gradient in found]
            check_unused(member.call, own)
            pushed = [*_own(call, member, derived[:count]), *derived[start:stop]]
            subjects[member] = Subject(pull.fw.outputs.values(), own, pushed)
            finish_hvp(member.job, member.results, pull, own, pushed)
        start = stop
    _examine(call, subjects, found, derived, lambda member: subjects[member])
    call.timings["backward"] = time.perf_counter() - begin


def _jvp(call: MergedCall) -> None:
    begin = time.perf_counter()
    outputs, pushed = push(call, _moved(call), lambda *_: None)
    subjects: dict[Member, Subject] = {}
    for member in call.living:
        with member:
            own, tangents = member.outputs(outputs), {name: pushed[key] for name, key in member.names.items()}
            member.results.check_size(own, [tangent for tangent in tangents.values() if tangent is not None])
            finish_jvp(member.results, own, tangents)
            subjects[member] = Subject(own.values(), others=list(tangents.values()))
    _examine(call, subjects, (), pushed.values(), lambda member: subjects[member])
    call.timings["forward"] = time.perf_counter() - begin


def _examine(
    call: MergedCall,
    members: Iterable[Member],
    gradients: Sequence[torch.Tensor | None],
    others: Iterable[torch.Tensor | None],
    subject: Callable[[Member], Subject],
) -> None:
    """Looks at the health of members. gradients, others: what there is of everybody; subject: of one member."""
    name = call.hosted.registration.name
    found = list(members) if call.hosted.examined and thrift.affords(name) else []
    if found:
        began = time.perf_counter()
        parts = [(member.first, member.rows) for member in found]
        seen = itertools.chain(call.everything(), others)
        signs = examine_rows(gradients, call.axis, parts, seen, lambda index: subject(found[index]))
        for member, one in zip(found, signs, strict=True):
            member.results.signs = one
        thrift.looked(name, began)


def _own(call: MergedCall, member: Member, found: Sequence[torch.Tensor | None]) -> Iterator[torch.Tensor | None]:
    """A member's rows of gradients."""
    return (member.own(gradient, call.axis) for gradient in found)


def _moved(call: MergedCall) -> dict[int, torch.Tensor]:
    """All tangents, in one for each member of `wrt`."""
    if any(member.moved.keys() != call.members[0].moved.keys() for member in call.members):
        raise Fault(Reason.INTERNAL, "the members of a batch move different things")
    return {
        index: torch.cat([member.moved[index] for member in call.members], call.axis) for index in call.members[0].moved
    }


_WORK: dict[str, Callable[[MergedCall], None]] = {"evaluate": _evaluate, "vjp": _vjp, "hvp": _hvp, "jvp": _jvp}
