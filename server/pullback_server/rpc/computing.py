"""What every call that computes has in common: a job is scheduled, its outcome encoded, and where time went is told."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

from pullback_server.fleet.seam import Buffer
from pullback_server.job import Job, Outcome, Signature
from pullback_server.rpc.journal import Computed
from pullback_server.rpc.unary import Call
from pullback_server.scheduling import Scheduler
from pullback_server.telemetry import Metrics

#: Makes the answer of an outcome and its payloads, which may be views of shared memory: it copies what it keeps.
Encode = Callable[[Outcome, Sequence[Buffer]], Awaitable[bytes]]


class Computing:
    """Has jobs computed."""

    def __init__(self, scheduler: Scheduler, metrics: Metrics) -> None:
        self._scheduler = scheduler
        self._metrics = metrics

    async def __call__(
        self, job: Job, payloads: Sequence[memoryview], signature: Signature, call: Call, encode: Encode
    ) -> bytes:
        """The answer to a call whose request has been decoded. Raises Fault, whose field is one of the job's."""
        decoded = time.monotonic()
        scheduled = await self._scheduler.submit(job, payloads, call.deadline, call.origin)
        with scheduled.reply as reply:
            outcome, timings = cast(Outcome, reply.outcome), reply.timings
            answered = time.monotonic()
            answer = await encode(outcome, reply.payloads)
            stages = {
                "decode": decoded - call.began,
                "queue": scheduled.queued,
                "transfer": timings["transfer"],
                "forward": timings.get("forward", 0.0),
                "backward": timings.get("backward", 0.0),
                "encode": time.monotonic() - answered,
            }
            call.computed = Computed(
                job.version,
                stages,
                decoded,
                timings,
                scheduled.worker,
                scheduled.rows,
                scheduled.batch,
                outcome.device_memory,
            )
            # The others take place in every call, however short they are.
            passed = stages if "backward" in timings else {name: stages[name] for name in stages if name != "backward"}
            self._metrics.stages(job.model, passed, call.trace_id)
            if outcome.health is not None:
                self._metrics.health(job.model, outcome.health, signature.health, call.trace_id)
        return answer
