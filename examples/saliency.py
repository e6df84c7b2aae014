"""Which pixels make it a three? Gradient, SmoothGrad and integrated gradients of a hosted digit classifier.

The gradient by the pixels says what a small change would do. SmoothGrad (Smilkov et al., 2017) averages it over noisy
copies. Integrated gradients (Sundararajan et al., 2017) integrate it along the way from a blank sheet to the digit,
so that the attributions of all pixels add up to what the classifier gained on that way: their completeness axiom, which
this program checks. All points of all ways are rows of one call.
"""

import numpy as np
from _gallery import BLUE, GREEN, GREY, ORANGE, arguments, connected, digits, panels, save, show

import pullback as pb


def gradients(model: pb.RemoteModel, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """d logit[label] / d pixel for images [n, 8, 8] and labels [n], in one call: [n, 8, 8]."""
    # Row i's cotangent picks the logit of its own label. Rows are independent, so that one VJP has all of them.
    _, grads = model.vjp(images, np.eye(10, dtype=np.float32)[labels], return_outputs=False)
    return grads


def smooth_gradients(model: pb.RemoteModel, images: np.ndarray, labels: np.ndarray, copies: int) -> np.ndarray:
    """The mean gradient over noisy copies of each image: [n, 8, 8]."""
    rng = np.random.default_rng(0)
    noisy = images[:, None] + rng.normal(scale=0.15, size=(len(images), copies, 8, 8)).astype(np.float32)
    found = gradients(model, noisy.reshape(-1, 8, 8), np.repeat(labels, copies))
    return found.reshape(noisy.shape).mean(1)


def integrated_gradients(model: pb.RemoteModel, images: np.ndarray, labels: np.ndarray, points: int) -> np.ndarray:
    """x * integral over a from 0 to 1 of the gradient at a * x, the baseline being blank paper: [n, 8, 8]."""
    # Gauss and Legendre's points: for a smooth network a few dozen leave nothing but rounding.
    at, weights = np.polynomial.legendre.leggauss(points)
    at, weights = (at + 1) / 2, weights / 2
    way = images[:, None] * at.astype(np.float32)[:, None, None]
    found = gradients(model, way.reshape(-1, 8, 8), np.repeat(labels, points)).reshape(way.shape)
    return images * np.tensordot(weights, found, ([0], [1]))


def logits_without(model: pb.RemoteModel, images: np.ndarray, labels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The label's logit after the first 0, 1, ... 32 pixels of `order` [n, 64] were made blank: [n, 33]."""
    rank = order.argsort(1)
    kept = images.reshape(-1, 1, 64) * (rank[:, None] >= np.arange(33)[:, None])
    logits = model.evaluate(kept.reshape(-1, 8, 8).astype(np.float32)).reshape(len(images), 33, 10)
    return logits[np.arange(len(images)), :, labels]


def main() -> None:
    options = arguments(__doc__, __file__)
    copies, points, count = (20, 16, 20) if options.small else (100, 32, 100)
    _, _, images, labels = digits()
    images, labels = images[:count], labels[:count]
    with connected(options, "digits-conv") as client, pb.record_timings() as calls:
        model = client.model("digits-conv")
        plain = gradients(model, images, labels)
        smooth = smooth_gradients(model, images, labels, copies)
        integrated = integrated_gradients(model, images, labels, points)
        made = len(calls)

        # Completeness: all attributions of an image add up to f(image) - f(blank).
        rows = np.arange(count)
        gained = model.evaluate(images)[rows, labels] - model.evaluate(np.zeros_like(images))[rows, labels]
        error = np.abs(integrated.sum((1, 2)) - gained).max()
        # Which method finds the pixels that matter? Blank them, those of highest rank first.
        ranked = {
            "integrated": -integrated,
            "gradient x pixel": -plain * images,
            "SmoothGrad x pixel": -smooth * images,
            "random": np.random.default_rng(1).random(images.shape),
        }
        curves = {
            name: logits_without(model, images, labels, rank.reshape(count, 64).argsort(1)).mean(0)
            for name, rank in ranked.items()
        }
    print(f"{count} digits, {count * (1 + copies + points)} gradients in {made} calls")
    print(f"completeness: attributions add up to f(x) - f(blank) within {error:.1e} (gained: {gained.mean():.1f})")
    areas = {name: float(curve.mean()) for name, curve in curves.items()}
    print("mean logit while pixels go: " + ", ".join(f"{name} {area:.1f}" for name, area in areas.items()))
    assert error < 1e-4 * np.abs(gained).max(), "the attributions do not add up"
    assert areas["integrated"] < areas["random"] - 2, "the pixels found matter no more than any others"
    assert areas["integrated"] < areas["gradient x pixel"], "integrating the gradient gained nothing"

    picture, axes = panels(4, 9, width_ratios=[1] * 6 + [0.4, 2.2, 2.2])
    shown = np.unique(labels, return_index=True)[1][[0, 2, 3, -4, -2, -1]]
    for column, at in enumerate(shown):
        show(axes[0, column], images[at], f"a {labels[at]}")
        for row, found in enumerate((plain, smooth, integrated), 1):
            limit = np.abs(found[at]).max()
            show(axes[row, column], found[at], cmap="RdBu_r", vmin=-limit, vmax=limit)
    for row, name in enumerate(("digit", "gradient", "SmoothGrad", "integrated\ngradients")):
        axes[row, 0].set_ylabel(name)
    for one in axes[:, 6:].flat:
        one.remove()
    right = picture.add_subplot(axes[0, 0].get_gridspec()[:, 7:])
    for (name, curve), colour in zip(curves.items(), (BLUE, ORANGE, GREEN, GREY), strict=True):
        right.plot(curve, color=colour, label=name)
    right.set(
        xlabel="pixels made blank, highest rank first", ylabel="logit of the label", title="Do these pixels matter?"
    )
    right.legend()
    picture.suptitle("What a hosted classifier looks at (red: for the label, blue: against)", fontsize=11)
    save(picture, options)


if __name__ == "__main__":
    main()
