"""What the gate asks of a model's derivatives: whether each is the slope of what it is the derivative of.

Along one input or group of parameters at a time, so that no part hides behind another; at random points, of which one
where nothing can be told (a kink, noise, NaN) gives way to others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from pullback_server.engine.differences import DOUBLE, SINGLE, Slope, slope
from pullback_server.engine.order_trial import derived
from pullback_server.engine.samples import spread
from pullback_server.engine.trial import TRIES, Failed, Point, Tensors, TooLong, Trial, Variant, normal, paired
from pullback_server.job import GradRef

#: As many parameters are moved one at a time; of more, so many groups.
_SINGLY, _GROUPS = 8, 4
#: A derivative that is wrong here and there must be so at as many points, of so many tried at least.
_OFTEN, _TRIED = 2, 3


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


def settle(trial: Trial, variants: list[Variant], ask: Ask, points: int, late: str) -> Told:
    """Asks at so many points for each choice of inputs. late: what to say where time runs out."""
    for variant in variants:
        told = _settle(trial, variant, ask, points, late)
        if told.outcome != "passed":
            return told
    return told


def _settle(trial: Trial, variant: Variant, ask: Ask, points: int, late: str) -> Told:
    right: Counter[str] = Counter()
    near: Counter[str] = Counter()
    wrong: dict[str, list[tuple[Point, Question, Slope]]] = {}
    asked: list[str] = []
    tried, failure, done = 0, "no sample gave finite values; declare low and high of its inputs", True
    for number in range(TRIES):
        try:
            point = _scaled(trial, variant, trial.point(*variant, number))
            if not point.v:
                return Told("skipped", "no output can be differentiated")
            if not point.t:
                return Told("skipped", "nothing can stand in for what its outputs depend on")
            questions = list(ask(trial, point, number))
            if not all(math.isfinite(question.expected) and math.isfinite(question.here) for question in questions):
                continue
            tried += 1
            asked = asked or [question.what for question in questions]
            for question in questions:
                what = question.what
                if right[what] >= points and what not in wrong:
                    continue
                found = _answer(trial, point, question)
                right[what] += found.right is True
                near[what] += found.near
                if found.right is False:
                    wrong.setdefault(what, []).append((point, question, found))
        except TooLong:
            done = False
            break
        except Failed as error:
            failure = str(error)
            continue
        if tried >= _TRIED and (often := _worst(wrong)) is not None and len(often) >= _OFTEN:
            return Told("failed", f"at {len(often)} of {tried} points", often[-1])
        if asked and not wrong and all(right[what] >= points for what in asked):
            break
    # What nothing spoke against at any point, and what was about right, is right but for noise.
    right.update({what: near[what] for what in asked if not right[what] and what not in wrong})
    never = [what for what in asked if not right[what]]
    if not done and (often := _worst({what: wrong[what] for what in never if what in wrong})) is not None:
        return Told("failed", f"at all of {len(often)} points", often[-1])
    if not tried:
        return Told("skipped", failure if done else late)
    if never:
        unclear = f"differences tell nothing of {', '.join(never)} at {tried} points: kinks, or rounding"
        return Told("skipped", unclear if done else late)
    remark = f"; not along {', '.join(wrong)} at one of {tried}, as around a kink" if wrong else ""
    precision = "double precision" if trial.wide else "its own precision"
    count = min(right[what] for what in asked)
    return Told("passed", f"agrees with central differences in {precision} at {count} points{remark}")


def _worst(wrong: dict[str, list[tuple[Point, Question, Slope]]]) -> list[tuple[Point, Question, Slope]] | None:
    return max(wrong.values(), key=len, default=None)


def _answer(trial: Trial, point: Point, question: Question) -> Slope:
    found = Slope(None, math.nan, math.nan)
    if trial.wide:
        found = slope(question.expected, question.here, question.size, question.value, DOUBLE)
        if found.right or point.width == 8:
            return found
    # In steps so small, what is computed in single precision is a staircase.
    if point.width == 4:
        found = slope(question.expected, question.here, question.size, question.value, SINGLE)
    return Slope(None, math.nan, math.nan) if point.width < 4 else found


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
        s = {name: normal(like, point.generator) * _size(like) for name, like in along.items()}
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
