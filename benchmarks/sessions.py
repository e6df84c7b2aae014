"""Sessions against the floor of gRPC's own streams, and against stateless calls, in one run.

As in latency.py, contestants take turns within a round and ratios are taken within a round.
Run: python benchmarks/sessions.py
"""

import argparse
import platform
import queue
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import torch
from latency import BIG, compare
from models import mlp
from serving import HERE, child, pullback_server

import pullback as pb
from pullback import _caller

#: About what one backward on a held graph sends besides its cotangent, and gets besides its gradient.
_DESCRIPTION = 64


class BareStream:
    """Ping-pong on a bare stream of gRPC's own."""

    def __init__(self, target: str, path: str) -> None:
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._answers = grpc.insecure_channel(target, BIG).stream_stream(path)(self._frames())

    def _frames(self) -> Iterator[bytes]:
        while (message := self._out.get()) is not None:
            yield message

    def __call__(self, *messages: bytes) -> None:
        for message in messages:
            self._out.put(message)
        for _ in messages:
            next(self._answers)

    def close(self) -> None:
        """Ends it, as the server expects it."""
        self._out.put(None)
        for _ in self._answers:
            pass


def small(target: str, echo: str, rounds: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 784), dtype=np.float32)
    v = rng.standard_normal((32, 10), dtype=np.float32)
    module = mlp()
    x_torch, v_torch = torch.from_numpy(x).requires_grad_(), torch.from_numpy(v)
    y_torch = module(x_torch)
    client = pb.connect(target)
    model = client.model("mlp")

    # One graph is held; each work runs one backward on it and reads the gradient.
    held = client.tensor(x, requires_grad=True)
    y = model(held)

    def backward() -> object:
        (gradient,) = pb.autograd.grad(y, held, v, retain_graph=True)
        assert gradient is not None
        return gradient.numpy()

    stream = BareStream(echo, f"/stream/{x.nbytes + _DESCRIPTION}")
    there = bytes(v.nbytes + _DESCRIPTION)
    compare(
        f"backward on a held graph: MLP 784-256-10, batch 32 ({v.nbytes} bytes there, {x.nbytes} back)",
        {
            "floor: bare stream echo of the same bytes": lambda: stream(there),
            "floor: the same backward in process": lambda: torch.autograd.grad(
                y_torch, x_torch, v_torch, retain_graph=True
            ),
            "session: autograd.grad and read": backward,
        },
        rounds,
        200,
    )
    stream.close()

    def unary() -> None:
        model.evaluate(x)
        model.vjp(x, v)

    def vjp() -> None:
        model.vjp(x, v)

    def steps(session: pb.Session) -> Callable[[], object]:
        def work() -> object:
            leaf = session.tensor(x, requires_grad=True)
            model(leaf).backward(gradient=v)
            assert leaf.grad is not None
            return leaf.grad.numpy()

        return work

    waiting, pipelined = client.session(), client.session(pipelined=True)
    compare(
        "forward, backward, and the gradient read",
        {
            "floor: evaluate and vjp, two unary calls": unary,
            "vjp, one unary call": vjp,
            "session": steps(waiting),
            "session, pipelined": steps(pipelined),
        },
        rounds,
        100,
    )


def large(target: str, echo: str, mebibytes: int, rounds: int) -> None:
    x = np.random.default_rng(0).standard_normal((mebibytes << 18,), dtype=np.float32)
    data = x.tobytes()
    chunks = [data[at : at + (1 << 20)] for at in range(0, len(data), 1 << 20)]
    bare = grpc.insecure_channel(echo, BIG).unary_unary("/echo/same")
    stream = BareStream(echo, "/stream/same")
    identity = pb.connect(target, max_message_bytes=2**31 - 1, timeout=120).model("identity")

    def evaluate(threshold: int) -> Callable[[], object]:
        def work() -> object:
            _caller.BULK_BYTES = threshold
            return identity.evaluate({"input": x})

        return work

    compare(
        f"{mebibytes} MiB there and back",
        {
            "floor: bare unary echo": lambda: bare(data),
            "bare stream echo in 1 MiB chunks": lambda: stream(*chunks),
            "pullback, one message each way": evaluate(1 << 60),
            "pullback, chunks": evaluate(0),
        },
        rounds,
        3 if mebibytes > 128 else 5,
    )
    stream.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 16, 64, 512], help="MiB of the large tensors")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pb.tune_malloc()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} torch thread, "
        f"Python {platform.python_version()}, torch {torch.__version__}, grpcio {grpc.__version__}"
    )
    big = ("--max-message-bytes", str(2**31 - 1))
    with (
        pullback_server(str(HERE / "models.py"), "--threads", "1", *big) as server,
        child("echo_server.py") as echo,
    ):
        small(server.target, echo, arguments.rounds)
        for mebibytes in arguments.sizes:
            large(server.target, echo, mebibytes, max(3, arguments.rounds // (2 if mebibytes > 128 else 1)))


if __name__ == "__main__":
    main()
