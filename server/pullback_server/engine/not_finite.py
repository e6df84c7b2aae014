"""What a tensor holds that is no finite number."""

from __future__ import annotations

from typing import Literal

import torch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

Kind = Literal["nan", "inf"]


def kinds_of(tensor: torch.Tensor) -> tuple[Kind, ...]:
    """What a tensor holds that is no finite number."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.device.type == "meta":
        return ()
    with torch.no_grad():
        values = _plain(tensor)
        if values is None or not values.numel() or bool(values.isfinite().all()):
            return ()
        found: tuple[Kind, ...] = ("nan",) if bool(values.isnan().any()) else ()
        return (*found, "inf") if bool(values.isinf().any()) else found


def stored(tensor: torch.Tensor) -> torch.Tensor | None:
    """The memory that holds a tensor's numbers; None where there is none, or no getting at it.

    What torch.func wraps is unwrapped: all that is mapped over at once. A tensor of zeros that forward mode and second
    derivatives make has no memory, and torch raises where it is asked for.
    """
    tensor = _unwrapped(tensor)
    if tensor._is_zerotensor():
        return None
    if tensor.layout is torch.strided:
        return tensor
    try:
        return tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()
    except RuntimeError:
        return None


def _unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def _plain(tensor: torch.Tensor) -> torch.Tensor | None:
    """The values that a tensor holds, in a dtype that can be asked; None where there is no getting at them."""
    values = stored(tensor)
    # torch has no isnan for the narrowest.
    return values.float() if values is not None and values.itemsize == 1 else values


def described(tensor: torch.Tensor, kind: Kind) -> str:
    """Its shape, and how many elements are not finite in this way."""
    with torch.no_grad():
        values = _plain(tensor)
        assert values is not None
        count = int((values.isnan() if kind == "nan" else values.isinf()).sum())
    whole = _unwrapped(tensor)
    return f"shape {tuple(whole.shape)}, {count} of {whole.numel()} elements"
