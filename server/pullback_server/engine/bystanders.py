"""Whether the models of a worker still compute what they did, when another has been loaded beside them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pullback_server.engine._dtypes import TORCH, differentiable
from pullback_server.engine.call import WritesInputs
from pullback_server.engine.closeness import distance
from pullback_server.engine.core import Engine
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.samples import choices, sample, shapes
from pullback_server.engine.trial import job_by_everything
from pullback_server.faults import Fault
from pullback_server.job import Job, TensorRef

_log = logging.getLogger(__name__)

#: Seconds in which models are computed before one is loaded, and again after it.
_BUDGET = 1.0
#: Elements of inputs above which a sample is not small.
_SMALL = 1 << 16


@dataclass
class _Sample:
    """A job, its tensors, and what it came to."""

    job: Job
    tensors: list[torch.Tensor]
    found: list[torch.Tensor]
    seconds: float


class Bystanders:
    """A sample of each model of an engine: the smallest inputs that run, and their VJP."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # None: it has none, for its shapes are not declared, it does not run, or never gives the same twice.
        self._samples: dict[tuple[str, str], _Sample | None] = {}

    def watch(self) -> None:
        """Before a load: computes what is not known yet, the rest at another load."""
        there = {(one.name, id) for one, id in self._engine.loaded()}
        self._samples = {key: one for key, one in self._samples.items() if key in there}
        end = time.monotonic() + _BUDGET
        # Known ones again, for a model may change by what happens to it alone.
        for number, (name, id) in enumerate(sorted(there, key=lambda key: (key in self._samples, key))):
            if time.monotonic() > end:
                _log.warning("%d models were not computed, to compare with later", len(there) - number)
                return
            known = self._samples.get((name, id))
            if (name, id) not in self._samples or (known is not None and not self._same(known)):
                self._samples[name, id] = self._sampled(name, id)

    def drop(self, model: str, id: str) -> None:
        """Another model will have this name."""
        self._samples.pop((model, id), None)

    def changed(self) -> str:
        """After a load: a model that computes something else than before, in words; empty: none that was looked at."""
        end = time.monotonic() + _BUDGET
        samples = [(key, one) for key, one in self._samples.items() if one is not None]
        for number, ((name, id), one) in enumerate(sorted(samples, key=lambda each: each[1].seconds)):
            if time.monotonic() > end:
                _log.warning("%d models were not compared with what they computed before", len(samples) - number)
                return ""
            if not self._same(one):
                return f"model {name!r} version {id}"
        return ""

    def _same(self, one: _Sample) -> bool:
        try:
            found = self._run(one.job, one.tensors)
        except (Fault, WritesInputs):
            return False
        return len(found) == len(one.found) and all(map(_close, found, one.found))

    def _sampled(self, model: str, id: str) -> _Sample | None:
        try:
            hosted = self._engine.find(model, id)
        except Fault:
            return None
        for records in choices(hosted):
            for extents in shapes(records):
                generator = torch.Generator().manual_seed(0)
                cautious = self._engine.device.type == "cuda"
                made = sample(records, extents, generator, cautious=cautious)
                if sum(tensor.numel() for tensor in made.values()) > _SMALL:
                    continue
                inputs = {name: tensor.to(self._engine.device) for name, tensor in made.items()}
                try:
                    found = self._of(hosted, inputs, generator)
                    # Of one that is never the same nothing can be told, and slow ones would hold up every load.
                    return found if found.seconds < _BUDGET / 4 and self._same(found) else None
                except (Fault, WritesInputs):
                    continue
        return None

    def _of(self, hosted: HostedModel, inputs: dict[str, torch.Tensor], generator: torch.Generator) -> _Sample:
        job, tensors = job_by_everything("evaluate", hosted, inputs)
        begin = time.monotonic()
        outputs, found = self._computed(job, tensors)
        plain = _Sample(job, tensors, found, time.monotonic() - begin)
        cotangents = {}
        for ref in outputs:
            if differentiable(TORCH[ref.dtype]):
                made = torch.randn(ref.shape, generator=generator, dtype=torch.float64)
                cotangents[ref.name] = made.to(self._engine.device, TORCH[ref.dtype])
        job, tensors = job_by_everything("vjp", hosted, inputs, cotangents=cotangents)
        begin = time.monotonic()
        try:
            found = self._run(job, tensors)
        except (Fault, WritesInputs):
            return plain
        return _Sample(job, tensors, found, time.monotonic() - begin)

    def _run(self, job: Job, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self._computed(job, tensors)[1]

    def _computed(self, job: Job, tensors: Sequence[torch.Tensor]) -> tuple[list[TensorRef], list[torch.Tensor]]:
        result = self._engine.run(job, [tensor.clone() for tensor in tensors])
        return list(result.outcome.outputs), [tensor.detach().cpu().clone() for tensor in result.tensors]


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two are the same within rounding."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    allowed = torch.finfo(one.dtype).eps ** 0.5 if one.dtype.is_floating_point or one.dtype.is_complex else 0.0
    return distance(one, other) <= allowed
