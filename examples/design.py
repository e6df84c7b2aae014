"""Design by gradients: where does a little copper cool a plate best?

A plate that is heated everywhere alike loses its heat through a small window in the middle of its left edge. A seventh
of its area may be copper. The server hosts the physics (examples/models/heat.py, a finite-volume solver in torch). This
program has numpy and scipy: L-BFGS-B moves the copper by the gradient of the mean temperature with respect to every
cell, which costs little more than one simulation. How much copper there is, is the designer's own affair: an augmented
Lagrangian on this side.

A design is judged as it would be made: of cells that are copper or not, with exactly the same area of copper.
"""

import time
from collections.abc import Callable

import numpy as np
from _gallery import BLUE, GREY, arguments, connected, panels, save, show
from scipy.optimize import minimize

import pullback as pb
from pullback import Objective

SHARE = 1 / 7
STIFFNESS = 8.0
EVEN, BAR, DESIGN = "an even alloy", "a bar from the window", "designed by gradients"


def made(wish: np.ndarray) -> np.ndarray:
    """The cells that want copper most, wholly of it, and as many as there may be."""
    cells = np.zeros(wish.size)
    cells[np.argsort(-wish.ravel(), kind="stable")[: round(SHARE * wish.size)]] = 1
    return cells.reshape(wish.shape)


def simulated(model: pb.RemoteModel, copper: np.ndarray) -> np.ndarray:
    """The temperature, without what only helps the search."""
    return model.evaluate({"copper": copper, "power": np.array(1.0), "blur": np.array(0.0)})


def lagrangian(o: Objective, scale: float, price: float) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """The mean temperature and what copper costs beyond SHARE: value and gradient."""

    def run(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = o.value_and_grad(x)
        excess = x.mean() / SHARE - 1
        slope = (price + STIFFNESS * excess) / (SHARE * x.size)
        return value / scale + (price + STIFFNESS / 2 * excess) * excess, gradient / scale + slope

    return run


def optimised(model: pb.RemoteModel, copper: np.ndarray, steps: int) -> tuple[np.ndarray, list[tuple[int, float]]]:
    """The copper at the end, and on the way: calls so far, and the mean temperature if it were made as it is then."""
    history, calls = [], 0
    # Step by step, cells that are half copper become worth less.
    for power in (1.0, 2.0, 3.0, 4.0):
        inputs = {"copper": copper, "power": np.array(power), "blur": np.array(1.0)}
        # Temperatures are positive, so that the mean of |T - 0| is their mean.
        o = model.objective(inputs, wrt="copper", loss="l1_loss", target=np.zeros_like(copper))
        x, scale = o.x0, o.fun(o.x0)
        price = 0.0
        for _ in range(3):
            bounds, goal = np.stack(o.bounds(), 1), lagrangian(o, scale, price)
            x = minimize(goal, x, jac=True, bounds=bounds, method="L-BFGS-B", options={"maxiter": steps}).x
            price += STIFFNESS * (x.mean() / SHARE - 1)
            copper = o.unpack(x)["copper"]
            history.append((calls + o.calls.total(), simulated(model, made(copper)).mean()))
        calls += o.calls.total()
    return copper, history


def main() -> None:
    options = arguments(__doc__, __file__)
    columns, steps = (32, 6) if options.small else (80, 15)
    shape = columns // 2, columns
    with connected(options, "heat") as client:
        model = client.model("heat")
        began = time.perf_counter()
        even = np.full(shape, SHARE)
        copper, history = optimised(model, even, steps)
        took = time.perf_counter() - began
        rows = np.broadcast_to(np.arange(shape[0])[:, None], shape)
        designs = {EVEN: even, BAR: made(-rows), DESIGN: made(copper)}
        fields = {name: simulated(model, one) for name, one in designs.items()}
    mean = {name: float(field.mean()) for name, field in fields.items()}
    for name, field in fields.items():
        share = designs[name].mean()
        print(f"{name}: {share:.1%} copper, mean temperature {mean[name]:.4f}, highest {field.max():.4f}")
    print(f"{copper.size} design variables, {history[-1][0]} calls, {took:.1f} s")

    figure, axes = panels(2, 4, width_ratios=[1, 1, 1, 1.3])
    hottest = max(field.max() for field in fields.values())
    for column, (name, half) in enumerate(designs.items()):
        # The other half is its mirror image.
        show(axes[0, column], np.concatenate([half[::-1], half]), name, vmin=0, vmax=1.2, cmap="YlOrBr")
        field = np.concatenate([fields[name][::-1], fields[name]])
        shown = f"mean {mean[name]:.3f}, highest {field.max():.3f}"
        show(axes[1, column], field, shown, vmin=0, vmax=hottest, cmap="inferno")
    for one in axes[:, 3]:
        one.remove()
    side = figure.add_subplot(axes[0, 3].get_gridspec()[:, 3])
    side.plot(*zip(*history, strict=True), color=BLUE, marker=".", label="the design, if made then")
    side.axhline(mean[BAR], color=GREY, linestyle="--", label=BAR)
    side.set(xlabel="server calls", ylabel="mean temperature", ylim=(0, None))
    side.legend()
    save(figure, options)
    assert designs[DESIGN].sum() == designs[BAR].sum()
    assert mean[DESIGN] < (0.7 if options.small else 0.5) * mean[BAR]


if __name__ == "__main__":
    main()
