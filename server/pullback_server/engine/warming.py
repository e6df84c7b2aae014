"""Compiles a model when it loads, for the shapes that its operator chose, and holds the plan against its own code.

torch.compile may lose what a model's author wrote: the backward of a Function, a hook, a branch. So each variant is
run at several random points, and one whose outputs or gradients are not those of the model's own code costs the whole
plan; the model is served all the same.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec
import torch

from pullback_server.engine._dtypes import differentiable
from pullback_server.engine.agreement import Found, disagreement
from pullback_server.engine.call import Again, Call, Forward, WritesInputs, text_of
from pullback_server.engine.guards import Ambience, generator_states
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.plan import Plan, Variant, compiled, compiling, shapes_of
from pullback_server.engine.samples import choices, sample, shapes
from pullback_server.engine.trial import job_by_everything
from pullback_server.engine.tripwire import has_hooks, nodes
from pullback_server.faults import Fault
from pullback_server.job import SpecRecord

_log = logging.getLogger(__name__)

#: Points at which a variant is run; CUDA graphs are recorded in the second run and replayed from the third on.
_POINTS = 3
#: Seconds that a gradient by the inputs may take to compile for those by the parameters to be compiled as well.
_CHEAP = 30.0

Tensors = dict[str, torch.Tensor]
Extents = Mapping[str, tuple[int, ...]]


class Refused(Exception):
    """Why there is no plan."""


def make_plan(hosted: HostedModel) -> None:
    """Fills in the plan of a model whose options ask for one. Without one it is served all the same."""
    options = hosted.registration.options.compile
    if options is None:
        return
    begin = time.monotonic()
    plan = Plan(graphs=options.cuda_graphs and hosted.device.type == "cuda")
    try:
        said = _Maker(hosted, plan).make(options.rows)
    except Refused as refusal:
        why = str(refusal)
    # The compiler is a world of its own, of which anything may be missing here.
    except (Exception, SystemExit) as error:
        text = error.message if isinstance(error, Fault) else f"{type(error).__name__}: {text_of(error)}"
        why = _headline(text.removeprefix(f"{hosted.owner} raised "))
    else:
        hosted.plans, hosted.plan = plan, f"compiled{said} in {time.monotonic() - begin:.1f} s"
        _log.info("%s: %s", hosted.owner, hosted.plan)
        return
    hosted.plan = f"refused: {why}"
    _log.warning("%s runs as it is written, its compiled plan is refused: %s", hosted.owner, why)


def _headline(text: str) -> str:
    """What a compiler's message begins with; its first line may be nothing but the name of an exception."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])[:300]


class _Maker:
    """Compiles the variants of one model's plan, and tries them."""

    def __init__(self, hosted: HostedModel, plan: Plan) -> None:
        self._hosted = hosted
        self._plan = plan

    def make(self, rows: Sequence[int]) -> str:
        """Fills the plan. Returns what for, in words. Raises Refused, and whatever compiling raises."""
        hosted = self._hosted
        if hosted.compiled:
            raise Refused("its author has compiled it already")
        if not choices(hosted):
            raise Refused("not every input declares its shape")
        axis = hosted.registration.batch_axis
        if rows and axis is None:
            raise Refused("the model declares no batch_axis that the rows could be an extent of")
        others: dict[str, int] = {}
        with compiling():
            for count, records in itertools.product(rows or (None,), choices(hosted)):
                fixed = _fixed(records, axis, count)
                extents = self._fitting(fixed)
                self._compile(fixed, extents)
                for record in fixed:
                    pairs = zip(record.shape or (), extents[record.name], strict=True)
                    others |= {extent: size for extent, size in pairs if isinstance(extent, str)}
        said = f" for rows {', '.join(map(str, rows))}" if rows else ""
        return said + (f" ({', '.join(f'{name} = {size}' for name, size in others.items())})" if others else "")

    def _fitting(self, records: Sequence[SpecRecord]) -> Extents:
        """Shapes with which the model runs as it is written. Raises Refused."""
        why = "no free extents fit"
        for extents in shapes(records):
            try:
                self._run(self._sample(records, extents, 0), frozenset())
                return extents
            except Fault as fault:
                why = fault.message
        raise Refused(f"no sample input made the model run ({why})")

    def _compile(self, records: Sequence[SpecRecord], extents: Extents) -> None:
        """Adds the variants for one set of shapes. Raises Refused."""
        hosted = self._hosted
        tensors = self._sample(records, extents, 0)
        inputs = frozenset(f"input:{name}" for name, tensor in tensors.items() if differentiable(tensor.dtype))
        parameters = frozenset(f"param:{name}" for name, own in hosted.parameters.items() if differentiable(own.dtype))
        self._add(frozenset(), records, extents)
        begin = time.monotonic()
        if inputs:
            self._add(inputs, records, extents)
        if parameters and time.monotonic() - begin < _CHEAP:
            self._add(inputs | parameters, records, extents)

    def _add(self, requiring: frozenset[str], records: Sequence[SpecRecord], extents: Extents) -> None:
        """Compiles one variant. Raises Refused where it computes anything else than the model's code."""
        hosted = self._hosted
        everything = dict.fromkeys((*requiring, ""), frozenset[str]())
        variant = Variant(compiled(hosted.code, self._plan.graphs), requiring, everything)
        dtypes = {own.dtype for own in hosted.parameters.values()} | ({hosted.autocast} if hosted.autocast else set())
        found = shapes_of(self._sample(records, extents, 0))
        for point in range(_POINTS):
            inputs = self._sample(records, extents, point)
            expected = self._run(inputs, requiring)
            for part in _parts(requiring) if point == 0 else ():
                if why := disagreement(self._run(inputs, part), expected, dtypes, fewer=True):
                    raise Refused(f"what it computes depends on what requires grad: {why}")
            trial = Plan(self._plan.graphs, warming=point == 0)
            trial.add(found, variant)
            hosted.plans = trial
            try:
                actual = self._run(inputs, requiring)
            finally:
                hosted.plans = None
            if why := disagreement(expected, actual, dtypes):
                raise Refused(why)
        self._plan.add(found, replace(variant, reach=expected.reach))

    def _sample(self, records: Sequence[SpecRecord], extents: Extents, point: int) -> Tensors:
        generator = torch.Generator().manual_seed(point + 1)
        device = self._hosted.device
        made = sample(records, extents, generator, cautious=device.type == "cuda")
        return {name: tensor.to(device) for name, tensor in made.items()}

    def _run(self, inputs: Tensors, requiring: frozenset[str]) -> Found:
        """A call by all that requires grad: with the plan that the model has, or as it is written.

        Raises Refused for a model that no plan can be made for, and what its code raises.
        """
        hosted, plan = self._hosted, self._hosted.plans
        job, tensors = job_by_everything("vjp" if requiring else "evaluate", hosted, inputs)
        job.wrt = [wrt for wrt in job.wrt if wrt.label in requiring]
        job.seed, job.copy_inputs = None, False
        hosted.watch_parameters(False)
        found = None
        try:
            with Ambience(), Call(job, hosted, tensors) as call:
                before = generator_states(hosted.device)
                # What is watched does not run compiled.
                fw = call.forward(watch=plan is None)
                found = _found(fw, [wrt.label for wrt in job.wrt], separately=plan is None)
                drawn = before != generator_states(hosted.device)
        except (Again, WritesInputs) as error:
            if plan is not None and plan.suspect:
                raise Refused(f"it cannot be compiled once for all calls: {_headline(plan.suspect)}") from error
        finally:
            hosted.restore_state()
        if hosted.writes_inputs or hosted.writes_buffers or hosted.writes_parameters:
            raise Refused("it writes into its inputs, buffers or parameters")
        if found is None or (plan is not None and call.variant is None):
            raise Refused("it needs its parameters to require grad, or more than one run")
        if plan is None and (hosted.hooked or fw.witness.hooks or any(map(has_hooks, nodes(fw.outputs.values())))):
            raise Refused("its backward runs hooks")
        if drawn:
            raise Refused("it draws random numbers")
        return found


def _parts(requiring: frozenset[str]) -> list[frozenset[str]]:
    """What a variant may be asked for less than all of: code may look at what requires grad."""
    inputs = frozenset(label for label in requiring if label.startswith("input:"))
    parts = {frozenset([label]) for label in inputs} | {inputs, requiring - inputs}
    return sorted((part for part in parts if part and part != requiring), key=sorted)


def _found(fw: Forward, labels: Sequence[str], *, separately: bool) -> Found:
    """What a forward came to, and its gradients by everything.

    separately: of each output as well, to see what it depends on.
    """
    pulled = {name: tensor for name, tensor in fw.outputs.items() if tensor.requires_grad}
    reach = dict.fromkeys((*labels, ""), frozenset(pulled))
    gradients: list[torch.Tensor | None] = [None] * len(labels)
    if pulled and labels:
        generator = torch.Generator().manual_seed(0)
        values = [
            torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor) for tensor in pulled.values()
        ]
        for (name, tensor), value in zip(pulled.items(), values, strict=True) if separately else ():
            alone = torch.autograd.grad(tensor, fw.wrt, value, retain_graph=True, allow_unused=True)
            reach |= {
                label: reach[label] - {name} for label, gradient in zip(labels, alone, strict=True) if gradient is None
            }
        gradients = list(torch.autograd.grad(list(pulled.values()), fw.wrt, values, allow_unused=True))
    # Copies, for what a CUDA graph returns is gone with its next run.
    return Found(
        {name: tensor.detach().clone() for name, tensor in fw.outputs.items()},
        {label: None if g is None else g.clone() for label, g in zip(labels, gradients, strict=True)},
        reach,
    )


def _fixed(records: Sequence[SpecRecord], axis: int | None, rows: int | None) -> list[SpecRecord]:
    """The records with so many rows. Raises Refused where they cannot have so many."""
    if axis is None or rows is None:
        return list(records)
    extents = {record.shape[axis] for record in records if record.shape is not None and len(record.shape) > axis}
    free = {extent for extent in extents if isinstance(extent, str)}
    if not free and rows not in extents:
        raise Refused(f"its batch axis has an extent of {', '.join(map(str, extents)) or 'nothing'}, not of {rows}")
    return [
        msgspec.structs.replace(
            record, shape=record.shape and tuple(rows if extent in free else extent for extent in record.shape)
        )
        for record in records
    ]
