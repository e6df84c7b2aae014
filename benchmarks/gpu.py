"""On a CUDA device: saturated throughput against the same loop in process, overlap of copies, and CUDA graphs.

Contestants take turns within a round; ratios are taken within a round, figures are medians of rounds. Also the source
of the models that are served for that. Run: python benchmarks/gpu.py
"""

import argparse
import platform
from statistics import median

import grpc
import numpy as np
import torch
from load import Called, Calls, Helper, Local, registered
from serving import HERE, Running, pullback_server
from torch import nn

import pullback as pb
from pullback_server import Batching, Compile, model, spec
from pullback_wire import GRADIENT_METHODS, TensorWriter, encode_message
from pullback_wire.v1 import gradient_service_pb2 as messages
from pullback_wire.v1.function_pb2 import Function

VJP = GRADIENT_METHODS["ComputeVjp"].path
CALLERS = (1, 2, 4, 8)
#: Requests are as they come: what fills the device must not wait for others.
_AS_THEY_COME = Batching(enabled=False)


class Transformer(nn.Module):
    """A transformer encoder over patches, and classes of their mean."""

    def __init__(self, layers: int, width: int, heads: int, features: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.embed = nn.Linear(features, width)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 1000)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.encoder(self.embed(input)).mean(1))
        return logits


class Block(nn.Module):
    """A residual block."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.GroupNorm(8, after), nn.ReLU()),
            *(nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.GroupNorm(8, after)),
        )
        self.beside = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.beside(x))


@model("transformer", inputs={"input": spec("float32", ["batch", 128, 64])}, batch_axis=0, batching=_AS_THEY_COME)
def transformer() -> nn.Module:
    """12 layers of width 768, 128 patches of 64 features."""
    torch.manual_seed(0)
    return Transformer(12, 768, 12, 64).eval()


@model("resnet", inputs={"input": spec("float32", ["batch", 3, 64, 64])}, batch_axis=0, batching=_AS_THEY_COME)
def resnet() -> nn.Module:
    """8 residual blocks with group norms, for 3x64x64."""
    torch.manual_seed(0)
    widths = [64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [Block(a, b, 1 if a == b else 2) for a, b in zip([64, *widths], widths, strict=False)]
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(8, 64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def _narrow() -> nn.Module:
    torch.manual_seed(0)
    return Transformer(6, 256, 8, 64).eval()


_NARROW = {"input": spec("float32", ["batch", 32, 64])}


@model("narrow", inputs=_NARROW, batch_axis=0, batching=_AS_THEY_COME)
def narrow() -> nn.Module:
    """6 layers of width 256, 32 patches of 64 features: as it is written."""
    return _narrow()


@model("narrow_compiled", inputs=_NARROW, batch_axis=0, batching=_AS_THEY_COME, compile=Compile(rows=(1,)))
def narrow_compiled() -> nn.Module:
    """The same, compiled."""
    return _narrow()


@model(
    "narrow_graphs",
    inputs=_NARROW,
    batch_axis=0,
    batching=_AS_THEY_COME,
    compile=Compile(rows=(1,), cuda_graphs=True),
)
def narrow_graphs() -> nn.Module:
    """The same, compiled, with CUDA graphs."""
    return _narrow()


def request(name: str, rows: int, classes: int, seed: int = 0) -> bytes:
    """A VJP with respect to the input."""
    _, extents = registered(name, "gpu")
    rng = np.random.default_rng(seed)
    writer = TensorWriter()
    shape = [extent if isinstance(extent, int) else rows for extent in extents]
    message = messages.ComputeVjpRequest(
        function=Function(model=name),
        inputs=[writer.add("input", rng.standard_normal(shape, dtype=np.float32))],
        cotangents=[writer.add("output", rng.standard_normal((rows, classes), dtype=np.float32))],
        wrt=["input"],
    )
    return encode_message(message, writer.payloads)


def check(server: Running, name: str) -> None:
    """Compares an answer with the same model in process. Raises SystemExit where they differ."""
    factory, extents = registered(name, "gpu")
    shape = [extent if isinstance(extent, int) else 1 for extent in extents]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    module = factory().cuda()
    leaf = x.clone().cuda().requires_grad_()
    output = module(leaf)
    v = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(output, leaf, v.cuda())
    with pb.connect(server.target, timeout=120) as client:
        y, gradients = client.model(name).vjp({"input": x.numpy()}, {"output": v.numpy()}, wrt=["input"])
    for what, found, expected in (("output", y, output.detach()), ("gradient", gradients["input"], gradient)):
        expected = expected.cpu().numpy()
        gap = np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)
        if not gap < 1e-3:
            raise SystemExit(f"{name}: the {what} differs from the one in process by {gap:.2g} of its norm")


def call(helper: Helper, server: Running, requests: list[bytes], callers: int, seconds: float) -> Called:
    """Raises SystemExit when a call fails."""
    called = helper.call(Calls(server.target, VJP, requests, callers, seconds / 4, seconds))
    if called.failed or not called.latencies:
        raise SystemExit(f"{callers} callers: {called.failed or 'no call was answered'}")
    return called


def saturated(server: Running, name: str, rows: int, rounds: int, seconds: float) -> None:
    """Rows per second of several callers, against the loop in process; and what copies cost beside computing."""
    requests = [request(name, rows, 1000, seed) for seed in range(2)]
    own: dict[bool, list[float]] = {False: [], True: []}
    rates: dict[int, list[float]] = {count: [] for count in CALLERS}
    parts: dict[int, list[tuple[float, float, float]]] = {count: [] for count in CALLERS}
    # New ones for each measurement, so that nothing of one stays in the device's memory under the next.
    with Helper("local") as local, Helper("calls") as helper:
        for _ in range(rounds):
            for copies, found in own.items():
                found.append(local.compute(Local(name, rows, seconds, "gpu", "cuda", copies)).rate)
            for count in CALLERS:
                before = server.mean_seconds()
                called = call(helper, server, requests, count, seconds)
                after = server.mean_seconds()
                rates[count].append(called.rate * rows)
                transfer, compute = (
                    (after[stage][0] - before[stage][0]) / (after[stage][1] - before[stage][1])
                    for stage in ("transfer", "compute")
                )
                parts[count].append((1 / called.rate, transfer, compute))
    print(
        f"\n{name}, batch {rows}, {len(requests[0]) / 2**20:.1f} MiB there; "
        f"in process {median(own[False]):.0f} rows/s, with copies from and to pinned memory {median(own[True]):.0f}"
    )
    print(
        f"  {'callers':>7} {'rows/s':>9} {'/ in process':>13} {'/ with copies':>14}"
        f" {'ms per call':>12} {'transfer':>9} {'compute':>8}  per call / (transfer + compute)"
    )
    for count in CALLERS:
        shares = [median(a / b for a, b in zip(rates[count], own[copies], strict=True)) for copies in (False, True)]
        wall, transfer, compute = (median(part) * 1e3 for part in zip(*parts[count], strict=True))
        print(
            f"  {count:>7} {median(rates[count]):>9.0f} {shares[0]:>13.2f} {shares[1]:>14.2f}"
            f" {wall:>12.2f} {transfer:>9.2f} {compute:>8.2f}  {wall / (transfer + compute):.2f}"
        )


def graphs(server: Running, rounds: int, seconds: float) -> None:
    """One caller's latency with one row: as written, compiled, with CUDA graphs; against the VJP in process."""
    names = ("narrow", "narrow_compiled", "narrow_graphs")
    requests = {name: [request(name, 1, 1000)] for name in names}
    latencies: dict[str, list[float]] = {name: [] for name in names}
    computed: dict[str, list[float]] = {name: [] for name in names}
    own: list[float] = []
    with Helper("local") as local, Helper("calls") as helper:
        for _ in range(rounds):
            own.append(1 / local.compute(Local("narrow", 1, seconds, "gpu", "cuda", True)).rate)
            for name in names:
                before = server.mean_seconds()["compute"]
                latencies[name].append(call(helper, server, requests[name], 1, seconds).quantile(0.5))
                after = server.mean_seconds()["compute"]
                computed[name].append((after[0] - before[0]) / (after[1] - before[1]))
    print(f"\nbatch 1, one caller: as written in process, with copies {median(own) * 1e3:.2f} ms")
    with pb.connect(server.target) as client:
        for name in names:
            against_own = median(a / b for a, b in zip(latencies[name], own, strict=True))
            as_written = median(a / b for a, b in zip(latencies[name], latencies["narrow"], strict=True))
            print(
                f"  {name:<16} p50 {median(latencies[name]) * 1e3:6.2f} ms, of it computing "
                f"{median(computed[name]) * 1e3:6.2f}; {against_own:5.2f} x in process, {as_written:5.2f} x as written"
                f"   {client.model(name).info.plan}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rows", type=int, nargs="*", default=[64, 256], help="of requests that fill the device")
    parser.add_argument("--models", nargs="*", default=["transformer", "resnet"], choices=["transformer", "resnet"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here: nothing was measured")
    torch.set_num_threads(1)
    print(
        f"{torch.cuda.get_device_name()}, {platform.processor() or platform.machine()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, grpcio {grpc.__version__}"
    )
    with pullback_server(str(HERE / "gpu.py"), "--devices", "cuda:0") as server:
        for name in (*arguments.models, "narrow", "narrow_compiled", "narrow_graphs"):
            check(server, name)
        torch.cuda.empty_cache()
        for name in arguments.models:
            for rows in arguments.rows:
                saturated(server, name, rows, arguments.rounds, arguments.seconds)
        graphs(server, arguments.rounds, arguments.seconds)


if __name__ == "__main__":
    main()
