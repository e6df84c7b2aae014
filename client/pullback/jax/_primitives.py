"""The primitives, and their rules of differentiation, transposition and batching.

evaluate and value_and_grad are functions of the points x; vjp, jvp, hvp and the two derivatives of VJP and JVP are
forms (see `Form`) with one slot open. Forms are linear in each closed slot, and transposing one by a slot opens that
slot and closes the one that was open; so one set of rules serves all of them, and orders differ in slots alone.

`sizes` are the extents of the mapped axes, outermost first; `masks` say which of them each operand has, in front.
Results have all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from pullback import errors
from pullback.jax._call import Call, Form, Masks, Shape, Slot, is_complex, second_order_refused

THIRD = (
    "a third derivative of a hosted model is asked for, and stateless calls have two orders; sessions have any: "
    "pullback.autograd, or pullback.torch.RemoteModule"
)


def _primitive(name: str) -> Any:
    # Any: JAX's own types leave these methods out.
    made: Any = Primitive(f"pullback_{name}")
    made.multiple_results = True
    return made


evaluate_p = _primitive("evaluate")
value_and_grad_p = _primitive("value_and_grad")
#: Forms by order and open slot.
FORMS: dict[tuple[int, Slot], Any] = {
    (1, "u"): _primitive("vjp"),
    (1, "c"): _primitive("jvp"),
    (2, "w"): _primitive("hvp"),
    (2, "u"): _primitive("vjp_derivative"),
    (2, "c"): _primitive("jvp_derivative"),
}
#: A derivative that cannot be had. It stands in a trace, for what is never computed need not be refused.
refused_p = _primitive("refused")


def bind_form(
    call: Call, form: Form, sizes: Shape, masks: Masks, points: Sequence[Any], vectors: dict[Slot, list[Any]]
) -> list[Any]:
    """A form at points, with vectors in its closed slots. masks: of the points and then of the vectors."""
    operands = [*points, *(vector for slot in form.closed for vector in vectors[slot])]
    primitive = FORMS[len(form.slots) - 1, form.open]
    return list(primitive.bind(*operands, call=call, form=form, sizes=sizes, masks=masks))


def _split(call: Call, form: Form, values: Sequence[Any]) -> tuple[list[Any], dict[Slot, list[Any]]]:
    """Operands (or what there is for each) as points, and by closed slot."""
    at = len(call.points)
    by_slot: dict[Slot, list[Any]] = {}
    for slot in form.closed:
        end = at + len(form.indices(slot))
        by_slot[slot] = list(values[at:end])
        at = end
    return list(values[: len(call.points)]), by_slot


def _joined(form: Form, points: Sequence[Any], by_slot: dict[Slot, list[Any]]) -> tuple[Any, ...]:
    return (*points, *(value for slot in form.closed for value in by_slot[slot]))


# ---- shapes


def _mapped(sizes: Shape, mask: Sequence[bool]) -> Shape:
    return tuple(size for size, on in zip(sizes, mask, strict=True) if on)


def _check(operands: Sequence[Any], like: Sequence[Any], sizes: Shape, masks: Masks) -> None:
    for operand, one, mask in zip(operands, like, masks, strict=True):
        expected = (*_mapped(sizes, mask), *one.shape)
        if operand.shape != expected or operand.dtype != one.dtype:
            raise TypeError(f"{one}: got {operand.dtype}{list(operand.shape)}, expected {one.dtype}{list(expected)}")


def _shaped(sizes: Shape, like: Sequence[Any]) -> list[ShapedArray]:
    return [ShapedArray((*sizes, *one.shape), one.dtype) for one in like]


def _evaluate_shapes(*operands: Any, call: Call, sizes: Shape, masks: Masks) -> list[ShapedArray]:
    _check(operands, call.points, sizes, masks)
    return _shaped(sizes, call.outs)


def _value_and_grad_shapes(
    *operands: Any, call: Call, wrt: tuple[int, ...], sizes: Shape, masks: Masks
) -> list[ShapedArray]:
    _check(operands, call.points, sizes, masks)
    return _shaped(sizes, [*call.outs, *(call.points[i] for i in wrt)])


def _form_shapes(*operands: Any, call: Call, form: Form, sizes: Shape, masks: Masks) -> list[ShapedArray]:
    like = [*call.points, *(one for slot in form.closed for one in call.of_slot(slot, form.indices(slot)))]
    _check(operands, like, sizes, masks)
    return _shaped(sizes, call.of_slot(form.open, form.indices(form.open)))


def _refused_shapes(*operands: Any, why: str, like: tuple[tuple[Shape, Any], ...]) -> list[ShapedArray]:
    return [ShapedArray(shape, dtype) for shape, dtype in like]


# ---- forward mode


def _moves(tangent: Any) -> bool:
    return type(tangent) is not ad.Zero and tangent.dtype != jax.dtypes.float0


def _zero(value: Any) -> Any:
    aval: Any = ShapedArray(value.shape, value.dtype)
    return ad.Zero(aval.to_tangent_aval())


def _moved(tangents: Sequence[Any]) -> tuple[int, ...]:
    return tuple(index for index, tangent in enumerate(tangents) if _moves(tangent))


def _sum(parts: Sequence[Sequence[Any]]) -> list[Any]:
    first, *others = parts
    found = list(first)
    for part in others:
        found = [a + b for a, b in zip(found, part, strict=True)]
    return found


def _refuse(why: str, results: Sequence[Any], *operands: Any) -> list[Any]:
    like = tuple((one.shape, one.dtype) for one in results)
    return list(refused_p.bind(*operands, why=why, like=like))


def spread(value: Any, sizes: Shape, mask: Sequence[bool]) -> Any:
    """With an axis of extent 1 for each mapped one that it has not."""
    base = value.shape[sum(mask) :]
    return jnp.reshape(value, (*(size if on else 1 for size, on in zip(sizes, mask, strict=True)), *base))


def _along_gradient(
    gradients: Sequence[Any], tangents: Sequence[Any], sizes: Shape, masks: Sequence[Sequence[bool]], dtype: Any
) -> Any:
    """Re(sum g t) over all points: what a real scalar changes by. In JAX's operations, which transpose to c g."""
    total = 0
    for gradient, tangent, mask in zip(gradients, tangents, masks, strict=True):
        product = gradient * spread(tangent, sizes, mask)
        product = product.real if is_complex(product.dtype) else product
        total = total + product.sum(axis=tuple(range(len(sizes), product.ndim))).astype(dtype)
    return total


def _evaluate_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, call: Call, sizes: Shape, masks: Masks
) -> tuple[list[Any], list[Any]]:
    # y' = J x'. For a real scalar J is the gradient, which comes with the value in one call, and y' = <gradient, x'>
    # needs no other. Else y' is the form A(x)[., x'] with c open, and the value a call of its own.
    moved = _moved(tangents)
    along = [tangents[i] for i in moved]
    moved_masks = tuple(masks[i] for i in moved)
    if call.scalar and moved:
        value, *gradients = value_and_grad_p.bind(*primals, call=call, wrt=moved, sizes=sizes, masks=masks)
        return [value], [_along_gradient(gradients, along, sizes, moved_masks, value.dtype)]
    outputs = list(evaluate_p.bind(*primals, call=call, sizes=sizes, masks=masks))
    changes: list[Any] = [_zero(output) for output in outputs]
    if moved and call.floating:
        form = Form(call.floating, moved, None, "c")
        pushed = bind_form(call, form, sizes, (*masks, *moved_masks), primals, {"u": along})
        for index, change in zip(call.floating, pushed, strict=True):
            changes[index] = change
    return outputs, changes


def _value_and_grad_jvp(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    call: Call,
    wrt: tuple[int, ...],
    sizes: Shape,
    masks: Masks,
) -> tuple[list[Any], list[Any]]:
    # y' = <gradient, x'>, with the gradient by all that moves. The gradient is g = A(x)[1, .] with u open, so
    # g' = B(x)[1, ., x'] with u open.
    moved = _moved(tangents)
    every = tuple(sorted({*wrt, *moved}))
    value, *found = value_and_grad_p.bind(*primals, call=call, wrt=every, sizes=sizes, masks=masks)
    by_point = dict(zip(every, found, strict=True))
    gradients = [by_point[i] for i in wrt]
    if not moved:
        return [value, *gradients], [_zero(one) for one in (value, *gradients)]
    along = [tangents[i] for i in moved]
    moved_masks = tuple(masks[i] for i in moved)
    change = _along_gradient([by_point[i] for i in moved], along, sizes, moved_masks, value.dtype)
    if not wrt:
        return [value], [change]
    why = second_order_refused(call.model.info)
    if why:
        return [value, *gradients], [change, *_refuse(why, gradients, *along)]
    one = jnp.ones((), call.outs[0].dtype)
    nowhere = (False,) * len(sizes)
    form = Form((0,), wrt, moved, "u")
    changes = bind_form(call, form, sizes, (*masks, nowhere, *moved_masks), primals, {"c": [one], "w": along})
    return [value, *gradients], [change, *changes]


def _form_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, call: Call, form: Form, sizes: Shape, masks: Masks
) -> tuple[list[Any], list[Any]]:
    # Multilinear in the closed slots: the sum of the form with each slot's vectors replaced by their tangents. By the
    # points: A'[., x'] = B with x' in the slot w. Of B the derivative is of third order.
    points, vectors = _split(call, form, primals)
    points_t, vectors_t = _split(call, form, tangents)
    points_m, vectors_m = _split(call, form, masks)
    results = bind_form(call, form, sizes, masks, points, vectors)
    parts: list[list[Any]] = []
    for slot in form.closed:
        moved = _moved(vectors_t[slot])
        if not moved:
            continue
        changed = form.changed({slot: tuple(form.indices(slot)[i] for i in moved)})
        new = {**vectors, slot: [vectors_t[slot][i] for i in moved]}
        new_m = {**vectors_m, slot: [vectors_m[slot][i] for i in moved]}
        parts.append(bind_form(call, changed, sizes, _joined(changed, points_m, new_m), points, new))
    moved = _moved(points_t)
    if moved:
        along = [points_t[i] for i in moved]
        why = THIRD if form.w is not None else second_order_refused(call.model.info)
        if why:
            parts.append(_refuse(why, results, *along))
        else:
            changed = Form(form.c, form.u, moved, form.open)
            new, new_m = {**vectors, "w": along}, {**vectors_m, "w": [points_m[i] for i in moved]}
            parts.append(bind_form(call, changed, sizes, _joined(changed, points_m, new_m), points, new))
    return results, _sum(parts) if parts else [_zero(one) for one in results]


def _refused_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, why: str, like: tuple[tuple[Shape, Any], ...]
) -> tuple[list[Any], list[Any]]:
    results = list(refused_p.bind(*primals, why=why, like=like))
    moving = [tangent for tangent in tangents if _moves(tangent)]
    return results, _refuse(why, results, *moving) if moving else [_zero(one) for one in results]


# ---- transposition

_is_unknown: Callable[[Any], bool] = ad.is_undefined_primal


def _form_transpose(
    cotangents: Sequence[Any], *operands: Any, call: Call, form: Form, sizes: Shape, masks: Masks
) -> list[Any]:
    # The form as a function of the slot s is v -> F[.., v in s, .., open o]. Paired with a cotangent z of its result it
    # is F[.., v in s, .., z in o], whose gradient by v is the form with z in the slot o, and s open. Where v has not
    # all mapped axes, it was the same along the others, so its gradient is summed over them.
    points, vectors = _split(call, form, operands)
    points_m, vectors_m = _split(call, form, masks)
    unknown = {slot: [_is_unknown(one) for one in vectors[slot]] for slot in form.closed}
    linear = [slot for slot in form.closed if any(unknown[slot])]
    if any(map(_is_unknown, points)) or len(linear) != 1:
        raise NotImplementedError(f"{call}: a derivative is transposed by what it is not linear in; please report this")
    (slot,) = linear
    given = [i for i, cotangent in enumerate(cotangents) if type(cotangent) is not ad.Zero]
    wanted = [i for i, is_unknown in enumerate(unknown[slot]) if is_unknown]
    found: dict[int, Any] = {}
    if given:
        closed, everywhere = form.open, (True,) * len(sizes)
        changed = form.changed(
            {
                closed: tuple(form.indices(closed)[i] for i in given),
                slot: tuple(form.indices(slot)[i] for i in wanted),
            },
            slot,
        )
        new = {**vectors, closed: [cotangents[i] for i in given]}
        new_m = {**vectors_m, closed: [everywhere for _ in given]}
        results = bind_form(call, changed, sizes, _joined(changed, points_m, new_m), points, new)
        found = dict(zip(wanted, results, strict=True))
    returned: dict[Slot, list[Any]] = {one: [None] * len(vectors[one]) for one in form.closed}
    for i in wanted:
        mask, value = vectors_m[slot][i], found.get(i)
        if value is None:
            returned[slot][i] = ad.Zero(vectors[slot][i].aval)
        else:
            axes = tuple(axis for axis, on in enumerate(mask) if not on)
            returned[slot][i] = value.sum(axis=axes) if axes else value
    return list(_joined(form, [None] * len(points), returned))


def _refused_transpose(cotangents: Sequence[Any], *operands: Any, why: str, like: Any) -> list[Any]:
    if all(type(cotangent) is ad.Zero for cotangent in cotangents):
        return [ad.Zero(one.aval) if _is_unknown(one) else None for one in operands]
    raise errors.OrderUnavailable(why)


# ---- batching


def _batched(primitive: Any) -> Callable[..., Any]:
    """One mapped axis more, in front of the others. What it means for calls is decided where they are made."""

    def rule(
        operands: Sequence[Any], dims: Sequence[int | None], *, sizes: Shape, masks: Masks, **params: Any
    ) -> tuple[list[Any], list[int]]:
        (size, *_) = {one.shape[dim] for one, dim in zip(operands, dims, strict=True) if dim is not None}
        turned = [one if dim is None else jnp.moveaxis(one, dim, 0) for one, dim in zip(operands, dims, strict=True)]
        more = tuple((dim is not None, *mask) for dim, mask in zip(dims, masks, strict=True))
        results = primitive.bind(*turned, sizes=(size, *sizes), masks=more, **params)
        return list(results), [0] * len(results)

    return rule


def _refused_batched(
    operands: Sequence[Any], dims: Sequence[int | None], *, why: str, like: tuple[tuple[Shape, Any], ...]
) -> tuple[list[Any], list[int]]:
    (size, *_) = {one.shape[dim] for one, dim in zip(operands, dims, strict=True) if dim is not None}
    results = refused_p.bind(*operands, why=why, like=tuple(((size, *shape), dtype) for shape, dtype in like))
    return list(results), [0] * len(results)


evaluate_p.def_abstract_eval(_evaluate_shapes)
value_and_grad_p.def_abstract_eval(_value_and_grad_shapes)
refused_p.def_abstract_eval(_refused_shapes)
ad.primitive_jvps[evaluate_p] = _evaluate_jvp
ad.primitive_jvps[value_and_grad_p] = _value_and_grad_jvp
for _form_p in FORMS.values():
    _form_p.def_abstract_eval(_form_shapes)
    ad.primitive_jvps[_form_p] = _form_jvp
    ad.primitive_transposes[_form_p] = _form_transpose
for _each in (evaluate_p, value_and_grad_p, *FORMS.values()):
    batching.primitive_batchers[_each] = _batched(_each)
ad.primitive_jvps[refused_p] = _refused_jvp
ad.primitive_transposes[refused_p] = _refused_transpose
batching.primitive_batchers[refused_p] = _refused_batched
