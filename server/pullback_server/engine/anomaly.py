"""`detect_anomaly`: which operation made the NaN or infinity that a call would return.

A call is computed as ever. Only where what it returns is not finite is it computed once more, from the same random
numbers and under a `Tracer`, which knows of each NaN what it began with. So a call with nothing wrong gets the very
results that it gets without, and infinities that a model makes on purpose and that reach nothing (a mask of -inf before
a softmax) are none of anybody's business. A session's backward cannot be run twice, and runs under the tracer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec
import torch

from pullback_server.engine.call import Again, WritesInputs, out_of_memory, text_of
from pullback_server.engine.guards import compiled_code_as_written, rewinding
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.not_finite import kinds_of
from pullback_server.engine.origins import Origin, Tracer
from pullback_server.engine.places import owner_of
from pullback_server.engine.results import EngineResult
from pullback_server.faults import Fault
from pullback_server.job import Job
from pullback_wire import Reason

#: How often the second computation is begun anew with what it learned about the model.
_ATTEMPTS = 9

Named = Sequence[tuple[str, torch.Tensor]]


def watched(
    job: Job,
    hosted: HostedModel,
    tensors: Sequence[torch.Tensor],
    run: Callable[[Job, Sequence[torch.Tensor]], EngineResult],
) -> EngineResult:
    """Computes a job. Raises Fault (NON_FINITE) where a result is not finite, and whatever `run` raises."""
    # What its code may do to them behind torch's back must not reach the second computation.
    kept = list(tensors) if hosted.stock else [tensor.clone() for tensor in tensors]
    rewind = rewinding(hosted.device, not hosted.stock)
    result = run(job, tensors)
    found = _results(job, result)
    if all_finite(found):
        return result
    again = msgspec.structs.replace(job, result_dtype=0)
    fields = _given(job, kept)

    def compute() -> Named:
        return _results(job, run(again, kept))

    raise explained(hosted, found, fields, compute, rewind, converted=bool(job.result_dtype))


def explained(
    hosted: HostedModel,
    found: Named,
    given: Mapping[str, torch.Tensor],
    compute: Callable[[], Named],
    rewind: Callable[[], None],
    *,
    converted: bool = False,
) -> Fault:
    """Why results are not finite. compute: makes them once more. rewind: has it draw the same random numbers.

    converted: whether the results had been converted to another dtype, as those of `compute` are not.
    """
    owner = owner_of(hosted)
    for _ in range(_ATTEMPTS):
        tracer = Tracer()
        for field, tensor in given.items():
            tracer.given(field, tensor, field)
        for what, tensor in _held(hosted):
            tracer.given(what, tensor)
        rewind()
        try:
            with compiled_code_as_written(), tracer.tracing():
                second = compute()
        except (Again, WritesInputs):
            continue
        except BaseException as error:
            if not isinstance(error, Exception):
                raise
            why = "memory ran out" if out_of_memory(error) else f"{type(error).__name__}: {text_of(error)}"
            return _fault(f"{owner}: {_told(found)}; the operation that made it could not be looked for ({why})")
        if not all_finite(second):
            return fault_of(tracer, second, owner)
        if converted:
            return _fault(
                f"{owner}: {_told(found)} in the dtype that results were asked for in; as they are computed they are "
                "finite",
                "results.dtype",
            )
        break
    return _fault(
        f"{owner}: {_told(found)}, but the same call computed once more, with the same random numbers, is finite: the "
        "model computes other things each time, or torch does so in another way where it is observed"
    )


def fault_of(tracer: Tracer, found: Named, owner: str = "") -> Fault:
    """What the first of the origins of some results was. Raises nothing; they are not all finite."""
    origins: list[tuple[Origin, str]] = []
    for label, tensor in found:
        for kind in kinds_of(tensor):
            origin = tracer.origin(tensor, kind)
            if origin is not None:
                origins.append((origin, label))
    if not origins and tracer.lost:
        said = f"{_told(found)}; the operation that made it could not be looked for ({tracer.lost})"
        return _fault(f"{owner}: {said}" if owner else said)
    if not origins:
        said = f"{_told(found)}, which no operation of torch's made: code outside of torch did"
        return _fault(f"{owner}: {said}" if owner else said)
    origin, label = min(origins, key=lambda one: one[0].number)
    said = f"{told(origin)}; {label} has it"
    first = origin
    while first.cause is not None:
        first = first.cause
    named = first.place.owner if first.place is not None else owner
    return _fault(f"{named}: {said}" if named else said, first.field)


def told(origin: Origin) -> str:
    """An origin as a sentence, without whose it is."""
    kind, what = origin.kind, origin.what
    where = f" in {origin.place}" if origin.place is not None else ""
    if origin.source == "given":
        return f"{what} holds {kind} already"
    if origin.source == "constant":
        return f"{what}{where} put {kind} there, as it was told to ({origin.result})"
    if origin.source == "unseen":
        by = f"the backward of {what}{where} found" if what else f"the code{where or ' around the model'} brought in"
        whence = (
            "which the forward had left for it" if what else "a constant of its own, or what is no operation of torch's"
        )
        return f"{by} {kind} ({origin.result}), {whence}"
    whose = f"the backward of {what}" if origin.source == "backward" else f"the operation {what}"
    if origin.cause is None:
        return f"{whose}{where} made {kind} of finite numbers ({origin.result})"
    # In the order of events: what was first is what has to be looked at.
    return f"{told(origin.cause)}; of that {whose}{where} made {kind} ({origin.result})"


def all_finite(found: Named) -> bool:
    return not any(kinds_of(tensor) for _, tensor in found)


def _fault(message: str, field: str = "") -> Fault:
    return Fault(Reason.NON_FINITE, message, field)


def _told(found: Named) -> str:
    """Which results are not finite, the first of them."""
    for label, tensor in found:
        for kind in kinds_of(tensor):
            return f"{label} holds {kind}"
    raise AssertionError("they are finite")


def _results(job: Job, result: EngineResult) -> Named:
    """The tensors of a result, by what callers know them by."""
    outcome, tensors = result.outcome, result.tensors
    found = [(f"outputs[{ref.name}]", ref) for ref in outcome.outputs]
    groups = {
        "tangents" if job.kind == "jvp" else "gradients": outcome.gradients,
        "hvps": outcome.hvps,
        "cotangent_derivatives": outcome.cotangent_derivatives,
    }
    for what, grads in groups.items():
        found += [(f"{what}[{one.name}]", one.value) for one in grads if one.value is not None]
    found += [(f"blocks[{b.row}, {b.column}]", b.value) for b in outcome.blocks if b.value is not None]
    return [(label, tensors[ref.payload]) for label, ref in found]


def _given(job: Job, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    groups = ("inputs", "parameters", "targets", "cotangents", "tangents")
    return {f"{what}[{ref.name}]": tensors[ref.payload] for what in groups for ref in getattr(job, what)}


def _held(hosted: HostedModel) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in hosted.parameters.items():
        yield f"the hosted parameter {name!r}", parameter.detach()
    if hosted.module is not None:
        for name, buffer in hosted.module.named_buffers():
            yield f"the hosted buffer {name!r}", buffer


@contextmanager
def looking(given: Mapping[str, torch.Tensor], wanted: bool) -> Iterator[Tracer | None]:
    """Around a backward that runs once. given: what goes into it, by field. Yields None where it is not wanted."""
    if not wanted:
        yield None
        return
    tracer = Tracer()
    for field, tensor in given.items():
        tracer.given(field, tensor, field)
    with tracer.tracing():
        yield tracer
