"""How much ink does it take to fool a hosted classifier? FGSM and PGD against random noise of the same size.

The fast gradient sign method (Goodfellow et al., 2015) moves each pixel by epsilon the way that raises the loss;
projected gradient descent (Madry et al., 2018) takes many small such steps and stays within epsilon. Noise that moves
each pixel as far, but not the way of the gradient, hardly matters: it is the gradient that makes it an attack. Each
step is one call for all images.
"""

import numpy as np
from _gallery import BLUE, GREY, RED, arguments, connected, digits, panels, save, show

import pullback as pb


def loss_gradient(model: pb.RemoteModel, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The gradient of the summed cross-entropy by the pixels, so that no image's depends on another's: [n, 8, 8]."""
    loss = pb.Loss("cross_entropy", reduction="sum")
    _, grads = model.value_and_grad(images, loss=loss, target=labels)
    return grads["image"]


def random_signs(images: np.ndarray, epsilon: float) -> np.ndarray:
    """Each pixel up or down by epsilon, as far as there is room."""
    signs = np.random.default_rng(0).choice(np.float32([-1, 1]), size=images.shape)
    return np.clip(images + epsilon * signs, 0, 1)


def fgsm(model: pb.RemoteModel, images: np.ndarray, labels: np.ndarray, epsilon: float) -> np.ndarray:
    """One step of epsilon along the sign of the gradient."""
    return np.clip(images + epsilon * np.sign(loss_gradient(model, images, labels)), 0, 1)


def pgd(model: pb.RemoteModel, images: np.ndarray, labels: np.ndarray, epsilon: float, steps: int) -> np.ndarray:
    """Steps of 2.5 epsilon / steps, each brought back to where no pixel is further than epsilon from the image."""
    low, high = np.clip(images - epsilon, 0, 1), np.clip(images + epsilon, 0, 1)
    x = images
    for _ in range(steps):
        x = np.clip(x + 2.5 * epsilon / steps * np.sign(loss_gradient(model, x, labels)), low, high)
    return x


def main() -> None:
    options = arguments(__doc__, __file__)
    count, steps = (120, 8) if options.small else (360, 20)
    budgets = np.linspace(0, 0.3, 5 if options.small else 13, dtype=np.float32)
    _, _, images, labels = digits()
    images, labels = images[:count], labels[:count]
    with connected(options, "digits-conv") as client, pb.record_timings() as calls:
        model = client.model("digits-conv")
        attacks = {
            "random signs": lambda epsilon: random_signs(images, epsilon),
            "FGSM": lambda epsilon: fgsm(model, images, labels, epsilon),
            f"PGD, {steps} steps": lambda epsilon: pgd(model, images, labels, epsilon, steps),
        }
        guesses = {
            name: np.stack([model.evaluate(attack(epsilon)).argmax(1) for epsilon in budgets])
            for name, attack in attacks.items()
        }
        shown_budget = float(budgets[len(budgets) // 2])
        attacked = pgd(model, images, labels, shown_budget, steps)
        logits = model.evaluate(np.concatenate([images, attacked])).reshape(2, count, 10)

    assert np.abs(attacked - images).max() <= shown_budget + 1e-6
    noise, single, many = (100 * (guess == labels).mean(1) for guess in guesses.values())
    for row in zip(budgets, noise, single, many, strict=True):
        print("epsilon {:.3f}: right with noise {:5.1f} %, FGSM {:5.1f} %, PGD {:5.1f} %".format(*row))
    print(f"{len(calls)} calls of {count} images")
    middle = len(budgets) // 2
    assert noise[0] == many[0] > 95, "the classifier is no good to begin with"
    assert noise[middle] > 85, "it is the noise that fools it"
    assert many[middle] < 20, "PGD does not fool it"
    assert (many <= single + 1).all(), "more steps made a weaker attack"

    picture, axes = panels(3, 8, width_ratios=[2.4, 2.4, 0.4] + [1] * 5)
    for one in axes[:, :3].flat:
        one.remove()
    left = picture.add_subplot(axes[0, 0].get_gridspec()[:, :2])
    for (name, _), share, colour in zip(attacks.items(), (noise, single, many), (GREY, BLUE, RED), strict=True):
        left.plot(budgets, share, "o-", color=colour, label=name, markersize=3)
    left.axhline(10, color=GREY, linewidth=0.7, linestyle=":")
    left.annotate("guessing", (0, 11), color=GREY, fontsize=8)
    left.set(xlabel="largest change of a pixel (ink is 0 to 1)", ylabel="still recognised, %", ylim=(-3, 103))
    left.set_title(f"Accuracy on {count} digits under attack")
    left.legend(loc="center right")
    fooled = np.flatnonzero((logits[0].argmax(1) == labels) & (logits[1].argmax(1) != labels))
    chosen = fooled[np.unique(labels[fooled], return_index=True)[1]][[0, 2, 3, -2, -1]]
    for column, at in enumerate(chosen, 3):
        show(axes[0, column], images[at], f"a {labels[at]}")
        show(axes[1, column], attacked[at] - images[at], cmap="PuOr", vmin=-0.3, vmax=0.3)
        show(axes[2, column], attacked[at], f'"{logits[1, at].argmax()}"')
        axes[2, column].title.set_color(RED)
    for row, name in enumerate(("digit", "+ change", "= seen as")):
        axes[row, 3].set_ylabel(name)
    shown = f"those shown: PGD within {shown_budget:.2f} (purple: more ink, orange: less)"
    picture.suptitle(f"Adversarial digits; {shown}", fontsize=11)
    save(picture, options)


if __name__ == "__main__":
    main()
