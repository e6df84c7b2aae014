"""The tensor operations of a session: the table of `pullback_wire.operations`, carried out by torch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pullback_server import ops
from pullback_server.engine._dtypes import describe, differentiable
from pullback_server.engine.call import out_of_memory, text_of
from pullback_server.engine.operation_options import check_index, index_of, option_value, options_of
from pullback_server.engine.operation_sizes import bytes_of, expanded
from pullback_server.engine.tape_state import Afford, Held, Lineage, Operands, merged
from pullback_server.faults import Fault, nearest
from pullback_wire import Reason
from pullback_wire.operations import OPERATIONS, Operation

Code = Callable[..., torch.Tensor]


def _with_dim(function: Code) -> Code:
    """A reduction that takes `keepdim` only together with a `dim`, which may be None."""

    def call(input: torch.Tensor, **options: Any) -> torch.Tensor:
        if "keepdim" in options:
            options.setdefault("dim", None)
        return function(input, **options)

    return call


def _without_none(function: Code) -> Code:
    """One that knows no `dim` None: it is left out, and `keepdim` is done by hand."""

    def call(input: torch.Tensor, **options: Any) -> torch.Tensor:
        if options.get("dim") is not None:
            return function(input, **options)
        found = function(input)
        return found.reshape([1] * input.ndim) if options.get("keepdim") else found

    return call


def _squeeze(input: torch.Tensor, dim: Any = None) -> torch.Tensor:
    if dim is None:
        return torch.squeeze(input)
    return torch.squeeze(input, tuple(dim) if isinstance(dim, list) else dim)


def _norm(input: torch.Tensor, ord: Any = None, **options: Any) -> torch.Tensor:
    linalg: Any = torch.linalg
    found: torch.Tensor = linalg.norm(input, ord, **options)
    return found


#: Those whose arguments are just torch's.
_SAME = (
    "maximum minimum matmul logical_and logical_or neg abs sign square sqrt rsqrt reciprocal exp expm1 log log1p "
    "sin cos tan asin acos atan sinh cosh tanh sigmoid relu erf conj real imag angle isfinite isnan logical_not "
    "floor ceil round clone zeros_like ones_like logsumexp softmax log_softmax cumsum clamp where permute transpose "
    "flatten unsqueeze"
)

_CODE: dict[str, Code] = {
    **{
        name: getattr(operator, {"div": "truediv"}.get(name, name))
        for name in ("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge", "pow")
    },
    **{name: getattr(torch, name) for name in _SAME.split()},
    **{name: _with_dim(getattr(torch, name)) for name in ("sum", "mean", "std", "var", "argmax", "argmin")},
    **{name: _without_none(getattr(torch, name)) for name in ("amax", "amin", "all", "any")},
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,
    "detach": torch.Tensor.detach,
    "norm": _norm,
    "reshape": torch.reshape,
    "expand": lambda input, shape: input.expand(shape),
    "squeeze": _squeeze,
    "index": lambda input, items: input[items],
    "cat": torch.cat,
    "stack": torch.stack,
    "to": torch.Tensor.to,
    "requires_grad_": torch.Tensor.requires_grad_,
    "zero_": torch.Tensor.zero_,
    "copy_": torch.Tensor.copy_,
    **{name: getattr(torch.Tensor, name) for name in ("add_", "sub_", "mul_", "div_")},
}


@dataclass
class Applied:
    """What an operation came to. changed: what it changed in place, instead of making a tensor."""

    tensor: torch.Tensor
    lineage: Lineage
    changed: Held | None = None


def apply(callee: ops.Operation, call: ops.Call, operands: Operands, afford: Afford) -> Applied:
    """Applies one operation.

    Raises Fault, Dependency, and what torch raises when memory runs out.
    """
    operation = OPERATIONS.get(callee.name)
    if operation is None or callee.name not in _CODE:
        raise Fault(
            Reason.OPERATION_NOT_FOUND,
            f"there is no tensor operation {callee.name!r}; {nearest(callee.name, OPERATIONS)}",
            "operation",
        )
    if call.targets or call.parameters:
        raise Fault(Reason.BAD_NAME, "a tensor operation takes its tensors as inputs", "targets")
    options = options_of(operation, callee.options)
    helds, arguments, options = _arguments(operation, call.inputs, options, operands)
    tensors = [held.tensor for held in helds]
    if operation.name == "expand":
        afford.at_all(expanded(tensors[0], options["shape"]))
    afford(bytes_of(operation.name, arguments, options))
    torch._C._set_grad_enabled(not call.no_grad)
    try:
        found = _CODE[operation.name](*arguments, **options)
    except (RuntimeError, TypeError, ValueError, IndexError, OverflowError, NotImplementedError) as error:
        if out_of_memory(error):
            raise
        raise _refusal(operation, tensors, callee.options, error) from error
    finally:
        torch._C._set_grad_enabled(True)
    lineage = merged(held.lineage for held in helds)
    return Applied(found, lineage, helds[0] if operation.in_place else None)


def _arguments(
    operation: Operation, inputs: Sequence[ops.Operand], options: dict[str, Any], operands: Operands
) -> tuple[list[Held], list[Any], dict[str, Any]]:
    """The tensors, the positional arguments and the others. Raises Fault."""
    if operation.variadic:
        return _variadic(operation, inputs, options, operands)
    if inputs and not any(operand.name for operand in inputs):
        inputs_by_name = dict(zip(operation.tensors, inputs, strict=False))
        if len(inputs) > len(operation.tensors):
            raise _count(operation, len(inputs))
    else:
        inputs_by_name = {operand.name: operand for operand in inputs}
        if len(inputs_by_name) != len(inputs):
            raise Fault(Reason.BAD_OPERAND, f"{operation.name}: an operand is given twice", "inputs")
    for name in inputs_by_name:
        if name not in operation.tensors:
            raise Fault(
                Reason.BAD_OPERAND,
                f"{operation.name} takes no tensor {name!r}; it takes {', '.join(operation.tensors)}",
                f"inputs[{name}]",
            )
    helds: list[Held] = []
    arguments: list[Any] = []
    for name in operation.tensors:
        operand = inputs_by_name.get(name)
        if operand is not None:
            if name in options:
                raise Fault(
                    Reason.BAD_OPERAND, f"{operation.name}: {name!r} is given twice, as a tensor and as a number"
                )
            helds.append(operands.take(operand, f"inputs[{name}]"))
            arguments.append(helds[-1].tensor)
        elif name in options:
            arguments.append(options.pop(name))
        elif operation.name == "clamp":
            arguments.append(None)
        else:
            raise Fault(
                Reason.BAD_OPERAND,
                f"{operation.name} needs {name!r}; it takes {', '.join(operation.tensors)}",
                f"inputs[{name}]",
            )
    if not helds:
        raise Fault(Reason.BAD_OPERAND, f"{operation.name} needs a tensor, there are numbers only", "inputs")
    if operation.in_place and not helds[0].handle:
        raise Fault(Reason.BAD_OPERAND, f"{operation.name} changes a tensor that the session holds", "inputs")
    return helds, arguments, options


def _count(operation: Operation, count: int) -> Fault:
    return Fault(
        Reason.BAD_OPERAND,
        f"{operation.name} takes {len(operation.tensors)} tensors ({', '.join(operation.tensors)}), {count} are given",
        "inputs",
    )


def _variadic(
    operation: Operation, inputs: Sequence[ops.Operand], options: dict[str, Any], operands: Operands
) -> tuple[list[Held], list[Any], dict[str, Any]]:
    if not inputs:
        raise Fault(Reason.BAD_OPERAND, f"{operation.name} needs a tensor", "inputs")
    helds = [operands.take(operand, f"inputs[{operand.name or k}]") for k, operand in enumerate(inputs)]
    if operation.name != "index":
        return helds, [[held.tensor for held in helds]], options
    others: Mapping[str, torch.Tensor] = {
        operand.name: held.tensor for operand, held in zip(inputs[1:], helds[1:], strict=True)
    }
    if len(others) != len(helds) - 1:
        raise Fault(Reason.BAD_OPERAND, "index: an operand is given twice", "inputs")
    items = index_of(options["items"], others)
    check_index(helds[0].tensor, items)
    return helds, [helds[0].tensor, items], {}


def _shown(tensors: Sequence[torch.Tensor]) -> str:
    return " and ".join(describe(tensor) for tensor in tensors[:8])


def _refusal(
    operation: Operation, tensors: Sequence[torch.Tensor], given: Mapping[str, Any], error: Exception
) -> Fault:
    text = text_of(error).partition("\n")[0]
    if operation.name == "requires_grad_" and not differentiable(tensors[0].dtype):
        return Fault(Reason.NOT_DIFFERENTIABLE, f"requires_grad_ of {_shown(tensors)}: {text}", "inputs")
    shown = {name: value for name, value in given.items() if name in operation.options}
    # Where the one tensor is as it is, what does not go with it is the option.
    if shown and (len(tensors) == 1 or isinstance(error, (TypeError, IndexError))):
        return Fault(
            Reason.BAD_OPTION,
            f"torch's {operation.name} of {_shown(tensors)} refuses {str(shown)[:200]}: {text}",
            f"options[{next(iter(shown))}]",
        )
    if "leaf Variable that requires grad" in text:
        text += " (outside torch.no_grad(), that is; under no_grad it can be changed)"
    numbers = {name: option_value(name, value) for name, value in given.items() if name in operation.scalars}
    also = f" and {numbers}" if numbers else ""
    return Fault(Reason.BAD_OPERAND, f"torch's {operation.name} refuses {_shown(tensors)}{also}: {text}", "inputs")
