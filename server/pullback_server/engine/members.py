"""A batch in a worker: its members' bytes into tensors, and what they came to into one answer."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import msgspec
import torch

from pullback_server.engine.batches import BatchResult
from pullback_server.engine.core import Engine
from pullback_server.engine.records import fault_record
from pullback_server.engine.results import EngineResult
from pullback_server.engine.transfer import Piece, Watch, references, tensors_of
from pullback_server.faults import Fault
from pullback_server.job import Alone, Answered, Batch, BatchOutcome, FaultRecord, Skip


@dataclass
class BatchAnswer:
    """What a batch came to; the members' tensors one after the other."""

    outcome: BatchOutcome
    tensors: list[torch.Tensor]


def overdue(batch: Batch) -> list[int]:
    """The members whose deadline has passed."""
    now = time.monotonic()
    return [index for index, deadline in enumerate(batch.deadlines) if now >= deadline]


class Batches:
    """Computes batches for a worker."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._engine = engine
        self._device = device

    def run(
        self, batch: Batch, places: Sequence[Piece], watch: Watch | None, passed_over: Collection[int]
    ) -> BatchAnswer:
        """Computes what somebody waits for.

        places: of the payloads of all members. watch: see `tensors_of`. passed_over: the other members.

        Raises Fault where no member can be computed.
        """
        begin = time.perf_counter()
        members: list[Answered | FaultRecord | Skip | Alone] = [Skip() for _ in batch.members]
        live: list[int] = []
        tensors: list[list[torch.Tensor]] = []
        start = 0
        for index, (job, count) in enumerate(zip(batch.members, batch.counts, strict=True)):
            own = places[start : start + count]
            start += count
            if index in passed_over:
                continue
            try:
                tensors.append(tensors_of(references(job), own, watch, self._device))
                live.append(index)
            except Fault as fault:
                members[index] = fault_record(fault)
        copied = time.perf_counter() - begin
        found = BatchResult([])
        if live:
            shadow = live.index(batch.shadow) if batch.shadow in live else -1
            found = self._engine.run_batch(
                msgspec.structs.replace(batch, members=[batch.members[i] for i in live], shadow=shadow), tensors
            )
        results: list[torch.Tensor] = []
        for index, member in zip(live, found.members, strict=True):
            if isinstance(member, EngineResult):
                members[index] = Answered(member.outcome, len(member.tensors))
                results += member.tensors
            elif member is None:
                members[index] = Alone()
            else:
                members[index] = fault_record(member)
        timings = found.timings | {"copy_in": found.timings.get("copy_in", 0.0) + copied}
        outcome = BatchOutcome(members, found.merged, found.refused, found.splits, timings, found.device_memory)
        return BatchAnswer(outcome, results)
