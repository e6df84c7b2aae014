"""The precision that a model computes in, whatever that of its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pullback_server.engine._dtypes import differentiable


class Widths(TorchFunctionMode):
    """Sees the narrowest floating numbers that are computed with. (A dispatch mode would import torch._dynamo.)

    least: bytes of a real number.
    """

    least = 8

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim and differentiable(tensor.dtype):
                self.least = min(self.least, tensor.itemsize // (2 if tensor.is_complex() else 1))
        return found
