"""What a derivative command got, and how it is told: to people, to programs, and in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pullback._arrays import Array, is_differentiable
from pullback._cli.literals import to_json
from pullback._cli.tables import short, width

#: Elements that are printed one by one, and beyond which none are.
_ALL, _SOME = 100, 10_000


@dataclass(frozen=True)
class Section:
    """Arrays of one kind. prefix: of their names in files, where each name stands for one array. None: unused."""

    title: str
    prefix: str
    arrays: Mapping[str, Array | None]


@dataclass(frozen=True)
class Outcome:
    """What came back. version: of the model that answered; empty: the answer did not say."""

    model: str
    method: str
    version: str
    revision: int
    sections: list[Section] = field(default_factory=list)
    #: Of all gradients, before they were clipped.
    norm: Any = None

    def arrays(self, asked_for: bool = False) -> dict[str, Array]:
        """By name as in a file. Raises ValueError where a name would stand for two of them.

        asked_for: only those that the command is named after, which come last.
        """
        found: dict[str, Array] = {}
        for section in self.sections[-1:] if asked_for else self.sections:
            for name, array in section.arrays.items():
                if array is None:
                    continue
                if section.prefix + name in found:
                    raise ValueError(f"the result has the name {section.prefix + name!r} twice; use --json")
                found[section.prefix + name] = array
        return found

    def document(self) -> dict[str, Any]:
        """For programs."""
        told: dict[str, Any] = {
            "model": self.model,
            "version": self.version or None,
            "revision": self.revision,
            "method": self.method,
        }
        for section in self.sections:
            told[section.title] = {name: to_json(array) for name, array in section.arrays.items()}
        if self.norm is not None:
            told["norm"] = np.asarray(self.norm).tolist()
        return told

    def text(self) -> str:
        """For people."""
        version = f" version {self.version}" if self.version else ""
        lines = [f"{self.model}{version}: {self.method}"]
        for section in self.sections:
            lines.append(f"  {section.title.replace('_', ' ')}")
            for name, array in section.arrays.items():
                lines += [f"    {line}".rstrip() for line in _told(name, array)]
        if self.norm is not None:
            lines.append(f"  norm before clipping: {np.array2string(np.asarray(self.norm), precision=6)}")
        return "\n".join(lines)


def _told(name: str, array: Array | None) -> list[str]:
    if array is None:
        return [f"{name}: unused"]
    lines = [f"{name}: {array.dtype.name}{list(array.shape)}{_figures(array)}"]
    if array.ndim == 0:
        return [f"{lines[0]}  {array[()]}"]
    if 0 < array.size <= _SOME:
        # Of larger ones the corners; a row each is enough of more than a matrix.
        edge = 3 if array.ndim <= 2 else 1
        values = np.array2string(array, max_line_width=width() - 6, threshold=_ALL, edgeitems=edge)
        lines += [f"  {line}" for line in values.splitlines()]
    return lines


def _figures(array: Array) -> str:
    """Norm, least and largest element, and how many are no finite numbers."""
    if array.size == 0 or array.ndim == 0:
        return ""
    if not is_differentiable(array):
        return "" if array.dtype == np.bool_ else f"  min {array.min()}  max {array.max()}"
    wide = np.abs(array.astype(np.complex128)) if array.dtype.kind == "c" else array.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    told = []
    if finite.size == wide.size:
        # Squares of large elements would not be finite.
        largest = float(np.abs(wide).max())
        norm = largest * float(np.linalg.norm(wide / largest)) if largest else 0.0
        told.append(f"norm {norm:.6g}")
    if array.dtype.kind == "c":
        told += [f"largest |.| {finite.max():.6g}"] if finite.size else []
    elif finite.size:
        told += [f"min {finite.min():.6g}", f"max {finite.max():.6g}"]
    nans = int(np.isnan(wide).sum())
    infinite = wide.size - finite.size - nans
    told += [f"{short(number)} {what}" for number, what in ((nans, "NaN"), (infinite, "Inf")) if number]
    return "  " + "  ".join(told)
