"""How the primitives are run: at once on concrete arrays, and as host callbacks inside compiled programs."""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import mlir

from pullback import errors
from pullback._arrays import Array
from pullback.jax._call import Call, Form, Masks, Shape, Slot, is_complex, is_symmetric, size_of
from pullback.jax._host import Ask, execute
from pullback.jax._primitives import FORMS, bind_form, evaluate_p, refused_p, spread, value_and_grad_p

#: Most HVPs for one derivative of a gradient that need not be symmetric.
_MOST_HVPS = 4096
#: Since lowerings are cached, callbacks have to say that theirs are not.
_UNCACHED: dict[str, Any] = (
    {"cacheable": False} if "cacheable" in inspect.signature(mlir.register_lowering).parameters else {}
)


def _ask_of(call: Call, form: Form) -> Ask | None:
    """The server's call for a form; None: it takes many, see `_by_numbers`.

    B with u open has one where it is symmetric in u and w: B[c, ., w] is then the HVP with w in the slot u.
    """
    if form.w is None:
        return Ask("vjp", form.u, form.c) if form.open == "u" else Ask("jvp", form.c, (), form.u)
    if form.open == "w":
        return Ask("hvp", form.w, form.c, form.u)
    if form.open == "u" and is_symmetric(call.model.info):
        return Ask("hvp", form.u, form.c, form.w, symmetric=True)
    return None


def _by_numbers(*operands: Any, call: Call, form: Form, sizes: Shape, masks: Masks) -> list[Any]:
    """B with another slot open than w, number by number, from HVPs, which have w open. Raises OrderUnavailable.

    With e a unit vector of the open slot u, the number is B[c, e, w] = <HVP(c, e), w>; of the slot c likewise. So it
    takes as many HVPs as the result has numbers (twice as many for complex ones, the second with -i e, as Re(-i z) =
    Im z). They do not depend on w, so that many w take no more.
    """
    first = len(call.points)
    points, point_masks = operands[:first], masks[:first]
    other: Slot = "c" if form.open == "u" else "u"
    split = first + len(form.indices(other))
    given, given_masks = list(operands[first:split]), masks[first:split]
    along, along_masks = list(operands[split:]), masks[split:]
    used = [axis for axis in range(len(sizes)) if any(mask[axis] for mask in (*point_masks, *given_masks))]
    units = _units(call, form)
    count = len(units[0])
    if count > _MOST_HVPS:
        raise errors.OrderUnavailable(
            f"a derivative of {'a gradient' if form.open == 'u' else 'a JVP'} of model {call.model.name!r} has {count} "
            f"numbers and would take as many calls, at most {_MOST_HVPS} are made; use reverse mode over "
            f"{'reverse mode (jacrev(jacrev(f)), grad of grad)' if form.open == 'u' else 'forward mode'}"
        )
    inner = (count, *(sizes[axis] for axis in used))
    keep = [(False, *(mask[axis] for axis in used)) for mask in (*point_masks, *given_masks)]
    alone = (True, *(False for _ in used))
    vectors: dict[Slot, list[Any]] = {form.open: list(map(jnp.asarray, units)), other: given}
    vector_masks: dict[Slot, list[tuple[bool, ...]]] = {form.open: [alone] * len(units), other: keep[first:]}
    hvp = form.changed({}, "w")
    every = (*keep[:first], *vector_masks["c"], *vector_masks["u"])
    rows = bind_form(call, hvp, inner, every, points, vectors)
    numbers = sum(
        _paired(row, used, tangent, sizes, mask) for row, tangent, mask in zip(rows, along, along_masks, strict=True)
    )
    return _assembled(numbers, call.of_slot(form.open, form.indices(form.open)))


def _units(call: Call, form: Form) -> list[Array]:
    """All unit vectors of the open slot, by its indices, with a leading axis over them."""
    like = call.of_slot(form.open, form.indices(form.open))
    widths = [size_of(one.shape) * (2 if is_complex(one.dtype) else 1) for one in like]
    total, start, units = sum(widths), 0, []
    for one, width in zip(like, widths, strict=True):
        size = size_of(one.shape)
        block = np.zeros((total, size), one.dtype)
        block[start : start + size] = np.eye(size, dtype=one.dtype)
        if width > size:
            block[start + size : start + width] = -1j * np.eye(size, dtype=one.dtype)
        units.append(block.reshape((total, *one.shape)))
        start += width
    return units


def _paired(row: Any, used: Sequence[int], tangent: Any, sizes: Shape, mask: Sequence[bool]) -> Any:
    """Re(sum row tangent): [all mapped axes, units] from [units, used axes, ...] and [its axes, ...]."""
    letters = string.ascii_lowercase[: len(sizes)]
    flat = jnp.reshape(row, (*row.shape[: 1 + len(used)], -1))
    moved = jnp.reshape(tangent, (*tangent.shape[: sum(mask)], -1))
    left = "Z" + "".join(letters[axis] for axis in used) + "X"
    right = "".join(letter for letter, on in zip(letters, mask, strict=True) if on) + "X"
    has = [axis in used or mask[axis] for axis in range(len(sizes))]
    out = "".join(letter for letter, on in zip(letters, has, strict=True) if on) + "Z"
    found = jnp.einsum(f"{left},{right}->{out}", flat, moved, precision=lax.Precision.HIGHEST)
    return spread(found.real if is_complex(found.dtype) else found, sizes, has)


def _assembled(numbers: Any, like: Sequence[Any]) -> list[Any]:
    """Tensors from [mapped axes, units]."""
    start, results = 0, []
    for one in like:
        size = size_of(one.shape)
        part = numbers[..., start : start + size]
        start += size
        if is_complex(one.dtype):
            part = lax.complex(part, numbers[..., start : start + size])
            start += size
        results.append(part.reshape((*part.shape[:-1], *one.shape)).astype(one.dtype))
    return results


def _run(ask: Ask, operands: Sequence[Any], call: Call, sizes: Shape, masks: Masks) -> list[Any]:
    return [jnp.asarray(one) for one in execute(call, ask, sizes, masks, [np.asarray(one) for one in operands])]


def _emit(ctx: Any, ask: Ask, operands: Sequence[Any], call: Call, sizes: Shape, masks: Masks) -> Any:
    axes = ctx.module_context.axis_context
    if not isinstance(axes, mlir.ShardingContext) or axes.num_devices != 1:
        raise NotImplementedError(
            f"{call}: hosted models do not run inside programs over several devices (pmap, shard_map, sharded jit)"
        )

    def host(*values: Any) -> tuple[Array, ...]:
        return tuple(execute(call, ask, sizes, masks, [np.asarray(value) for value in values]))

    results, _, _ = mlir.emit_python_callback(
        ctx, host, None, list(operands), ctx.avals_in, ctx.avals_out, has_side_effect=False
    )
    return results


def _register(primitive: Any, ask: Callable[..., Ask | None]) -> None:
    """ask: what the server is asked, from the call and those params that are not `sizes` and `masks`."""

    def impl(*operands: Any, call: Call, sizes: Shape, masks: Masks, **params: Any) -> list[Any]:
        asked = ask(call=call, **params)
        if asked is None:
            return _by_numbers(*operands, call=call, sizes=sizes, masks=masks, **params)
        return _run(asked, operands, call, sizes, masks)

    def lower(ctx: Any, *operands: Any, call: Call, sizes: Shape, masks: Masks, **params: Any) -> Any:
        asked = ask(call=call, **params)
        if asked is None:
            several = mlir.lower_fun(_by_numbers, multiple_results=True)
            return several(ctx, *operands, call=call, sizes=sizes, masks=masks, **params)
        return _emit(ctx, asked, operands, call, sizes, masks)

    primitive.def_impl(impl)
    mlir.register_lowering(primitive, lower, **_UNCACHED)


def _refuse(*_: Any, why: str, **__: Any) -> Any:
    raise errors.OrderUnavailable(why)


_register(evaluate_p, lambda call: Ask("evaluate"))
_register(value_and_grad_p, lambda call, wrt: Ask("value_and_grad", wrt))
for _form_p in FORMS.values():
    _register(_form_p, _ask_of)
refused_p.def_impl(_refuse)
mlir.register_lowering(refused_p, _refuse, **_UNCACHED)
