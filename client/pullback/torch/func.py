"""torch.func's transforms of a hosted model, each as stateless calls: torch tensors in, torch tensors out.

    from pullback.torch import func

    value_and_gradient = func.grad_and_value(model)   # a RemoteModel, or a RemoteModule
    gradient, value = value_and_gradient(x)
    output, pull = func.vjp(model, x)

Signatures and results are those of torch.func, but for `hvp`, which is as torch.autograd.functional's; has_aux,
chunk_size and the like are not there. Inputs are tensors, arrays or numbers, in the order of the model's code. Several
outputs are a dict by name. What the outputs do not depend on has zeros, as in torch.func.

A RemoteModule gives its mirrored parameters along and is run in its mode; a RemoteModel is in eval mode.

Results have no graph: nothing can be differentiated through them. So in grad mode a tensor that requires grad, be it a
parameter of the module, is refused, where torch.func would return results with a graph. Use torch.no_grad() or
detach(), or a RemoteModule and torch.autograd.grad, whose gradients can be differentiated to any order. The transforms
do not nest: `hessian` and `hvp` are calls of their own.

Every function raises RuntimeError for a tensor that requires grad in grad mode, and inside torch.func's own transforms;
NotImplementedError for dual tensors; TypeError for what is no hosted model or no input; PullbackError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch

from pullback._arrays import is_differentiable
from pullback._model import RemoteModel
from pullback._remote_call import _named
from pullback.torch._convert import to_torch
from pullback.torch._module import RemoteModule, _as_input, _check_plain

__all__ = ["grad", "grad_and_value", "hessian", "hvp", "jacrev", "jvp", "vjp"]

Hosted: TypeAlias = RemoteModel | RemoteModule
Tensors: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]
Argnums: TypeAlias = int | tuple[int, ...]

_GRAPHLESS = (
    "{} requires grad, and results of pullback.torch.func have no graph, so that a derivative of them would be missing "
    "without a word: pass .detach(), or call inside torch.no_grad(); or call a RemoteModule, and torch.autograd.grad "
    "with create_graph=True"
)


class _Call:
    """One set of arguments: by name, with what the model is asked for beside."""

    def __init__(
        self, function: Hosted, args: tuple[Any, ...], kwargs: Mapping[str, Any], seeded: bool = False
    ) -> None:
        if isinstance(function, RemoteModule):
            self.model: RemoteModel = function._pullback_remote.model
            parameters = dict(function.named_parameters(remove_duplicate=False))
            train = function.training
        elif isinstance(function, RemoteModel):
            self.model, parameters, train = function, {}, False
        else:
            raise TypeError(f"function is a {type(function).__name__}, expected a RemoteModel or a RemoteModule")
        caller = self.model._caller
        self.inputs = {name: _as_input(one, name) for name, one in _named(caller, args, kwargs).items()}
        #: Names by position.
        self.positions = [spec.name for spec in caller.signature().inputs][: len(args)] if args else []
        every = {**parameters, **self.inputs}
        tensors = {name: one for name, one in every.items() if isinstance(one, torch.Tensor)}
        _check_plain([*tensors.values()])
        if torch.is_grad_enabled():
            for name, one in tensors.items():
                if one.requires_grad:
                    raise RuntimeError(_GRAPHLESS.format(repr(name)))
        # By torch's generator, so that torch.manual_seed makes runs repeatable.
        seed = int(torch.randint(1 << 62, (), device="cpu")) if train or seeded else None
        self.options: dict[str, Any] = {"parameters": parameters, "train": train, "seed": seed}
        given = [one for one in self.inputs.values() if isinstance(one, torch.Tensor)]
        self.device = given[0].device if given else torch.device("cpu")

    def wrt(self, argnums: Argnums) -> list[str]:
        """The inputs at these positions."""
        numbers = argnums if isinstance(argnums, tuple) else (argnums,)
        if not numbers or not all(isinstance(number, int) for number in numbers):
            raise TypeError(f"argnums is {argnums!r}, expected an int or a tuple of them")
        if any(not -len(self.positions) <= number < len(self.positions) for number in numbers):
            raise ValueError(f"argnums is {argnums}, and {len(self.positions)} arguments are given by position")
        return [f"input:{self.positions[number]}" for number in numbers]

    def tensor(self, array: Any) -> Any:
        """A result; dicts of them too."""
        if isinstance(array, Mapping):
            return {name: self.tensor(one) for name, one in array.items()}
        return to_torch(array, self.device)

    def gradient(self, array: Any, wrt: str) -> torch.Tensor:
        """A derivative by one input; None: zeros of its shape."""
        if array is not None:
            return to_torch(array, self.device)
        like = self.inputs[wrt.removeprefix("input:")]
        return torch.zeros_like(like) if isinstance(like, torch.Tensor) else torch.from_numpy(np.zeros_like(like))


def _moving(function: Hosted, primals: Any, tangents: Any) -> _Call:
    """The tangents by name. Raises TypeError where there is not one for each primal."""
    if not isinstance(primals, tuple | list) or not isinstance(tangents, tuple | list):
        raise TypeError("primals and tangents are tuples, also where there is one of each")
    if len(primals) != len(tangents):
        raise TypeError(f"{len(tangents)} tangents are given for {len(primals)} primals; None is one that stands still")
    return _Call(function, tuple(tangents), {})


def _as_given(found: list[Any], one: bool) -> Any:
    return found[0] if one else tuple(found)


def vjp(function: Hosted, *primals: Any) -> tuple[Any, Callable[[Any], tuple[torch.Tensor, ...]]]:
    """The outputs, and a function from cotangents (in the structure of the outputs) to a tuple of Jᴴv.

    Each call of that function is a call of the model, with the same random numbers.
    """
    call = _Call(function, primals, {}, seeded=True)
    wrt = call.wrt(tuple(range(len(primals))))
    # As they are now, whatever is written into them before the cotangents come.
    call.inputs = {
        name: one.clone() if isinstance(one, torch.Tensor) else one.copy() for name, one in call.inputs.items()
    }
    call.options["parameters"] = {name: one.detach().clone() for name, one in call.options["parameters"].items()}
    outputs = call.model.evaluate(call.inputs, **call.options)

    def pull(cotangents: Any) -> tuple[torch.Tensor, ...]:
        every = [*cotangents.values()] if isinstance(cotangents, Mapping) else cotangents
        given = [
            one for one in (every if isinstance(every, tuple | list) else [every]) if isinstance(one, torch.Tensor)
        ]
        _check_plain(given)
        if torch.is_grad_enabled() and any(one.requires_grad for one in given):
            raise RuntimeError(_GRAPHLESS.format("a cotangent"))
        options = {**call.options, "allow_unused": True, "return_outputs": False}
        result = call.model.vjp(call.inputs, cotangents, wrt=wrt, **options)
        found = [call.gradient(one, name) for one, name in zip(result.gradients.values(), wrt, strict=True)]
        return tuple(found)

    return call.tensor(outputs), pull


def jvp(function: Hosted, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """The outputs and J t. A tangent that is None stands still."""
    moving = _moving(function, primals, tangents)
    call = _Call(function, tuple(primals), {})
    result = call.model.jvp(call.inputs, {f"input:{name}": t for name, t in moving.inputs.items()}, **call.options)
    if not isinstance(result.outputs, Mapping):
        return call.tensor(result.outputs), call.tensor(result.tangents)
    # An output that is not differentiable does not move.
    moved = {
        name: np.zeros_like(one) if result.tangents[name] is None else result.tangents[name]
        for name, one in result.outputs.items()
    }
    return call.tensor(result.outputs), call.tensor(moved)


def grad_and_value(function: Hosted, argnums: Argnums = 0) -> Callable[..., tuple[Tensors, torch.Tensor]]:
    """Of a model that returns one real number: a function that returns the gradient and that number."""

    def run(*args: Any, **kwargs: Any) -> tuple[Tensors, torch.Tensor]:
        call = _Call(function, args, kwargs)
        wrt = call.wrt(argnums)
        value, gradients = call.model.value_and_grad(call.inputs, wrt=wrt, allow_unused=True, **call.options)
        found = [call.gradient(one, name) for one, name in zip(gradients.values(), wrt, strict=True)]
        return _as_given(found, isinstance(argnums, int)), call.tensor(value)

    return run


def grad(function: Hosted, argnums: Argnums = 0) -> Callable[..., Tensors]:
    """Of a model that returns one real number: a function that returns its gradient."""
    both = grad_and_value(function, argnums)
    return lambda *args, **kwargs: both(*args, **kwargs)[0]


def hvp(function: Hosted, inputs: Any, v: Any) -> tuple[torch.Tensor, Tensors]:
    """Of a model that returns one real number: that number and the Hessian times v. inputs, v: one, or tuples."""
    many = isinstance(inputs, tuple)
    primals = inputs if many else (inputs,)
    call = _Call(function, primals, {})
    moving = _moving(function, primals, v if isinstance(v, tuple) else (v,))
    wrt = call.wrt(tuple(range(len(call.positions))))
    tangents = {f"input:{name}": t for name, t in moving.inputs.items()}
    result = call.model.hvp(call.inputs, tangents, wrt=wrt, allow_unused=True, **call.options)
    found = [call.gradient(one, name) for one, name in zip(result.hvps.values(), wrt, strict=True)]
    return call.tensor(result.outputs), _as_given(found, not many)


def jacrev(function: Hosted, argnums: Argnums = 0) -> Callable[..., Any]:
    """A function that returns the Jacobian, of shape output.shape + input.shape; of several outputs a dict."""

    def run(*args: Any, **kwargs: Any) -> Any:
        call = _Call(function, args, kwargs)
        wrt = call.wrt(argnums)
        options = {**call.options, "return_outputs": True, "allow_unused": True}
        outputs, blocks = call.model.jacobian(call.inputs, wrt=wrt, **options)
        found: dict[str, list[torch.Tensor]] = {}
        for ((row, _), block), name in zip(blocks.items(), wrt * len(blocks), strict=False):
            output = outputs[row] if isinstance(outputs, Mapping) else outputs
            found.setdefault(row, []).append(_block(call, block, call.tensor(output), call.gradient(None, name)))
        if isinstance(outputs, Mapping):
            # What is cut off from the inputs has no blocks; torch.func has zeros for it.
            for row in [row for row, output in outputs.items() if row not in found and is_differentiable(output)]:
                likes = [call.gradient(None, name) for name in wrt]
                found[row] = [_block(call, None, call.tensor(outputs[row]), like) for like in likes]
        result = {row: _as_given(parts, isinstance(argnums, int)) for row, parts in found.items()}
        return result if isinstance(outputs, Mapping) else next(iter(result.values()))

    return run


def hessian(function: Hosted, argnums: Argnums = 0) -> Callable[..., Any]:
    """Of a model that returns one real number: a function that returns the Hessian; of several inputs nested tuples."""

    def run(*args: Any, **kwargs: Any) -> Any:
        call = _Call(function, args, kwargs)
        wrt = call.wrt(argnums)
        blocks = iter(call.model.hessian(call.inputs, wrt=wrt, allow_unused=True, **call.options).values())
        one = isinstance(argnums, int)
        likes = [call.gradient(None, name) for name in wrt]
        return _as_given(
            [_as_given([_block(call, next(blocks), row, col) for col in likes], one) for row in likes], one
        )

    return run


def _block(call: _Call, block: Any, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    return column.new_zeros((*row.shape, *column.shape)) if block is None else call.tensor(block)
