"""What the gate asks of a model's derivatives: whether each is the slope of what it is the derivative of.

Along one input or group of parameters at a time, so that no part hides behind another; at random points, of which one
where nothing can be told (a kink, noise, NaN) gives way to others.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from pullback_server.engine.differences import DOUBLE, SINGLE, Slope, slope
from pullback_server.engine.order_trial import derived
from pullback_server.engine.samples import shapes, spread, values
from pullback_server.engine.trial import TRIES, Failed, Point, Tensors, TooLong, Trial, Variant, normal, paired
from pullback_server.job import GradRef

#: As many parameters are moved one at a time; of more, so many groups.
_SINGLY, _GROUPS = 8, 4
#: A derivative that is wrong somewhere is looked at so often close by, and must be wrong there again.
_AGAIN, _NEARBY = 3, 1e-2
#: Points at most, of which more than are asked for while the gate has taken less than so many seconds.
_MOST, _QUICK = 16, 0.04


@dataclass(frozen=True)
class Question:
    """Whether `expected` is the slope of `value`, a function of the step along some tangents. See `slope`.

    gradients: those that were asked for, by what they are by.
    """

    what: str
    along: Tensors
    expected: float
    here: float
    size: float
    value: Callable[[float], float]
    gradients: Tensors


@dataclass(frozen=True)
class Told:
    """What came of a check: "passed", "noted", "skipped" or "failed". wrong: where a derivative is."""

    outcome: Literal["passed", "noted", "skipped", "failed"]
    detail: str
    wrong: tuple[Point, Question, Slope] | None = None


Ask = Callable[[Trial, Point, int], Iterator[Question]]


def settle(
    trial: Trial, variants: list[Variant], ask: Ask, points: int, late: str, *, since: float = 0.0, hasty: bool = False
) -> Told:
    """Asks at so many points for each choice of inputs, and at more where that is quick.

    late: what to say where time runs out. since: when the gate began; hasty: a call takes so long that few can be made.
    """
    noted = None
    for variant in variants:
        told = Settling(trial, variant, ask, points, late, since, hasty)()
        if told.outcome not in ("passed", "noted"):
            return told
        noted = noted or (told if told.outcome == "noted" else None)
    return noted or told


class Settling:
    """One choice of inputs, at point after point."""

    def __init__(
        self, trial: Trial, variant: Variant, ask: Ask, points: int, late: str, since: float, hasty: bool
    ) -> None:
        self._trial, self._variant, self._ask, self._late = trial, variant, ask, late
        self._since, self._hasty = since, hasty
        counts = [values(record, variant[1][record.name]) for record in variant[0]]
        self._points = points
        #: Every value of a flag is met.
        self._least = points if hasty else max([points, *counts])
        self._right: Counter[str] = Counter()
        self._near: Counter[str] = Counter()
        self._odd: dict[str, tuple[Point, Question, Slope]] = {}
        self._asked: list[str] = []
        self._tried = self._infinite = 0
        self._extents = [variant[1]]
        symbols = any(isinstance(extent, str) for record in variant[0] for extent in record.shape or ())
        if symbols and not hasty:
            small = [found for found in shapes(variant[0]) if found != variant[1]]
            self._extents += sorted(small, key=lambda found: sum(map(math.prod, found.values())))[:4]

    def __call__(self) -> Told:
        failure, done = "no sample gave finite values; declare low and high of its inputs", True
        for number in range(_MOST):
            if self._enough(number):
                break
            # Other extents come after those that are known to run.
            more = number >= self._least
            extents = self._extents[(number - self._least + 1) % len(self._extents) if more else 0]
            try:
                point = self._trial.point(self._variant[0], extents, number)
                if not point.v:
                    return Told("skipped", "no output can be differentiated")
                if not point.t:
                    return Told("skipped", "nothing can stand in for what its outputs depend on")
                wrong = self._look(point, number)
                if wrong is not None:
                    return wrong
            except TooLong:
                done = False
                break
            except Failed as error:
                if extents is not self._variant[1]:
                    self._extents.remove(extents)
                else:
                    failure = str(error)
        return self._told(failure, done)

    def _enough(self, number: int) -> bool:
        settled = bool(self._asked) and all(
            self._right[what] >= self._points or what in self._odd for what in self._asked
        )
        if number >= TRIES and not settled:
            return True
        return settled and number >= self._least and time.monotonic() - self._since > _QUICK

    def _look(self, point: Point, number: int) -> Told | None:
        """Asks at a point; what is wrong there, if it is so close by as well. Raises Failed."""
        _scaled(self._trial, self._variant, point)
        questions = list(self._ask(self._trial, point, number))
        if not all(math.isfinite(question.expected) and math.isfinite(question.here) for question in questions):
            self._infinite += all(math.isfinite(question.here) for question in questions)
            return None
        self._tried += 1
        self._asked = self._asked or [question.what for question in questions]
        odd = []
        for place, question in enumerate(questions):
            found = answer(self._trial, point, question, self._hasty)
            self._right[question.what] += found.right is True
            self._near[question.what] += found.near
            if found.right is False:
                odd.append((place, question, found))
        for place, question, found in odd:
            try:
                times = self._again(point, place, number)
            except TooLong:
                if question.what in self._odd or not self._right[question.what]:
                    return Told("failed", f"at all of {self._tried} points", (point, question, found))
                raise
            if times:
                return Told("failed", f"at a point and {times} close by", (point, question, found))
            self._odd.setdefault(question.what, (point, question, found))
        return None

    def _again(self, point: Point, place: int, number: int) -> int:
        """At how many points close by a derivative is wrong as well: with the same integers and flags."""
        times = 0
        for turn in range(_AGAIN):
            moving = {name.partition(":")[2]: t for name, t in point.t.items() if name.startswith("input:")}
            near = {
                name: tensor + _NEARBY * normal(tensor, point.generator).clamp(-1, 1) * moving[name].abs()
                if tensor.is_floating_point() and name in moving
                else tensor
                for name, tensor in point.inputs.items()
            }
            try:
                other = _scaled(self._trial, self._variant, self._trial.at(near, 1000 * (number + 1) + turn))
                question = list(self._ask(self._trial, other, number))[place]
            except TooLong:
                raise
            except (Failed, IndexError):
                continue
            if math.isfinite(question.expected) and math.isfinite(question.here):
                times += answer(self._trial, other, question, self._hasty).right is False
        return times

    def _told(self, failure: str, done: bool) -> Told:
        right, odd, asked = self._right, self._odd, self._asked
        # What nothing spoke against at any point, and what was about right, is right but for noise.
        right.update({what: self._near[what] for what in asked if not right[what] and what not in odd})
        never = [what for what in asked if not right[what]]
        infinite = f"at {self._infinite} points its gradient is NaN or infinite where its outputs are not"
        if not self._tried and self._infinite and done:
            return Told("noted", infinite)
        if not self._tried:
            return Told("skipped", failure if done else self._late)
        if never:
            unclear = f"differences tell nothing of {', '.join(never)} at {self._tried} points: kinks, or rounding"
            return Told("skipped", unclear if done else self._late)
        precision = "double precision" if self._trial.wide else "its own precision"
        told = f"agrees with central differences in {precision} at {min(right[what] for what in asked)} points"
        if odd:
            told += f"; not along {', '.join(odd)} at one of {self._tried}, though close by: a kink there"
        if self._infinite:
            told += f"; {infinite}"
        return Told("noted" if odd or self._infinite else "passed", told)


def answer(trial: Trial, point: Point, question: Question, hasty: bool = False) -> Slope:
    """What differences say to a question."""
    nothing = found = Slope(None, math.nan, math.nan)
    double = trial.wide or (point.width == 8 and all(_bytes(tensor) == 8 for tensor in point.t.values()))
    blur, grain = _rounded(trial, point, question)
    if double:
        precision = replace(DOUBLE, steps=DOUBLE.steps[:2], finer=()) if hasty else DOUBLE
        found = slope(question.expected, question.here, question.size, question.value, precision, blur, grain)
        if found.right or point.width == 8:
            return found
    # In steps so small, what is computed in single precision is a staircase.
    if point.width == 4:
        return slope(question.expected, question.here, question.size, question.value, SINGLE, blur, grain)
    return nothing


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.itemsize // (2 if tensor.is_complex() else 1)


def _rounded(trial: Trial, point: Point, question: Question) -> tuple[float, float]:
    """How far rounding of what is moved may take differences from the slope, and the step that is one unit of it."""
    blur = grain = 0.0
    for name, tangent in question.along.items():
        own = moved_by(trial, point, name)
        if own is None or not tangent.numel():
            continue
        unit = torch.finfo(own.dtype).eps * own.detach().abs().double()
        size = float(tangent.abs().double().square().mean().sqrt())
        grain = max(grain, float(unit.square().mean().sqrt()) / size if size else 0.0)
        gradient = question.gradients.get(name)
        if gradient is not None:
            blur += float((gradient.abs().double() * unit).sum())
    return blur, grain


def moved_by(trial: Trial, point: Point, name: str) -> torch.Tensor | None:
    place, _, bare = name.partition(":")
    return point.inputs.get(bare) if place == "input" else trial.parameters.get(bare) if place == "param" else None


def _scaled(trial: Trial, variant: Variant, point: Point) -> Point:
    """The same with tangents as large as what they move, so that a step is small for each of them."""
    spreads = {f"input:{record.name}": spread(record) for record in variant[0]}
    own = {f"input:{name}": tensor for name, tensor in point.inputs.items()}
    own |= {f"param:{name}": tensor for name, tensor in trial.parameters.items()}
    for name, tensor in point.t.items():
        size = spreads.get(name) or float(own[name].abs().double().square().mean().sqrt()) if tensor.numel() else 1.0
        point.t[name] = tensor * (size if 0 < size < math.inf else 1.0)
    return point


def directions(t: Tensors) -> Iterator[tuple[str, Tensors]]:
    """What is moved at a time, and what that is called."""
    parameters = [name for name in t if name.startswith("param:")]
    for name, tensor in t.items():
        if name.startswith("input:"):
            yield f"the input {name.removeprefix('input:')!r}", {name: tensor}
    groups = len(parameters) if len(parameters) <= _SINGLY else _GROUPS
    for group in range(groups):
        names = parameters[group::groups]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"the parameter {names[0].removeprefix('param:')!r}{more}", {name: t[name] for name in names}


def first_order(trial: Trial, point: Point, number: int) -> Iterator[Question]:
    """Whether the VJP is the derivative of the outputs: by everything at once, or by inputs and parameters alone.

    Raises Failed.
    """
    places = [place for place in ("input", "param") if any(name.startswith(place) for name in point.t)]
    gradients: Tensors = {}
    for place in places if number % 2 else [""] if places else []:
        outcome, values = trial.run("vjp", point.inputs, place=place, cotangents=point.v)
        gradients |= {
            grad.name: values[grad.value.payload]
            for grad in outcome.gradients
            if grad.value is not None and (not place or grad.name.startswith(place))
        }
        outputs = [GradRef(ref.name, ref) for ref in outcome.outputs]
        here, size = (paired(outputs, values, point.v, absolute) for absolute in (False, True))
    for what, along in directions(point.t):
        yield Question(what, along, dotted(gradients, along), here, size, _valued(trial, point, along), gradients)


def second_order(trial: Trial, point: Point, number: int) -> Iterator[Question]:
    """Whether the HVP is the derivative of the VJP. Raises Failed."""
    outcome, values = trial.run("hvp", point.inputs, cotangents=point.v, tangents=point.t)
    here, size = (paired(outcome.gradients, values, point.t, absolute) for absolute in (False, True))
    v = {f"output:{name}": tensor for name, tensor in point.v.items()}
    for what, along in [*directions(point.t), ("the cotangents", v)]:
        s = {name: point.drawn(name, like) * _size(like) for name, like in along.items()}
        yield Question(what, s, paired(derived(outcome), values, s), here, size, _pulled(trial, point, s), {})


def _size(tensor: torch.Tensor) -> float:
    return float(tensor.abs().double().square().mean().sqrt()) if tensor.numel() else 1.0


def _valued(trial: Trial, point: Point, along: Tensors) -> Callable[[float], float]:
    return lambda step: _or_nan(lambda: trial.valued(point, along, step))


def _pulled(trial: Trial, point: Point, along: Tensors) -> Callable[[float], float]:
    return lambda step: _or_nan(lambda: trial.pulled(point, along, step))


def _or_nan(value: Callable[[], float]) -> float:
    """A moved point may be one that the model refuses."""
    try:
        return value()
    except TooLong:
        raise
    except Failed:
        return math.nan


def dotted(gradients: Tensors, along: Tensors) -> float:
    """Sum of Re<gradient, tangent>; no gradient is one of zero."""
    total = 0.0
    for name, tangent in along.items():
        if name in gradients:
            product = gradients[name].conj() * tangent
            total += float((product.real if product.is_complex() else product).double().sum())
    return total
