"""A batch of jobs: computed in one as far as that goes, and one by one where it does not.

What concerns one member never reaches another: whatever the merged computation raises, the members are computed alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from pullback_server.engine.call import Again, WritesInputs, out_of_memory, text_of
from pullback_server.engine.closeness import differing, nudged
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.merged import Refused, detached, mergeable, together
from pullback_server.engine.results import EngineResult, add_seconds, share_out
from pullback_server.faults import Fault
from pullback_server.job import Batch, BatchRecord, Job
from pullback_wire import Reason

#: How often a merged computation is tried anew with what was learned about the model.
_ATTEMPTS = 4
#: Seconds for computing members alone after all. Who is not computed by then goes back to the front, where others have
#: their turns in between, and each has a limit of its own.
_PATIENCE = 0.2
#: So many merged computations of a kind, and so many with faults, are compared with a member alone: the first ones.
_CHECKED = 4


@dataclass
class BatchResult:
    """What a batch came to; see `job.BatchOutcome`. A fault has no traceback: what it said is a note on it.

    members: None: it must be computed alone, and was not.
    """

    members: list[EngineResult | Fault | None]
    merged: int = 0
    refused: str = ""
    splits: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    device_memory: int = 0


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
        groups = self._groups(hosted)
        while groups:
            group = groups.pop()
            if len(group) > 1 and not self._refused:
                groups += self._together(group)
        for index in self._to_check():
            self._check(index)
        until = time.monotonic() + _PATIENCE
        for index in range(len(self._jobs)):
            if index not in self._found and time.monotonic() < until:
                self._found[index] = self._alone(index)
        for group, failure in self._failures:
            if all(isinstance(self._found.get(index), EngineResult) for index in group):
                self._refuse(f"{len(group)} requests in one failed, and alone they did not: {failure}")
        members = [self._found.get(index) for index in range(len(self._jobs))]
        return BatchResult(members, self._merged, self._refused, self._splits, self._timings)

    def _groups(self, hosted: HostedModel) -> list[list[int]]:
        """The members that may be computed in one: those that have the same tangents."""
        groups: dict[frozenset[str], list[int]] = {}
        for index, job in enumerate(self._jobs):
            if mergeable(job, hosted):
                groups.setdefault(frozenset(ref.name for ref in job.tangents), []).append(index)
        return list(groups.values())

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
            begin = time.perf_counter()
            try:
                found = together(jobs, hosted, tensors, timings)
                self._settle()
                share_out(timings, jobs[0].kind, time.perf_counter() - begin)
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
                for one in found:
                    if isinstance(one, EngineResult) and one.signs is not None:
                        one.outcome.health = one.signs.read()
                self._found.update(zip(group, found, strict=True))
                self._merged += len(group)
                add_seconds(self._timings, timings)
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

    def _alone(self, index: int, tensors: Sequence[torch.Tensor] | None = None) -> EngineResult | Fault:
        """tensors: instead of its own."""
        # With a copy, for nobody could send the original bytes again.
        job = msgspec.structs.replace(self._jobs[index], copy_inputs=True)
        try:
            found = self._run(job, self._tensors[index] if tensors is None else tensors)
        except BaseException as error:
            return detached(error)
        add_seconds(self._timings, found.outcome.timings)
        self._splits += found.outcome.splits
        return found

    def _to_check(self) -> list[int]:
        """The members to compare with: the one asked for; while few were looked at, also a result and a fault."""
        chosen = [self._shadow] if self._shadow in self._found else []
        checked = self._find().checked_batches
        for kind in (EngineResult, Fault):
            members = [index for index, found in self._found.items() if isinstance(found, kind)]
            of_kind = f"{self._jobs[0].kind} {kind.__name__}"
            count = checked.get(of_kind, 0)
            if members and count < _CHECKED:
                checked[of_kind] = count + 1
                if self._shadow not in members:
                    # The first, the last, the last but one...
                    chosen.append(members[-count % len(members)])
        return chosen

    def _check(self, index: int) -> None:
        """Computes a member alone as well. Where that comes to something else, nothing merged is handed out."""
        if not self._merged:
            return
        merged, alone = self._found[index], self._alone(index)
        if isinstance(alone, Fault) and alone.reason is Reason.OUT_OF_MEMORY:
            # Memory may suffice at one time and not at another.
            return
        why = ""
        if isinstance(merged, Fault) and isinstance(alone, Fault):
            if (merged.reason, merged.field) != (alone.reason, alone.field):
                why = f"it fails otherwise: {merged.message}; alone: {alone.message}"
        elif isinstance(merged, Fault):
            why = f"it fails: {merged.message}"
        elif isinstance(alone, Fault):
            why = f"alone it fails: {alone.message}"
        elif why := differing(merged, alone, self._find(), 1.0):
            # Where a step of rounding in what was sent takes it as far, it says nothing.
            moved = self._alone(index, [nudged(tensor) for tensor in self._tensors[index]])
            if isinstance(moved, EngineResult) and differing(moved, alone, self._find(), 1e-2):
                why = ""
        if why:
            self._refuse(f"a request computed with others came to another result than alone: {why}")
            self._found = {index: alone}
            self._merged = 0

    def _refuse(self, why: str) -> None:
        self._refused = why
        hosted = self._find()
        hosted.batched_inputs = frozenset()
        hosted.batch = BatchRecord(evidence=why)
