"""How a shape follows from free extents: what a few points let one say of it, and no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Shape = tuple[int, ...]
#: Extents by axis: a number, the name of a free extent, or "": free, and nothing more is known.
Claim = tuple[int | str, ...]
#: The free extents of an input, by name, and the shape that came of them.
Point = tuple[Mapping[str, int], Shape]


def fit(points: Sequence[Point]) -> Claim | None:
    """What all points agree on: for each axis a constant, or the one free extent that it equals; else "".

    A dimension that is a polynomial of degree one in each extent is told rightly, if of every extent two values are
    among points that are otherwise equal. None: not even the number of axes is the same, or there is no point.
    """
    ranks = {len(shape) for _, shape in points}
    if len(ranks) != 1:
        return None
    return tuple(_axis(points, axis) for axis in range(ranks.pop()))


def _axis(points: Sequence[Point], axis: int) -> int | str:
    found: list[int | str] = []
    came = [shape[axis] for _, shape in points]
    if len(set(came)) == 1:
        found.append(came[0])
    names = set(points[0][0]).intersection(*(extents for extents, _ in points))
    found += [
        name for name in names if all(extents[name] == size for (extents, _), size in zip(points, came, strict=True))
    ]
    return found[0] if len(found) == 1 else ""


def common(one: Claim | None, other: Claim | None) -> Claim | None:
    """What two claims both say."""
    if one is None or other is None or len(one) != len(other):
        return None
    return tuple(mine if mine == theirs else "" for mine, theirs in zip(one, other, strict=True))
