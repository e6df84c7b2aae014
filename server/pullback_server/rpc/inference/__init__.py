"""GRPCInferenceService: forward passes, VJPs and HVPs for clients of KServe and Triton. See docs/open_inference.md."""

from pullback_server.rpc.inference.descriptors import Descriptors
from pullback_server.rpc.inference.infer import InferHandler
from pullback_server.rpc.inference.metadata import MetadataHandler
from pullback_server.rpc.inference.service import handlers
from pullback_server.rpc.inference.streaming import Streams

__all__ = ["Descriptors", "InferHandler", "MetadataHandler", "Streams", "handlers"]
