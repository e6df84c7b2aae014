"""The main job, end to end: train a classifier that lives on a server, from a client that has no torch.

The weights and the optimiser are this program's; each step sends the weights along and gets loss and gradients back.
Afterwards the gradient with respect to the *input* shows which pixels a decision hangs on. Writes out/demo.png, and the
trained model into a repository, out/models, from which it can be served.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from publishing import publish
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import pullback as pb
from pullback_server import Server

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Arrays = dict[str, np.ndarray[Any, Any]]
#: (weights, pixels, labels) -> loss and its gradient by weight.
LossAndGradient = Callable[[Arrays, np.ndarray[Any, Any], np.ndarray[Any, Any]], tuple[float, Arrays]]

HERE = Path(__file__).parent
OUT = HERE.parent / "out"
EPOCHS, BATCH, RATE = 30, 64, 2e-3


def data() -> tuple[np.ndarray[Any, Any], ...]:
    """Pixels in [0, 1] as float32 [n, 64] and labels as int64 [n]: for training, for testing."""
    digits = load_digits()
    pixels = (digits.data / 16).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels, digits.target.astype(np.int64), test_size=0.2, random_state=0, stratify=digits.target
    )
    return train_x, train_y, test_x, test_y


def initial_weights(model: pb.RemoteModel) -> Arrays:
    """Random weights of the shapes that the model's signature tells."""
    rng = np.random.default_rng(0)
    weights: Arrays = {}
    for parameter in model.info.parameters:
        shape = parameter.shape
        assert shape is not None
        scale = 1 / np.sqrt(shape[-1])
        weights[parameter.name] = rng.uniform(-scale, scale, shape).astype(np.float32)
    return weights


class Adam:
    """Adam (Kingma & Ba, 2015) in numpy."""

    def __init__(self, weights: Arrays) -> None:
        self.steps = 0
        self.mean = {name: np.zeros_like(weight) for name, weight in weights.items()}
        self.square = {name: np.zeros_like(weight) for name, weight in weights.items()}

    def step(self, weights: Arrays, gradients: Arrays) -> None:
        self.steps += 1
        for name, gradient in gradients.items():
            self.mean[name] += 0.1 * (gradient - self.mean[name])
            self.square[name] += 0.001 * (gradient**2 - self.square[name])
            mean = self.mean[name] / (1 - 0.9**self.steps)
            square = self.square[name] / (1 - 0.999**self.steps)
            weights[name] -= RATE * mean / (np.sqrt(square) + 1e-8)


def train(
    weights: Arrays, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], loss_and_gradient: LossAndGradient, label: str
) -> tuple[list[float], float]:
    """Trains `weights` in place; returns the losses, and steps per second."""
    rng = np.random.default_rng(1)
    adam = Adam(weights)
    losses: list[float] = []
    steps = EPOCHS * (len(x) // BATCH)
    began = time.perf_counter()
    with tqdm(total=steps, desc=label, unit="step") as bar:
        for _ in range(EPOCHS):
            order = rng.permutation(len(x))
            for start in range(0, len(x) - BATCH + 1, BATCH):
                rows = order[start : start + BATCH]
                loss, gradients = loss_and_gradient(weights, x[rows], y[rows])
                adam.step(weights, gradients)
                losses.append(loss)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
    return losses, steps / (time.perf_counter() - began)


def in_process() -> LossAndGradient:
    """The same gradient from torch in this process, for comparison."""
    import torch
    from models.digits import Digits

    module = Digits()
    parameters = dict(module.named_parameters())

    def loss_and_gradient(weights: Arrays, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> tuple[float, Arrays]:
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(torch.from_numpy(weight))
        loss = torch.nn.functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y))
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        return loss.item(), {name: grad.numpy() for name, grad in zip(parameters, gradients, strict=True)}

    return loss_and_gradient


def picture(losses: list[float], x: np.ndarray[Any, Any], saliency: np.ndarray[Any, Any], labels: Any) -> Path:
    """Loss curve, and digits with the pixels that decide."""
    figure = plt.figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.4])
    axes = left.subplots()
    axes.plot(losses, linewidth=0.8)
    axes.set(xlabel="step", ylabel="cross-entropy", yscale="log", title="loss, gradients from the server")
    grid = right.subplots(2, len(labels))
    right.suptitle("digit, and |d logit / d pixel|")
    for column, label in enumerate(labels):
        for row, values in enumerate((x[column], np.abs(saliency[column]))):
            grid[row, column].imshow(values.reshape(8, 8), cmap="gray_r" if row == 0 else "inferno")
            grid[row, column].set(xticks=[], yticks=[], title=str(label) if row == 0 else "")
    OUT.mkdir(exist_ok=True)
    path = OUT / "demo.png"
    figure.savefig(path, dpi=110)
    return path


def published(weights: Arrays) -> Path:
    """The trained model as the next version in a repository: its code, a manifest without any key, and the weights."""
    folder = OUT / "models" / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "models" / "digits.py", folder / "model.py")
    (folder / "model.toml").touch()
    return publish(folder, weights)


def main() -> None:
    train_x, train_y, test_x, test_y = data()
    with Server(HERE / "models" / "digits.py") as server, pb.connect(server.target) as client:
        model = client.model("digits")

        def remote(weights: Arrays, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> tuple[float, Arrays]:
            loss, gradients = model.value_and_grad(
                x, loss="cross_entropy", target=y, parameters=weights, wrt=["param:*"]
            )
            return float(loss), gradients

        def accuracy() -> float:
            logits = model.evaluate(test_x, parameters=weights)
            return float((logits.argmax(axis=1) == test_y).mean())

        weights = initial_weights(model)
        before = accuracy()
        losses, served = train(weights, train_x, train_y, remote, "through the server")
        after = accuracy()
        local_weights = initial_weights(model)
        _, local = train(local_weights, train_x, train_y, in_process(), "in process")

        shown = [int(np.flatnonzero(test_y == digit)[0]) for digit in range(6)]
        cotangent = np.eye(10, dtype=np.float32)[test_y[shown]]
        _, saliency = model.vjp(test_x[shown], cotangent, parameters=weights)
        path = picture(losses, test_x[shown], saliency, test_y[shown])

    drift = max(float(np.abs(weights[name] - local_weights[name]).max()) for name in weights)
    print(f"accuracy {before:.3f} before, {after:.3f} after training")
    print(f"requests per second {served:.0f}; in process {local:.0f}; ratio {local / served:.2f}")
    print(f"largest difference between weights trained through the server and in process: {drift:.1e}")
    print(f"picture {path}")
    if after < 0.95:
        raise SystemExit(f"accuracy {after:.3f} is below 0.95")
    print(f"model {published(weights)}; serve it with: pullback-server serve --repository {OUT / 'models'}")


if __name__ == "__main__":
    main()
