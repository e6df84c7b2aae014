"""Second derivatives held against finite differences, at random points."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from pullback_server.engine._dtypes import WIRE, differentiable
from pullback_server.engine.call import Again, Call, WritesInputs
from pullback_server.engine.guards import Ambience, plain_kernels
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.results import EngineResult
from pullback_server.engine.samples import sample
from pullback_server.faults import Fault
from pullback_server.job import GradRef, Job, SpecRecord, TensorRef, Wrt
from pullback_wire import Reason

#: Points at which derivatives are compared, and how many may be tried for that (a point that gives NaN says nothing).
_POINTS, TRIES = 3, 8
#: Steps of the finite differences. A kink within one step is not within a smaller one; a wrong derivative always is.
_STEPS = (1e-5, 1e-6, 1e-4)
#: Parameters are moved in at most so many groups.
_GROUPS = 4

Compute = Callable[[Job, HostedModel, Sequence[torch.Tensor]], EngineResult]
Tensors = dict[str, torch.Tensor]


def job_by_everything(
    kind: str, hosted: HostedModel, inputs: Tensors, **given: Tensors
) -> tuple[Job, list[torch.Tensor]]:
    """A job by everything that can be differentiated by."""
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
        version=hosted.registration.version,
        loss=None,
        train=False,
        seed=0,
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


class Trial:
    """The comparison, on a copy of the model in double precision."""

    def __init__(self, twin: HostedModel, compute: Compute, deadline: float) -> None:
        self._twin = twin
        self._compute = compute
        self._deadline = deadline
        #: Whether the VJP agrees with finite differences of the outputs.
        self.honest = True
        self._parameters = {
            name: parameter.detach() for name, parameter in twin.parameters.items() if differentiable(parameter.dtype)
        }

    def _run(self, kind: str, inputs: Tensors, **given: Tensors) -> tuple[Any, list[torch.Tensor]]:
        if time.monotonic() > self._deadline:
            raise Failed("it took too long")
        job, tensors = job_by_everything(kind, self._twin, inputs, **given)
        for _ in range(4):
            try:
                found = self._compute(job, self._twin, tensors)
            except Again:
                continue
            except Fault as error:
                after = error.message.partition(": ")[2] if error.reason is Reason.ORDER_UNAVAILABLE else ""
                raise Failed(after or error.message) from error
            except RuntimeError as error:
                raise Failed(str(error)) from error
            return found.outcome, found.tensors
        raise Failed("the model keeps changing its state")

    def _point(
        self, records: list[SpecRecord], extents: dict[str, tuple[int, ...]], number: int, *, wide: bool = True
    ) -> tuple[Tensors, Tensors, Tensors, torch.Generator]:
        """A random point: inputs, tangents of everything, cotangents of what has one."""
        generator = torch.Generator().manual_seed(number + 1)
        device = self._twin.device
        inputs = {
            name: tensor.to(device)
            for name, tensor in sample(records, extents, generator, wide=wide, cautious=device.type == "cuda").items()
        }
        outcome, tensors = self._run("evaluate", inputs)
        outputs = {ref.name: tensors[ref.payload] for ref in outcome.outputs}
        connected = self._connected(inputs)
        v = {name: _normal(outputs[name], generator) for name in connected}
        t = {
            f"input:{name}": _normal(tensor, generator)
            for name, tensor in inputs.items()
            if differentiable(tensor.dtype)
        } | {f"param:{name}": _normal(parameter, generator) for name, parameter in self._parameters.items()}
        return inputs, t, v, generator

    def _connected(self, inputs: Tensors) -> list[str]:
        job, tensors = job_by_everything("evaluate", self._twin, inputs)
        try:
            with Ambience(), plain_kernels(), Call(job, self._twin, tensors) as call:
                fw = call.forward()
        except (Fault, WritesInputs, Again, RuntimeError) as error:
            raise Failed(str(error)) from error
        return [name for name, tensor in fw.outputs.items() if tensor.requires_grad]

    def check_forward(self, found: Sequence[tuple[list[SpecRecord], dict[str, tuple[int, ...]]]]) -> tuple[bool, str]:
        """Whether J t is the adjoint of J^H v: by forward mode, or else by two backwards; and why not."""
        for records, extents in found:
            why = self._adjoint(records, extents)
            if why and self._twin.forward_mode:
                self._twin.forward_mode = False
                why = self._adjoint(records, extents)
            if why:
                return False, f"; no JVP: {why}"
        return True, ""

    def _adjoint(self, records: list[SpecRecord], extents: dict[str, tuple[int, ...]]) -> str:
        try:
            inputs, t, v, _ = self._point(records, extents, 0)
            pulled, values = self._run("vjp", inputs, cotangents=v)
            left = _paired(pulled.gradients, values, t)
            pushed, values = self._run("jvp", inputs, tangents=t)
            right = _paired(pushed.gradients, values, v)
        except Failed as failure:
            return str(failure)
        if math.isfinite(left) and abs(left - right) > 1e-6 * (abs(left) + abs(right)) + 1e-9:
            return f"<J^H v, t> is {left:.6g}, <v, J t> {right:.6g}"
        return ""

    def check_second(
        self, trials: Sequence[tuple[list[SpecRecord], dict[str, tuple[int, ...]], int]], variants: int
    ) -> None:
        """Compares the HVP with differences of the VJP. Raises Failed."""
        passed = 0
        for records, extents, number in trials:
            if number == 0:
                passed = 0
            if passed < _POINTS:
                passed += self._agrees(records, extents, number)
            if number == TRIES - 1 and passed < _POINTS:
                raise Failed("too few points gave finite values")

    def check_narrow(
        self, hosted: HostedModel, found: Sequence[tuple[list[SpecRecord], dict[str, tuple[int, ...]]]]
    ) -> set[Any]:
        """Compares the HVP in the model's own precision, where its code may go another way, with that in double.

        Returns what of its graphs is thereby proven. Raises Failed.
        """
        narrow = Trial(hosted, self._compute, self._deadline)
        hosted.probing = True
        try:
            for records, extents in found:
                if not any(self._agrees_with(narrow, records, extents, number) for number in range(TRIES)):
                    raise Failed("in its own precision the second derivative is another one, or not finite")
            return set(hosted.seen)
        finally:
            hosted.probing = False
            hosted.seen = set()

    def _agrees_with(
        self, narrow: Trial, records: list[SpecRecord], extents: dict[str, tuple[int, ...]], number: int
    ) -> bool:
        inputs, t, v, generator = narrow._point(records, extents, number, wide=False)
        found = narrow._run("hvp", inputs, cotangents=v, tangents=t)
        expected = self._run("hvp", _widened(inputs), cotangents=_widened(v), tangents=_widened(t))
        along = {name: _normal(like, generator) for name, like in _widened(t | _outputs(v)).items()}
        pairs = [(_derived(outcome), values) for outcome, values in (found, expected)]
        value, sure = (_paired(refs, values, along) for refs, values in pairs)
        size = _paired(*pairs[1], along, absolute=True)
        rounding = max(
            (torch.finfo(like.dtype).eps for like in (*t.values(), *v.values())), default=torch.finfo(torch.double).eps
        )
        return math.isfinite(value) and abs(value - sure) <= min(10 * math.sqrt(rounding), 0.1) * size + 1e-10

    def _agrees(self, records: list[SpecRecord], extents: dict[str, tuple[int, ...]], number: int) -> bool:
        """False: not finite here. Raises Failed where the two differ."""
        inputs, t, v, generator = self._point(records, extents, number)
        if not v:
            raise Failed("no output can be differentiated")
        outcome, values = self._run("hvp", inputs, cotangents=v, tangents=t)
        size = _paired(outcome.gradients, values, t, absolute=True)
        if not math.isfinite(size):
            return False
        derived = _derived(outcome)
        self.honest = self.honest and self._is_honest(inputs, t, v, _paired(outcome.gradients, values, t))
        for moving in self._directions(t, v):
            s = {name: _normal(like, generator) for name, like in moving.items()}
            expected = _paired(derived, values, s)
            if not math.isfinite(expected):
                return False
            gaps = []
            for step in _STEPS:
                above, below = (self._pulled(inputs, t, v, s, sign * step) for sign in (1, -1))
                difference = (above - below) / (2 * step)
                if not math.isfinite(difference):
                    return False
                gaps.append((difference, 1e-5 * (abs(difference) + abs(expected)) + 1e-14 / step * size + 1e-10))
                if abs(difference - expected) <= gaps[-1][1]:
                    break
            else:
                name = next(iter(moving))
                raise Failed(
                    f"along {name} the second derivative is {expected:.6g}, finite differences give {gaps[0][0]:.6g}"
                )
        return True

    def _is_honest(self, inputs: Tensors, t: Tensors, v: Tensors, expected: float) -> bool:
        """Whether <J^H v, t> is the derivative of <v, y> along t."""
        for step in _STEPS:
            above, below = (self._valued(inputs, t, v, sign * step) for sign in (1, -1))
            difference = (above - below) / (2 * step)
            if abs(difference - expected) <= 1e-5 * (abs(difference) + abs(expected)) + 1e-14 / step * abs(above):
                return True
        return False

    def _valued(self, inputs: Tensors, t: Tensors, v: Tensors, step: float) -> float:
        """Re<v, y> at a point moved along t."""
        outcome, values = self._run(
            "evaluate",
            _moved(inputs, "input", t, step),
            parameters=_moved(self._parameters, "param", t, step),
        )
        return _paired([GradRef(ref.name, ref) for ref in outcome.outputs], values, v)

    def _directions(self, t: Tensors, v: Tensors) -> Iterator[Tensors]:
        for name, tensor in t.items():
            if name.startswith("input:"):
                yield {name: tensor}
        parameters = [name for name in t if name.startswith("param:")]
        for group in range(min(_GROUPS, len(parameters))):
            yield {name: t[name] for name in parameters[group::_GROUPS]}
        yield {f"output:{name}": tensor for name, tensor in v.items()}

    def _pulled(self, inputs: Tensors, t: Tensors, v: Tensors, s: Tensors, step: float) -> float:
        """Re<J^H v, t> at a point moved along s."""
        parameters = {name: p for name, p in self._parameters.items() if f"param:{name}" in s}
        outcome, values = self._run(
            "vjp",
            _moved(inputs, "input", s, step),
            parameters=_moved(parameters, "param", s, step),
            cotangents=_moved(v, "output", s, step),
        )
        return _paired(outcome.gradients, values, t)


def _derived(outcome: Any) -> list[GradRef]:
    """The second derivatives of an outcome, by what they belong to."""
    return [*outcome.hvps, *(GradRef(f"output:{grad.name}", grad.value) for grad in outcome.cotangent_derivatives)]


def _outputs(v: Tensors) -> Tensors:
    return {f"output:{name}": tensor for name, tensor in v.items()}


def _widened(named: Tensors) -> Tensors:
    return {
        name: tensor.double()
        if tensor.is_floating_point()
        else tensor.to(torch.complex128)
        if tensor.is_complex()
        else tensor
        for name, tensor in named.items()
    }


def _moved(named: Tensors, place: str, along: Tensors, step: float) -> Tensors:
    return {
        name: tensor + step * along[f"{place}:{name}"] if f"{place}:{name}" in along else tensor
        for name, tensor in named.items()
    }


def _normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _paired(grads: Sequence[GradRef], values: Sequence[torch.Tensor], others: Tensors, absolute: bool = False) -> float:
    """Sum of Re<gradient, other>; `absolute`: an upper bound of its terms."""
    total = 0.0
    for grad in grads:
        other = others.get(grad.name)
        if grad.value is not None and other is not None:
            product = values[grad.value.payload].conj() * other
            total += float(
                product.abs().sum() if absolute else product.real.sum() if product.is_complex() else product.sum()
            )
    return total
