"""Trains examples/models/digits-conv through a server, and publishes the weights as the next version in a repository.

This program has no torch: weights and optimiser are numpy's, and each step sends the weights along and gets loss and
gradients back. Afterwards the version is served from the repository, as it would be from then on.

With `--repository examples/models` it makes the next version of the model there; that is how version 1 was made.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from digits_demo import Adam, Arrays, data, initial_weights
from publishing import publish
from tqdm import tqdm

import pullback as pb
from pullback_server import Server

HERE = Path(__file__).parent
NAME = "digits-conv"
EPOCHS, BATCH = 80, 64


def train(model: pb.RemoteModel, x: np.ndarray, y: np.ndarray) -> Arrays:
    """Weights that fit images x [n, 8, 8] to labels y [n]."""
    weights, rng = initial_weights(model), np.random.default_rng(1)
    adam = Adam(weights)
    for _ in tqdm(range(EPOCHS), unit="epoch"):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            _, gradients = model.value_and_grad(
                x[rows], loss="cross_entropy", target=y[rows], parameters=weights, wrt="param:*"
            )
            adam.step(weights, gradients)
    return weights


def accuracy(model: pb.RemoteModel, x: np.ndarray, y: np.ndarray, parameters: Arrays | None = None) -> float:
    """Share of images that are told right."""
    return float((model.evaluate(x, parameters=parameters).argmax(axis=1) == y).mean())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repository", type=Path, default=HERE.parent / "out" / "models")
    repository: Path = arguments.parse_args().repository
    train_x, train_y, test_x, test_y = data()
    train_x, test_x = train_x.reshape(-1, 8, 8), test_x.reshape(-1, 8, 8)
    source = HERE / "models" / NAME
    # The code alone, as yet without weights of its own.
    with Server(source / "model.py", threads=1) as server, pb.connect(server.target) as client:
        model = client.model(NAME)
        weights = train(model, train_x, train_y)
        trained = accuracy(model, test_x, test_y, weights)
    folder = repository / NAME
    folder.mkdir(parents=True, exist_ok=True)
    for shared in ("model.toml", "model.py"):
        if not (folder / shared).exists():
            shutil.copy(source / shared, folder)
    place = publish(folder, weights)
    print(f"accuracy {trained:.3f} on {len(test_y)} images not trained on; published {place}")
    with (
        Server(repository=str(repository), repository_mode="explicit", load_model=[NAME], threads=1) as server,
        pb.connect(server.target) as client,
    ):
        served = accuracy(client.model(NAME), test_x, test_y)
    print(f"accuracy {served:.3f} when served from {repository}")
    if served != trained or served < 0.95:
        raise SystemExit(f"expected {trained:.3f}, and 0.95 or more")


if __name__ == "__main__":
    main()
