"""What is known of the server and of each model before the checks: by asking it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np

from pullback.conformance._arrays import inputs as draw_inputs
from pullback.conformance._arrays import like, rng, ways
from pullback.conformance._check import Mismatch, Skip
from pullback.conformance._draft import Draft, draft
from pullback.conformance._numbers import finite, is_complex, is_differentiable, precision
from pullback.conformance._wire import Answer, Refused, Wire
from pullback_wire.v1 import model_service_pb2 as pb

#: Attempts to find inputs that a model takes.
_ATTEMPTS = 24
#: Codes of a server that hangs or is gone.
_NOBODY = ("DEADLINE_EXCEEDED", "UNAVAILABLE")
#: Causes that are the model's, so that the server has nothing to answer for.
_MODELS_OWN = ("MODEL_ERROR", "NOT_DIFFERENTIABLE", "UNSUPPORTED_BY_MODEL")


@dataclass
class Subject:
    """A model, inputs that it takes, and what it answers to them.

    inputs, outputs: by name. cotangents: random, for each differentiable output. wrt: the differentiable inputs that
    the outputs depend on; unused: the others. given: inputs came from the user. listed: what ListModels said of it.
    problem: why the model cannot be computed; refusal: where it was one. first: the refusal of the first VJP, where it
    has none. wrong: what it answered does not keep the contract, so that nothing more can be asked.
    """

    wire: Wire
    model: pb.Model
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    cotangents: dict[str, np.ndarray] = field(default_factory=dict)
    wrt: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    given: bool = False
    problem: str = ""
    refusal: Refused | None = None
    first: Refused | None = None
    listed: pb.Model | None = None
    wrong: Mismatch | None = None

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def eps(self) -> float:
        """The coarsest precision of what goes in and comes out."""
        return precision([*self.inputs.values(), *self.outputs.values()])

    @property
    def tolerance(self) -> float:
        """What two ways to compute one thing may differ by, relative to its norm."""
        return 2000 * self.eps if self.eps < 1e-10 else 200 * self.eps

    @property
    def differentiable(self) -> dict[str, np.ndarray]:
        """Inputs that have a dtype which can be differentiated."""
        return {name: array for name, array in self.inputs.items() if is_differentiable(array.dtype)}

    @property
    def scalar(self) -> str:
        """The name of the only differentiable output when it is a real scalar, else empty."""
        if len(self.cotangents) == 1:
            ((name, array),) = self.cotangents.items()
            if array.shape == () and not is_complex(array.dtype):
                return name
        return ""

    @property
    def complex(self) -> bool:
        """Whether anything complex goes in or comes out."""
        arrays = [*self.inputs.values(), *self.outputs.values()]
        return any(is_complex(array.dtype) for array in arrays)

    def declared(self, *checks: str) -> str:
        """What the operator says of a gradient that intentionally is not the true one; empty: nothing."""
        for check in self.model.checks:
            if check.name in checks and check.outcome == pb.CHECK_OUTCOME_DECLARED:
                return f"declared as intended: {check.detail}"
        return ""

    def draft(self, method: str, inputs: Mapping[str, np.ndarray] | None = None, **more: Any) -> Draft:
        """A request with the subject's inputs, or others. more: see `draft`; arrays by field name are tensors."""
        tensors: dict[str, Any] = {"inputs": self.inputs if inputs is None else inputs}
        for name in ("targets", "parameters", "cotangents", "tangents"):
            if more.get(name) is not None:
                tensors[name] = more.pop(name)
        return draft(method, self.name, tensors=tensors, **more)

    def evaluate(self, inputs: Mapping[str, np.ndarray] | None = None, **more: Any) -> dict[str, np.ndarray]:
        return self.wire.ask(self.draft("Evaluate", inputs, **more)).outputs()

    def vjp(self, inputs: Mapping[str, np.ndarray] | None = None, **more: Any) -> dict[str, np.ndarray | None]:
        """J^H v by name; unless said otherwise with the subject's cotangents and wrt."""
        more = {"cotangents": self.cotangents, "wrt": self.wrt, "omit_outputs": True, **more}
        return self.wire.ask(self.draft("ComputeVjp", inputs, **more)).gradients()

    def hvp(self, tangents: Mapping[str, np.ndarray], **more: Any) -> Answer:
        more = {"cotangents": self.cotangents, "wrt": self.wrt, "allow_unused": True, "omit_outputs": True, **more}
        return self.wire.ask(self.draft("ComputeHvp", tangents=tangents, **more))

    def jvp(self, tangents: Mapping[str, np.ndarray], **more: Any) -> dict[str, np.ndarray | None]:
        more = {"omit_outputs": True, **more}
        return self.wire.ask(self.draft("ComputeJvp", tangents=tangents, **more)).gradients("tangents")

    def tangents(self, word: str = "tangent") -> dict[str, np.ndarray]:
        """Random ones for all of wrt."""
        return like(rng(self.name, word), {name: self.inputs[name] for name in self.wrt})

    # What a check needs, or else says nothing.

    def computes(self) -> None:
        """Raises Skip where the model could not be evaluated."""
        if self.wrong is not None:
            raise self.wrong
        if self.problem:
            raise Skip(self.problem)

    def differentiates(self) -> None:
        """Raises Skip where there is no VJP by any input, or its values are not finite."""
        self.computes()
        if not self.differentiable:
            raise Skip("it has no floating-point or complex input")
        if self.first is not None:
            if self.first.reason not in _MODELS_OWN:
                raise self.first
            raise Skip(f"it has no VJP ({self.first.reason})")
        if not self.wrt:
            raise Skip("its outputs depend on no input")
        if not finite(self.outputs):
            raise Skip("its outputs are not finite")


@dataclass
class House:
    """The server, and the models that were chosen.

    budget: seconds that a check may wait for something that takes its time. token: whether credentials were given.
    healthy: the gradients of the plain model, once they were asked for.
    """

    wire: Wire
    subjects: list[Subject]
    listed: list[pb.Model]
    budget: float = 5.0
    token: bool = False
    healthy: dict[str, np.ndarray | None] | None = None

    def among(self, fits: Callable[[Subject], bool], what: str) -> Subject:
        """The first model that computes and fits. what: is asked for. Raises Skip."""
        for subject in self.subjects:
            if not subject.problem and fits(subject):
                return subject
        raise Skip(f"no hosted model {what}")

    @cached_property
    def plain(self) -> Subject:
        """The plainest differentiable model: no scalar, float64 if there is one, few elements. Raises Skip."""
        found = [
            subject
            for subject in self.subjects
            if not subject.problem and subject.wrt and not subject.complex and finite(subject.outputs)
        ]
        if not found:
            raise Skip("no hosted model is differentiable by a real input")
        return min(found, key=lambda one: (bool(one.scalar), one.eps, len(one.inputs), _elements(one), one.name))


def _elements(subject: Subject) -> int:
    return sum(array.size for array in (*subject.inputs.values(), *subject.outputs.values()))


def discover(
    wire: Wire, globs: Sequence[str], given: Mapping[str, Mapping[str, np.ndarray]]
) -> tuple[list[pb.Model], Iterator[Subject]]:
    """The models that the server lists, and those that match a glob, with inputs. Raises Refused, Mismatch."""
    listed = list(wire.model("ListModels", pb.ListModelsRequest()).models)
    chosen = [one for one in listed if not globs or any(fnmatchcase(one.name, glob) for glob in globs)]
    return listed, (subject_of(wire, one, given.get(one.name)) for one in chosen)


def subject_of(wire: Wire, listed: pb.Model, given: Mapping[str, np.ndarray] | None) -> Subject:
    """One model. Raises Mismatch where an answer cannot be read."""
    try:
        model = wire.model("GetModel", pb.GetModelRequest(name=listed.name)).model
    except Refused as refused:
        return Subject(wire, listed, listed=listed, problem=f"GetModel answers {refused.words}", refusal=refused)
    subject = Subject(wire, model, given=given is not None, listed=listed)
    if model.state != pb.MODEL_STATE_READY:
        subject.problem = f"it is not ready ({pb.ModelState.Name(model.state)})"
        return subject
    try:
        _find_inputs(subject, given)
        if not subject.problem:
            _find_gradients(subject)
    except Mismatch as wrong:
        subject.wrong = Mismatch(wrong.expected, wrong.received, wrong.asked or wire.asked)
        subject.problem = str(wrong)
    except Exception as error:
        # A signature with a dtype that there is not, say: as in a check, the server's doing.
        subject.wrong = Mismatch("an answer that keeps the contract", f"{error!r}", wire.asked)
        subject.problem = str(subject.wrong)
    return subject


def _find_inputs(subject: Subject, given: Mapping[str, np.ndarray] | None) -> None:
    candidates: Iterator[dict[str, np.ndarray]]
    candidates = iter([dict(given)]) if given is not None else _candidates(subject)
    spare: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None = None
    for _, inputs in zip(range(_ATTEMPTS), candidates, strict=False):
        try:
            outputs = subject.evaluate(inputs)
        except Refused as refused:
            # The first: later attempts are less likely.
            subject.refusal = subject.refusal or refused
            if refused.code in _NOBODY:
                # Other inputs would wait as long.
                break
            continue
        spare = spare or (inputs, outputs)
        if finite(outputs):
            spare = inputs, outputs
            break
    if spare is None:
        said = "" if subject.refusal is None else f": {subject.refusal.words[:200]}"
        subject.problem = f"no inputs were found that it takes (--inputs {subject.name}=FILE.npz gives some){said}"
        return
    subject.refusal = None
    subject.inputs, subject.outputs = spare


def _candidates(subject: Subject) -> Iterator[dict[str, np.ndarray]]:
    optional = any(spec.optional and not spec.any_shape for spec in subject.model.inputs)
    for way in ways(subject.model.inputs):
        for whole in (True, False) if optional else (False,):
            try:
                yield draw_inputs(subject.model.inputs, way, subject.name, whole)
            except ValueError:
                continue


def _find_gradients(subject: Subject) -> None:
    """Which outputs can be differentiated, and by which inputs."""
    inputs = subject.differentiable
    outputs = {name: array for name, array in subject.outputs.items() if is_differentiable(array.dtype)}
    if not inputs or not outputs:
        return
    cotangents = like(rng(subject.name, "cotangents"), outputs)

    def attempt(names: Sequence[str]) -> dict[str, np.ndarray | None] | None:
        chosen = {name: cotangents[name] for name in names}
        try:
            return subject.vjp(cotangents=chosen, wrt=list(inputs), allow_unused=True)
        except Refused as refused:
            subject.first = refused
            return None

    names = list(outputs)
    if len(names) > 1:
        # Some may depend on no input (but on parameters), or not differentiably.
        alone = {name: attempt([name]) for name in names}
        names = [name for name, one in alone.items() if one and any(array is not None for array in one.values())]
    found = attempt(names) if names else None
    if found is None:
        return
    subject.first = None
    subject.cotangents = {name: cotangents[name] for name in names}
    subject.wrt = [name for name in inputs if found.get(name) is not None]
    subject.unused = [name for name in inputs if name in found and found[name] is None]
