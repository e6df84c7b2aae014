"""What a tensor holds that is no finite number."""

from __future__ import annotations

from typing import Literal

import torch

Kind = Literal["nan", "inf"]


def kinds_of(tensor: torch.Tensor) -> tuple[Kind, ...]:
    """What a tensor holds that is no finite number."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.device.type == "meta":
        return ()
    with torch.no_grad():
        values = plain(tensor)
        if values is None or not values.numel() or bool(values.isfinite().all()):
            return ()
        found: tuple[Kind, ...] = ("nan",) if bool(values.isnan().any()) else ()
        return (*found, "inf") if bool(values.isinf().any()) else found


def plain(tensor: torch.Tensor) -> torch.Tensor | None:
    """The values that a tensor holds, in a dtype that can be asked; None where there is no getting at them."""
    if tensor.layout is not torch.strided:
        try:
            tensor = tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()
        except RuntimeError:
            return None
    # torch has no isnan for the narrowest.
    return tensor.float() if tensor.itemsize == 1 else tensor


def described(tensor: torch.Tensor, kind: Kind) -> str:
    """Its shape, and how many elements are not finite in this way."""
    with torch.no_grad():
        values = plain(tensor)
        assert values is not None
        count = int((values.isnan() if kind == "nan" else values.isinf()).sum())
    return f"shape {tuple(tensor.shape)}, {count} of {tensor.numel()} elements"
