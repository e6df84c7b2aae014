"""What a model's declared specs say of the tensors of a call; checked before the model's code sees them."""

from __future__ import annotations

from pullback_server.faults import Fault
from pullback_server.job import SpecRecord, TensorRef
from pullback_wire import Reason, dtype_name


def check_tensor(spec: SpecRecord, tensor: TensorRef, what: str, field: str, free: dict[str, tuple[int, str]]) -> None:
    """Holds one tensor of a call against its spec.

    what: "input" or "parameter", for the sentence. free: collects the extents of named axes, over all tensors of the
    call: the extent, and the tensor that fixed it.

    Raises Fault (BAD_TENSOR).
    """
    if spec.dtype and tensor.dtype != spec.dtype:
        raise Fault(
            Reason.BAD_TENSOR,
            f"{what} {spec.name!r} is {dtype_name(tensor.dtype)}, expected {dtype_name(spec.dtype)}",
            f"{field}.dtype",
        )
    if spec.shape is None:
        return
    shape = list(tensor.shape)
    wanted = "[" + ", ".join(str(extent) for extent in spec.shape) + "]"
    if len(shape) != len(spec.shape):
        raise Fault(
            Reason.BAD_TENSOR,
            f"{what} {spec.name!r} has shape {shape}, expected {wanted}: {len(spec.shape)} axes, not {len(shape)}",
            f"{field}.shape",
        )
    for extent, expected in zip(shape, spec.shape, strict=True):
        if isinstance(expected, str):
            known, by = free.setdefault(expected, (extent, spec.name))
            if known != extent:
                raise Fault(
                    Reason.BAD_TENSOR,
                    f"{what} {spec.name!r} has shape {shape}, expected {wanted}: "
                    f"{expected} is {known} in {by!r} and {extent} here",
                    f"{field}.shape",
                )
        elif extent != expected:
            raise Fault(
                Reason.BAD_TENSOR, f"{what} {spec.name!r} has shape {shape}, expected {wanted}", f"{field}.shape"
            )
