"""The contract of Pullback, shared by client and server: messages, tensor codec, framing, error reasons.

Nothing here knows torch, jax or grpc.
"""

from pullback_wire.codec import TensorReader, TensorWriter, element_count
from pullback_wire.dtypes import DTYPES, dtype_name, numpy_dtype, wire_dtype
from pullback_wire.framing import PAYLOADS_FIELD, WireError, decode, encode, encode_message
from pullback_wire.methods import (
    CALLER_KEY,
    GRADIENT_METHODS,
    MODEL_METHODS,
    PRIORITY_KEY,
    REQUEST_ID_KEY,
    SESSION_SERVICE,
    TIMINGS_KEY,
    Method,
)
from pullback_wire.reasons import ERROR_DOMAIN, Code, Reason

__all__ = [
    "CALLER_KEY",
    "DTYPES",
    "ERROR_DOMAIN",
    "GRADIENT_METHODS",
    "MODEL_METHODS",
    "PAYLOADS_FIELD",
    "PRIORITY_KEY",
    "REQUEST_ID_KEY",
    "SESSION_SERVICE",
    "TIMINGS_KEY",
    "Code",
    "Method",
    "Reason",
    "TensorReader",
    "TensorWriter",
    "WireError",
    "decode",
    "dtype_name",
    "element_count",
    "encode",
    "encode_message",
    "numpy_dtype",
    "wire_dtype",
]
