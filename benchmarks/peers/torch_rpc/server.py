"""torch.distributed.rpc: the callee. It waits for the caller, joins it, and runs what it is sent."""

import os
import sys

import workload

# user code
from torch.distributed import rpc

# end

os.environ["TP_SOCKET_IFNAME"] = "lo"


def options(rendezvous: str) -> rpc.TensorPipeRpcBackendOptions:
    # The rendezvous is a file, since torch's TCP store would listen on all interfaces. The bytes go by TCP, as those of
    # all contestants do; left alone, two processes of one machine would take shared memory.
    return rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{rendezvous}", rpc_timeout=60, _transports=["uv"], _channels=["basic"]
    )


if __name__ == "__main__":
    assert workload.FUNCTIONS
    # user code
    rpc.init_rpc("server", rank=0, world_size=2, rpc_backend_options=options(sys.argv[1]))
    rpc.shutdown()
    # end
