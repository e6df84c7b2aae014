"""mosec: a Rust front, Python workers, dynamic batching, msgpack bodies."""

import sys

import numpy as np
import torch
import workload
from mosec import Server, Worker
from mosec.mixin import MsgpackMixin


# user code
def tensor(sent: dict, name: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(sent[name], np.float32).reshape(sent["shapes"][name]).copy())


class Mlp(MsgpackMixin, Worker):
    def forward(self, batch: list[dict]) -> list[dict]:
        x, v = (torch.cat([tensor(sent, name) for sent in batch]) for name in "xv")
        y, gradient = workload.vjp("mlp", x, v)
        rows = [sent["shapes"]["x"][0] for sent in batch]
        parts = zip(y.split(rows), gradient.split(rows), strict=True)
        return [{"y": part.numpy().tobytes(), "gradient": slope.numpy().tobytes()} for part, slope in parts]


# end


class Cube(MsgpackMixin, Worker):
    def forward(self, sent: dict) -> dict:
        y, gradient = workload.vjp("cube", tensor(sent, "x"), tensor(sent, "v"))
        return {"y": y.numpy().tobytes(), "gradient": gradient.numpy().tobytes()}


class Identity(MsgpackMixin, Worker):
    def forward(self, sent: dict) -> dict:
        return {"y": tensor(sent, "x").numpy().tobytes()}


if __name__ == "__main__":
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", sys.argv[1], "--max-request-size", str(1 << 28)]
    # user code
    server = Server()
    # The shortest wait there is: what has arrived by then makes a batch.
    server.append_worker(Mlp, max_batch_size=16, max_wait_time=1, route="/vjp/mlp")
    # end
    server.append_worker(Cube, route="/vjp/cube")
    server.append_worker(Identity, route="/evaluate/identity")
    # user code
    server.run()
    # end
