"""A model tried at random points: jobs by everything that can be differentiated by, and what they come to."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pullback_server.engine._dtypes import WIRE, differentiable
from pullback_server.engine.call import Again, Call, WritesInputs
from pullback_server.engine.guards import Ambience, plain_kernels
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.results import EngineResult
from pullback_server.engine.samples import sampled
from pullback_server.engine.tripwire import nodes, padding_of
from pullback_server.engine.widths import Widths
from pullback_server.faults import Fault
from pullback_server.job import GradRef, Job, Outcome, SpecRecord, TensorRef, Wrt
from pullback_wire import Reason

#: How many points may be tried (one that gives NaN says nothing).
TRIES = 8
#: Outputs of other sizes than between these, both ways, get cotangents of sizes that make up for it.
_USUAL = 1e3

Compute = Callable[[Job, HostedModel, Sequence[torch.Tensor]], EngineResult]
Tensors = dict[str, torch.Tensor]
Extents = dict[str, tuple[int, ...]]
#: Inputs that the model takes, with shapes that it runs with.
Variant = tuple[list[SpecRecord], Extents]


def job_by_everything(
    kind: str, hosted: HostedModel, inputs: Tensors, *, seed: int = 0, **given: Tensors
) -> tuple[Job, list[torch.Tensor]]:
    """A job by everything that can be differentiated by.

    given: parameters, cotangents, tangents.
    """
    tensors: list[torch.Tensor] = []

    def refs(named: Mapping[str, torch.Tensor]) -> list[TensorRef]:
        found = []
        for name, tensor in named.items():
            tensors.append(tensor)
            found.append(TensorRef(name, WIRE[tensor.dtype], tuple(tensor.shape), len(tensors) - 1))
        return found

    wrt = [Wrt("input", name, f"input:{name}") for name, tensor in inputs.items() if differentiable(tensor.dtype)]
    wrt += [Wrt("param", name, f"param:{name}") for name, p in hosted.parameters.items() if differentiable(p.dtype)]
    job = Job(
        kind=kind,  # type: ignore[arg-type]
        model=hosted.registration.name,
        version=hosted.registration.id,
        loss=None,
        train=False,
        seed=seed,
        inputs=refs(inputs),
        parameters=refs(given.get("parameters", {})),
        targets=[],
        wrt=wrt,
        cotangents=refs(given.get("cotangents", {})),
        batched=False,
        tangents=refs(given.get("tangents", {})),
        allow_unused=True,
        return_outputs=True,
        return_cotangent_derivatives=True,
        result_dtype=0,
        max_norm=None,
        max_result_bytes=1 << 62,
        max_cotangents=1,
        copy_inputs=True,
    )
    return job, tensors


class Failed(Exception):
    """What the probe found, for the evidence."""


class TooLong(Failed):
    """There is no more time."""


@dataclass
class Point:
    """Inputs, cotangents of the outputs that can be differentiated, and tangents of everything ("input:x", "param:w").

    width: bytes of the narrowest real number that the outputs were computed with. still: rows of embeddings whose
    gradient torch defines to be zero, by the name of their tangent: they do not move.
    """

    inputs: Tensors
    v: Tensors
    t: Tensors
    generator: torch.Generator
    width: int
    still: dict[str, int] = field(default_factory=dict)

    def drawn(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A random direction to move something in."""
        found = normal(like, self.generator)
        if name in self.still:
            found[self.still[name]] = 0
        return found


class Trial:
    """A model that is run until a deadline, by time.monotonic. wide: it is a copy in double precision."""

    def __init__(self, hosted: HostedModel, compute: Compute, deadline: float, *, wide: bool = True) -> None:
        self.hosted = hosted
        self.deadline = deadline
        self.wide = wide
        self._compute = compute
        #: Parameters that its code keeps elsewhere too, where nothing can stand in for them: they are moved in place.
        self.in_place: set[str] = set()
        #: Kinds of nodes that its graphs were seen to hold.
        self.kinds: set[str] = set()
        self.parameters = {
            name: parameter.detach() for name, parameter in hosted.parameters.items() if differentiable(parameter.dtype)
        }

    def run(
        self, kind: str, inputs: Tensors, *, place: str = "", seed: int = 0, **given: Tensors
    ) -> tuple[Outcome, list[torch.Tensor]]:
        """What a job comes to. place: "input" or "param", to differentiate by those alone. Raises Failed."""
        if time.monotonic() > self.deadline:
            raise TooLong("it took too long")
        job, tensors = job_by_everything(kind, self.hosted, inputs, seed=seed, **given)
        if place:
            job.wrt = [wrt for wrt in job.wrt if wrt.place == place]
        for _ in range(4):
            try:
                found = self._compute(job, self.hosted, tensors)
            except Again:
                continue
            except Fault as error:
                after = error.message.partition(": ")[2] if error.reason is Reason.ORDER_UNAVAILABLE else ""
                raise Failed(after or error.message) from error
            except RuntimeError as error:
                raise Failed(str(error)) from error
            return found.outcome, found.tensors
        raise Failed("the model keeps changing its state")

    def point(self, records: list[SpecRecord], extents: Extents, number: int) -> Point:
        """A random point. Raises Failed."""
        device = self.hosted.device
        made = sampled(records, extents, number, wide=self.wide, cautious=device.type == "cuda")
        return self.at({name: tensor.to(device) for name, tensor in made.items()}, number)

    def at(self, inputs: Tensors, seed: int) -> Point:
        """A point with these inputs. Raises Failed."""
        generator = torch.Generator().manual_seed(seed + 1)
        outputs, width, still = self._connected(inputs)
        v = {name: normal(tensor, generator) * _evened(tensor) for name, tensor in outputs.items()}
        point = Point(inputs, v, {}, generator, width, still)
        moving = {f"input:{name}": tensor for name, tensor in inputs.items() if differentiable(tensor.dtype)}
        moving |= {f"param:{name}": parameter for name, parameter in self.parameters.items()}
        point.t |= {name: point.drawn(name, like) for name, like in moving.items()}
        return point

    def _connected(self, inputs: Tensors) -> tuple[Tensors, int, dict[str, int]]:
        """The outputs that can be differentiated, the width that they were computed with, and rows that stay."""
        job, tensors = job_by_everything("evaluate", self.hosted, inputs)
        for _ in range(4):
            self.hosted.watch_parameters(False)
            try:
                with Ambience(), plain_kernels(), Widths() as widths, Call(job, self.hosted, tensors) as call:
                    fw = call.forward()
                    graph = list(nodes(fw.outputs.values()))
                    self.kinds.update(type(node).__name__ for node in graph)
                    found, still = fw.outputs, _still(job, fw.wrt, graph)
            except Again:
                continue
            except (Fault, WritesInputs, RuntimeError) as error:
                raise Failed(str(error)) from error
            finally:
                self.hosted.restore_state()
            connected = {name: tensor.detach() for name, tensor in found.items() if tensor.requires_grad}
            return connected, widths.least, still
        raise Failed("the model keeps changing its state")

    @contextlib.contextmanager
    def _moved(self, along: Tensors, step: float) -> Iterator[Tensors]:
        """What stands in for its parameters a step farther; those that are moved in place are so meanwhile."""
        moving = {name: p for name, p in self.parameters.items() if f"param:{name}" in along}
        before = {name: p.clone() for name, p in moving.items() if name in self.in_place}
        try:
            for name in before:
                # As nobody sees: what a model writes itself is told by the version.
                moving[name].data.add_(along[f"param:{name}"], alpha=step)
            yield moved({name: p for name, p in moving.items() if name not in before}, "param", along, step)
        finally:
            for name, own in before.items():
                moving[name].data.copy_(own)

    def valued(self, point: Point, along: Tensors, step: float) -> float:
        """Re<v, y> at a point moved along some of its tangents. Raises Failed."""
        with self._moved(along, step) as parameters:
            outcome, values = self.run("evaluate", moved(point.inputs, "input", along, step), parameters=parameters)
        return paired([GradRef(ref.name, ref) for ref in outcome.outputs], values, point.v)

    def pulled(self, point: Point, along: Tensors, step: float) -> float:
        """Re<J^H v, t> at a point moved along some directions, also of v ("output:y"). Raises Failed."""
        with self._moved(along, step) as parameters:
            outcome, values = self.run(
                "vjp",
                moved(point.inputs, "input", along, step),
                parameters=parameters,
                cotangents=moved(point.v, "output", along, step),
            )
        return paired(outcome.gradients, values, point.t)


def _still(job: Job, wrt: Sequence[torch.Tensor], graph: Iterable[Any]) -> dict[str, int]:
    """The padding rows of embeddings, by the label of what holds them."""
    labels = {id(tensor): one.label for one, tensor in zip(job.wrt, wrt, strict=True)}
    found = {}
    for node in graph:
        row = padding_of(node)
        if row is not None:
            ((following, _), *_rest) = node.next_functions
            label = labels.get(id(getattr(following, "variable", None)))
            if label is not None:
                found[label] = row
    return found


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """What a model makes of nothing is double as well."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


def moved(named: Tensors, place: str, along: Tensors, step: float) -> Tensors:
    """Tensors with those that `along` has something for ("input:x") a step farther."""
    return {
        name: tensor + step * along[f"{place}:{name}"] if f"{place}:{name}" in along else tensor
        for name, tensor in named.items()
    }


def normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random numbers of a tensor's shape and dtype, where it is."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _evened(output: torch.Tensor) -> float:
    size = float(output.abs().double().mean()) if output.numel() else 1.0
    return 1.0 if 1 / _USUAL <= size <= _USUAL or not 0 < size < math.inf else 1 / size


def paired(grads: Sequence[GradRef], values: Sequence[torch.Tensor], others: Tensors, absolute: bool = False) -> float:
    """Sum of Re<gradient, other>; `absolute`: an upper bound of its terms."""
    total = 0.0
    for grad in grads:
        other = others.get(grad.name)
        if grad.value is not None and other is not None:
            product = _wide(values[grad.value.payload]).conj() * _wide(other)
            total += float(
                product.abs().sum() if absolute else product.real.sum() if product.is_complex() else product.sum()
            )
    return total


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
