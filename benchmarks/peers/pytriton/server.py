"""PyTriton: NVIDIA's Triton Inference Server in front of a Python function, dynamic batching, KServe's gRPC."""

import sys

import numpy as np
import torch
import workload

# user code
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


@batch
def mlp(x: np.ndarray, v: np.ndarray) -> dict[str, np.ndarray]:
    y, gradient = workload.vjp("mlp", torch.from_numpy(x), torch.from_numpy(v))
    return {"y": y.numpy(), "gradient": gradient.numpy()}


# end


@batch
def cube(x: np.ndarray, v: np.ndarray) -> dict[str, np.ndarray]:
    y, gradient = workload.vjp("cube", torch.from_numpy(x), torch.from_numpy(v))
    return {"y": y.numpy(), "gradient": gradient.numpy()}


@batch
def identity(x: np.ndarray) -> dict[str, np.ndarray]:
    return {"y": x}


def array(name: str, *shape: int) -> Tensor:
    return Tensor(name=name, dtype=np.float32, shape=shape)


if __name__ == "__main__":
    port = int(sys.argv[1])
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=port,
        grpc_address="127.0.0.1",
        grpc_port=int(sys.argv[2]),
        allow_metrics=False,
    )
    plain = ModelConfig(max_batch_size=512)
    # user code
    with Triton(config=config) as triton:
        triton.bind(
            model_name="mlp",
            infer_func=mlp,
            inputs=[array("x", 784), array("v", 10)],
            outputs=[array("y", 10), array("gradient", 784)],
            # The shortest delay there is: what has arrived by then makes a batch.
            config=ModelConfig(max_batch_size=512, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        )
        # end
        free = [array("x", -1), array("v", -1)], [array("y", -1), array("gradient", -1)]
        triton.bind("cube", cube, *free, config=plain)
        triton.bind("identity", identity, [array("x", -1)], [array("y", -1)], config=plain)
        # user code
        triton.serve()
        # end
