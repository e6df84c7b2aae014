"""A batch of jobs: computed in one as far as that goes, and one by one where it does not.

What concerns one member never reaches another: whatever the merged computation raises, the members are computed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from pullback_server.engine._dtypes import name_of
from pullback_server.engine.call import Again, WritesInputs, out_of_memory, text_of
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.merged import Refused, detached, mergeable, together
from pullback_server.engine.results import EngineResult
from pullback_server.faults import Fault
from pullback_server.job import Batch, BatchRecord, Job
from pullback_wire import Reason

#: How often a merged computation is tried anew with what was learned about the model.
_ATTEMPTS = 4
#: How far a result computed with others may be from the same computed alone, relative to its norm, by the bytes of a
#: real number. The sums in it may have been taken in another order.
_TOLERANCE = {1: 0.5, 2: 5e-2, 4: 1e-3, 8: 1e-9}


@dataclass
class BatchResult:
    """What a batch came to; see `job.BatchOutcome`. A fault has no traceback: what it said is a note on it."""

    members: list[EngineResult | Fault]
    merged: int = 0
    refused: str = ""
    splits: int = 0
    timings: dict[str, float] = field(default_factory=dict)


class BatchRun:
    """One batch.

    find: the model, as it is now.
    run: computes one job alone; as `Engine.run`.
    settle: returns when the device has computed everything. Raises what it met.
    tidy: gives back memory that is only kept for later.
    """

    def __init__(
        self,
        batch: Batch,
        tensors: Sequence[Sequence[torch.Tensor]],
        find: Callable[[], HostedModel],
        run: Callable[[Job, Sequence[torch.Tensor]], EngineResult],
        settle: Callable[[], None],
        tidy: Callable[[], None],
    ) -> None:
        self._jobs = batch.members
        self._shadow = batch.shadow
        self._tensors = tensors
        self._find = find
        self._run = run
        self._settle = settle
        self._tidy = tidy
        self._found: dict[int, EngineResult | Fault] = {}
        self._refused = ""
        self._merged = 0
        self._splits = 0
        self._timings: dict[str, float] = {}
        #: What merged computations failed with, and whose.
        self._failures: list[tuple[list[int], str]] = []

    def __call__(self) -> BatchResult:
        """Raises Fault where the model is not there."""
        hosted = self._find()
        if not hosted.batched_inputs:
            self._refused = hosted.batch.evidence
        groups = [[index for index, job in enumerate(self._jobs) if mergeable(job, hosted)]]
        while groups:
            group = groups.pop()
            if len(group) > 1 and not self._refused:
                groups += self._together(group)
        self._look_at_shadow()
        for index in range(len(self._jobs)):
            if index not in self._found:
                self._found[index] = self._alone(index)
        for group, failure in self._failures:
            if all(isinstance(self._found[index], EngineResult) for index in group):
                self._refuse(f"{len(group)} requests in one failed, and alone they did not: {failure}")
        members = [self._found[index] for index in range(len(self._jobs))]
        return BatchResult(members, self._merged, self._refused, self._splits, self._timings)

    def _together(self, group: list[int]) -> list[list[int]]:
        """Computes some members in one. What is not found afterwards must be computed alone.

        Returns the parts to try instead where memory ran out.
        """
        jobs, tensors = [self._jobs[i] for i in group], [self._tensors[i] for i in group]
        failure = ""
        short_of_memory = False
        for _ in range(_ATTEMPTS):
            hosted = self._find()
            knew = hosted.writes_inputs
            timings: dict[str, float] = {}
            try:
                found = together(jobs, hosted, tensors, timings)
                self._settle()
            except Again:
                continue
            except WritesInputs:
                # The members' own bytes are as they were: the model saw a copy.
                if hosted.writes_inputs and not knew:
                    continue
            except Refused as refused:
                self._refuse(str(refused))
            except Exception as error:
                short_of_memory = out_of_memory(error)
                failure = f"{type(error).__name__}: {text_of(error)}"
            else:
                self._found.update(zip(group, found, strict=True))
                self._merged += len(group)
                self._add(timings)
                return []
            break
        # Outside the handlers, whose exceptions would hold on to what is to be freed.
        if short_of_memory:
            self._tidy()
            self._splits += 1
            half = len(group) // 2
            return [group[half:], group[:half]]
        if failure:
            self._failures.append((group, failure))
        return []

    def _alone(self, index: int) -> EngineResult | Fault:
        # With a copy, for nobody could send the original bytes again.
        job = msgspec.structs.replace(self._jobs[index], copy_inputs=True)
        try:
            found = self._run(job, self._tensors[index])
        except BaseException as error:
            return detached(error)
        self._add(found.outcome.timings)
        self._splits += found.outcome.splits
        return found

    def _look_at_shadow(self) -> None:
        """Computes one member alone as well. Where that comes to something else, nothing merged is handed out."""
        merged = self._found.get(self._shadow)
        if not isinstance(merged, EngineResult):
            return
        alone = self._alone(self._shadow)
        if isinstance(alone, EngineResult):
            why = differing(merged, alone, self._find())
        else:
            # Memory may suffice at one time and not at another.
            why = "" if alone.reason is Reason.OUT_OF_MEMORY else f"alone it fails: {alone.message}"
        if why:
            self._refuse(f"a request computed with others came to another result than alone: {why}")
            self._found = {self._shadow: alone}
            self._merged = 0

    def _refuse(self, why: str) -> None:
        self._refused = why
        hosted = self._find()
        hosted.batched_inputs = frozenset()
        hosted.batch = BatchRecord(evidence=why)

    def _add(self, timings: dict[str, float]) -> None:
        for stage, seconds in timings.items():
            self._timings[stage] = self._timings.get(stage, 0.0) + seconds


def differing(merged: EngineResult, alone: EngineResult, hosted: HostedModel) -> str:
    """How two results of one job differ by more than rounding; empty: they do not."""
    names = [_named(merged), _named(alone)]
    if names[0] != names[1]:
        return f"it has {', '.join(names[0])}, and alone {', '.join(names[1])}"
    for name, a, b in zip(names[0], merged.tensors, alone.tensors, strict=True):
        limit = tolerance(b.dtype, hosted)
        gap = distance(a, b)
        if not gap <= limit:
            return f"{name} differs by {gap:.3g} of its norm, more than {limit:g}"
    return ""


def _named(result: EngineResult) -> list[str]:
    """The tensors of a result in words, in the order of its payloads."""
    outcome = result.outcome
    found = {ref.payload: f"output {ref.name!r} {list(ref.shape)}" for ref in outcome.outputs}
    for what, grads in (
        ("gradient", outcome.gradients),
        ("HVP", outcome.hvps),
        ("cotangent derivative", outcome.cotangent_derivatives),
    ):
        found |= {
            grad.value.payload: f"{what} {grad.name!r} {list(grad.value.shape)}"
            for grad in grads
            if grad.value is not None
        }
    return [f"{found[index]} {name_of(tensor.dtype)}" for index, tensor in enumerate(result.tensors)]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far apart two tensors of one shape are, relative to the norm of the second; NaN is equal to itself."""
    equal = (a == b) | ((a != a) & (b != b))
    if bool(equal.all()):
        return 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return float("inf")
    wide = torch.complex128 if a.is_complex() else torch.float64
    zero = torch.zeros((), dtype=wide, device=a.device)
    b = torch.where(b == b, b.to(wide), zero)
    finite = torch.where(b.abs() < float("inf"), b, zero)
    gap = torch.where(equal, zero, a.to(wide) - b)
    size = float(torch.linalg.vector_norm(finite))
    found = float(torch.linalg.vector_norm(gap))
    return found / size if size else float("inf")


def tolerance(dtype: torch.dtype, hosted: HostedModel) -> float:
    """The distance that two computations of one thing may have."""
    if dtype.is_complex:
        dtype = dtype.to_real()
    if not dtype.is_floating_point:
        return 0.0
    width = dtype.itemsize
    rough = hosted.registration.options.autocast is not None or torch.get_float32_matmul_precision() != "highest"
    return _TOLERANCE[min(width, 2) if rough and width <= 4 else width]
