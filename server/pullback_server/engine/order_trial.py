"""Orders of derivatives tried out: second ones held against finite differences, JVPs against VJPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from pullback_server.engine.differences import DOUBLE, slope
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.trial import TRIES, Compute, Failed, Point, Tensors, Trial, Variant, normal, paired
from pullback_server.job import GradRef, Outcome

#: Points at which derivatives are compared.
_POINTS = 3
#: Parameters are moved in at most so many groups.
_GROUPS = 4
#: A promise needs no more than this.
_DOUBLE = replace(DOUBLE, tolerance=1e-5, noisy=0.0)


class OrderTrial(Trial):
    """The comparison, on a copy of the model in double precision."""

    def __init__(self, twin: HostedModel, compute: Compute, deadline: float) -> None:
        super().__init__(twin, compute, deadline)
        #: Whether the VJP agrees with finite differences of the outputs.
        self.honest = True

    def check_forward(self, found: Sequence[Variant]) -> tuple[bool, str]:
        """Whether J t is the adjoint of J^H v: by forward mode, or else by two backwards; and why not."""
        for variant in found:
            why = self._adjoint(variant)
            if why and self.hosted.forward_mode:
                self.hosted.forward_mode = False
                why = self._adjoint(variant)
            if why:
                return False, f"; no JVP: {why}"
        return True, ""

    def _adjoint(self, variant: Variant) -> str:
        try:
            point = self.point(*variant, 0)
            pulled, values = self.run("vjp", point.inputs, cotangents=point.v)
            left = paired(pulled.gradients, values, point.t)
            pushed, values = self.run("jvp", point.inputs, tangents=point.t)
            right = paired(pushed.gradients, values, point.v)
        except Failed as failure:
            return str(failure)
        if math.isfinite(left) and abs(left - right) > 1e-6 * (abs(left) + abs(right)) + 1e-9:
            return f"<J^H v, t> is {left:.6g}, <v, J t> {right:.6g}"
        return ""

    def check_second(self, found: Sequence[Variant]) -> None:
        """Compares the HVP with differences of the VJP. Raises Failed."""
        for variant in found:
            passed = 0
            for number in range(TRIES):
                passed += self._agrees(variant, number)
                if passed == _POINTS:
                    break
            else:
                raise Failed("too few points gave finite values")

    def check_narrow(self, hosted: HostedModel, found: Sequence[Variant]) -> set[Any]:
        """Compares the HVP in the model's own precision, where its code may go another way, with that in double.

        Returns what of its graphs is thereby proven. Raises Failed.
        """
        narrow = Trial(hosted, self._compute, self.deadline, wide=False)
        hosted.probing = True
        try:
            for variant in found:
                if not any(self._agrees_with(narrow, variant, number) for number in range(TRIES)):
                    raise Failed("in its own precision the second derivative is another one, or not finite")
            return set(hosted.seen)
        finally:
            hosted.probing = False
            hosted.seen = set()

    def _agrees_with(self, narrow: Trial, variant: Variant, number: int) -> bool:
        point = narrow.point(*variant, number)
        v, t = point.v, point.t
        found = narrow.run("hvp", point.inputs, cotangents=v, tangents=t)
        expected = self.run("hvp", widened(point.inputs), cotangents=widened(v), tangents=widened(t))
        along = {name: normal(like, point.generator) for name, like in widened(t | _outputs(v)).items()}
        pairs = [(derived(outcome), values) for outcome, values in (found, expected)]
        value, sure = (paired(refs, values, along) for refs, values in pairs)
        size = paired(*pairs[1], along, absolute=True)
        rounding = max(
            (torch.finfo(like.dtype).eps for like in (*t.values(), *v.values())), default=torch.finfo(torch.double).eps
        )
        return math.isfinite(value) and abs(value - sure) <= min(10 * math.sqrt(rounding), 0.1) * size + 1e-10

    def _agrees(self, variant: Variant, number: int) -> bool:
        """False: not finite here. Raises Failed where the two differ."""
        point = self.point(*variant, number)
        if not point.v:
            raise Failed("no output can be differentiated")
        outcome, values = self.run("hvp", point.inputs, cotangents=point.v, tangents=point.t)
        size = paired(outcome.gradients, values, point.t, absolute=True)
        if not math.isfinite(size):
            return False
        here = paired(outcome.gradients, values, point.t)
        self.honest = self.honest and self._is_honest(point, outcome, values, here)
        for moving in _directions(point):
            s = {name: point.drawn(name, like) for name, like in moving.items()}
            expected = paired(derived(outcome), values, s)
            seen: list[float] = []
            difference = _watched(lambda step, s=s: self.pulled(point, s, step), seen)  # type: ignore[misc]
            found = slope(expected, here, size, difference, _DOUBLE)
            if found.right:
                continue
            if not all(map(math.isfinite, (expected, *seen))):
                return False
            first = (seen[0] - seen[1]) / (2 * _DOUBLE.steps[0])
            raise Failed(
                f"along {next(iter(moving))} the second derivative is {expected:.6g}, "
                f"finite differences give {first:.6g}"
            )
        return True

    def _is_honest(self, point: Point, outcome: Outcome, values: Sequence[torch.Tensor], expected: float) -> bool:
        """Whether <J^H v, t> is the derivative of <v, y> along t."""
        outputs = [GradRef(ref.name, ref) for ref in outcome.outputs]
        here, size = (paired(outputs, values, point.v, absolute) for absolute in (False, True))
        return bool(slope(expected, here, size, lambda step: self.valued(point, point.t, step), _DOUBLE).right)


def _watched(value: Callable[[float], float], seen: list[float]) -> Callable[[float], float]:
    def look(step: float) -> float:
        seen.append(value(step))
        return seen[-1]

    return look


def _directions(point: Point) -> Iterator[Tensors]:
    """What is moved at a time: an input, a group of parameters, a cotangent."""
    for name, tensor in point.t.items():
        if name.startswith("input:"):
            yield {name: tensor}
    parameters = [name for name in point.t if name.startswith("param:")]
    for group in range(min(_GROUPS, len(parameters))):
        yield {name: point.t[name] for name in parameters[group::_GROUPS]}
    yield _outputs(point.v)


def derived(outcome: Outcome) -> list[GradRef]:
    """The second derivatives of an outcome, by what they belong to."""
    return [*outcome.hvps, *(GradRef(f"output:{grad.name}", grad.value) for grad in outcome.cotangent_derivatives)]


def _outputs(v: Tensors) -> Tensors:
    return {f"output:{name}": tensor for name, tensor in v.items()}


def widened(named: Tensors) -> Tensors:
    """Tensors in double precision."""
    return {
        name: tensor.double()
        if tensor.is_floating_point()
        else tensor.to(torch.complex128)
        if tensor.is_complex()
        else tensor
        for name, tensor in named.items()
    }
