"""From named tensors to the arguments of a model's code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pullback_server.engine._names import unknown_name
from pullback_server.faults import Fault
from pullback_server.hosting import Registration
from pullback_server.hosting.loading import LoadError
from pullback_wire import Reason

_PLAIN = (bool, int, float, str, bytes)
_WORD = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
_PLAIN_WORDS = frozenset({"bool", "int", "float", "str", "bytes", "None", "Optional", "Union", "typing", "class"})


def _is_plain(parameter: inspect.Parameter) -> bool:
    """Whether an argument is surely no tensor, by its annotation or its default."""
    annotation = parameter.annotation
    if annotation is not inspect.Parameter.empty:
        text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", None)
        if not isinstance(annotation, (str, type)) or text is None:
            text = str(annotation)
        words = set(_WORD.findall(text))
        if words and words <= _PLAIN_WORDS and words != {"None"}:
            return True
        if "Tensor" in words:
            return False
    return isinstance(parameter.default, _PLAIN)


@dataclass(frozen=True)
class Binding:
    """The inputs of a model, and how its code takes them.

    names: every input, in the order of the code.
    optional: those that may be left out.
    positional: those that go by position, in order; as torch's hooks expect, all that can.
    only_positional: how many of `positional` cannot go by keyword.
    spread: those that fill `*args`, after all of `positional`.
    """

    owner: str
    names: tuple[str, ...]
    optional: frozenset[str]
    positional: tuple[str, ...]
    only_positional: int
    spread: tuple[str, ...]

    def check(self, given: Mapping[str, Any]) -> None:
        """Raises Fault when an input is unknown or missing."""
        if len(given) == len(self.names) and all(map(given.__contains__, self.names)):
            return
        for name in given:
            if name not in self.names:
                raise unknown_name("input", name, self.names, f"inputs[{name}]", self.owner)
        missing = [name for name in self.names if name not in given and name not in self.optional]
        if missing:
            raise Fault(
                Reason.BAD_NAME,
                f"{self.owner} needs the input {missing[0]!r}, which the request does not have; it has "
                f"{', '.join(map(repr, given)) or 'none'}",
                f"inputs[{missing[0]}]",
            )

    def arrange(self, given: Mapping[str, torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Positional and keyword arguments. Raises Fault where a gap cannot be expressed."""
        arguments: list[torch.Tensor] = []
        for name in self.positional:
            if name not in given:
                break
            arguments.append(given[name])
        count = len(arguments)
        if count == len(given):
            return arguments, {}
        rest = {name: tensor for name, tensor in given.items() if name not in self.positional[:count]}
        later = [name for name in self.positional[: self.only_positional] + self.spread if name in rest]
        if later:
            if count < len(self.positional) and (count < self.only_positional or later[0] in self.spread):
                raise Fault(
                    Reason.BAD_NAME,
                    f"{self.owner} takes {later[0]!r} by position, so {self.positional[count]!r} must be given as well",
                    f"inputs[{self.positional[count]}]",
                )
            arguments += [rest.pop(name) for name in self.spread]
        return arguments, rest


def bind(registration: Registration, code: Callable[..., Any]) -> Binding:
    """How to call `code` with named tensors. Raises LoadError where that cannot be known."""
    owner = f"model {registration.name!r}"
    try:
        parameters = list(inspect.signature(code).parameters.values())
    except (TypeError, ValueError) as error:
        raise LoadError(f"{owner}: the arguments of its code cannot be told: {error}") from error
    names: list[str] = []
    optional: set[str] = set()
    positional: list[str] = []
    only_positional = 0
    takes_args = takes_kwargs = False
    leading = True
    for parameter in parameters:
        name, kind = parameter.name, parameter.kind
        if kind is parameter.VAR_POSITIONAL:
            takes_args = True
        elif kind is parameter.VAR_KEYWORD:
            takes_kwargs = True
        elif _is_plain(parameter) and name not in registration.inputs:
            if parameter.default is parameter.empty:
                raise LoadError(
                    f"{owner}: its argument {name!r} is annotated {parameter.annotation!r} and has no default; every "
                    "required argument must be a tensor"
                )
            # What comes after an argument that is never given can only go by keyword.
            leading = False
        else:
            if leading and kind is not parameter.KEYWORD_ONLY:
                positional.append(name)
                only_positional += kind is parameter.POSITIONAL_ONLY
            elif kind is parameter.POSITIONAL_ONLY:
                raise LoadError(f"{owner}: its positional-only argument {name!r} follows one that is no tensor")
            names.append(name)
            if parameter.default is not parameter.empty:
                optional.add(name)
    extra = [name for name in registration.inputs if name not in names]
    if extra and not takes_args and not takes_kwargs:
        raise LoadError(
            f"{owner}: an input {extra[0]!r} is declared, but its code takes {', '.join(map(repr, names)) or 'nothing'}"
        )
    if takes_args and not extra and not names:
        raise LoadError(f"{owner}: its code takes *args, so its inputs must be declared: inputs={{'x': spec(), ...}}")
    spread = tuple(extra) if takes_args and not takes_kwargs else ()
    if takes_args and takes_kwargs and not names:
        # A wrapper that passes on whatever it gets: by position, as a direct call would.
        spread = tuple(extra)
    if not names and not extra:
        raise LoadError(f"{owner}: its code takes no tensors")
    return Binding(owner, (*names, *extra), frozenset(optional), tuple(positional), only_positional, spread)
