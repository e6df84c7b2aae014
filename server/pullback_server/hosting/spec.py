"""`@model`: what an operator says of a model. Free of torch, so that the front can import it."""

from __future__ import annotations

import contextvars
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from pullback_server.hosting.gate import Gate
from pullback_server.hosting.options import Options
from pullback_server.job import version_id
from pullback_wire.dtypes import dtype_number

#: Name of a model: what fits a metric label, a URL path and a directory.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ATTRIBUTE = "__pullback_registrations__"

F = TypeVar("F", bound=Callable[..., Any])


def is_name(text: str) -> bool:
    """Whether a model can be called so."""
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True)
class TensorSpec:
    """What one input looks like.

    dtype: torch's name of it ("float32"); None: any.
    shape: extents; a str is a free extent with a name, and equal names mean equal extents in one call; None: any.
    low, high: inclusive bounds of the elements, checked before the model runs.
    """

    dtype: str | None = None
    shape: tuple[int | str, ...] | None = None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            dtype_number(self.dtype)
        for extent in self.shape or ():
            if isinstance(extent, str):
                if not extent:
                    raise ValueError("a free extent in a shape has a name, which cannot be empty")
            elif isinstance(extent, bool) or not isinstance(extent, int) or extent < 0:
                raise ValueError(f"a shape holds extents (0 or more) and names of free extents, not {extent!r}")


def spec(
    dtype: str | None = None,
    shape: Sequence[int | str] | None = None,
    *,
    low: float | None = None,
    high: float | None = None,
) -> TensorSpec:
    """A `TensorSpec`: `spec("float32", ["batch", 784])`, `spec("int64", ["batch", "seq"], low=0, high=999)`.

    Raises ValueError for a dtype or an extent that cannot be.
    """
    return TensorSpec(dtype, None if shape is None else tuple(shape), low, high)


@dataclass(frozen=True)
class Abilities:
    """What a model cannot do because of what it was made from: the reason in words; empty: it can.

    train: be put into train mode.
    parameters: be given other parameters for one call, or have its parameters differentiated by while given.
    forward_mode: forward-mode derivatives; JVPs are then computed by two backwards.
    notes: what its users should know, each a sentence.
    """

    train: str = ""
    parameters: str = ""
    forward_mode: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Registration:
    """A model as its operator registered it.

    target: a factory without required parameters that returns an nn.Module, or a plain function of tensors.
    kind: which of the two `target` is; "auto" decides by whether it has required parameters.
    inputs: specs by input name; what is not named here takes any dtype and shape.
    outputs: names for the outputs of a tuple-returning model, in order.
    batch_axis: the axis along which rows are independent of each other; None: not declared.
    options: how it is run.
    gate: what must be shown before it is served.
    source: what it is made from: "python", "pt2" or "torchscript".
    abilities: what it cannot do.
    revision, digest: see `Signature`.
    """

    name: str
    target: Callable[..., Any]
    kind: Literal["auto", "factory", "function"] = "auto"
    version: str = "1"
    description: str = ""
    inputs: Mapping[str, TensorSpec] = field(default_factory=dict)
    outputs: tuple[str, ...] | None = None
    batch_axis: int | None = None
    options: Options = field(default_factory=Options)
    gate: Gate = field(default_factory=Gate)
    source: str = "python"
    abilities: Abilities = field(default_factory=Abilities)
    revision: int = 0
    digest: str = ""

    @property
    def id(self) -> str:
        """See `Signature.id`."""
        return version_id(self.version, self.revision)

    def __post_init__(self) -> None:
        if self.batch_axis is None and self.options.micro_batch is not None:
            raise ValueError(f"model {self.name!r}: micro_batch needs a batch_axis")
        if self.batch_axis is not None and self.batch_axis < 0:
            raise ValueError(f"model {self.name!r}: batch_axis is {self.batch_axis}, expected 0 or more")
        if not is_name(self.name):
            raise ValueError(
                f"model name {self.name!r}: expected letters, digits, '.', '_' and '-', at most 128, "
                "beginning with a letter or digit"
            )
        if not self.version.isdecimal() or not self.version.isascii():
            raise ValueError(f"model {self.name!r}: version {self.version!r} is not a number")
        if not callable(self.target):
            raise TypeError(f"model {self.name!r}: expected a factory or a function, got {type(self.target).__name__}")


#: Registrations made while a model file is imported, so that none is lost to a name that is bound again.
collecting: contextvars.ContextVar[list[Registration] | None] = contextvars.ContextVar("collecting", default=None)


def model(
    name: str,
    *,
    inputs: Mapping[str, TensorSpec] | None = None,
    outputs: Sequence[str] | None = None,
    batch_axis: int | None = None,
    version: str = "1",
    description: str | None = None,
    kind: Literal["auto", "factory", "function"] = "auto",
    gate: Gate | bool | None = None,
    intended: Mapping[str, str] | None = None,
    **options: Any,
) -> Callable[[F], F]:
    """Registers a factory that returns an nn.Module, or a plain function of tensors, as a model.

    The decorated object is returned as it was. `description` defaults to its docstring's first line. See
    `Registration` for the arguments, and `Options` for the others: batching, compile, autocast, checkpoint,
    micro_batch, hard_timeout, devices, replicas, gradient_health. `gate`: a `Gate`, or whether there is one;
    `intended`: see there.

    Raises ValueError or TypeError for arguments that cannot be.
    """
    if not isinstance(name, str):
        # Without parentheses, nothing would be registered, and nobody told.
        raise TypeError('@model needs the model\'s name: @model("name")')

    try:
        chosen = Options(**options)
        through = gate if isinstance(gate, Gate) else Gate(enabled=gate)
        if intended is not None:
            through = replace(through, intended=intended)
    except ValueError as error:
        raise ValueError(f"model {name!r}: {error}") from None

    def register(target: F) -> F:
        text = description if description is not None else first_line(target)
        registration = Registration(
            name=name,
            target=target,
            kind=kind,
            version=str(version),
            description=text.partition("\n")[0],
            inputs=dict(inputs or {}),
            outputs=None if outputs is None else tuple(outputs),
            batch_axis=batch_axis,
            options=chosen,
            gate=through,
        )
        try:
            setattr(target, _ATTRIBUTE, (*registrations_of(target), registration))
        except AttributeError:
            raise TypeError(
                f"model {name!r}: a {type(target).__name__} cannot be decorated; wrap it in a def"
            ) from None
        collected = collecting.get()
        if collected is not None:
            collected.append(registration)
        return target

    return register


def first_line(target: object) -> str:
    """Of an object's docstring; none: empty."""
    return (getattr(target, "__doc__", None) or "").strip().partition("\n")[0]


def registrations_of(target: object) -> tuple[Registration, ...]:
    """What `@model` has said of an object (nothing: empty), not counting what a class inherited."""
    own = vars(target) if hasattr(target, "__dict__") else {}
    found: tuple[Registration, ...] = own.get(_ATTRIBUTE, ())
    return found
