"""The checks of the gate, on one model."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace

from pullback_server.engine.gate_agreement import agrees_with, settle_forward_mode
from pullback_server.engine.gate_elements import locate, number
from pullback_server.engine.gate_slopes import Ask, Told, first_order, second_order, settle
from pullback_server.engine.gate_state import Runs, check_state
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.probe import Ground
from pullback_server.engine.trial import Compute, Failed, TooLong, Trial, double_precision

#: Seconds of a VJP, and elements of all parameters, from which on one point must do; of the parameters those with the
#: fewest elements are moved, up to so many in all.
_SLOW, _LARGE, _MOVED = 0.5, 50_000_000, 5_000_000
#: Elements of all parameters of which no copy in double precision is made.
_HUGE = 500_000_000
#: Of the gate's seconds, the share that is spent on second derivatives of torch's own operations.
_SHARE = 0.25
#: Nodes of what torch differentiates as a function of symmetric matrices.
_SYMMETRIC = ("LinalgEigh", "LinalgCholesky", "Cholesky")
#: Seconds to find a wrong element in.
_SEARCH = 5.0


class Checks:
    """The checks but for that of rows, in the order in which each tells what the next may rely on."""

    def __init__(self, hosted: HostedModel, compute: Compute, ground: Ground, deadline: float) -> None:
        self._hosted = hosted
        self._compute = compute
        self._ground = ground
        self._deadline = deadline
        self._late = f"took longer than {hosted.registration.gate.seconds:g} s"
        self._since = time.monotonic()
        #: Parameters that cannot be moved, for a copy of the model does not have its own where its code looks for them.
        self._kept: list[str] = []
        self._elements = sum(parameter.numel() for parameter in hosted.parameters.values())

    def __call__(self) -> dict[str, Told]:
        """What came of each."""
        runs = self._timed()
        slow = self._hosted.gradient_seconds > _SLOW
        # Of the little that a slow model can be asked, its gradient comes first.
        told = self._derivatives() if slow else {}
        determinism, purity = runs if isinstance(runs, tuple) else self._state(runs)
        found = {"determinism": determinism, "purity": purity}
        if any(told.outcome == "failed" for told in found.values()):
            blind = Told("skipped", "its calls do not give the same again, so that differences tell nothing")
            return found | {"gradient": blind, "second": blind}
        return found | (told if slow else self._derivatives())

    def _timed(self) -> Runs | tuple[Told, Told]:
        runs = None
        try:
            runs = Runs(self._hosted, self._compute, self._ground.variants[-1], self._deadline)
            runs.time()
            return runs
        except TooLong:
            told = Told("skipped", self._late)
        except Failed as failure:
            told = Told("skipped", f"a sample's VJP fails: {failure}")
        finally:
            if runs is not None:
                self._hosted.gradient_seconds = runs.gradient_seconds
        return told, told

    def _state(self, runs: Runs) -> tuple[Told, Told]:
        try:
            return check_state(runs)
        except TooLong:
            told = Told("skipped", self._late)
        except Failed as failure:
            told = Told("skipped", f"a sample's VJP fails: {failure}")
        return told, told

    def _derivatives(self) -> dict[str, Told]:
        trial = self._trial()
        if isinstance(trial, Told):
            return {"gradient": trial, "second": trial}
        gradient = self._gradient(trial)
        if gradient.outcome != "failed" and self._hosted.gradient_seconds <= _SLOW and not self._ground.foreign:
            settle_forward_mode(self._hosted, trial, self._ground.variants)
        return {"gradient": gradient, "second": self._second(trial)}

    def _trial(self) -> Trial | Told:
        """What derivatives are compared on: a copy in double precision, or the model itself."""
        trial = Trial(self._hosted, self._compute, self._deadline, wide=False)
        if self._elements <= _HUGE:
            try:
                wide = Trial(self._ground.twin(), self._compute, self._deadline)
                if self._hosted.gradient_seconds <= _SLOW:
                    with double_precision():
                        wide.point(*self._ground.variants[0], 0)
                trial = wide
            except TooLong:
                return Told("skipped", self._late)
            # A model's own copying may raise anything, and its code may insist on its types.
            except Exception:
                pass
        room = _MOVED if self._elements > _LARGE else self._elements
        for name, parameter in sorted(trial.parameters.items(), key=lambda item: item[1].numel()):
            room -= parameter.numel()
            if room < 0 or self._hosted.registration.abilities.parameters:
                del trial.parameters[name]
            elif (kept := trial.hosted.kept.get(name)) is not None:
                # Nothing can stand in for what its code keeps elsewhere.
                if kept.copied or not trial.wide:
                    trial.in_place.add(name)
                else:
                    del trial.parameters[name]
                    self._kept.append(name)
        return trial

    def _settled(self, trial: Trial, ask: Ask, points: int) -> Told:
        slow = self._hosted.gradient_seconds > _SLOW
        points = 1 if slow or self._elements > _LARGE else points
        since = -math.inf if self._elements > _LARGE else self._since
        with double_precision() if trial.wide else contextlib.nullcontext():
            told = settle(trial, self._ground.variants, ask, points, self._late, since=since, hasty=slow)
            if told.wrong is not None:
                told = replace(told, detail=self._told(trial, told))
        return told

    def _gradient(self, trial: Trial) -> Told:
        told = self._settled(trial, first_order, self._hosted.registration.gate.points)
        if told.outcome == "passed" and trial.wide and self._hosted.gradient_seconds <= _SLOW:
            told = self._narrow(trial, told)
        if self._kept and told.outcome == "passed":
            names = ", ".join(map(repr, self._kept))
            return Told("noted", f"{told.detail}; not looked at by {names}, which its code keeps elsewhere as well")
        every = [name for name, own in self._hosted.parameters.items() if own.is_floating_point() or own.is_complex()]
        if told.outcome == "passed" and len(trial.parameters) < len(every):
            return replace(told, detail=f"{told.detail}; of {len(every)} parameters by {len(trial.parameters)}")
        return told

    def _narrow(self, trial: Trial, told: Told) -> Told:
        """Holds the gradient in its own precision, where its code may go another way, against that in double."""
        narrow = Trial(self._hosted, self._compute, trial.deadline, wide=False)
        narrow.parameters = {name: own for name, own in narrow.parameters.items() if name in trial.parameters}
        narrow.in_place = set(trial.in_place)
        try:
            if all(agrees_with(narrow, trial, variant) for variant in self._ground.variants):
                return told
            own = self._settled(narrow, first_order, 1)
        except Failed:
            return told
        if own.outcome in ("failed", "passed"):
            return own if own.outcome == "failed" else told
        return Told(
            "noted", f"{told.detail}; in its own precision it is another one, of which differences tell nothing"
        )

    def _second(self, trial: Trial) -> Told:
        """Of code that is not torch's the probe has said what can be promised; there is nothing more to refuse."""
        orders = self._hosted.orders
        if self._ground.foreign:
            return Told("passed" if orders.reverse != 1 else "noted", orders.evidence)
        if not trial.wide:
            return Told("skipped", "it does not compute in double precision, and differences would drown in rounding")
        trial.deadline = min(self._deadline, time.monotonic() + _SHARE * self._hosted.registration.gate.seconds)
        # Of torch's own modules the derivatives are torch's as well.
        told = self._settled(trial, second_order, 1 if self._hosted.stock else self._hosted.registration.gate.points)
        return replace(told, detail="took too long") if told.detail == self._late else told

    def _hint(self, trial: Trial) -> str:
        if not any(kind.startswith(_SYMMETRIC) for kind in trial.kinds):
            return ""
        return (
            "; torch's eigh and cholesky differentiate among symmetric matrices alone, so make it one: (x + x.mH) / 2"
        )

    def _told(self, trial: Trial, told: Told) -> str:
        """What is wrong with a derivative, in words."""
        assert told.wrong is not None
        point, question, found = told.wrong
        if not question.gradients:
            return (
                f"its second derivative is not that of its gradient, {told.detail}: along {question.what} it is "
                f"{number(question.expected)}, by central differences {number(found.difference)}"
            )
        before, trial.deadline = trial.deadline, time.monotonic() + _SEARCH
        try:
            element = locate(trial, point, question, found.step)
        except Failed:
            return (
                f"its gradient is not the derivative of its outputs, {told.detail}: along {question.what} it is "
                f"{number(question.expected)}, by central differences {number(found.difference)}"
            )
        finally:
            trial.deadline = before
        place, _, name = element.name.partition(":")
        what = "input" if place == "input" else "parameter"
        at = f"element {element.index} of " if element.index else ""
        return (
            f"its gradient by the {what} {name!r} is not the derivative of its outputs, {told.detail}: {at}the "
            f"gradient of a random combination of them is {number(element.analytical)}, and by central differences "
            f"{number(element.numerical)}{self._hint(trial)}"
        )
