"""Write me a seven: a local diffusion model of digits, guided by the gradient of a classifier that a server hosts.

The generator knows nothing of labels. It removes noise in steps, and its denoiser, the best one for a mixture of
Gaussians that was fitted to digits, is a few lines of numpy. Guidance (Dhariwal and Nichol, 2021) moves each step along
the gradient of log p(label | what the picture will be), which is the remote part: one call a step for all pictures.

Whether it worked is judged by a support vector machine as well, which had no say in the guiding.
"""

from dataclasses import dataclass

import numpy as np
from _gallery import BLUE, GREY, ORANGE, arguments, connected, digits, panels, save, show
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC

import pullback as pb

#: The noise's standard deviation, from where nothing but noise is left to where there is hardly any.
FIRST, LAST = 5.0, 0.02


@dataclass
class Generator:
    """A mixture of Gaussians of one covariance: weights [k], means [k, 64], eigenvalues [64] and vectors [64, 64]."""

    weights: np.ndarray
    means: np.ndarray
    values: np.ndarray
    vectors: np.ndarray

    def denoised(self, x: np.ndarray, sigma: float) -> np.ndarray:
        """E[x0 | x] for x = x0 + sigma * noise: [n, 64]."""
        spread = self.values + sigma**2
        x, means = x @ self.vectors, self.means @ self.vectors  # along the eigenvectors
        # Which Gaussian it came from: log N(x; mean, spread), but for what is the same for all of them.
        logs = np.log(self.weights) + (x / spread) @ means.T - 0.5 * (means**2 / spread).sum(1)
        shares = np.exp(logs - logs.max(1, keepdims=True))
        mean = shares / shares.sum(1, keepdims=True) @ means
        return (mean + self.values / spread * (x - mean)) @ self.vectors.T

    def transposed_jacobian(self, x: np.ndarray, sigma: float, v: np.ndarray) -> np.ndarray:
        """(d denoised / d x)^T v for each row; that Jacobian is symmetric, so a difference along v will do."""
        step = 1e-4 / (np.linalg.norm(v, axis=1, keepdims=True) + 1e-12)
        return (self.denoised(x + step * v, sigma) - self.denoised(x - step * v, sigma)) / (2 * step)


def fitted(images: np.ndarray) -> Generator:
    """The mixture that images [n, 8, 8] suggest; no labels."""
    mixture = GaussianMixture(60, covariance_type="tied", reg_covar=1e-3, random_state=0).fit(images.reshape(-1, 64))
    return Generator(mixture.weights_, mixture.means_, *np.linalg.eigh(mixture.covariances_))


def reward_gradient(model: pb.RemoteModel, pictures: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The gradient of log p(wanted | picture) by the pixels of each: [n, 64]. One call."""
    images = pictures.reshape(-1, 8, 8).astype(np.float32)
    _, grads = model.value_and_grad(images, loss=pb.Loss("cross_entropy", reduction="sum"), target=wanted)
    return -grads["image"].reshape(-1, 64).astype(np.float64)


def sample(generator: Generator, model: pb.RemoteModel, wanted: np.ndarray, scale: float, steps: int) -> np.ndarray:
    """Pictures [n, 8, 8], from the same noise at each call, guided towards the labels wanted [n]; scale 0: unguided."""
    sigmas = np.geomspace(FIRST, LAST, steps)
    x = FIRST * np.random.default_rng(0).normal(size=(len(wanted), 64)) + generator.means.mean(0)
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        target = generator.denoised(x, sigma)
        if scale:
            towards = reward_gradient(model, target, wanted)
            target = target + scale * sigma**2 * generator.transposed_jacobian(x, sigma, towards)
        x = target + following / sigma * (x - target)
    return x.clip(0, 1).reshape(-1, 8, 8)


def main() -> None:
    options = arguments(__doc__, __file__)
    scales = [0.0, 1.0, 4.0] if options.small else [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
    count, steps = (100, 25) if options.small else (300, 50)
    images, labels, held_out, _ = digits()
    generator, judge = fitted(images), SVC().fit(images.reshape(-1, 64), labels)
    wanted = np.arange(count) % 10
    with connected(options, "digits-conv") as client, pb.record_timings() as calls:
        model = client.model("digits-conv")
        pictures = [sample(generator, model, wanted, scale, steps) for scale in scales]
        seen = [model.evaluate(one.astype(np.float32)).argmax(1) for one in pictures]
    neighbours = NearestNeighbors(n_neighbors=1).fit(images.reshape(-1, 64))
    remote = np.array([100 * (one == wanted).mean() for one in seen])
    local = np.array([100 * (judge.predict(one.reshape(-1, 64)) == wanted).mean() for one in pictures])
    away = [neighbours.kneighbors(one.reshape(-1, 64))[0].mean() for one in pictures]
    usual = neighbours.kneighbors(held_out.reshape(-1, 64))[0].mean()
    for row in zip(scales, remote, local, away, strict=True):
        print("scale {:4}: as wanted {:5.1f} % (local judge {:5.1f} %), {:.2f} from the next real digit".format(*row))
    print(f"{len(calls)} calls; real digits are {usual:.2f} from the next one")
    assert local[0] < 25, "unguided samples are not random"
    assert local[-1] > 85, "guidance does not lead to what is wanted"
    assert (np.diff(local[:3]) > 0).all(), "more guidance gave less of what is wanted"

    rows = len(scales)
    picture, axes = panels(rows, 14, width_ratios=[1] * 10 + [0.6, 2, 2, 2])
    for row, (scale, drawn) in enumerate(zip(scales, pictures, strict=True)):
        for column in range(10):
            show(axes[row, column], drawn[column], f"a {wanted[column]}!" if row == 0 else "")
        axes[row, 0].set_ylabel(f"{scale:g}", rotation=0, ha="right", va="center")
    for one in axes[:, 10:].flat:
        one.remove()
    right = picture.add_subplot(axes[0, 0].get_gridspec()[:, 11:])
    at = range(len(scales))
    right.plot(at, remote, "o-", color=BLUE, label="says the hosted classifier", markersize=3)
    right.plot(at, local, "o-", color=ORANGE, label="says a judge that did not guide", markersize=3)
    right.axhline(10, color=GREY, linewidth=0.7, linestyle=":")
    right.annotate("chance", (at[-1], 11), color=GREY, fontsize=8, ha="right")
    right.set_xticks(at, [f"{scale:g}" for scale in scales])
    right.set(xlabel="guidance scale", ylabel="pictures of what was wanted, %", ylim=(0, 103))
    right.legend(loc="center right", bbox_to_anchor=(1, 0.35))
    picture.suptitle("One noise for each column, guided ever more (down) towards the label above it", fontsize=11)
    save(picture, options)


if __name__ == "__main__":
    main()
