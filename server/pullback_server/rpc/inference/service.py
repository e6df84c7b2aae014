"""The service's methods and who answers each; what is not offered is refused in a sentence."""

from __future__ import annotations

from typing import NoReturn

import grpc

from pullback_server.rpc.inference.infer import InferHandler
from pullback_server.rpc.inference.metadata import MetadataHandler
from pullback_server.rpc.inference.streaming import Streams
from pullback_server.rpc.probes import Probes
from pullback_server.rpc.unary import Unary
from pullback_wire.inference import INFERENCE_METHODS, STREAM_INFER
from pullback_wire.inference import open_inference_pb2 as pb

_METADATA = ("ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig", "RepositoryIndex")
_SHARED = "tensors travel in messages; there is no shared memory"
#: What is said of each method that is not served.
REFUSED = {
    "ModelStatistics": "/metrics on the metrics port has the figures of each model",
    "RepositoryModelLoad": "pullback.v1.ModelService/LoadModel does this",
    "RepositoryModelUnload": "pullback.v1.ModelService/UnloadModel does this",
    "SystemSharedMemoryStatus": _SHARED,
    "SystemSharedMemoryRegister": _SHARED,
    "SystemSharedMemoryUnregister": _SHARED,
    "CudaSharedMemoryStatus": _SHARED,
    "CudaSharedMemoryRegister": _SHARED,
    "CudaSharedMemoryUnregister": _SHARED,
    "TraceSetting": "traces are set up when the server starts (--tracing)",
    "LogSettings": "logs are set up when the server starts (--log-level, --log-format)",
}


def handlers(
    unary: Unary, infer: InferHandler, metadata: MetadataHandler, streams: Streams, probes: Probes
) -> dict[str, grpc.RpcMethodHandler]:
    """By the names of the methods."""
    found = {name: unary.method_handler(INFERENCE_METHODS[name], metadata) for name in _METADATA}
    found["ModelInfer"] = unary.method_handler(INFERENCE_METHODS["ModelInfer"], infer)
    found[STREAM_INFER.name] = streams.method_handler()
    for name, why in REFUSED.items():
        found[name] = _refusing(name, why)

    # Asked by probes, every few seconds, and so neither logged nor counted: as health is.
    async def live(request: pb.ServerLiveRequest, context: grpc.aio.ServicerContext) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ready(request: pb.ServerReadyRequest, context: grpc.aio.ServicerContext) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=probes.is_ready)

    for name, answer in (("ServerLive", live), ("ServerReady", ready)):
        method = INFERENCE_METHODS[name]
        found[name] = grpc.unary_unary_rpc_method_handler(
            answer, method.request.FromString, method.response.SerializeToString
        )
    return found


def _refusing(name: str, why: str) -> grpc.RpcMethodHandler:
    async def refuse(request: bytes, context: grpc.aio.ServicerContext) -> NoReturn:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"Method not found: this server has no {name}; {why}")
        raise AssertionError("a call that was refused went on")

    return grpc.unary_unary_rpc_method_handler(refuse)
