"""Wire numbers of dtypes <-> torch's dtypes."""

from __future__ import annotations

import torch

from pullback_wire.dtypes import DTYPES, dtype_name

#: Wire number -> torch dtype, as far as this torch has it.
TORCH: dict[int, torch.dtype] = {
    number: getattr(torch, dtype_name(number)) for number in DTYPES if hasattr(torch, dtype_name(number))
}
#: torch dtype -> wire number.
WIRE: dict[torch.dtype, int] = {dtype: number for number, dtype in TORCH.items()}


def name_of(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def differentiable(dtype: torch.dtype) -> bool:
    """Whether torch can differentiate with respect to tensors of this dtype."""
    return dtype.is_floating_point or dtype.is_complex


def describe(tensor: torch.Tensor) -> str:
    """ "float32 [2, 3]", for messages."""
    return f"{name_of(tensor.dtype)} {list(tensor.shape)}"
