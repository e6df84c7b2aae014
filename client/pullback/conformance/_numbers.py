"""Inner products, tolerances and central differences over named arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from pullback.conformance._check import Mismatch, Skip
from pullback_wire.dtypes import COMPLEX, FLOATING, wire_dtype

#: Arrays by name; None: the function does not depend on it.
Named = Mapping[str, "np.ndarray | None"]


def is_floating(dtype: np.dtype) -> bool:
    """Whether it is one of the wire's real floating types."""
    return wire_dtype(dtype) in FLOATING


def is_complex(dtype: np.dtype) -> bool:
    return wire_dtype(dtype) in COMPLEX


def is_differentiable(dtype: np.dtype) -> bool:
    return is_floating(dtype) or is_complex(dtype)


def wide(array: np.ndarray) -> np.ndarray:
    """In double precision."""
    return array.astype(np.complex128 if is_complex(array.dtype) else np.float64)


def epsilon(dtype: np.dtype) -> float:
    """Of a floating-point or complex dtype."""
    import ml_dtypes

    # numpy knows nothing of bfloat16 and float8, ml_dtypes nothing of complex numbers.
    return float(np.finfo(dtype).eps if is_complex(dtype) else ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]


def largest(dtype: np.dtype) -> float:
    """The largest finite number of a real floating-point dtype."""
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


def precision(arrays: Iterable[np.ndarray]) -> float:
    """The largest epsilon among the floating and complex ones."""
    return max((epsilon(array.dtype) for array in arrays if is_differentiable(array.dtype)), default=2.0**-52)


def inner(one: Named, other: Named) -> float:
    """Re <one, other> over the names of `one`; what is None counts as zero."""
    total = 0.0
    for name, array in one.items():
        partner = other.get(name)
        if array is not None and partner is not None:
            total += float(np.vdot(wide(array), wide(partner)).real)
    return total


def norm(one: Named) -> float:
    """The 2-norm over all of them."""
    return math.sqrt(sum(float(np.sum(np.abs(wide(array)) ** 2)) for array in one.values() if array is not None))


def scaled(one: Named, factor: float) -> dict[str, np.ndarray | None]:
    """Each times a number, in its own dtype."""
    return {name: None if array is None else (wide(array) * factor).astype(array.dtype) for name, array in one.items()}


def moved(at: Mapping[str, np.ndarray], along: Mapping[str, np.ndarray], step: float) -> dict[str, np.ndarray]:
    """at + step * along; what `along` does not name stands still."""
    return {
        name: (wide(array) + step * wide(along[name])).astype(array.dtype) if name in along else array
        for name, array in at.items()
    }


def finite(*many: Named) -> bool:
    """Whether there is no NaN and no infinity."""
    return all(bool(np.isfinite(wide(array)).all()) for one in many for array in one.values() if array is not None)


def same(received: Named, expected: Named, tolerance: float, what: str, floor: float = 0.0) -> None:
    """Raises Mismatch unless names, shapes and dtypes are equal and values agree.

    tolerance: relative to the norm of each expected array, or of all of them together, whichever is larger. floor: what
    a norm counts for at least, where the values are differences of larger ones.
    """
    if list(received) != list(expected):
        raise Mismatch(f"{what}: {list(expected)}", str(list(received)))
    scale = max(norm(expected) if finite(expected) else 0.0, floor)
    for name, right in expected.items():
        got = received[name]
        if right is None or got is None:
            if right is not got:
                raise Mismatch(f"{what} {name!r}: {told(right)}", told(got))
            continue
        if got.shape != right.shape or got.dtype != right.dtype:
            raise Mismatch(f"{what} {name!r}: {described(right)}", described(got))
        close(got, right, tolerance, scale, f"{what} {name!r}")


def close(got: np.ndarray, right: np.ndarray, tolerance: float, scale: float, what: str) -> None:
    """Raises Mismatch unless both have NaN and infinities in the same places and agree elsewhere."""
    if not (is_differentiable(got.dtype) and is_differentiable(right.dtype)):
        if not np.array_equal(got, right):
            raise Mismatch(f"{what}: {told(right)}", told(got))
        return
    one, other = wide(got), wide(right)
    mask = np.isfinite(other)
    odd = np.array_equal(np.isfinite(one), mask) and np.array_equal(one[~mask], other[~mask], equal_nan=True)
    if not odd or (mask.any() and float(np.abs(one[mask] - other[mask]).max()) > tolerance * max(scale, 1e-30)):
        raise Mismatch(f"{what}: {told(right)}", told(got))


def equal(received: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Raises Mismatch unless one array is another, to the last digits. what: it is."""
    if received.dtype != expected.dtype or received.shape != expected.shape:
        raise Mismatch(f"{what} {expected.dtype} {list(expected.shape)}", f"{received.dtype} {list(received.shape)}")
    scale = float(np.abs(expected).max()) if expected.size and is_differentiable(expected.dtype) else 0.0
    close(received, expected, 1e-13, max(scale, 1.0), what)


def told(array: np.ndarray | None) -> str:
    """An array's beginning, for people."""
    if array is None:
        return "nothing: it is unused"
    flat = ", ".join(f"{value:.10g}" if not is_complex(array.dtype) else f"{value:.8g}" for value in wide_or_not(array))
    return f"{described(array)} ({flat}{', ...' if array.size > 6 else ''})"


def wide_or_not(array: np.ndarray) -> list[complex]:
    """The first elements as Python numbers."""
    first = array.reshape(-1)[:6]
    return [complex(one) if is_complex(array.dtype) else float(one) for one in first]


def described(array: np.ndarray) -> str:
    """dtype and shape."""
    return f"{array.dtype} {list(array.shape)}"


def slope(value: Callable[[float], float], eps: float, scale: float) -> tuple[float, float]:
    """d value(s) / ds at 0 by central differences, and how far off that may be.

    eps: of the values' dtype. scale: of the terms that `value` adds up, for their rounding.

    Raises Skip where two steps contradict each other: the function is not smooth there, or too steep for its dtype.
    """
    step = 2.0 * eps ** (1 / 4)
    coarse = (value(step) - value(-step)) / (2 * step)
    fine = (value(step / 2) - value(-step / 2)) / step
    if not (math.isfinite(coarse) and math.isfinite(fine)):
        raise Skip("its values are not finite in the neighbourhood")
    # One step of Richardson's, and what it moved as the error.
    best = fine + (fine - coarse) / 3
    error = abs(fine - coarse) + 8 * eps * scale / step
    return best, error


def agrees(claimed: float, found: float, error: float, size: float, what: str) -> None:
    """Raises Mismatch unless a claimed slope is the one found by differences.

    size: what the slope could be at most, by Cauchy's inequality. Raises Skip where the error would hide a mistake.
    """
    if not (math.isfinite(claimed) and math.isfinite(size)):
        raise Mismatch(f"{what} {found:.10g} (by central differences)", f"{claimed:.10g}")
    allowed = 4 * error + 1e-9 * size
    if allowed > 0.05 * max(abs(found), 0.02 * size):
        raise Skip(f"differences tell too little at this point ({found:.3g} +- {error:.1g})")
    if not abs(claimed - found) <= allowed:
        raise Mismatch(f"{what} {found:.10g} (by central differences, +- {allowed:.1g})", f"{claimed:.10g}")
