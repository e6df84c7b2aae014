"""Inputs drawn so that they fit a signature."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pullback.conformance._numbers import is_complex, is_floating
from pullback_wire import DTYPES
from pullback_wire.v1 import tensor_pb2 as pb

#: What free extents are tried as, in the order of their first use; unequal ones tell mistakes of shape apart.
_EXTENTS = ((3, 4, 5, 2), (2, 3, 4, 5), (8, 8, 8, 8), (16, 16, 16, 16), (32, 32, 32, 32), (1, 1, 1, 1))
#: Shapes tried for an input that declares none.
_SHAPES: tuple[tuple[int, ...], ...] = ((3, 4), (4,), (), (2, 3, 4), (2, 3, 8, 8))
_ANY_DTYPE = (pb.DTYPE_FLOAT64, pb.DTYPE_FLOAT32)
#: Integers that are drawn are no further from 0.
_FAR = 1 << 62
#: Most elements of one input.
_MOST = 1 << 20


def rng(*words: object) -> np.random.Generator:
    """Random numbers that are the same each time for the same words."""
    return np.random.default_rng(zlib.crc32(repr(words).encode()))


def drawn(generator: np.random.Generator, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
    """Standard normal numbers of a floating or complex dtype."""
    values = generator.normal(size=shape)
    if is_complex(dtype):
        values = values + 1j * generator.normal(size=shape)
    return np.asarray(values).astype(dtype)


def like(generator: np.random.Generator, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Standard normal numbers of the same dtypes and shapes."""
    return {name: drawn(generator, array.dtype, array.shape) for name, array in arrays.items()}


@dataclass(frozen=True)
class Way:
    """One way to draw inputs: extents for free axes, a shape and dtype for what declares none, and positive or not."""

    extents: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: int
    positive: bool


def ways(specs: Sequence[pb.TensorSpec]) -> Iterator[Way]:
    """Ways that are worth trying, the likeliest first."""
    any_shape = any(spec.any_shape for spec in specs if not spec.optional)
    any_dtype = any(spec.dtype == pb.DTYPE_UNSPECIFIED for spec in specs if not spec.optional)
    free = any(dim.WhichOneof("extent") == "symbol" for spec in specs for dim in spec.shape)
    for shape in _SHAPES if any_shape else _SHAPES[:1]:
        for extents in _EXTENTS if free else _EXTENTS[:1]:
            for dtype in _ANY_DTYPE if any_dtype else _ANY_DTYPE[:1]:
                for positive in (False, True):
                    yield Way(extents, shape, dtype, positive)


def inputs(specs: Sequence[pb.TensorSpec], way: Way, seed: str, optional: bool) -> dict[str, np.ndarray]:
    """Arrays for a signature's inputs. optional: those too that may be left out and declare a shape.

    Raises ValueError where they would be absurdly large.
    """
    extents: dict[str, int] = {}
    found = {}
    for spec in specs:
        if spec.optional and (spec.any_shape or not optional):
            continue
        number = spec.dtype or way.dtype
        shape = way.shape if spec.any_shape else tuple(_extent(dim, extents, way.extents) for dim in spec.shape)
        if math.prod(shape) > _MOST:
            raise ValueError(f"input {spec.name!r} would have the shape {list(shape)}")
        found[spec.name] = _values(rng(seed, spec.name), spec, DTYPES[number], shape, way.positive)
    return found


def _extent(dim: pb.Dim, extents: dict[str, int], free: Sequence[int]) -> int:
    if dim.WhichOneof("extent") == "size":
        return dim.size
    if dim.symbol not in extents:
        extents[dim.symbol] = free[len(extents) % len(free)]
    return extents[dim.symbol]


def _values(
    generator: np.random.Generator, spec: pb.TensorSpec, dtype: np.dtype, shape: Sequence[int], positive: bool
) -> np.ndarray:
    # An infinite bound is none.
    low = spec.minimum if spec.HasField("minimum") and math.isfinite(spec.minimum) else None
    high = spec.maximum if spec.HasField("maximum") and math.isfinite(spec.maximum) else None
    if is_complex(dtype):
        return drawn(generator, dtype, shape)
    if is_floating(dtype):
        if low is None and high is None:
            values = generator.uniform(0.3, 1.3, shape) if positive else 0.8 * generator.normal(size=shape)
        else:
            below = low if low is not None else min(high or 0.0, 0.0) - 1.0
            above = high if high is not None else below + 1.0
            # Away from the bounds, so that differences stay within.
            values = below + (above - below) * generator.uniform(0.2, 0.8, shape)
        return np.asarray(values).astype(dtype)
    if dtype == np.bool_:
        return np.asarray(generator.integers(0, 2, shape)).astype(bool)
    first = math.ceil(low) if low is not None else min(0, math.floor(high)) if high is not None else 0
    last = math.floor(high) if high is not None else first + 1
    # As far as numpy draws numbers; of a range that wide a part is as good.
    first, last = max(first, -_FAR), min(last, _FAR)
    return np.asarray(generator.integers(first, last + 1, shape)).astype(dtype)
