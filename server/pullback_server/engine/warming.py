"""Compiles a model when it loads, for the shapes that its operator chose, and holds the plan against its own code.

torch.compile may lose what a model's author wrote: the backward of a Function, a hook, a branch. So each variant is
run at several random points, and one whose outputs or gradients are not those of the model's own code costs the whole
plan; the model is served all the same.
"""

from __future__ import annotations

import contextlib
import random
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pullback_server.engine._dtypes import differentiable
from pullback_server.engine.agreement import difference
from pullback_server.engine.call import Again, Call, WritesInputs, text_of
from pullback_server.engine.guards import Ambience
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.plan import Plan, Variant, shapes_of
from pullback_server.engine.samples import choices, sample, shapes
from pullback_server.engine.trial import job_by_everything
from pullback_server.engine.tripwire import has_hooks, nodes
from pullback_server.faults import Fault
from pullback_server.job import Job, SpecRecord

#: Points at which a variant is run; CUDA graphs are recorded in the second run and replayed from the third on.
_POINTS = 3
#: Seconds that the first gradient may take to compile for those by the parameters to be compiled as well.
_CHEAP = 30.0

Tensors = dict[str, torch.Tensor]


class Refused(Exception):
    """Why there is no plan."""


def make_plan(hosted: HostedModel) -> None:
    """Fills in `plans` and `plan` of a model whose options ask for them. Raises nothing: a model without is served."""
    options = hosted.registration.options.compile
    if options is None:
        return
    begin = time.monotonic()
    plan = Plan(graphs=options.cuda_graphs and hosted.device.type == "cuda", warming=True)
    try:
        said = _Maker(hosted, plan).make(options.rows)
    except Refused as refusal:
        hosted.refuse_plan(str(refusal))
    # The compiler is a world of its own, of which anything may be missing here.
    except (Exception, SystemExit) as error:
        hosted.refuse_plan(f"{type(error).__name__}: {text_of(error).strip().partition(chr(10))[0]}")
    else:
        plan.warming = False
        hosted.keep_plan(plan, f"compiled{said} in {time.monotonic() - begin:.1f} s")


class _Maker:
    def __init__(self, hosted: HostedModel, plan: Plan) -> None:
        self._hosted = hosted
        self._plan = plan
        self._count = 0

    def make(self, rows: Sequence[int]) -> str:
        """Adds the variants to the plan. Returns for what, in words. Raises Refused, and what compiling raises."""
        hosted = self._hosted
        if hosted.compiled:
            raise Refused("its author compiled it already")
        if not choices(hosted):
            raise Refused("not every input declares its shape")
        if rows and hosted.registration.batch_axis is None:
            raise Refused("it has no batch_axis for the rows to be an extent of")
        others: dict[str, int] = {}
        with _compiling():
            for count in rows or (None,):
                for records in choices(hosted):
                    fixed = _fixed(records, hosted.registration.batch_axis, count)
                    self._compile(fixed, found := self._shapes(fixed))
                    others |= {
                        extent: size
                        for record in fixed
                        for extent, size in zip(record.shape or (), found[record.name], strict=True)
                        if isinstance(extent, str)
                    }
        said = f" for rows {', '.join(map(str, rows))}" if rows else ""
        return said + (f" ({', '.join(f'{name} = {size}' for name, size in others.items())})" if others else "")

    def _shapes(self, records: Sequence[SpecRecord]) -> dict[str, tuple[int, ...]]:
        """Shapes with which the model runs, as it is written."""
        why = "no free extents fit"
        for extents in shapes(records):
            try:
                self._run(*self._job(self._sample(records, extents, 0), frozenset()))
                return extents
            except (Fault, RuntimeError) as error:
                why = text_of(error)
        raise Refused(f"no sample input made the model run ({why})")

    def _compile(self, records: Sequence[SpecRecord], extents: Mapping[str, tuple[int, ...]]) -> None:
        """Adds the variants for one set of shapes."""
        hosted = self._hosted
        inputs = frozenset(
            f"input:{name}"
            for name, tensor in self._sample(records, extents, 0).items()
            if differentiable(tensor.dtype)
        )
        parameters = frozenset(f"param:{name}" for name, own in hosted.parameters.items() if differentiable(own.dtype))
        self._add(frozenset(), records, extents)
        begin = time.monotonic()
        if inputs:
            self._add(inputs, records, extents)
        if parameters and time.monotonic() - begin < _CHEAP:
            self._add(inputs | parameters, records, extents)

    def _add(
        self, requiring: frozenset[str], records: Sequence[SpecRecord], extents: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Compiles one variant and tries it. Raises Refused where it computes something else."""
        hosted = self._hosted
        self._count += 1
        variant = Variant(_compiled(hosted.code, self._count, self._plan.graphs), requiring, requiring)
        trial = Plan(self._plan.graphs, warming=True)
        found = shapes_of(self._sample(records, extents, 0))
        assert found is not None
        trial.add(found, variant)
        covers = requiring
        for point in range(_POINTS):
            job, tensors = self._job(self._sample(records, extents, point), requiring)
            expected, covered = self._run(job, tensors)
            # Compiled once, and never again.
            trial.warming = point == 0
            hosted.plans = trial
            try:
                actual, _ = self._run(job, tensors)
            finally:
                hosted.plans = None
            if trial.suspect:
                raise Refused(f"it would be compiled anew with every call: {trial.suspect.partition(chr(10))[0]}")
            if why := difference(expected, actual, hosted.autocast, hosted.parameters.values()):
                raise Refused(why)
            covers &= covered
        self._plan.add(found, replace(variant, covers=covers))

    def _sample(self, records: Sequence[SpecRecord], extents: Mapping[str, tuple[int, ...]], point: int) -> Tensors:
        generator = torch.Generator().manual_seed(point + 1)
        return sample(records, extents, generator, cautious=self._hosted.device.type == "cuda")

    def _job(self, inputs: Tensors, requiring: frozenset[str]) -> tuple[Job, list[torch.Tensor]]:
        job, tensors = job_by_everything("vjp", self._hosted, inputs)
        job.wrt = [wrt for wrt in job.wrt if wrt.label in requiring]
        job.kind = "vjp" if requiring else "evaluate"
        job.seed = None
        job.copy_inputs = False
        return job, [tensor.to(self._hosted.device) for tensor in tensors]

    def _run(self, job: Job, tensors: Sequence[torch.Tensor]) -> tuple[dict[str, torch.Tensor | None], frozenset[str]]:
        """Outputs and gradients, and what all differentiable outputs depend on.

        Raises Refused for a model that no plan can be made of, and what its code raises.
        """
        hosted = self._hosted
        compiled = hosted.plans is not None
        hosted.watch_parameters(False)
        before = _randomness(hosted.device)
        try:
            with Ambience(), Call(job, hosted, tensors) as call:
                # Watched, nothing compiled would run.
                fw = call.forward(watch=not compiled)
                if (
                    fw.witness.hooks
                    or hosted.hooked
                    or (not compiled and any(map(has_hooks, nodes(fw.outputs.values()))))
                ):
                    raise Refused("its backward runs hooks")
                found: dict[str, torch.Tensor | None] = {
                    f"the output {name!r}": tensor.detach().clone() for name, tensor in fw.outputs.items()
                }
                covers, gradients = _gradients(fw.outputs, fw.wrt, separately=not compiled)
                for index, (wrt, gradient) in enumerate(zip(job.wrt, gradients, strict=True)):
                    found[f"the gradient of {wrt.name!r}"] = None if gradient is None else gradient.clone()
                    del index
        except (Again, WritesInputs) as error:
            if compiled and hosted.plans is not None and hosted.plans.suspect:
                return {}, frozenset()
            raise Refused(str(error) or "it changes what it is given") from error
        finally:
            hosted.restore_state()
        if hosted.writes_buffers or hosted.writes_parameters or hosted.writes_inputs or hosted.needs_natural:
            raise Refused("it writes into its buffers, parameters or inputs, or differentiates by its parameters")
        if not compiled and before != _randomness(hosted.device):
            raise Refused("it draws random numbers")
        return found, frozenset(wrt.label for wrt, covered in zip(job.wrt, covers, strict=True) if covered)
