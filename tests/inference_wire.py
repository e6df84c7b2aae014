"""The Open Inference Protocol as its clients speak it: requests written by protobuf's own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message

from pullback_wire import dtype_name, numpy_dtype, wire_dtype
from pullback_wire.inference import DATATYPES, INFERENCE_METHODS, STREAM_INFER, datatype_name
from pullback_wire.inference import open_inference_pb2 as pb

PATIENCE = 60
#: Field of typed contents, by datatype.
CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
}  # fmt: skip


def infer(
    model: str,
    inputs: Mapping[str, np.ndarray],
    *,
    raw: bool = True,
    outputs: Sequence[str] = (),
    parameters: Mapping[str, bool | int | float | str] | None = None,
    **more: Any,
) -> pb.ModelInferRequest:
    """A request. raw: with raw contents, else with typed ones."""
    request = pb.ModelInferRequest(model_name=model, outputs=[{"name": name} for name in outputs], **more)
    for name, array in inputs.items():
        datatype = datatype_name(wire_dtype(array.dtype))
        tensor = request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        if raw:
            request.raw_input_contents.append(array.tobytes())
        else:
            getattr(tensor.contents, CONTENTS[datatype]).extend(array.ravel().tolist())
    for key, value in (parameters or {}).items():
        kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
        setattr(request.parameters[key], kinds[type(value)], value)
    return request


def arrays(response: pb.ModelInferResponse) -> dict[str, np.ndarray]:
    """The outputs of an answer."""
    assert len(response.outputs) == len(response.raw_output_contents)
    found = {}
    for tensor, data in zip(response.outputs, response.raw_output_contents, strict=True):
        assert not tensor.HasField("contents")
        array = np.frombuffer(data, numpy_dtype(DATATYPES[tensor.datatype])).reshape(tuple(tensor.shape))
        assert dtype_name(DATATYPES[tensor.datatype]) == array.dtype.name
        found[tensor.name] = array
    return found


class Caller:
    """Calls a server. metadata: of each call."""

    def __init__(self, target: str, metadata: Sequence[tuple[str, str]] = ()) -> None:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1),
                   ("grpc.use_local_subchannel_pool", 1)]  # fmt: skip
        self.channel = grpc.insecure_channel(target, options=options)
        self.metadata = tuple(metadata)

    def raw(self, method: str, data: bytes, timeout: float = PATIENCE) -> bytes:
        call = self.channel.unary_unary(INFERENCE_METHODS[method].path)
        found: bytes = call(data, timeout=timeout, metadata=self.metadata, wait_for_ready=True)
        return found

    def call(self, method: str, request: Message) -> Any:
        return INFERENCE_METHODS[method].response.FromString(self.raw(method, request.SerializeToString()))

    def infer(self, *arguments: Any, **options: Any) -> dict[str, np.ndarray]:
        """The outputs."""
        return arrays(self.call("ModelInfer", infer(*arguments, **options)))

    def stream(self, requests: Any, timeout: float = PATIENCE, metadata: Sequence[tuple[str, str]] = ()) -> Any:
        """The call: an iterator of answers."""
        call = self.channel.stream_stream(
            STREAM_INFER.path, lambda one: one.SerializeToString(), pb.ModelStreamInferResponse.FromString
        )
        return call(requests, timeout=timeout, metadata=(*self.metadata, *metadata))
