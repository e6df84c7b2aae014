"""Learning to learn: MAML on sine waves, its second-order gradient taken through hosted networks.

Wanted are weights from which one step of gradient descent on ten points of a new wave is enough (Finn et al., 2017).
The loss after that step is differentiated by the weights before it, so that a gradient goes through a gradient. Here
the inner step happens on the server, in a session: fast weights are a tensor there, given with each call by
`parameters=`, and `create_graph=True` keeps the graph of the step. First-order MAML leaves that graph out; both are
held against a difference of losses, and it is the second-order one that is right.
"""

import numpy as np
from _gallery import BLUE, GREEN, GREY, RED, arguments, connected, panels, save

import pullback as pb

INNER_RATE, OUTER_RATE, POINTS = 0.05, 0.01, 10
#: The hosted networks: one for each task, with weights of its own.
TASKS = 8
#: Points x and y to learn from, and x and y to be judged by, for TASKS waves: [TASKS, POINTS, 1] each.
Waves = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def waves(rng: np.random.Generator) -> Waves:
    """Amplitudes 1 to 5, phases 0 to pi, x within 5 of 0."""
    amplitude, phase = rng.uniform(1, 5, (TASKS, 1, 1)), rng.uniform(0, np.pi, (TASKS, 1, 1))
    x, query = rng.uniform(-5, 5, (2, TASKS, POINTS, 1))
    return x, amplitude * np.sin(x + phase), query, amplitude * np.sin(query + phase)


def loss_of(model: pb.RemoteModel, weights: pb.Tensor, x: np.ndarray, y: np.ndarray) -> pb.Tensor:
    """The sum over tasks of the mean squared error: no task's weights have a part in another's term."""
    return pb.functional.mse_loss(model(x, parameters={"weights": weights}), y, reduction="sum") / POINTS


def stepped(model: pb.RemoteModel, weights: pb.Tensor, x: np.ndarray, y: np.ndarray, second_order: bool) -> pb.Tensor:
    """The weights after one inner step; with `second_order` they know how they came about."""
    (grad,) = pb.autograd.grad(loss_of(model, weights, x, y), weights, create_graph=second_order)
    return weights - INNER_RATE * grad


def meta_gradient(
    model: pb.RemoteModel, start: np.ndarray, task: Waves, second_order: bool
) -> tuple[float, np.ndarray]:
    """The loss after the inner step, meant over tasks, and its gradient by the weights [1761] before it."""
    x, y, query, answer = task
    weights = pb.tensor(np.tile(start, (TASKS, 1)), requires_grad=True)
    loss = loss_of(model, stepped(model, weights, x, y, second_order), query, answer) / TASKS
    loss.backward()
    return loss.item(), weights.grad.numpy().sum(0)


def meta_train(model: pb.RemoteModel, start: np.ndarray, steps: int, second_order: bool) -> np.ndarray:
    """Steps of Adam with a falling rate on the meta-gradient; returns the weights to start from."""
    rng, weights = np.random.default_rng(1), start.copy()
    mean, square = np.zeros_like(start), np.zeros_like(start)
    for step in range(1, steps + 1):
        _, grad = meta_gradient(model, weights, waves(rng), second_order)
        grad *= min(1, 10 / np.linalg.norm(grad))
        mean += 0.1 * (grad - mean)
        square += 0.001 * (grad**2 - square)
        moved = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        weights -= OUTER_RATE * (1 - step / (steps + 1)) * moved
    return weights


def adapted(model: pb.RemoteModel, start: np.ndarray, task: Waves, steps: int) -> list[np.ndarray]:
    """The weights [TASKS, 1761] after 0, 1, ... inner steps."""
    found = [np.tile(start, (TASKS, 1))]
    for _ in range(steps):
        weights = pb.tensor(found[-1], requires_grad=True)
        found.append(stepped(model, weights, task[0], task[1], False).numpy())
    return found


def main() -> None:
    options = arguments(__doc__, __file__)
    steps, batches, inner = (40, 3, 3) if options.small else (300, 10, 4)
    rng = np.random.default_rng(0)
    grid = np.broadcast_to(np.linspace(-5, 5, 100)[:, None], (TASKS, 100, 1))
    with connected(options, "regressors") as client, client.session(models=["regressors"], pipelined=True):
        model = client.model("regressors")
        start = next(model.parameters()).numpy()[0]

        # Along the direction in which the two gradients differ most, what does the loss really do?
        task = waves(rng)
        (_, second), (_, first) = meta_gradient(model, start, task, True), meta_gradient(model, start, task, False)
        way = (second - first) / np.linalg.norm(second - first)
        ahead, behind = (meta_gradient(model, start + h * way, task, False)[0] for h in (1e-4, -1e-4))
        slope = (ahead - behind) / 2e-4
        print(f"slope of the loss {slope:.6f}; second-order MAML {second @ way:.6f}, first-order {first @ way:.6f}")
        assert abs(second @ way - slope) < 1e-5 * abs(slope), "the second-order gradient is wrong"

        starts = {"random weights": start}
        starts["first-order MAML"] = meta_train(model, start, steps, False)
        starts["second-order MAML"] = meta_train(model, start, steps, True)
        losses = {name: np.zeros(inner + 1) for name in starts}
        for new in [waves(rng) for _ in range(batches)]:
            for name, weights in starts.items():
                for step, fast in enumerate(adapted(model, weights, new, inner)):
                    predicted = model.evaluate(new[2], parameters={"weights": fast})
                    losses[name][step] += ((predicted - new[3]) ** 2).mean() / batches
        # Drawn: the highest wave of the last batch.
        shown = int(np.abs(new[1]).max((1, 2)).argmax())
        fits = {
            name: [model.evaluate(grid, parameters={"weights": fast}) for fast in adapted(model, weights, new, 1)]
            for name, weights in starts.items()
        }
    for name, curve in losses.items():
        print(f"{name}: loss on new waves after 0, 1, ... steps: " + ", ".join(f"{one:.2f}" for one in curve))
    after = {name: curve[1] for name, curve in losses.items()}
    assert after["second-order MAML"] < after["random weights"] - 0.5, "nothing was learned"
    assert options.small or after["second-order MAML"] < after["first-order MAML"], "the second order gained nothing"

    picture, axes = panels(1, 3)
    for one, name in zip(axes, ("random weights", "second-order MAML"), strict=False):
        one.plot(grid[0], fits[name][0][shown], ":", color=GREY, label="before")
        one.plot(grid[0], fits[name][1][shown], color=BLUE, label="after one step")
        one.plot(new[2][shown], new[3][shown], "o", color=GREEN, label="to be predicted", markersize=3)
        one.plot(new[0][shown], new[1][shown], "o", color=RED, label="its ten points", markersize=4)
        one.set(title=f"A new wave, from {name}", xlabel="x", ylabel="y", ylim=(-7.5, 6))
    axes[0].legend(loc="lower center", ncols=2)
    for (name, curve), colour in zip(losses.items(), (GREY, BLUE, RED), strict=True):
        axes[2].plot(curve, "o-", color=colour, label=name, markersize=4)
    axes[2].set(title=f"{batches * TASKS} new waves", xlabel="steps on ten points", ylabel="error on other points")
    axes[2].set(ylim=(0, 2 * max(curve[1] for curve in losses.values())), xticks=range(inner + 1))
    axes[2].legend()
    save(picture, options)


if __name__ == "__main__":
    main()
