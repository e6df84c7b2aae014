"""torch.distributed.rpc: the callee. It waits for the caller, joins it, and runs what it is sent."""

import os
import sys

import workload

# user code
from torch.distributed import rpc

# end

os.environ["TP_SOCKET_IFNAME"] = "lo"


def options(port: str) -> rpc.TensorPipeRpcBackendOptions:
    # TCP, as all contestants have; between two processes of a machine it would take shared memory.
    return rpc.TensorPipeRpcBackendOptions(
        init_method=f"tcp://127.0.0.1:{port}", rpc_timeout=60, _transports=["uv"], _channels=["basic"]
    )


if __name__ == "__main__":
    assert workload.FUNCTIONS
    # user code
    rpc.init_rpc("server", rank=0, world_size=2, rpc_backend_options=options(sys.argv[1]))
    rpc.shutdown()
    # end
