"""Element types: numbers of the wire's `Dtype`, their names in torch, and their numpy types."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from pullback_wire.v1 import tensor_pb2 as pb

#: Wire number -> numpy dtype (little-endian). bfloat16 and float8 come from ml_dtypes, numpy having none of its own.
DTYPES: dict[int, np.dtype] = {
    pb.DTYPE_BOOL: np.dtype(np.bool_),
    pb.DTYPE_UINT8: np.dtype("<u1"),
    pb.DTYPE_UINT16: np.dtype("<u2"),
    pb.DTYPE_UINT32: np.dtype("<u4"),
    pb.DTYPE_UINT64: np.dtype("<u8"),
    pb.DTYPE_INT8: np.dtype("<i1"),
    pb.DTYPE_INT16: np.dtype("<i2"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_FLOAT16: np.dtype("<f2"),
    pb.DTYPE_BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_FLOAT64: np.dtype("<f8"),
    pb.DTYPE_COMPLEX64: np.dtype("<c8"),
    pb.DTYPE_COMPLEX128: np.dtype("<c16"),
    pb.DTYPE_FLOAT8_E4M3FN: np.dtype(ml_dtypes.float8_e4m3fn),
    pb.DTYPE_FLOAT8_E4M3FNUZ: np.dtype(ml_dtypes.float8_e4m3fnuz),
    pb.DTYPE_FLOAT8_E5M2: np.dtype(ml_dtypes.float8_e5m2),
    pb.DTYPE_FLOAT8_E5M2FNUZ: np.dtype(ml_dtypes.float8_e5m2fnuz),
    pb.DTYPE_FLOAT8_E8M0FNU: np.dtype(ml_dtypes.float8_e8m0fnu),
}

_WIRE = {dtype: number for number, dtype in DTYPES.items()}
_NAMES = {number: dtype.name for number, dtype in DTYPES.items()}
_BY_NAME = {name: number for number, name in _NAMES.items()}

#: Bytes of one element, by wire number.
ITEM_SIZES: dict[int, int] = {number: dtype.itemsize for number, dtype in DTYPES.items()}

#: Real floating types of the wire.
FLOATING: frozenset[int] = frozenset(number for number, name in _NAMES.items() if name.startswith(("float", "bfloat")))
#: Complex types of the wire.
COMPLEX: frozenset[int] = frozenset({pb.DTYPE_COMPLEX64, pb.DTYPE_COMPLEX128})
#: Real floating types a result may be asked for in.
RESULT_DTYPES: frozenset[int] = frozenset({pb.DTYPE_FLOAT16, pb.DTYPE_BFLOAT16, pb.DTYPE_FLOAT32, pb.DTYPE_FLOAT64})


def dtype_name(number: int) -> str:
    """Torch's name for a wire number ("float32"); "unspecified" or "unknown(99)" where there is none."""
    if number == pb.DTYPE_UNSPECIFIED:
        return "unspecified"
    return _NAMES.get(number, f"unknown({number})")


def dtype_number(name: str) -> int:
    """Wire number for torch's name of a dtype ("float32").

    Raises ValueError for a name that the wire has no number for.
    """
    try:
        return _BY_NAME[name.removeprefix("torch.")]
    except KeyError:
        raise ValueError(f"no dtype is called {name!r}; known: {', '.join(sorted(_BY_NAME))}") from None


def numpy_dtype(number: int) -> np.dtype:
    """The numpy dtype for a wire number.

    Raises ValueError for a number that names no dtype.
    """
    try:
        return DTYPES[number]
    except KeyError:
        raise ValueError(f"dtype number {number} is unknown") from None


def wire_dtype(dtype: np.dtype) -> int:
    """The wire number for a numpy dtype of either byte order.

    Raises ValueError for a dtype that the wire does not carry (object, str, datetime, structured, long double).
    """
    try:
        return _WIRE[dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype]
    except KeyError:
        raise ValueError(f"dtype {dtype} cannot travel; known: {', '.join(sorted(_BY_NAME))}") from None
