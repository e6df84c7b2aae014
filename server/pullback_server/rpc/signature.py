"""A request held against a model's signature, before any byte of it is copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from pullback_server.faults import Fault, nearest
from pullback_server.hosting.checks import check_tensor
from pullback_server.job import Signature, SpecRecord, TensorRef, Wrt
from pullback_wire import Reason, dtype_name
from pullback_wire.dtypes import COMPLEX, FLOATING

_DIFFERENTIABLE = FLOATING | COMPLEX
#: Patterns of one request that have to be held against every name, and characters of one.
_MOST_GLOBS, _LONGEST_GLOB = 256, 1024
_PREFIXES = {"input": "input", "param": "param", "target": "target"}


class SignatureView:
    """A signature with its names at hand; made once for each model version."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.inputs: dict[str, SpecRecord] = {spec.name: spec for spec in signature.inputs}
        self.parameters: dict[str, SpecRecord] = {spec.name: spec for spec in signature.parameters}
        self.losses = frozenset(loss.name for loss in signature.losses)
        self._required = [spec.name for spec in signature.inputs if not spec.optional]

    def check_inputs(self, inputs: Sequence[TensorRef]) -> None:
        """Names, dtypes and shapes of the inputs.

        Raises Fault BAD_NAME or BAD_TENSOR.
        """
        given: dict[str, TensorRef] = {}
        free: dict[str, tuple[int, str]] = {}
        for index, tensor in enumerate(inputs):
            field = f"inputs[{index}]"
            if tensor.name in given:
                raise Fault(Reason.BAD_NAME, f"input {tensor.name!r} is given twice", f"{field}.name")
            spec = self.inputs.get(tensor.name)
            if spec is None:
                raise Fault(
                    Reason.BAD_NAME,
                    f"model {self.signature.name!r} has no input {tensor.name!r}; {nearest(tensor.name, self.inputs)}",
                    f"{field}.name",
                )
            given[tensor.name] = tensor
            check_tensor(spec, tensor, "input", field, free)
        for name in self._required:
            if name not in given:
                raise Fault(Reason.BAD_NAME, f"input {name!r} of model {self.signature.name!r} is missing", "inputs")

    def check_parameters(self, parameters: Sequence[TensorRef]) -> None:
        """Names, dtypes and shapes of given parameters.

        Raises Fault BAD_NAME or BAD_TENSOR.
        """
        seen: set[str] = set()
        for index, tensor in enumerate(parameters):
            field = f"parameters[{index}]"
            if tensor.name in seen:
                raise Fault(Reason.BAD_NAME, f"parameter {tensor.name!r} is given twice", f"{field}.name")
            seen.add(tensor.name)
            spec = self.parameters.get(tensor.name)
            if spec is None:
                raise Fault(
                    Reason.BAD_NAME,
                    f"model {self.signature.name!r} has no parameter {tensor.name!r}; "
                    f"{nearest(tensor.name, self.parameters)}",
                    f"{field}.name",
                )
            check_tensor(spec, tensor, "parameter", field, {})

    def resolve(
        self, patterns: Sequence[str], inputs: Sequence[TensorRef], targets: Sequence[TensorRef], field: str
    ) -> list[Wrt]:
        """What the names and globs of `field` mean, in order, each thing once; see GradientService in the contract.

        Raises Fault BAD_NAME (unknown, ambiguous, not given, or a glob that matches nothing) or NOT_DIFFERENTIABLE.
        """
        dtypes: dict[str, dict[str, int]] = {
            "input": {tensor.name: tensor.dtype for tensor in inputs},
            "param": {name: spec.dtype for name, spec in self.parameters.items()},
            "target": {tensor.name: tensor.dtype for tensor in targets},
        }
        if not patterns:
            everything = [
                self._wrt("input", name) for name, dtype in dtypes["input"].items() if dtype in _DIFFERENTIABLE
            ]
            if not everything:
                raise Fault(
                    Reason.NOT_DIFFERENTIABLE,
                    f"{field} is empty and no input is floating-point or complex: "
                    + ", ".join(f"{name!r} is {dtype_name(dtype)}" for name, dtype in dtypes["input"].items()),
                    field,
                )
            return everything
        found: dict[tuple[str, str], Wrt] = {}
        seen: set[str] = set()
        globs = 0
        for index, pattern in enumerate(patterns):
            # Overlapping globs are handy; one pattern written twice is a slip.
            if pattern in seen:
                raise Fault(Reason.BAD_NAME, f"{field} names {pattern!r} twice", f"{field}[{index}]")
            seen.add(pattern)
            if any(mark in pattern for mark in "*?["):
                globs += 1
                _check_glob(pattern, globs, f"{field}[{index}]")
            for wrt in self._match(pattern, dtypes, f"{field}[{index}]"):
                found[wrt.place, wrt.name] = wrt
        return list(found.values())

    def _match(self, pattern: str, dtypes: Mapping[str, Mapping[str, int]], field: str) -> list[Wrt]:
        place, _, bare = pattern.rpartition(":")
        if place not in _PREFIXES:
            place, bare = "", pattern
        places = [place] if place else ["input", "param"]
        exact = [where for where in places if bare in dtypes[where]]
        if len(exact) > 1:
            raise Fault(
                Reason.BAD_NAME,
                f"{bare!r} is both an input and a parameter; say 'input:{bare}' or 'param:{bare}'",
                field,
            )
        if exact:
            dtype = dtypes[exact[0]][bare]
            if dtype not in _DIFFERENTIABLE:
                raise Fault(
                    Reason.NOT_DIFFERENTIABLE,
                    f"{bare!r} is {dtype_name(dtype)}; only floating-point and complex tensors have derivatives",
                    field,
                )
            return [self._wrt(exact[0], bare)]
        if any(mark in bare for mark in "*?["):
            matched = [
                self._wrt(where, name)
                for where in places
                for name, dtype in dtypes[where].items()
                if dtype in _DIFFERENTIABLE and fnmatchcase(name, bare)
            ]
            if matched:
                return matched
        if bare in self.inputs and place in ("", "input"):
            raise Fault(Reason.BAD_NAME, f"input {bare!r} is not given, so nothing can be differentiated by it", field)
        if not place and bare in dtypes["target"]:
            raise Fault(
                Reason.BAD_NAME, f"{bare!r} is an argument of the loss; {field} must say 'target:{bare}'", field
            )
        known = [name for where in places for name in dtypes[where]]
        raise Fault(Reason.BAD_NAME, f"nothing to differentiate is called {pattern!r}; {nearest(bare, known)}", field)

    def _wrt(self, place: str, name: str) -> Wrt:
        ambiguous = name in self.inputs and name in self.parameters
        label = f"{place}:{name}" if ambiguous or place == "target" else name
        return Wrt(place, name, label)  # type: ignore[arg-type]


def _check_glob(pattern: str, count: int, field: str) -> None:
    """Raises Fault (BAD_NAME) where it would take long to hold a request's patterns against all names."""
    if count > _MOST_GLOBS:
        raise Fault(Reason.BAD_NAME, f"there are more than {_MOST_GLOBS} patterns; name what you mean", field)
    if len(pattern) > _LONGEST_GLOB:
        raise Fault(
            Reason.BAD_NAME, f"a pattern has {len(pattern)} characters, at most {_LONGEST_GLOB} are allowed", field
        )
