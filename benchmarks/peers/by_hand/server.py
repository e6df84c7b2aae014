"""gRPC written by hand: one method, shapes in a small JSON header before the raw bytes of the tensors."""

import json
import struct
import sys
from concurrent import futures

import grpc
import numpy as np
import torch
import workload


# user code
def pack(head: dict, *tensors: torch.Tensor) -> bytes:
    head = json.dumps({**head, "shapes": [tuple(tensor.shape) for tensor in tensors]}).encode()
    return b"".join([struct.pack("<I", len(head)), head, *(tensor.detach().numpy().tobytes() for tensor in tensors)])


def unpack(data: bytes) -> tuple[dict, list[torch.Tensor]]:
    (length,) = struct.unpack_from("<I", data)
    head, offset, tensors = json.loads(data[4 : 4 + length]), 4 + length, []
    for shape in head["shapes"]:
        array = np.frombuffer(data, np.float32, int(np.prod(shape)), offset).reshape(shape)
        tensors.append(torch.from_numpy(array.copy()))
        offset += array.nbytes
    return head, tensors


def compute(data: bytes, context: grpc.ServicerContext) -> bytes:
    try:
        head, tensors = unpack(data)
        if head["function"] == "identity":
            return pack({}, *tensors)
        return pack({}, *workload.vjp(head["function"], *tensors))
    except (KeyError, ValueError, RuntimeError, struct.error) as error:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))


def main() -> None:
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.server(futures.ThreadPoolExecutor(1), options=unlimited)
    handler = grpc.method_handlers_generic_handler("vjp.Vjp", {"Compute": grpc.unary_unary_rpc_method_handler(compute)})
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
# end
