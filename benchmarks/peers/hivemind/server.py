"""hivemind: ModuleBackends behind a libp2p daemon, found through a DHT; all on loopback."""

import signal
import sys
import time

import torch
import workload

# user code
from hivemind import DHT, ModuleBackend, Server
from hivemind.utils.tensor_descr import BatchTensorDescriptor

# end

LOOPBACK = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "nat_port_map": False, "auto_nat": False, "use_relay": False}


def backend(name: str, columns: int, rows: int = 512) -> ModuleBackend:
    # user code
    return ModuleBackend(
        name=name,
        module=workload.FUNCTIONS[name.partition(".")[0]],
        args_schema=(BatchTensorDescriptor(columns),),
        max_batch_size=rows,
    )
    # end


if __name__ == "__main__":
    # user code
    dht = DHT(start=True, **LOOPBACK)
    backends = {"mlp.0": backend("mlp.0", 784)}
    # end
    backends |= {"cube.0": backend("cube.0", 6), "identity.0": backend("identity.0", 4 << 20)}
    # user code
    server = Server(dht, backends, num_connection_handlers=4, device=torch.device("cpu"), start=True)
    # end
    print("ADDRESS", dht.get_visible_maddrs()[0], flush=True)
    # A polite end removes sockets and shared memory.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        # user code
        while server.is_alive():
            time.sleep(1)
        # end
    finally:
        server.shutdown()
