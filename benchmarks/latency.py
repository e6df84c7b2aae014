"""One caller: a small VJP and large tensors, against the floor of gRPC itself, in one run.

Every figure is the median over rounds of a round's median; the contestants take turns within a round, so that the
machine's drift hits all of them. Ratios are taken within a round. Run: python benchmarks/latency.py
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import grpc
import numpy as np
import torch
from models import mlp
from serving import HERE, Running, child, pullback_server

import pullback as pb
from pullback_wire import GRADIENT_METHODS, TensorWriter, encode_message
from pullback_wire.v1 import gradient_service_pb2 as messages

BIG = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def median_seconds(work: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def compare(title: str, works: dict[str, Callable[[], object]], rounds: int, times: int, unit: str = "ms") -> None:
    """Prints medians of each work, and for those after the first the ratio to the sum named "floor"."""
    for work in works.values():
        median_seconds(work, max(2, times // 5))
    seen: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            seen[name].append(median_seconds(work, times))
    floor_parts = [name for name in works if name.startswith("floor:")]
    floors = [sum(seen[name][index] for name in floor_parts) for index in range(rounds)]
    print(f"\n{title}")
    for name, values in seen.items():
        ratios = [value / floor for value, floor in zip(values, floors, strict=True)]
        print(f"  {name:<44} {statistics.median(values) * 1e3:9.3f} {unit}   {statistics.median(ratios):5.2f} x floor")
    print(f"  {'floor (sum of the above marked so)':<44} {statistics.median(floors) * 1e3:9.3f} {unit}")


def small(server: Running, naive: str, echo: str, rounds: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 784), dtype=np.float32)
    v = rng.standard_normal((32, 10), dtype=np.float32)
    module = mlp()
    x_torch, v_torch = torch.from_numpy(x).requires_grad_(), torch.from_numpy(v)

    def local() -> None:
        torch.autograd.grad(module(x_torch), x_torch, v_torch)

    writer = TensorWriter()
    request = messages.ComputeVjpRequest(
        function={"model": "mlp"}, inputs=[writer.add("input", x)], cotangents=[writer.add("output", v)], wrt=["input"]
    )
    data = encode_message(request, writer.payloads)
    path = GRADIENT_METHODS["ComputeVjp"].path
    raw = grpc.insecure_channel(server.target).unary_unary(path)
    answer_length = len(raw(data))
    bare = grpc.insecure_channel(echo).unary_unary(f"/echo/{answer_length}")
    clients = {
        name: pb.connect(target).model("mlp") for name, target in (("pullback", server.target), ("naive", naive))
    }

    def vjp(model: pb.RemoteModel) -> Callable[[], object]:
        return lambda: model.vjp({"input": x}, {"output": v}, wrt=["input"])

    compare(
        f"VJP of an MLP 784-256-10, batch 32 ({len(data)} bytes there, {answer_length} back)",
        {
            "floor: bare gRPC echo of the same bytes": lambda: bare(data),
            "floor: the same VJP in process": local,
            "pullback, client and all": vjp(clients["pullback"]),
            "pullback, request made beforehand": lambda: raw(data),
            "naive server, same client": vjp(clients["naive"]),
        },
        rounds,
        200,
    )
    print("  where the server's time goes, means of 500 calls:")
    before = server.mean_seconds()
    for _ in range(500):
        raw(data)
    after = server.mean_seconds()
    spent = {key: (after[key][0] - before[key][0]) / (after[key][1] - before[key][1]) * 1e3 for key in before}
    stages = ("decode", "queue", "transfer", "compute", "encode")
    spent["rest of the front"] = spent["request"] - sum(spent[key] for key in stages)
    print("  " + ", ".join(f"{key} {value:.3f} ms" for key, value in spent.items()))


def large(pullback: str, naive: str, echo: str, mebibytes: int, rounds: int) -> None:
    x = np.random.default_rng(0).standard_normal((mebibytes << 18,), dtype=np.float32)
    data = x.tobytes()
    bare = grpc.insecure_channel(echo, BIG).unary_unary("/echo/same")
    models = {
        name: pb.connect(target, max_message_bytes=1 << 30, timeout=120).model("identity")
        for name, target in (("pullback", pullback), ("naive", naive))
    }
    compare(
        f"{mebibytes} MiB there and back",
        {
            "floor: bare gRPC echo of the same bytes": lambda: bare(data),
            "pullback": lambda: models["pullback"].evaluate({"input": x}),
            "naive server": lambda: models["naive"].evaluate({"input": x}),
        },
        rounds,
        5,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="*", default=[16, 64], help="MiB of the large tensors")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pb.tune_malloc()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} torch thread, "
        f"Python {platform.python_version()}, torch {torch.__version__}, grpcio {grpc.__version__}"
    )
    big = ("--max-message-bytes", str(1 << 30))
    with (
        pullback_server(str(HERE / "models.py"), "--threads", "1", *big) as server,
        child("naive_server.py") as naive,
        child("echo_server.py") as echo,
    ):
        small(server, naive, echo, arguments.rounds)
        for mebibytes in arguments.sizes:
            large(server.target, naive, echo, mebibytes, arguments.rounds)


if __name__ == "__main__":
    main()
