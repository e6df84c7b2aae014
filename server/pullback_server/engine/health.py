"""How the numbers of a call are: norm and zeros of its gradients, NaN and infinities in all that it came to.

One norm of a tensor tells whether it has any of the latter, so that they are counted only where there are some. On CUDA
everything is gathered into one small tensor, which is read when the device is done with the call anyway. Nothing here
ever changes a call or has it fail.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from pullback_server.job import Health

logger = logging.getLogger(__name__)

T = TypeVar("T")

Tensors = Sequence[torch.Tensor]
Maybe = Iterable[torch.Tensor | None]

_NOTHING = Health()
#: Norms below are computed anew in double precision: squares of what they are made of may be lost in a float32.
_TINY = 1e-15
#: Elements that numpy compares at a time.
_CHUNK = 1 << 18
#: Where they are compared. A worker computes one job at a time.
_scratch = np.empty(_CHUNK, dtype=bool)
_KINDS = (torch.Tensor, torch.nn.Parameter)
#: Those that numpy counts faster, by its names.
_TYPES = {torch.float32: np.dtype(np.float32).str, torch.float64: np.dtype(np.float64).str}
_HALVES = (torch.float16, torch.bfloat16)
_told = False


@dataclass(frozen=True)
class Subject:
    """What is looked at: a call's outputs, its gradients, and derivatives of which only NaN and infinities count."""

    outputs: Iterable[torch.Tensor]
    gradients: Maybe = ()
    others: Maybe = ()


class Signs:
    """What a call's health is read from, once. find: None where `health` is known already."""

    __slots__ = ("_find", "_health")

    def __init__(self, health: Health | None, find: Callable[[], Health | None] | None = None) -> None:
        self._health = health
        self._find = find

    def read(self) -> Health | None:
        """To be called when the device is done. None: it could not be found out."""
        find, self._find = self._find, None
        return self._health if find is None else _quietly(find)


def examine(subject: Subject) -> Signs | None:
    """Looks at one call. None: it could not be."""
    return _quietly(lambda: _examined(subject))


def examine_rows(
    gradients: Maybe,
    axis: int,
    parts: Sequence[tuple[int, int]],
    others: Iterable[torch.Tensor | None],
    subject: Callable[[int], Subject],
) -> Sequence[Signs | None]:
    """Looks at calls that were computed in one, as `examine` at each of them.

    gradients: with the rows of all calls along `axis`. parts: of each call, where its rows begin, and how many there
    are; in ascending order. others: whatever else the calls came to. subject: one call by its place in `parts`, asked
    for only where there is something to find.
    """
    signs = _quietly(lambda: _by_rows(_numbers(gradients), axis, parts, _numbers(others), subject))
    return [None] * len(parts) if signs is None else signs


def joined(signs: Sequence[Signs | None]) -> Signs | None:
    """Of calls that are parts of one."""
    known = [one for one in signs if one is not None]
    if len(known) < len(signs):
        return None

    def read() -> Health | None:
        found = [health for one in known if (health := one.read()) is not None]
        return _sum(found) if len(found) == len(known) else None

    return Signs(None, read)


def _quietly(work: Callable[[], T]) -> T | None:
    global _told
    try:
        return work()
    # Among others, memory may run out, and a tensor may be of a kind that norms do not know.
    except Exception as error:
        if not _told:
            _told = True
            logger.warning("the health of a call could not be looked at: %s: %s", type(error).__name__, error)
        return None


def _sum(found: Sequence[Health]) -> Health:
    norms = [health.norm for health in found if health.norm is not None]
    return Health(
        _hypot(norms) if norms else None,
        *(
            sum(getattr(health, name) for health in found)
            for name in ("elements", "zeros", "gradient_nans", "gradient_infs", "output_nans", "output_infs")
        ),
    )


def _hypot(norms: Iterable[float]) -> float:
    norms = list(norms)
    # math.hypot makes infinity of NaN and infinity.
    return math.nan if any(norm != norm for norm in norms) else math.hypot(*norms)


# What there is to look at.


def _numbers(tensors: Maybe) -> list[torch.Tensor]:
    """Those of the tensors that may hold what is no finite number, without graphs, on torch's own terms."""
    return [
        tensor.detach()
        for tensor in tensors
        if tensor is not None
        and (tensor.is_floating_point() or tensor.is_complex())
        # The code of another kind of tensor must not be run.
        and type(tensor) in _KINDS
        and tensor.numel()
    ]


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor, zeros of a sparse one left out, in a type that there are norms of."""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return tensor.float() if tensor.itemsize < 2 else tensor


# Norms and zeros.


def _norms(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    if any(tensor.dtype in _HALVES or tensor.is_complex() for tensor in tensors):
        return [torch.linalg.vector_norm(tensor, dtype=_wide(tensor)) for tensor in tensors]
    return torch._foreach_norm(tensors) if tensors else ()


def _wide(tensor: torch.Tensor) -> torch.dtype | None:
    """What to add squares up in; None: in the tensor's own type."""
    return torch.float32 if tensor.dtype in _HALVES else None


def _nonzeros(tensor: torch.Tensor) -> int | torch.Tensor:
    """How many elements are not zero; where the device computes on its own, as a tensor."""
    if not tensor.is_cpu:
        return torch.count_nonzero(tensor)
    if not _is_plain(tensor):
        return int(torch.count_nonzero(tensor))
    # Several times as fast as torch.
    flat = _array(tensor).reshape(-1)
    count = 0
    for at in range(0, flat.size, _CHUNK):
        part = flat[at : at + _CHUNK]
        count += int(np.count_nonzero(np.not_equal(part, 0, out=_scratch[: part.size])))
    return count


def _is_plain(tensor: torch.Tensor) -> bool:
    lies_there = not (tensor.is_neg() or tensor._is_zerotensor())
    return tensor.dtype in _TYPES and tensor.is_contiguous() and lies_there


class _Memory:
    """A plain tensor's memory, as numpy asks for it; valid while the tensor is held.

    What tensor.numpy() has looked at cannot be resized any more, and a model may keep a buffer that it fills anew for
    each gradient.
    """

    __slots__ = ("__array_interface__",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": _TYPES[tensor.dtype],
            "shape": tuple(tensor.shape),
            "data": (tensor.data_ptr(), True),
        }


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.asarray(_Memory(tensor))


def _precise(tensor: torch.Tensor) -> tuple[float, int, int]:
    """Norm, NaNs and infinities of a tensor, whatever its numbers are."""
    nans, infs = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    if nans or infs:
        # An element of a complex tensor may be both.
        return (math.nan if nans else math.inf), nans, infs
    wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    largest = float(wide.abs().max())
    return (largest * float(torch.linalg.vector_norm(wide / largest)) if largest else 0.0), 0, 0


def _examined(subject: Subject) -> Signs:
    gradients = _numbers(subject.gradients)
    others = _numbers(subject.others)
    outputs = _numbers(subject.outputs)
    elements = sum(gradient.numel() for gradient in gradients)
    tensors = [_values(tensor) for tensor in (*gradients, *others, *outputs)]
    split, end = len(gradients), len(gradients) + len(others)
    norms = _norms(tensors)
    counts = [_nonzeros(tensor) for tensor in tensors[:split]]

    def judged(norms: Sequence[float], counts: Sequence[int]) -> Health:
        found: list[float] = []
        bad = [0, 0, 0, 0]
        for index, (tensor, norm) in enumerate(zip(tensors, norms, strict=True)):
            if not math.isfinite(norm) or (index < split and norm < _TINY and counts[index]):
                norm, nans, infs = _precise(tensor)
                where = 0 if index < end else 2
                bad[where] += nans
                bad[where + 1] += infs
            if index < split:
                found.append(norm)
        tensors.clear()
        return Health(_hypot(found) if found else None, elements, elements - sum(counts), *bad)

    if all(tensor.is_cpu for tensor in tensors):
        health = judged([float(norm) for norm in norms], [int(count) for count in counts])
        return Signs(health)
    packed = _packed([*norms, *counts])

    def read() -> Health:
        values = packed.tolist()
        return judged(values[: len(norms)], [int(value) for value in values[len(norms) :]])

    return Signs(None, read)


def _packed(numbers: Iterable[torch.Tensor | int]) -> torch.Tensor:
    """Numbers, or rows of them, as one tensor, on the first one's device."""
    numbers = list(numbers)
    if all(isinstance(number, torch.Tensor) and number.is_cpu and number.dtype == torch.float32 for number in numbers):
        return torch.stack(numbers)  # type: ignore[arg-type]
    device = next((number.device for number in numbers if isinstance(number, torch.Tensor)), None)
    return torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])


# Several calls in one.


def _by_rows(
    gradients: Tensors,
    axis: int,
    parts: Sequence[tuple[int, int]],
    others: Tensors,
    subject: Callable[[int], Subject],
) -> list[Signs | None]:
    whole = [_values(g if g.layout is torch.strided else g.to_dense()) for g in gradients]
    # All else is looked at as a whole, since there is seldom something to find.
    rest = _norms([_values(tensor) for tensor in others])
    suspicion = _packed(rest).sum() if rest else torch.zeros(())
    sums = [_norms_by_row(gradient, axis) for gradient in whole]
    widths = sum(gradient.numel() // gradient.shape[axis] for gradient in whole)

    def judged(norms: Sequence[Sequence[float]], counts: Sequence[int], clean: bool) -> list[Signs | None]:
        """norms: of the rows of each gradient. counts: of elements that are not zero, of each call."""
        if not whole:
            return [Signs(_NOTHING) if clean else _examined(subject(index)) for index in range(len(parts))]
        signs: list[Signs | None] = []
        for index, ((start, rows), number) in enumerate(zip(parts, counts, strict=True)):
            norm = math.hypot(*(norm for of_rows in norms for norm in of_rows[start : start + rows]))
            if not clean or not norm < math.inf or (norm < _TINY and number):
                signs.append(_examined(subject(index)))
            else:
                size = widths * rows
                signs.append(Signs(Health(norm, size, size - number)))
        return signs

    if all(tensor.is_cpu for tensor in (*whole, suspicion)):
        counts = [0] * len(parts)
        for gradient in whole:
            counts = list(map(operator.add, counts, _nonzeros_by_part(gradient, axis, parts)))
        return judged([one.tolist() for one in sums], counts, math.isfinite(suspicion))
    packed = _packed([*sums, sum(_nonzeros_by_row(gradient, axis) for gradient in whole)]) if whole else None

    def read() -> list[Signs | None]:
        *norms, by_row = [[]] if packed is None else packed.tolist()
        counts = [int(sum(by_row[start : start + rows])) for start, rows in parts]
        return judged(norms, counts, math.isfinite(suspicion.item()))

    shared = functools.cache(read)
    return [Signs(None, functools.partial(_of_member, shared, index)) for index in range(len(parts))]


def _of_member(shared: Callable[[], list[Signs | None]], index: int) -> Health | None:
    signs = shared()[index]
    return None if signs is None else signs.read()


def _norms_by_row(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    across = [other for other in range(tensor.ndim) if other != axis]
    if not across:
        return tensor.abs().double()
    norms: torch.Tensor = torch.linalg.vector_norm(tensor, dim=across, dtype=_wide(tensor))
    return norms.double()


def _nonzeros_by_row(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    across = tuple(other for other in range(tensor.ndim) if other != axis)
    return torch.count_nonzero(tensor, dim=across) if across else (tensor != 0).long()


def _nonzeros_by_part(tensor: torch.Tensor, axis: int, parts: Sequence[tuple[int, int]]) -> list[int]:
    """Of each part along an axis, how many elements are not zero. The tensor is in the processor's own memory."""
    if not _is_plain(tensor):
        by_row = _nonzeros_by_row(tensor, axis).tolist()
        return [sum(by_row[start : start + rows]) for start, rows in parts]
    other = np.moveaxis(_array(tensor) != 0, axis, 0)
    return [int(np.count_nonzero(other[start : start + rows])) for start, rows in parts]
