"""Which element of a gradient is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pullback_server.engine.gate_slopes import Question, dotted
from pullback_server.engine.trial import Point, Tensors, Trial

#: As many elements are looked at one by one; of more, the half that is off the most, again and again.
_FEW = 64


@dataclass(frozen=True)
class Element:
    """An element of a gradient: of what ("input:x"), its index, and what it is by the VJP and by differences."""

    name: str
    index: list[int]
    analytical: complex
    numerical: complex


def locate(trial: Trial, point: Point, question: Question, step: float) -> Element:
    """The element that is off the most, as far as that can be found. Raises Failed.

    Of a tensor of n elements it takes 2 log2(n) + 128 forwards or so.
    """

    def numerical(along: Tensors) -> float:
        return (trial.valued(point, along, step) - trial.valued(point, along, -step)) / (2 * step)

    def gap(along: Tensors) -> float:
        return abs(numerical(along) - dotted(question.gradients, along))

    along = question.along
    name = next(iter(along)) if len(along) == 1 else max(along, key=lambda name: gap({name: along[name]}))
    tangent = along[name]
    low, high = 0, tangent.numel()

    def part(first: int, last: int) -> Tensors:
        mask = torch.zeros(tangent.numel(), dtype=torch.bool, device=tangent.device)
        mask[first:last] = True
        return {name: torch.where(mask.reshape(tangent.shape), tangent, 0)}

    while high - low > _FEW:
        middle = (low + high) // 2
        low, high = max((low, middle), (middle, high), key=lambda half: gap(part(*half)))
    gradient = question.gradients.get(name, torch.zeros_like(tangent))
    size = float(tangent.abs().max())
    found = []
    for index in range(low, high):
        unit = torch.zeros(tangent.numel(), dtype=tangent.dtype, device=tangent.device)
        unit[index] = size
        value: complex = numerical({name: unit.reshape(tangent.shape)}) / size
        if tangent.is_complex():
            value += 1j * numerical({name: 1j * unit.reshape(tangent.shape)}) / size
        place = [int(i) for i in torch.unravel_index(torch.tensor(index), tangent.shape)]
        found.append(Element(name, place, complex(gradient.flatten()[index]), complex(value)))
    return max(found, key=lambda element: abs(element.analytical - element.numerical))


def number(value: complex) -> str:
    """ "1.5", or "1.5+2j"."""
    return f"{value.real:.6g}" if value.imag == 0 else f"{value.real:.6g}{value.imag:+.6g}j"
