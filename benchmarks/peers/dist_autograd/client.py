"""torch's distributed autograd: the callee's graph stays there, backward() goes through both."""

import os

import numpy as np
import torch
import workload
from torch.distributed import autograd as dist_autograd
from torch.distributed import rpc

PACKAGES = ["torch"]


class Client:
    SHARED = True  # init_rpc is once per process
    PENALTY = "dist_autograd.backward on (g * x).sum(), g from dist_autograd.get_gradients; it has no create_graph"

    def __init__(self, address: str) -> None:
        os.environ["TP_SOCKET_IFNAME"] = "lo"
        # user code
        options = rpc.TensorPipeRpcBackendOptions(
            init_method=f"file://{address}", rpc_timeout=60, _transports=["uv"], _channels=["basic"]
        )
        rpc.init_rpc("client", rank=1, world_size=2, rpc_backend_options=options)
        # end

    def vjp(self, x: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # user code
        leaf = torch.from_numpy(x).requires_grad_()
        with dist_autograd.context() as context:
            y = rpc.rpc_sync("server", workload.forward, ("mlp", leaf))
            dist_autograd.backward(context, [(y * torch.from_numpy(v)).sum()])
            return y.detach().numpy(), dist_autograd.get_gradients(context)[leaf].numpy()
        # end

    def echo(self, x: np.ndarray) -> np.ndarray:
        return rpc.rpc_sync("server", workload.forward, ("identity", torch.from_numpy(x))).numpy()

    def penalty(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        leaf = torch.from_numpy(x).requires_grad_()
        with dist_autograd.context() as context:
            y = rpc.rpc_sync("server", workload.forward, ("cube", leaf))
            dist_autograd.backward(context, [(y * torch.from_numpy(v)).sum()], retain_graph=True)
            gradient = dist_autograd.get_gradients(context)[leaf]
        with dist_autograd.context() as context:
            dist_autograd.backward(context, [(gradient * leaf).sum()])
            return dist_autograd.get_gradients(context)[leaf].numpy()
