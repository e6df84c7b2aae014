"""One call of the server for a primitive: JAX's conventions here, torch's there.

JAX pairs a cotangent with a tangent as Re(sum c t), torch as Re(sum conj(v) t). With v = conj(c):
    VJP   Re(sum c J u) = Re(sum conj(v) J u) = Re(sum conj(J^H v) u), so JAX's is conj(J^H conj(c)).
    JVP   J u is the same in both.
    HVP   the derivative of Re(sum g u) for JAX's g = conj(J^H v) is that of Re(sum conj(J^H v) u), the server's form
          Re<J^H v, u> with the same u. What it returns is torch's gradient of that, and JAX's is its conjugate.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pullback import errors
from pullback._arrays import Array
from pullback._info import ModelInfo
from pullback.jax._call import Call, Out, Point, Shape, size_of

#: Cotangents in one call, at first; a server that takes fewer says so.
_CHUNK = 4096
#: Numbers that a dense derivative is taken by, at most.
_DENSE = 4096


@dataclass(frozen=True)
class Once:
    """A call: what an `Ask` asks, of so many rows and cotangents.

    rows: None: the operands are as the model takes them. count: None: there is one cotangent, and no axis for it.
    """

    call: Call
    kind: str
    wrt: tuple[int, ...]
    pulled: tuple[int, ...]
    moved: tuple[int, ...]
    rows: int | None
    count: int | None

    def dense_pays(self, info: ModelInfo) -> bool:
        """Whether `dense_jvp` or `dense_hvp` can be used, and is less work than a call for each vector."""
        call = self.call
        points = [call.points[i] for i in {*self.moved, *(self.wrt if self.kind == "hvp" else ())}]
        plain = (np.float32, np.float64)
        if self.count is None or any(point.dtype not in plain for point in points):
            return False
        if self.kind == "hvp":
            work = sum(size_of(point.shape) for point in points)
            return call.scalar and work <= min(_DENSE, 2 * self.count)
        outs = [call.outs[i] for i in call.floating]
        work = sum(size_of(out.shape) for out in outs)
        return info.forward_mode and all(out.dtype in plain for out in outs) and work <= min(_DENSE, 2 * self.count)


def once(task: Once, operands: Sequence[Array]) -> list[Array]:
    """The results for operands that have [cotangents, rows] in front, where they have those. Results too.

    Of several outputs, one that does not depend on what is differentiated by adds nothing: JAX gives it a cotangent
    too. The server refuses such a cotangent, so which ones these are is learned from its refusals.

    Raises NotDifferentiable where no output depends on it; PullbackError, TypeError.
    """
    if task.kind not in ("vjp", "hvp"):
        return _one_call(task, operands)
    info = task.call.model.info
    key = (task.kind, task.wrt, task.pulled, task.moved, info.version, info.revision)
    cut = task.call.cut.get(key, frozenset())
    try:
        return _one_call(*_without(task, operands, cut))
    except errors.NotDifferentiable as error:
        refused = error
    parts, cut = [], frozenset()
    for i in task.pulled if len(task.pulled) > 1 else ():
        try:
            parts.append(_one_call(*_without(task, operands, {*task.pulled} - {i})))
        except errors.NotDifferentiable:
            cut |= {i}
    if not parts:
        refused.add_note("Where that is meant, jax.lax.stop_gradient around the output says so.")
        raise refused
    now = task.call.model.info
    if (now.version, now.revision) == (info.version, info.revision):
        task.call.cut[key] = cut
    return [sum(each[1:], each[0]) for each in zip(*parts, strict=True)]


def _without(task: Once, operands: Sequence[Array], cut: Collection[int]) -> tuple[Once, list[Array]]:
    """The same, without cotangents for some outputs."""
    first = len(task.call.points)
    last = first + len(task.pulled)
    pulled = tuple(i for i in task.pulled if i not in cut)
    kept = [value for i, value in zip(task.pulled, operands[first:last], strict=True) if i not in cut]
    return replace(task, pulled=pulled), [*operands[:first], *kept, *operands[last:]]


def _one_call(task: Once, operands: Sequence[Array]) -> list[Array]:
    call = task.call
    points = [_to_wire(task, point, value, 0) for point, value in zip(call.points, operands, strict=False)]
    given = _arguments(call, points)
    rest = list(operands[len(call.points) :])
    lead = 0 if task.count is None else 1
    cotangents = [_to_wire(task, call.outs[i], _conj(value), lead) for i, value in zip(task.pulled, rest, strict=False)]
    tangents = {
        call.points[i].label: _to_wire(task, call.points[i], value, 0)
        for i, value in zip(task.moved, rest[len(task.pulled) :], strict=True)
    }
    wrt = [call.points[i].label for i in task.wrt] if task.kind != "jvp" else []
    if task.kind == "evaluate":
        return _outputs(task, call.model.evaluate(**given), range(len(call.outs)))
    if task.kind == "value_and_grad":
        seed = [_to_wire(task, call.outs[0], _ones(task, call.outs[0]), 0)]
        outputs, found = call.model.vjp(**given, cotangents=_by_output(call, (0,), seed), wrt=wrt, allow_unused=True)
        return [*_outputs(task, outputs, (0,)), *_derivatives(task, found, 0)]
    if task.kind == "vjp":
        return _pulled_back(task, given, cotangents, wrt)
    if task.kind == "jvp":
        pushed = call.model.jvp(**given, tangents=tangents, return_outputs=False).tangents
        return _outputs(task, pushed, task.wrt)
    every = list(dict.fromkeys([*wrt, *tangents]))
    twice = call.model.hvp(
        **given,
        tangents=tangents,
        cotangents=_by_output(call, task.pulled, cotangents),
        wrt=every,
        allow_unused=True,
        return_outputs=False,
    )
    return _derivatives(task, twice.hvps, 0)


def _pulled_back(task: Once, given: dict[str, Any], cotangents: list[Array], wrt: list[str]) -> list[Array]:
    """A VJP, of many cotangents in pieces that the server takes."""
    call = task.call

    def ask(some: list[Array]) -> Mapping[str, Array | None]:
        found: Mapping[str, Array | None] = call.model.vjp(
            **given,
            cotangents=_by_output(call, task.pulled, some),
            wrt=wrt,
            allow_unused=True,
            batched=task.count is not None,
            return_outputs=False,
        ).gradients
        return found

    if task.count is None:
        return _derivatives(task, ask(cotangents), 0)
    pieces, start, chunk = [], 0, min(task.count, _CHUNK)
    while start < task.count:
        part = [value[start : start + chunk] for value in cotangents]
        count = len(part[0])
        try:
            pieces.append(_derivatives(task, ask(part), count))
        except errors.ResultTooLarge:
            if count == 1:
                raise
            chunk = (count + 1) // 2
            continue
        start += count
    return [np.concatenate(piece) if len(piece) > 1 else piece[0] for piece in zip(*pieces, strict=True)]


def dense_jvp(task: Once, operands: Sequence[Array]) -> list[Array]:
    """J u for each of `count` tangents u, by the dense J in one call."""
    call, first = task.call, len(task.call.points)
    wrt = [call.points[i].label for i in task.moved]
    blocks = call.model.jacobian(**_arguments(call, _sent(call, operands)), wrt=wrt, allow_unused=True)
    results = []
    for index in task.wrt:
        out = call.outs[index]
        total = np.zeros((task.count or 0, *out.shape), out.dtype)
        for tangent, i in zip(operands[first:], task.moved, strict=True):
            block = _block(blocks, out.name, call.points[i])
            if block is not None:
                flat = block.reshape(size_of(out.shape), size_of(call.points[i].shape))
                total += (tangent.reshape(task.count or 0, -1) @ flat.T).reshape(total.shape)
        results.append(total)
    return results


def dense_hvp(task: Once, operands: Sequence[Array]) -> list[Array]:
    """c times the gradient of <g, u> for each of `count` vectors u, by the dense derivative of g in one call."""
    call, first = task.call, len(task.call.points)
    wrt = [call.points[i].label for i in dict.fromkeys([*task.wrt, *task.moved])]
    blocks = call.model.hessian(**_arguments(call, _sent(call, operands)), wrt=wrt, allow_unused=True)
    scale = operands[first]
    results = []
    for j in task.wrt:
        point = call.points[j]
        total = np.zeros((task.count or 0, *point.shape), point.dtype)
        for vector, i in zip(operands[first + 1 :], task.moved, strict=True):
            # The row is the gradient, the column what that is differentiated by.
            block = _block(blocks, call.points[i], point)
            if block is not None:
                flat = block.reshape(size_of(call.points[i].shape), size_of(point.shape))
                total += (vector.reshape(task.count or 0, -1) @ flat).reshape(total.shape)
        results.append(total * scale.astype(point.dtype).reshape((-1, *(1 for _ in point.shape))))
    return results


def _block(blocks: Mapping[tuple[str, str], Array | None], row: Point | str | None, column: Point) -> Array | None:
    """The block of a pair; None: unused. Raises ProtocolError."""
    rows = {row.label, row.name} if isinstance(row, Point) else {row}
    for (above, beside), block in blocks.items():
        if (row is None or above in rows) and beside in (column.label, column.name):
            return block
    raise errors.ProtocolError(f"the server sent the blocks {', '.join(map(str, blocks))}, and none for {column.label}")


def _sent(call: Call, operands: Sequence[Array]) -> list[Array]:
    return [value.astype(point.wire, copy=False) for point, value in zip(call.points, operands, strict=False)]


def _arguments(call: Call, points: list[Array]) -> dict[str, Any]:
    """What every method of a RemoteModel is given."""
    by_place: dict[str, dict[str, Array]] = {"input": {}, "param": {}, "target": {}, "seed": {}}
    for point, value in zip(call.points, points, strict=True):
        by_place[point.place][point.name] = value
    seed = by_place["seed"].get("seed")
    return {
        "inputs": by_place["input"],
        "parameters": by_place["param"] or None,
        "targets": by_place["target"] or None,
        "loss": call.loss,
        "train": call.train,
        "seed": call.fixed_seed if seed is None else int(seed[0]) << 32 | int(seed[1]),
        "timeout": call.timeout,
    }


def _by_output(call: Call, indices: Sequence[int], values: list[Array]) -> Any:
    if any(call.outs[i].name is None for i in indices):
        return values[0]
    return {call.outs[i].name: value for i, value in zip(indices, values, strict=True)}


def _conj(value: Array) -> Array:
    return value.conj() if value.dtype.kind == "c" else value


def _ones(task: Once, out: Out) -> Array:
    return np.ones((*_lead(task, out), *out.shape), out.dtype)


def _has_rows(task: Once, like: Point | Out) -> bool:
    return task.rows is not None and like.batched


def _lead(task: Once, like: Point | Out) -> Shape:
    return (task.rows,) if task.rows is not None and _has_rows(task, like) else ()


def _to_wire(task: Once, like: Point | Out, value: Array, lead: int) -> Array:
    """From [lead, rows, ...] to the shape that the model takes: its batch axis made of the rows, where it has one."""
    if isinstance(like, Point):
        value = value.astype(like.wire, copy=False)
    if not _has_rows(task, like):
        return value
    axis = task.call.axis
    assert axis is not None
    moved = np.moveaxis(value, lead, lead + axis)
    if task.call.rows:
        return moved
    at = lead + axis
    return moved.reshape((*moved.shape[:at], moved.shape[at] * moved.shape[at + 1], *moved.shape[at + 2 :]))


def _from_wire(task: Once, like: Point | Out, value: Array, lead: Shape) -> Array:
    """The way back. Raises TypeError for what is not as it was announced."""
    shape, what = like.shape, "output" if isinstance(like, Out) else "derivative by"
    rows = task.rows if _has_rows(task, like) else None
    expected = shape
    axis = task.call.axis or 0
    if rows is not None and task.call.rows:
        expected = (*shape[:axis], rows, *shape[axis:])
    elif rows is not None:
        expected = (*shape[:axis], rows * shape[axis], *shape[axis + 1 :])
    if value.shape != (*lead, *expected) or value.dtype != like.dtype:
        raise TypeError(
            f"model {task.call.model.name!r}: the {what} {like.name or 'output'!r} is "
            f"{value.dtype}{list(value.shape)}, announced was {like.dtype}{[*lead, *expected]}; "
            "remote_function(..., outputs=) says what it is"
        )
    if rows is None:
        return value
    at = len(lead) + axis
    if not task.call.rows:
        value = value.reshape((*value.shape[:at], rows, shape[axis], *value.shape[at + 1 :]))
    return np.moveaxis(value, at, len(lead))


def _outputs(task: Once, found: Any, indices: Sequence[int]) -> list[Array]:
    """Outputs or their tangents by index. None: not differentiable, so the tangent is zero."""
    call, results = task.call, []
    for i in indices:
        out = call.outs[i]
        if isinstance(found, Mapping) != (len(call.outs) > 1) or (isinstance(found, Mapping) and out.name not in found):
            names = ", ".join(map(repr, found)) if isinstance(found, Mapping) else "one"
            raise TypeError(
                f"model {call.model.name!r} returned the outputs {names}, announced were "
                f"{', '.join(repr(o.name or 'output') for o in call.outs)}"
            )
        value = found[out.name] if isinstance(found, Mapping) else found
        if value is None:
            results.append(np.zeros((*_lead(task, out), *out.shape), out.dtype))
        else:
            results.append(_from_wire(task, out, value, ()))
    return results


def _derivatives(task: Once, found: Mapping[str, Array | None], count: int) -> list[Array]:
    """Derivatives by points, conjugated to JAX's convention. None: unused, so zero."""
    lead = (count,) if count else ()
    results = []
    for i in task.wrt:
        point = task.call.points[i]
        value = found.get(point.label, found.get(point.name))
        if value is None:
            results.append(np.zeros((*lead, *_lead(task, point), *point.shape), point.dtype))
        else:
            results.append(_from_wire(task, point, _conj(value), lead))
    return results
