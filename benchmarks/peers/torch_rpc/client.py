"""torch.distributed.rpc: the caller calls a VJP function of the callee by name."""

import os

import numpy as np
import torch
import workload
from torch.distributed import rpc

PACKAGES = ["torch"]


class Client:
    SHARED = True  # init_rpc is once per process
    PENALTY = "(g * x).sum().backward() with g from rpc_sync"

    def __init__(self, address: str) -> None:
        os.environ["TP_SOCKET_IFNAME"] = "lo"
        # user code
        options = rpc.TensorPipeRpcBackendOptions(
            init_method=f"file://{address}", rpc_timeout=60, _transports=["uv"], _channels=["basic"]
        )
        rpc.init_rpc("client", rank=1, world_size=2, rpc_backend_options=options)
        # end

    def vjp(self, x: np.ndarray, v: np.ndarray, function: str = "mlp") -> tuple[np.ndarray, np.ndarray]:
        # user code
        y, gradient = rpc.rpc_sync("server", workload.vjp, (function, torch.from_numpy(x), torch.from_numpy(v)))
        return y.numpy(), gradient.numpy()
        # end

    def echo(self, x: np.ndarray) -> np.ndarray:
        return rpc.rpc_sync("server", workload.forward, ("identity", torch.from_numpy(x))).numpy()

    def penalty(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        leaf = torch.from_numpy(x).requires_grad_()
        _, gradient = rpc.rpc_sync("server", workload.vjp, ("cube", leaf, torch.from_numpy(v)))
        (gradient * leaf).sum().backward()
        return leaf.grad.numpy()
