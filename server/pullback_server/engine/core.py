"""`Engine`: the models of one worker, and the jobs run on them."""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pullback_server.engine import anomaly, dense, forward_mode, losses, reverse, second
from pullback_server.engine._names import unknown_name
from pullback_server.engine.attempt import attempt
from pullback_server.engine.batches import BatchResult, BatchRun
from pullback_server.engine.call import Again, Call, WritesInputs, out_of_memory, text_of
from pullback_server.engine.gate import pass_gate, pass_rows
from pullback_server.engine.graph import graph
from pullback_server.engine.guards import Ambience
from pullback_server.engine.hosted import HostedModel, build
from pullback_server.engine.merged import Refused, mergeable, padded, together
from pullback_server.engine.output_shapes import learn_shapes
from pullback_server.engine.pieces import InOne, in_pieces, pieceable
from pullback_server.engine.probe import probe
from pullback_server.engine.results import EngineResult, Results, share_out
from pullback_server.engine.verdicts import adopt, verdict_of
from pullback_server.engine.warming import make_plan
from pullback_server.faults import Fault, listed
from pullback_server.hosting import Abilities, Registration
from pullback_server.hosting.loading import LoadError
from pullback_server.hosting.options import GradientHealth
from pullback_server.job import Batch, Job, Signature, Verdict
from pullback_wire import Reason
from pullback_wire.malloc import trim_malloc

#: How often a call is computed anew with what was learned about its model. Each thing is learned once.
_ATTEMPTS = 5


def _evaluate(call: Call, results: Results) -> EngineResult:
    # Not under no_grad: nothing requires grad here, and a model that differentiates inside finds what it would locally.
    fw = call.forward()
    results.check_size(fw.outputs, ())
    results.examine(call.hosted, fw.outputs.values())
    results.add_outputs(fw.outputs)
    return results.finish()


_KINDS: dict[str, Callable[[Call, Results], EngineResult]] = {
    "evaluate": _evaluate,
    "vjp": reverse.vjp,
    "jvp": forward_mode.jvp,
    "hvp": second.hvp,
    "jacobian": dense.jacobian,
    "hessian": dense.hessian,
}


def compute(job: Job, hosted: HostedModel, tensors: Sequence[torch.Tensor]) -> EngineResult:
    """One attempt at a job. Raises Fault, WritesInputs, Again, and what torch raises when memory runs out."""
    if job.kind == "graph":
        return graph(job, hosted)
    most = hosted.registration.options.micro_batch
    if most is not None:
        with contextlib.suppress(InOne):
            return in_pieces(job, hosted, tensors, most, _in_one)
    return _in_one(job, hosted, tensors)


def _in_one(job: Job, hosted: HostedModel, tensors: Sequence[torch.Tensor]) -> EngineResult:
    rows = mergeable(job, hosted)
    if rows and padded(rows, job, hosted) != rows:
        with contextlib.suppress(Refused, WritesInputs):
            timings: dict[str, float] = {}
            (found,) = together([job], hosted, [tensors], timings)
            if isinstance(found, Fault):
                raise found
            found.outcome.timings = timings
            return found
    results = Results(job)

    def work(call: Call) -> EngineResult:
        found = _KINDS[job.kind](call, results)
        found.outcome.timings = call.timings
        return found

    return attempt(job, hosted, lambda: Call(job, hosted, tensors), work)


def _computed(hosted: HostedModel, most: int | None, job: Job, tensors: Sequence[torch.Tensor]) -> EngineResult:
    """One attempt at a job, `most` rows at a time where memory ran out with more."""
    return compute(job, hosted, tensors) if most is None else in_pieces(job, hosted, tensors, most, _in_one)


def _fewer(job: Job, hosted: HostedModel, most: int | None) -> int:
    """How many rows to compute at a time where memory ran out with more; 0: no fewer can be."""
    rows = pieceable(job, hosted)
    return min(rows, most or hosted.registration.options.micro_batch or rows) // 2


def _rebuilt(hosted: HostedModel) -> HostedModel:
    try:
        return hosted.rebuilt()
    except LoadError as error:
        raise Fault(
            Reason.MODEL_ERROR, f"{hosted.owner} wrote into its own parameters and cannot be built anew: {error}"
        ) from error


def _limits(abilities: Abilities) -> list[str]:
    return [reason for reason in (abilities.train, abilities.parameters, abilities.forward_mode) if reason] + list(
        abilities.notes
    )


def _latest(id: str) -> tuple[int, int]:
    """Orders the ids of revisions: "2", "10", "10+1"."""
    version, _, revision = id.partition("+")
    return int(version), int(revision or 0)


class Engine:
    """Runs jobs, one at a time.

    gradient_health: whether the health of numbers is looked at, where a model does not say that it is not.
    """

    def __init__(self, device: torch.device, gradient_health: bool = True) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.gradient_health = gradient_health
        self._models: dict[str, dict[str, HostedModel]] = {}

    def load(self, registration: Registration, verdict: Verdict | None = None) -> Signature:
        """Builds a model, and finds out what can be promised of it, or believes what was found out elsewhere.

        Raises LoadError naming the model and the cause.
        """
        if not self.gradient_health:
            options = replace(registration.options, gradient_health=GradientHealth(enabled=False))
            registration = replace(registration, options=options)
        with Ambience():
            hosted = build(registration, self.device)
            if verdict is None:
                ground = probe(hosted, compute)
                pass_gate(hosted, compute, ground)
                pass_rows(hosted, compute)
                learn_shapes(hosted, ground)
            else:
                adopt(hosted, verdict, compute)
            make_plan(hosted)
        self._models.setdefault(registration.name, {})[registration.id] = hosted
        return self._signature(hosted)

    def verdict(self, name: str, id: str) -> Verdict:
        """What was found out about a model, for others that load the same. Raises KeyError where there is none."""
        return verdict_of(self._models[name][id])

    def unload(self, name: str, id: str) -> None:
        """Forgets a model and gives its memory back; nothing happens where there is none.

        What sessions made of it goes on working, and keeps what it needs of it.
        """
        versions = self._models.get(name, {})
        hosted = versions.pop(id, None)
        if not versions:
            self._models.pop(name, None)
        if hosted is None:
            return
        hosted.plans = None
        del hosted
        # Modules and what they hold lie in circles.
        gc.collect()
        self._tidy()

    def loaded(self) -> list[tuple[Registration, str]]:
        """What was loaded, with the ids."""
        return [(one.registration, id) for versions in self._models.values() for id, one in versions.items()]

    def signatures(self) -> list[Signature]:
        return [self._signature(hosted) for versions in self._models.values() for hosted in versions.values()]

    def _signature(self, hosted: HostedModel) -> Signature:
        registration = hosted.registration
        outputs = hosted.outputs
        return Signature(
            name=registration.name,
            version=registration.version,
            description=registration.description,
            inputs=hosted.input_records(),
            outputs=outputs,
            parameters=hosted.parameter_records(),
            batch_axis=registration.batch_axis,
            losses=losses.records(),
            orders=hosted.orders,
            device=str(self.device),
            parameter_count=sum(parameter.numel() for parameter in hosted.parameters.values()),
            batch=hosted.batch,
            hard_timeout=registration.options.hard_timeout,
            plan=hosted.plan,
            revision=registration.revision,
            source=registration.source,
            digest=registration.digest,
            checks=hosted.checks,
            limits=_limits(registration.abilities),
            memory=hosted.memory,
            gradient_seconds=hosted.gradient_seconds,
            health=hosted.health,
        )

    def find(self, model: str, version: str) -> HostedModel:
        """A model by name and version; no version: the latest. One that a call has spoilt is built anew first.

        Raises Fault.
        """
        versions = self._models.get(model)
        if versions is None:
            raise unknown_name("model", model, self._models, "function.model", "this server", Reason.MODEL_NOT_FOUND)
        version = version or max(versions, key=_latest)
        if version not in versions:
            raise Fault(
                Reason.VERSION_NOT_FOUND,
                f"model {model!r} has no version {version!r}, it has {listed(versions)}",
                "function.version",
            )
        hosted = versions[version]
        if hosted.spoilt:
            hosted = versions[version] = _rebuilt(hosted)
        return hosted

    def run(self, job: Job, tensors: Sequence[torch.Tensor]) -> EngineResult:
        """Computes one job.

        tensors: by payload index, of the dtype and shape that the job says. They may be written to by the model, and
        are not looked at after the results were copied out.

        Raises Fault; WritesInputs when the job must be sent anew with the original bytes and copy_inputs.
        """
        attempts, splits, shortage = _ATTEMPTS, 0, ""
        most: int | None = None
        short_of_memory = self.device.type != "cuda"
        while attempts:
            hosted = self.find(job.model, job.version)
            work = functools.partial(_computed, hosted, most)
            begin = time.perf_counter()
            try:
                found = anomaly.watched(job, hosted, tensors, work) if job.detect_anomaly else work(job, tensors)
                self._settle()
            except Again:
                attempts -= 1
                continue
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise Fault(Reason.INTERNAL, f"{hosted.owner}: {type(error).__name__}: {error}") from error
                if short_of_memory:
                    most = _fewer(job, hosted, most)
                    if not most:
                        raise self._does_not_fit(hosted, error) from error
                    splits += 1
                short_of_memory = True
                shortage = text_of(error)
            except InOne:
                raise self._does_not_fit(hosted, shortage) from None
            else:
                outcome = found.outcome
                share_out(outcome.timings, job.kind, time.perf_counter() - begin)
                outcome.health = None if found.signs is None else found.signs.read()
                outcome.device_memory = self._memory_in_use()
                outcome.splits = splits
                return found
            # Outside the handler, whose exception would hold on to what is to be freed.
            self._tidy()
        raise Fault(Reason.INTERNAL, f"model {job.model!r}: no attempt of {_ATTEMPTS} came to an end")

    def _does_not_fit(self, hosted: HostedModel, error: object) -> Fault:
        return Fault(Reason.OUT_OF_MEMORY, f"{hosted.owner} does not fit the memory of {self.device}: {error}")

    def run_batch(self, batch: Batch, tensors: Sequence[Sequence[torch.Tensor]]) -> BatchResult:
        """Computes jobs for one function, in one as far as that goes.

        tensors: of each member, by its own payload index; otherwise as in `run`.

        Raises Fault where there is no such model; what concerns one member alone is its result.
        """
        first = batch.members[0]
        found = BatchRun(
            batch, tensors, lambda: self.find(first.model, first.version), self.run, self._settle, self._tidy
        )()
        memory = found.device_memory = self._memory_in_use()
        for member in found.members:
            if isinstance(member, EngineResult):
                member.outcome.device_memory = memory
        return found

    def _settle(self) -> None:
        """Returns when the device has computed everything."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _tidy(self) -> None:
        """Gives back memory that is only kept for later."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            trim_malloc()

    def _memory_in_use(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
