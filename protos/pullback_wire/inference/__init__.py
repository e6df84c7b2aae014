"""The Open Inference Protocol, as far as a server needs it. `pullback_wire` does not load it.

Its descriptors lie in a pool of their own (see protos/generate.sh), so that a process which also has another client's
of the same names goes on.
"""

from pullback_wire.inference.datatypes import DATATYPES, datatype_name
from pullback_wire.inference.methods import INFERENCE_METHODS, INFERENCE_SERVICE, STREAM_INFER

__all__ = ["DATATYPES", "INFERENCE_METHODS", "INFERENCE_SERVICE", "STREAM_INFER", "datatype_name"]
