"""The tensor operations that a session offers on handles, beside models and losses: one table for both sides.

They are the glue that torch code needs around a model call. Names, arguments and semantics are torch's
(torch.add, torch.sum, ...; `index` is x[...], `to` is x.to(dtype)).

How arguments travel in a CallOp: tensors as operands by name; everything else in `options_json`, an object by argument
name. An argument in `scalars` may be given either way. In JSON

- a finite real number, bool, null, string or list stands for itself;
- {"float": "nan"}, {"float": "inf"}, {"float": "-inf"}: floats that JSON does not have;
- {"complex": [re, im]}: a complex number;
- a dtype is its name ("float64");
- `index` has the option "items", a list with, for each position: an int, null (a new axis), "..." (an ellipsis),
  {"slice": [start, stop, step]} with nulls, or {"tensor": name} for an operand that holds indices or a mask.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """One operation.

    tensors: names of its tensor arguments, in torch's order. Required unless in `scalars` and given as an option.
    scalars: those of `tensors` that may be a number instead (at least one argument must be a tensor).
    options: names of its other arguments; those with no default of torch's are in `required`.
    variadic: takes any number of operands, in order, whatever they are called (cat, stack; for index those after the
        first are index tensors by name).
    in_place: changes its first tensor, whose handle goes on to stand for it, and makes no handle.
    """

    name: str
    tensors: tuple[str, ...]
    scalars: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    variadic: bool = False
    in_place: bool = False


_BINARY = ("input", "other")
_NO_OPTIONS = (
    "neg abs sign square sqrt rsqrt reciprocal exp expm1 log log1p sin cos tan asin acos atan sinh cosh tanh sigmoid "
    "relu softplus silu erf conj real imag angle isfinite isnan logical_not floor ceil round clone detach zeros_like "
    "ones_like"
)

_ALL = [
    *(Operation(name, _BINARY, _BINARY) for name in ("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge")),
    Operation("pow", ("input", "exponent"), ("input", "exponent")),
    *(Operation(name, _BINARY) for name in ("maximum", "minimum", "matmul", "logical_and", "logical_or")),
    *(Operation(name, ("input",)) for name in _NO_OPTIONS.split()),
    Operation("gelu", ("input",), options=("approximate",)),
    *(Operation(n, ("input",), options=("dim", "keepdim")) for n in ("sum", "mean", "amax", "amin", "all", "any")),
    *(Operation(name, ("input",), options=("dim", "correction", "keepdim")) for name in ("std", "var")),
    Operation("norm", ("input",), options=("ord", "dim", "keepdim")),
    Operation("logsumexp", ("input",), options=("dim", "keepdim"), required=("dim",)),
    *(Operation(n, ("input",), options=("dim",), required=("dim",)) for n in ("softmax", "log_softmax", "cumsum")),
    *(Operation(name, ("input",), options=("dim", "keepdim")) for name in ("argmax", "argmin")),
    Operation("clamp", ("input", "min", "max"), ("min", "max")),
    Operation("where", ("condition", "input", "other"), ("input", "other")),
    Operation("reshape", ("input",), options=("shape",), required=("shape",)),
    Operation("expand", ("input",), options=("shape",), required=("shape",)),
    Operation("permute", ("input",), options=("dims",), required=("dims",)),
    Operation("transpose", ("input",), options=("dim0", "dim1"), required=("dim0", "dim1")),
    Operation("flatten", ("input",), options=("start_dim", "end_dim")),
    Operation("squeeze", ("input",), options=("dim",)),
    Operation("unsqueeze", ("input",), options=("dim",), required=("dim",)),
    Operation("index", ("input",), options=("items",), required=("items",), variadic=True),
    Operation("cat", (), options=("dim",), variadic=True),
    Operation("stack", (), options=("dim",), variadic=True),
    Operation("to", ("input",), options=("dtype",), required=("dtype",)),
    Operation("requires_grad_", ("input",), options=("requires_grad",), in_place=True),
    Operation("zero_", ("input",), in_place=True),
    Operation("copy_", _BINARY, in_place=True),
    *(Operation(name, _BINARY, ("other",), in_place=True) for name in ("add_", "sub_", "mul_", "div_")),
]

#: Every operation by name.
OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _ALL}
