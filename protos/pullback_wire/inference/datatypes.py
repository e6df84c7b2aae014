"""Element types by the protocol's names. Complex numbers and float8 have none."""

from pullback_wire.dtypes import dtype_name
from pullback_wire.v1 import tensor_pb2 as pb

#: Name -> the wire's number.
DATATYPES: dict[str, int] = {
    "BOOL": pb.DTYPE_BOOL,
    "UINT8": pb.DTYPE_UINT8,
    "UINT16": pb.DTYPE_UINT16,
    "UINT32": pb.DTYPE_UINT32,
    "UINT64": pb.DTYPE_UINT64,
    "INT8": pb.DTYPE_INT8,
    "INT16": pb.DTYPE_INT16,
    "INT32": pb.DTYPE_INT32,
    "INT64": pb.DTYPE_INT64,
    "FP16": pb.DTYPE_FLOAT16,
    "BF16": pb.DTYPE_BFLOAT16,
    "FP32": pb.DTYPE_FLOAT32,
    "FP64": pb.DTYPE_FLOAT64,
}
_NAMES = {number: name for name, number in DATATYPES.items()}


def datatype_name(number: int) -> str:
    """The protocol's name for a wire number.

    Raises ValueError for one that has none.
    """
    try:
        return _NAMES[number]
    except KeyError:
        raise ValueError(f"the Open Inference Protocol has no datatype for {dtype_name(number)}") from None
