"""What people write by hand: gRPC with a generated `bytes` field, torch in the same process, one thread.

It speaks ComputeVjp for one model, `mlp`, and Evaluate for `identity`, through generated messages. Prints its port.
"""

import sys
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import torch
from models import identity, mlp

from pullback_wire.v1 import gradient_service_pb2 as pb
from pullback_wire.v1 import tensor_pb2

MODULE = mlp()


def read(tensor: tensor_pb2.Tensor, payloads: Any) -> torch.Tensor:
    array = np.frombuffer(payloads[tensor.payload], dtype=np.float32).reshape(tuple(tensor.shape))
    return torch.from_numpy(array.copy())


def write(tensors: list[tuple[str, torch.Tensor]]) -> tuple[list[tensor_pb2.Tensor], list[bytes]]:
    described = [
        tensor_pb2.Tensor(name=name, dtype=tensor_pb2.DTYPE_FLOAT32, shape=tensor.shape, payload=index)
        for index, (name, tensor) in enumerate(tensors)
    ]
    return described, [tensor.detach().numpy().tobytes() for _, tensor in tensors]


def vjp(request: pb.ComputeVjpRequest, context: grpc.ServicerContext) -> pb.ComputeVjpResponse:
    x = read(request.inputs[0], request.payloads).requires_grad_()
    cotangent = read(request.cotangents[0], request.payloads)
    output = MODULE(x)
    (gradient,) = torch.autograd.grad(output, x, cotangent)
    tensors, payloads = write([("output", output), ("input", gradient)])
    return pb.ComputeVjpResponse(
        outputs=tensors[:1], gradients=[pb.Gradient(name="input", value=tensors[1])], payloads=payloads
    )


def evaluate(request: pb.EvaluateRequest, context: grpc.ServicerContext) -> pb.EvaluateResponse:
    tensors, payloads = write([("output", identity(read(request.inputs[0], request.payloads)))])
    return pb.EvaluateResponse(outputs=tensors, payloads=payloads)


def main() -> None:
    torch.set_num_threads(1)
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.server(futures.ThreadPoolExecutor(1), options=options)
    handlers = {
        "ComputeVjp": grpc.unary_unary_rpc_method_handler(
            vjp,
            request_deserializer=pb.ComputeVjpRequest.FromString,
            response_serializer=pb.ComputeVjpResponse.SerializeToString,
        ),
        "Evaluate": grpc.unary_unary_rpc_method_handler(
            evaluate,
            request_deserializer=pb.EvaluateRequest.FromString,
            response_serializer=pb.EvaluateResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("pullback.v1.GradientService", handlers),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
