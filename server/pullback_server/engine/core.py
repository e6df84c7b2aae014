"""`Engine`: the models of one worker, and the jobs run on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch

from pullback_server.engine import dense, forward_mode, losses, reverse, second
from pullback_server.engine._names import unknown_name
from pullback_server.engine.call import Again, Call, out_of_memory
from pullback_server.engine.guards import Ambience, compiled_code_as_written, plain_kernels, without_cudnn
from pullback_server.engine.hosted import HostedModel, build
from pullback_server.engine.probe import probe
from pullback_server.engine.results import EngineResult, Results
from pullback_server.faults import Fault, listed
from pullback_server.hosting import Registration
from pullback_server.hosting.loading import LoadError
from pullback_server.job import Job, Signature
from pullback_wire import Reason

#: How often a call is computed anew with what was learned about its model. Each thing is learned once.
_ATTEMPTS = 5


def _evaluate(call: Call, results: Results) -> EngineResult:
    # Not under no_grad: nothing requires grad here, and a model that differentiates inside finds what it would locally.
    fw = call.forward()
    results.check_size(fw.outputs, ())
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


def compute(job: Job, hosted: HostedModel, tensors: Sequence[torch.Tensor]) -> EngineResult:
    """One attempt at a job. Raises Fault, WritesInputs, Again, and what torch raises when memory runs out."""
    results = Results(job)
    hosted.watch_parameters(job.train)
    try:
        with Ambience(), _kernels(job, hosted), Call(job, hosted, tensors) as call:
            found = _KINDS[job.kind](call, results)
            found.outcome.timings = call.timings
    finally:
        wrote = hosted.restore_state()
    if hosted.spoilt or (wrote and call.forwards > 1):
        raise Again
    return found


def _rebuilt(hosted: HostedModel) -> HostedModel:
    try:
        return hosted.rebuilt()
    except LoadError as error:
        raise Fault(
            Reason.MODEL_ERROR, f"{hosted.owner} wrote into its own parameters and cannot be built anew: {error}"
        ) from error


class Engine:
    """Runs jobs, one at a time."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self._models: dict[str, dict[str, HostedModel]] = {}

    def load(self, registration: Registration) -> Signature:
        """Builds a model, and probes which derivatives of it can be promised.

        Raises LoadError naming the model and the cause.
        """
        with Ambience():
            hosted = build(registration, self.device)
            probe(hosted, compute)
        self._models.setdefault(registration.name, {})[registration.version] = hosted
        return self._signature(hosted)

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
        )

    def find(self, model: str, version: str) -> HostedModel:
        """A model by name and version; no version: the latest. One that a call has spoilt is built anew first.

        Raises Fault.
        """
        versions = self._models.get(model)
        if versions is None:
            raise unknown_name("model", model, self._models, "function.model", "this server", Reason.MODEL_NOT_FOUND)
        version = version or max(versions, key=int)
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
        short_of_memory = False
        for _ in range(_ATTEMPTS):
            hosted = self.find(job.model, job.version)
            try:
                found = compute(job, hosted, tensors)
            except Again:
                continue
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise Fault(Reason.INTERNAL, f"{hosted.owner}: {type(error).__name__}: {error}") from error
                if short_of_memory or self.device.type != "cuda":
                    raise Fault(
                        Reason.OUT_OF_MEMORY, f"{hosted.owner} does not fit the memory of {self.device}: {error}"
                    ) from error
                short_of_memory = True
            else:
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()
                    found.outcome.device_memory = torch.cuda.memory_allocated(self.device)
                return found
            # Outside the handler, whose exception would hold on to what is to be freed.
            torch.cuda.empty_cache()
        raise Fault(Reason.INTERNAL, f"model {job.model!r}: no attempt of {_ATTEMPTS} came to an end")
