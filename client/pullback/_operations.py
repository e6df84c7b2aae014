"""The tensor operations of `pullback_wire.operations`, from Python's arguments to calls."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pullback import errors
from pullback._arrays import tensor_dtype
from pullback_wire.operations import OPERATIONS, Operation

if TYPE_CHECKING:
    from pullback._tensor import Tensor

#: Options that take several ints, also given one by one: x.reshape(2, 3).
_SPREAD = frozenset({"shape", "dims"})


def is_number(value: Any) -> bool:
    """Whether it is a number by itself, with no dtype that matters: Python's, or a numpy scalar, as torch sees it."""
    return isinstance(value, bool | int | float | complex | np.number | np.bool_) and np.ndim(value) == 0


def encoded(value: Any) -> Any:
    """An option as the contract's JSON has it. Raises TypeError for what has no form there."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [encoded(value.real), encoded(value.imag)]}
    if isinstance(value, tuple | list):
        return [encoded(one) for one in value]
    if hasattr(value, "__index__"):
        return value.__index__()
    raise TypeError(f"{value!r} is no option of a tensor operation")


def operate(name: str, tensors: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """Runs an operation. tensors: its tensor arguments by name, in order; options: the others, None meaning default.

    Raises BadOperand, ..., TypeError, ValueError; OperationNotFound.
    """
    from pullback._apply import Arguments, choose_session, run, run_in_place
    from pullback._tensor import Tensor

    operation = OPERATIONS[name]
    plain = {
        key: list(value) if isinstance(value, _Ready) else encoded(value)
        for key, value in options.items()
        if value is not None
    }
    given: dict[str, Any] = {}
    for key, value in tensors.items():
        if value is None:
            continue
        if key in operation.scalars and is_number(value):
            plain[key] = encoded(value)
        else:
            given[key] = value
    held = [value for value in given.values() if isinstance(value, Tensor)]
    if operation.in_place:
        target = given.pop("input")
        return run_in_place(target, name, given, plain)
    session = choose_session(held)
    arguments = Arguments(session)
    like = held[0] if held else None
    inputs = {}
    for key, value in given.items():
        bare = like is not None and not isinstance(value, Tensor) and is_number(value)
        inputs[key] = arguments.operand(value, f"{name}: {key}", like.dtype if bare and like is not None else None)
    ((_, made),) = run(session, arguments, name, inputs, options=plain)
    return made


def index(tensor: Tensor, key: Any) -> Tensor:
    """tensor[key]. Raises TypeError for a key that is none."""
    from pullback._tensor import Tensor

    items: list[Any] = []
    tensors: dict[str, Any] = {"input": tensor}
    for item in key if isinstance(key, tuple) else (key,):
        if item is None:
            items.append(None)
        elif item is Ellipsis:
            items.append("...")
        elif isinstance(item, slice):
            items.append({"slice": [None if end is None else _int(end) for end in (item.start, item.stop, item.step)]})
        elif isinstance(item, Tensor | list | tuple) or (hasattr(item, "__array__") and np.ndim(item) > 0):
            name = f"index_{len(tensors)}"
            # A list of ints, or of bools, is an array here.
            tensors[name] = item if isinstance(item, Tensor) else np.asarray(item)
            items.append({"tensor": name})
        elif isinstance(item, bool | np.bool_):
            raise TypeError("a tensor cannot be indexed by a single bool")
        else:
            items.append(_int(item))
    return operate("index", tensors, {"items": _Ready(items)})


def assign(view: Tensor, value: Any) -> None:
    """Writes `value` to a view, as torch's x[i] = value does: leading axes of extent 1 that are too many are dropped.

    Raises what copy_ raises.
    """
    from pullback._tensor import Tensor

    while isinstance(value, list | tuple) and len(value) == 1:
        (value,) = value
    shape: tuple[int, ...] = tuple(getattr(value, "shape", ()))
    overlaps = isinstance(value, Tensor) and view.may_share(value)
    if overlaps and shape == view.shape:
        view.copy_(value)
        return
    leading = next((axis for axis, extent in enumerate(shape) if extent != 1), len(shape))
    if leading:
        value = (value if hasattr(value, "reshape") else np.asarray(value)).reshape(shape[leading:])
    if overlaps:
        # torch refuses most of what overlaps, but writes one number, and what it has to expand.
        value = value.expand(view.shape) if shape else value.clone()
    view.copy_(value)


class _Ready(list[Any]):
    """Items that are encoded already."""


def _int(value: Any) -> int:
    try:
        found: int = value.__index__()
    except AttributeError:
        raise TypeError(f"a tensor cannot be indexed by {value!r}") from None
    return found


# ---- functions and methods made of the table


def _parameters(operation: Operation) -> list[tuple[str, bool]]:
    """Arguments in order, and whether they must be given."""
    optional = operation.tensors[1:] if operation.name == "clamp" else ()
    tensors = [(name, name not in optional) for name in operation.tensors]
    return tensors + [(name, name in operation.required) for name in operation.options]


def function(operation: Operation) -> Callable[..., Any]:
    """A function for an operation, whose first argument is its first tensor."""
    parameters = _parameters(operation)
    names = [name for name, _ in parameters]
    required = [name for name, must in parameters if must]
    spread = operation.options[0] if operation.options and operation.options[0] in _SPREAD else ""

    def call(*args: Any, **kwargs: Any) -> Any:
        count = len(operation.tensors)
        if spread and len(args) > count and not isinstance(args[count], tuple | list):
            args = (*args[:count], args[count:])
        if len(args) > len(names):
            raise TypeError(f"{operation.name}() takes {len(names)} arguments, {len(args)} are given")
        given = dict(zip(names, args, strict=False))
        for key, value in kwargs.items():
            key = _SYNONYMS.get(key, key)
            if key not in names or key in given:
                raise TypeError(
                    f"{operation.name}() got {key!r} {'twice' if key in given else 'which it does not take'}"
                )
            given[key] = value
        missing = [name for name in required if name not in given]
        if missing:
            raise TypeError(f"{operation.name}() needs {', '.join(missing)}")
        if given.get("dtype") is not None:
            given["dtype"] = tensor_dtype(given["dtype"]).name
        tensors = {name: given.pop(name) for name in operation.tensors if name in given}
        return operate(operation.name, tensors, given)

    call.__name__ = call.__qualname__ = operation.name
    call.__doc__ = f"torch's {operation.name}, run on the server."
    empty = inspect.Parameter.empty
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind, default=empty if must else None) for name, must in parameters]
    )
    return call


_SYNONYMS = {"axis": "dim", "keepdims": "keepdim", "p": "ord", "size": "shape"}


def joined(name: str, tensors: Sequence[Any], dim: int) -> Tensor:
    """cat and stack. Raises TypeError for what is no sequence of tensors."""
    if not isinstance(tensors, tuple | list):
        raise TypeError(f"{name}() takes a tuple or list of tensors, not a {type(tensors).__name__}")
    if not tensors:
        raise errors.BadOperand(f"{name}() needs at least one tensor")
    return operate(name, {f"tensor_{index}": one for index, one in enumerate(tensors)}, {"dim": dim})


#: Functions by name, for all but those that take any number of tensors.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: function(operation) for name, operation in OPERATIONS.items() if not operation.variadic
}
