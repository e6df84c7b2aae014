"""What users pass as a tensor, as numpy arrays."""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from pullback_wire import numpy_dtype, wire_dtype
from pullback_wire.dtypes import COMPLEX, FLOATING, RESULT_DTYPES, dtype_name, dtype_number

Array: TypeAlias = np.ndarray[Any, Any]

#: torch's float types that numpy lacks: how to look at their bits, and what those bits are.
_TORCH_BITS = {
    "torch.bfloat16": ("int16", ml_dtypes.bfloat16),
    "torch.float8_e4m3fn": ("uint8", ml_dtypes.float8_e4m3fn),
    "torch.float8_e4m3fnuz": ("uint8", ml_dtypes.float8_e4m3fnuz),
    "torch.float8_e5m2": ("uint8", ml_dtypes.float8_e5m2),
    "torch.float8_e5m2fnuz": ("uint8", ml_dtypes.float8_e5m2fnuz),
    "torch.float8_e8m0fnu": ("uint8", ml_dtypes.float8_e8m0fnu),
}


def is_array(value: object) -> bool:
    """Whether `value` is an array by itself: numpy's, torch's, or any other that numpy can read. Scalars are not."""
    return not isinstance(value, np.generic) and hasattr(value, "__array__")


def as_array(value: Any, field: str) -> Array:
    """`value` as a numpy array with a dtype that can travel; a view of its memory where that is possible.

    Arrays and numpy scalars keep their dtype, torch tensors too (on any device, whether or not they require grad).
    As in torch, Python floats become float32, ints int64, bools bool, complex numbers complex64, and so do lists of
    them.

    Raises TypeError naming `field` for what is no tensor, ValueError for a ragged list or an int beyond int64.
    """
    torch = sys.modules.get("torch")
    # A torch that is still being imported has no Tensor yet.
    tensor_type = getattr(torch, "Tensor", None)
    if tensor_type is not None and isinstance(value, tensor_type):
        try:
            array = _from_torch(value, torch)
        except (TypeError, NotImplementedError) as error:
            # Sparse, quantised, without data, of a dtype that numpy has no twin for.
            raise TypeError(f"{field} is a torch tensor that numpy cannot hold: {error}") from None
    elif is_array(value) or isinstance(value, np.generic):
        if _is_masked(value):
            raise TypeError(f"{field} is a masked array, whose mask cannot travel; pass .filled(...) or .data")
        array = np.asarray(value)
    elif isinstance(value, bool | int | float | complex | list | tuple):
        array = _from_python(value, field)
    else:
        raise TypeError(f"{field} is a {type(value).__name__}, expected an array, a tensor, a number or a list of them")
    try:
        wire_dtype(array.dtype)
    except ValueError:
        raise TypeError(f"{field} has dtype {array.dtype}, which is no dtype of a tensor") from None
    return array


def _is_masked(value: Any) -> bool:
    # Not np.ma, which numpy imports on demand: an import under way in one thread hangs a child that another forks.
    masked_type = getattr(sys.modules.get("numpy.ma"), "MaskedArray", None)
    return masked_type is not None and isinstance(value, masked_type)


def _from_python(value: Any, field: str) -> Array:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{field} is a list that makes no array: {error}") from None
    if _has_dtype(value):
        return array
    kind = array.dtype.kind
    if kind == "f":
        return array.astype(np.float32)
    if kind == "c":
        return array.astype(np.complex64)
    if kind in "iu":
        if kind == "u":
            raise ValueError(f"{field} holds an int beyond int64; pass a numpy array of the dtype you mean")
        return array.astype(np.int64)
    if kind == "O" and _is_int(value):
        raise ValueError(f"{field} holds an int beyond int64; pass a numpy array of the dtype you mean")
    return array


def _has_dtype(value: Any) -> bool:
    """Whether anything in nested lists brings a dtype of its own, which then counts."""
    if isinstance(value, list | tuple):
        return any(_has_dtype(element) for element in value)
    return hasattr(value, "dtype")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, list | tuple) and any(map(_is_int, value)))


def _from_torch(tensor: Any, torch: Any) -> Array:
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    bits = _TORCH_BITS.get(str(plain.dtype))
    if bits is None:
        array: Array = plain.numpy()
        return array
    view, dtype = bits
    looked_at: Array = plain.view(getattr(torch, view)).numpy()
    return looked_at.view(dtype)


def is_differentiable(array: Array) -> bool:
    """Whether the dtype is a floating or complex one."""
    number = wire_dtype(array.dtype)
    return number in FLOATING or number in COMPLEX


def result_dtype(dtype: Any) -> int:
    """The wire number of the dtype that results are wanted in: a name, a numpy dtype or a torch dtype; None: 0.

    Raises ValueError for what is no float16, bfloat16, float32 or float64.
    """
    if dtype is None:
        return 0
    try:
        # str() of a torch.dtype is its name; numpy knows its own and ml_dtypes' types.
        named = isinstance(dtype, str) or str(dtype).startswith("torch.")
        number = dtype_number(str(dtype)) if named else wire_dtype(np.dtype(dtype))
    except (ValueError, TypeError):
        number = 0
    if number not in RESULT_DTYPES:
        wanted = ", ".join(dtype_name(known) for known in sorted(RESULT_DTYPES))
        raise ValueError(f"result_dtype is {dtype!r}, expected one of {wanted}")
    return number


def refuse_torch_graph(value: Any, field: str) -> None:
    """Raises TypeError for a torch tensor that requires grad: on the way to a server its graph would end silently."""
    torch = sys.modules.get("torch")
    tensor_type = getattr(torch, "Tensor", None)
    if tensor_type is not None and isinstance(value, tensor_type) and value.requires_grad:
        raise TypeError(
            f"{field} is a torch tensor that requires grad, whose graph would end here; pass .detach(), or use "
            "pullback.torch.RemoteModule"
        )


def tensor_dtype(dtype: Any) -> np.dtype[Any]:
    """A dtype of a tensor: given by name, as numpy's or as torch's. Raises ValueError for any other."""
    try:
        named = isinstance(dtype, str) or str(dtype).startswith("torch.")
        number = dtype_number(_ALIASES.get(str(dtype), str(dtype))) if named else wire_dtype(np.dtype(dtype))
    except (ValueError, TypeError):
        raise ValueError(f"{dtype!r} is no dtype of a tensor") from None
    return numpy_dtype(number)


#: torch's other names.
_ALIASES = {"float": "float32", "double": "float64", "half": "float16", "long": "int64", "int": "int32"}
