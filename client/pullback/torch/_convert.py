"""From numpy arrays to torch tensors; the way back is `pullback._arrays.as_array`."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from pullback._arrays import Array

#: Types that numpy has from ml_dtypes: how to look at their bits, and what those bits are.
_BITS: dict[np.dtype[Any], tuple[type[np.generic], torch.dtype]] = {
    np.dtype(ml_dtypes.bfloat16): (np.int16, torch.bfloat16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, torch.float8_e4m3fn),
    np.dtype(ml_dtypes.float8_e4m3fnuz): (np.uint8, torch.float8_e4m3fnuz),
    np.dtype(ml_dtypes.float8_e5m2): (np.uint8, torch.float8_e5m2),
    np.dtype(ml_dtypes.float8_e5m2fnuz): (np.uint8, torch.float8_e5m2fnuz),
    np.dtype(ml_dtypes.float8_e8m0fnu): (np.uint8, torch.float8_e8m0fnu),
}


def to_torch(array: Array, device: torch.device) -> torch.Tensor:
    """A tensor of the array's dtype; on the CPU it shares the array's memory."""
    bits = _BITS.get(array.dtype)
    tensor = torch.from_numpy(array) if bits is None else torch.from_numpy(array.view(bits[0])).view(bits[1])
    return tensor if device.type == "cpu" else tensor.to(device)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are one to the last bit: NaN is itself here, and 0.0 is not -0.0."""
    if one.dtype != other.dtype or one.shape != other.shape or one.device != other.device:
        return False
    return torch.equal(_bits(one), _bits(other))


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return plain.view(_INTEGERS[plain.element_size()])
