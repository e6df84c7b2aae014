"""The client of the gRPC server written by hand."""

import json
import struct

import grpc
import numpy as np

PACKAGES = ["grpcio", "torch"]
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Client:
    def __init__(self, address: str) -> None:
        # A connection each, as the other peers' clients have; grpc would share one between equal channels.
        local = [("grpc.use_local_subchannel_pool", 1)]
        # user code
        self.method = grpc.insecure_channel(f"127.0.0.1:{address}", OPTIONS + local).unary_unary("/vjp.Vjp/Compute")

    def call(self, function: str, *arrays: np.ndarray) -> list[np.ndarray]:
        head = json.dumps({"function": function, "shapes": [array.shape for array in arrays]}).encode()
        data = b"".join([struct.pack("<I", len(head)), head, *(array.tobytes() for array in arrays)])
        data = self.method(data)
        (length,) = struct.unpack_from("<I", data)
        offset, results = 4 + length, []
        for shape in json.loads(data[4 : 4 + length])["shapes"]:
            results.append(np.frombuffer(data, np.float32, int(np.prod(shape)), offset).reshape(shape))
            offset += results[-1].nbytes
        return results

    # end

    def vjp(self, x: np.ndarray, v: np.ndarray, function: str = "mlp") -> list[np.ndarray]:
        return self.call(function, x, v)

    def echo(self, x: np.ndarray) -> np.ndarray:
        return self.call("identity", x)[0]
