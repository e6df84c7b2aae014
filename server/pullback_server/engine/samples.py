"""Inputs made up from declared specs, to probe a model with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from pullback_server.engine._dtypes import TORCH
from pullback_server.engine.hosted import HostedModel
from pullback_server.job import SpecRecord

#: Extents tried for the free ones, in order of their first use. Those that do not suit the model make it raise.
_EXTENTS: tuple[Sequence[int], ...] = ((2, 3, 5, 7), (4,), (8,), (16,), (32,), (64,), (1,))
#: More elements than this make probing slow, and say no more.
_MOST = 1 << 24
#: So many optional inputs are tried one by one.
_SINGLES = 3
#: Of a scalar integer with so many values each is tried.
FEW = 8


def choices(hosted: HostedModel) -> list[list[SpecRecord]]:
    """Which inputs to probe with: those that must be given, and all whose shape is declared.

    Empty when an input that must be given has no declared shape.
    """
    records = hosted.input_records()
    required = [record for record in records if not record.optional]
    if not all(record.shape is not None for record in required):
        return []
    declared = [record for record in records if record.shape is not None]
    if not declared:
        return []
    return [declared] if declared == required or not required else [required, declared]


def singles(hosted: HostedModel) -> list[list[SpecRecord]]:
    """As `choices`, with the optional inputs one by one, where those are few and there are choices."""
    declared = choices(hosted)[-1]
    optional = [record for record in declared if record.optional]
    if not 1 < len(optional) <= _SINGLES:
        return []
    return [[record for record in declared if not record.optional or record is one] for one in optional]


def shapes(records: Sequence[SpecRecord]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes for every input, small ones first."""
    symbols = list(dict.fromkeys(e for record in records for e in record.shape or () if isinstance(e, str)))
    for extents in _EXTENTS if symbols else _EXTENTS[:1]:
        size = {symbol: extents[index % len(extents)] for index, symbol in enumerate(symbols)}
        found = {
            record.name: tuple(size[e] if isinstance(e, str) else e for e in record.shape or ()) for record in records
        }
        if sum(math.prod(shape) for shape in found.values()) <= _MOST:
            yield found


def sample(
    records: Sequence[SpecRecord],
    shapes_of: Mapping[str, tuple[int, ...]],
    generator: torch.Generator,
    *,
    wide: bool = False,
    cautious: bool = False,
) -> dict[str, torch.Tensor]:
    """Random inputs within their bounds.

    wide: floating ones in double precision.
    cautious: integers without bounds are 0, since an index out of range would cost a CUDA device's context.
    """
    found = {}
    for record in records:
        dtype = TORCH.get(record.dtype, torch.float32)
        if wide and dtype.is_floating_point:
            dtype = torch.float64
        elif wide and dtype.is_complex:
            dtype = torch.complex128
        low, high = record.minimum, record.maximum
        if cautious and high is None and not dtype.is_floating_point:
            high = low = low or 0
        found[record.name] = _random(shapes_of[record.name], dtype, low, high, generator)
    return found


def sampled(
    records: Sequence[SpecRecord],
    shapes_of: Mapping[str, tuple[int, ...]],
    number: int,
    *,
    wide: bool = False,
    cautious: bool = False,
) -> dict[str, torch.Tensor]:
    """The inputs of a point, by its number: two that follow each other are mirrored about the middle of the domain.

    So a scalar is met on both sides of it. Flags, and scalar integers of a small range, take every value in turn.
    """
    found = sample(records, shapes_of, torch.Generator().manual_seed(number // 2 + 1), wide=wide, cautious=cautious)
    others = sample(records, shapes_of, torch.Generator().manual_seed(number + 1), wide=wide, cautious=cautious)
    place = 0
    for record in records:
        tensor = found[record.name]
        count = values(record, shapes_of[record.name])
        if count:
            turn = number + number // count + place * (number // 2)
            found[record.name] = torch.full_like(tensor, math.ceil(record.minimum or 0) + turn % count)
            place += 1
        elif not (tensor.is_floating_point() or tensor.is_complex()):
            found[record.name] = others[record.name]
        elif number % 2:
            found[record.name] = mirrored(record, tensor)
    return found


def mirrored(record: SpecRecord, tensor: torch.Tensor) -> torch.Tensor:
    """About the middle of what samples are drawn from."""
    low, high = record.minimum, record.maximum
    if low is None and high is None:
        return -tensor
    low, high = high - 2.0 if low is None and high is not None else float(low or 0.0), high
    double = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    return (low + (low + 2.0 if high is None else high) - double).to(tensor.dtype)


def values(record: SpecRecord, shape: Sequence[int]) -> int:
    """How many values a scalar integer or flag has, where those are few; else 0."""
    dtype = TORCH.get(record.dtype, torch.float32)
    if math.prod(shape) != 1 or dtype.is_floating_point or dtype.is_complex:
        return 0
    if dtype == torch.bool:
        return 2
    low, high = record.minimum, record.maximum
    count = 0 if high is None else math.floor(high) - math.ceil(low or 0) + 1
    return count if 1 < count <= FEW else 0


def spread(record: SpecRecord) -> float | None:
    """Half the range that samples are drawn from, where it is bounded."""
    low, high = record.minimum, record.maximum
    if low is None or high is None:
        return None if low is high else 1.0
    return (high - low) / 2


def _random(
    shape: tuple[int, ...], dtype: torch.dtype, low: float | None, high: float | None, generator: torch.Generator
) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex128).to(dtype)
    if not dtype.is_floating_point:
        least = 0 if low is None else math.ceil(low)
        # Without bounds nothing is known; 0 and 1 index most things.
        most = least + 1 if high is None else min(math.floor(high), least + 2**31)
        return torch.randint(least, most + 1, shape, generator=generator).to(dtype)
    if low is None and high is None:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    start = high - 2.0 if low is None and high is not None else float(low or 0.0)
    stop = start + 2.0 if high is None else float(high)
    # Away from the bounds, so that a step of a finite difference does not cross them.
    share = 0.05 + 0.9 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return (start + (stop - start) * share).to(dtype)
