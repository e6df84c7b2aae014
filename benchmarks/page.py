"""Traffic of several kinds for a while, and a picture of the page under it: docs/page.png.

Run: python benchmarks/page.py --seconds 150
"""

import argparse
import contextlib
import functools
import math
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from serving import HERE, pullback_server

import pullback as pb

ROOT = HERE.parent
SILICON = np.array([[0, 0, 0], [0, 2, 2], [2, 0, 2], [2, 2, 0], [1, 1, 1], [1, 3, 3], [3, 1, 3], [3, 3, 1]]) * 5.431 / 4


class Caller:
    """One of many. It asks for a model once, as programs do."""

    def __init__(self, target: str, seed: int) -> None:
        self.client = pb.connect(target)
        self.rng = np.random.default_rng(seed)
        self.model = functools.cache(self.client.model)


def digits(caller: Caller) -> None:
    number = int(caller.rng.integers(1, 9))
    images = caller.rng.random((number, 8, 8), dtype=np.float32)
    targets = caller.rng.integers(0, 10, number)
    caller.model("digits-conv").value_and_grad(images, loss="cross_entropy", target=targets)


def forces(caller: Caller) -> None:
    positions = SILICON + caller.rng.normal(0, 0.05, SILICON.shape)
    caller.model("potential").value_and_grad({"positions": positions, "box": np.full(3, 5.431)})


def phonons(caller: Caller) -> None:
    positions = SILICON + caller.rng.normal(0, 0.02, SILICON.shape)
    caller.model("potential").hessian({"positions": positions, "box": np.full(3, 5.431)}, wrt="positions")


def rush(caller: Caller) -> None:
    """Many at once, who have to wait for each other."""
    targets = [threading.Thread(target=phonons, args=(caller,)) for _ in range(int(caller.rng.integers(20, 80)))]
    for target in targets:
        target.start()
    for target in targets:
        target.join()


def orbits(caller: Caller) -> None:
    inputs = {"mean": caller.rng.uniform(-3, 3, 64), "eccentricity": caller.rng.uniform(0, 0.9, 64)}
    caller.model("kepler").vjp(inputs, {"anomaly": caller.rng.normal(size=64)})


def logarithms(caller: Caller) -> None:
    # The gradient of log(x) at zero is what people come to this page for.
    x = caller.rng.uniform(0, 1, 16)
    x[caller.rng.integers(16)] *= caller.rng.random() > 0.01
    caller.model("log-likelihood").vjp(x, np.ones(16))


def saliency(caller: Caller) -> None:
    ids = caller.rng.integers(97, 123, (1, 24))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "offset": np.zeros((1, 24, 32), np.float32)}
    v = caller.rng.standard_normal((1, 24, 32), dtype=np.float32)
    caller.model("encoder").vjp(inputs, {"last_hidden_state": v}, wrt=["offset"])


def mistaken(caller: Caller) -> None:
    caller.model("digits-conv").evaluate(np.zeros((1, 9, 9), np.float32))


def training(caller: Caller) -> None:
    """Steps of a session, which holds graphs for a while."""
    with caller.client.session() as session:
        rows = int(caller.rng.integers(8, 128))
        x = session.tensor(caller.rng.standard_normal((rows, 784), dtype=np.float32), requires_grad=True)
        y = caller.model("mlp")(x)
        for _ in range(int(caller.rng.integers(200, 900))):
            v = caller.rng.standard_normal((rows, 10), dtype=np.float32)
            (gradient,) = pb.autograd.grad(y, x, v, retain_graph=True)
            assert gradient is not None
            gradient.numpy()
            time.sleep(0.1)


#: What is done, by how many at once, and how many seconds apart on average.
CALLERS: tuple[tuple[Callable[[Caller], None], int, float], ...] = (
    (digits, 3, 0.05),
    (forces, 2, 0.06),
    (phonons, 1, 1.0),
    (rush, 1, 12.0),
    (orbits, 2, 0.1),
    (logarithms, 1, 0.2),
    (saliency, 2, 0.3),
    (mistaken, 1, 4.0),
    (training, 6, 8.0),
)

MODELS = '''
from pathlib import Path

import torch
from torch import nn

from pullback_server import model, spec


@model("mlp", inputs={"input": spec("float32", ["batch", 784])}, batch_axis=0)
def mlp() -> nn.Module:
    """An MLP 784-256-10."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


@model("log-likelihood", inputs={"p": spec("float64", ["n"], low=0.0)})
def log_likelihood(p: torch.Tensor) -> torch.Tensor:
    """Logarithms of probabilities."""
    return torch.log(p)
'''


def call(work: Callable[[Caller], None], target: str, every: float, seed: int, ended: threading.Event) -> None:
    """Does it again and again, more often at some times than at others."""
    caller = Caller(target, seed)
    while not ended.is_set():
        with contextlib.suppress(pb.errors.PullbackError):
            work(caller)
        swell = 1 + 0.8 * math.sin(time.monotonic() / 25 + seed)
        ended.wait(float(caller.rng.exponential(every)) * swell)
    caller.client.close()


def picture(url: str, to: Path, width: int, height: int, *options: str) -> None:
    """What Chromium shows, a while after it was opened."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no Chromium is installed")
    with tempfile.TemporaryDirectory() as folder:
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                   "--disable-background-networking", "--disable-component-update", "--disable-sync",
                   f"--user-data-dir={folder}", "--hide-scrollbars", f"--screenshot={to}", "--virtual-time-budget=4000",
                   f"--window-size={width},{height}", *options, url]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(to) as image:
        # Its colours are few: those that are seen most, as they are, and some for lines make a file of a third of the
        # size.
        full = image.convert("RGB")
        most = sorted(full.getcolors(1 << 24) or (), reverse=True)[:128]
        lines = full.quantize(128, Image.Quantize.FASTOCTREE).getpalette() or []
        palette = Image.new("P", (1, 1))
        palette.putpalette([part for _, color in most for part in color] + lines)
        small = full.quantize(palette=palette, dither=Image.Dither.NONE)
    small.save(to, optimize=True)
    print(f"wrote {to}: {to.stat().st_size >> 10} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "page.png")
    parser.add_argument("--width", type=int, default=1240)
    parser.add_argument("--height", type=int, default=2400)
    parser.add_argument("--dark", action="store_true", help="as those see it who prefer dark pages")
    arguments = parser.parse_args()
    scheme = ("--blink-settings=preferredColorScheme=0",) if arguments.dark else ()
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models.py"
        models.write_text(MODELS)
        options = ("--repository", str(ROOT / "examples" / "models"), "--devices", "cpu:2", "--threads", "1")
        with pullback_server(str(models), *options) as server:
            ended = threading.Event()
            threads = [
                threading.Thread(target=call, args=(work, server.target, every, 7 * index + number, ended), daemon=True)
                for index, (work, callers, every) in enumerate(CALLERS)
                for number in range(callers)
            ]
            for thread in threads:
                thread.start()
            time.sleep(arguments.seconds)
            page = server.metrics.removesuffix("metrics")
            picture(page, arguments.to, arguments.width, arguments.height, *scheme)
            ended.set()


if __name__ == "__main__":
    main()
