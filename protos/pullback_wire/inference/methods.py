"""Its methods by name."""

from pullback_wire.inference import open_inference_pb2 as pb
from pullback_wire.methods import Method, unary_methods

#: The service's full name.
INFERENCE_SERVICE: str = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
#: Its unary methods by name.
INFERENCE_METHODS: dict[str, Method] = unary_methods(pb, "GRPCInferenceService")
#: Its one stream, both ways.
STREAM_INFER = Method(INFERENCE_SERVICE, "ModelStreamInfer", pb.ModelInferRequest, pb.ModelStreamInferResponse)
