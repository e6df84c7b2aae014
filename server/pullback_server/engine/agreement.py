"""Whether two runs of one model came to the same, but for rounding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

#: How far apart results may lie, relative to their norm, by the bytes of a real number of the narrowest type in play.
_TOLERANCE = {8: 1e-8, 4: 2e-3, 2: 5e-2}
_WIDEST_TOLERANCE = 0.2
#: What is so much smaller than everything else may be nothing but rounding.
_SMALL = 1e-3

Named = Mapping[str, "torch.Tensor | None"]


@dataclass
class Found:
    """What a run came to.

    reach: for each of the gradients the outputs that depend on what it is by, and under "" all that require grad.
    """

    outputs: Named
    gradients: Named
    reach: Mapping[str, frozenset[str]]


def disagreement(expected: Found, actual: Found, others: Iterable[torch.dtype], *, fewer: bool = False) -> str:
    """How another run differs from the one that is right, in words; empty: it does not.

    others: types that were computed in, besides those of the results. fewer: the expected run is by less than the
    other, on which fewer outputs may depend.
    """
    alike = expected.reach[""] == actual.reach[""]
    if expected.outputs.keys() != actual.outputs.keys() or not (alike or fewer):
        return "its outputs, or which of them can be differentiated, are others than eager's"
    widths = [_width(dtype) for dtype in others if dtype.is_floating_point or dtype.is_complex]
    why = _differing("output", expected.outputs, actual.outputs, widths)
    # Where other outputs were pulled, gradients are others.
    return why or (_differing("gradient of", expected.gradients, actual.gradients, widths) if alike else "")


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize // (2 if dtype.is_complex else 1)


def _differing(what: str, expected: Named, actual: Named, widths: list[int]) -> str:
    sizes = {name: _norm(tensor) for name, tensor in expected.items() if tensor is not None}
    floor = _SMALL * max(sizes.values(), default=0.0)
    for name, right in expected.items():
        found = actual[name]
        if right is None:
            # Compiled code may compute a gradient where there is none; then it is zero.
            right = None if found is None else torch.zeros_like(found)
        if right is None:
            continue
        found = torch.zeros_like(right) if found is None else found
        if found.dtype != right.dtype or found.shape != right.shape:
            return f"{what} {name!r} is {_told(found)}, eager's {_told(right)}"
        width = min([_width(right.dtype), *widths]) if right.is_floating_point() or right.is_complex() else 0
        gap, size = _gap(right, found), sizes.get(name, 0.0)
        # NaN is no agreement.
        if not gap <= (_TOLERANCE.get(width, _WIDEST_TOLERANCE) * (size + floor) if width else 0.0):
            return f"{what} {name!r} differs by {gap / size if size else gap:.2g} from eager's"
    return ""


def _told(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    dense = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    return dense.to(torch.complex128 if dense.is_complex() else torch.float64)


def _norm(tensor: torch.Tensor) -> float:
    wide = _wide(tensor)
    return float(torch.linalg.vector_norm(torch.where(wide.isfinite(), wide, 0)))


def _gap(right: torch.Tensor, found: torch.Tensor) -> float:
    """The norm of the difference; what is not finite must be the same."""
    a, b = _wide(right), _wide(found)
    equal = (a == b) | ((a != a) & (b != b))
    return float(torch.linalg.vector_norm(torch.where(equal, 0, a - b)))
