"""Newton or gradient descent? Three optimisers on functions that a server hosts, by how often they ask it.

Gradient descent steps by the gradient, L-BFGS guesses curvature from the gradients so far, and Newton's method (scipy's
trust-ncg) has products of the Hessian with vectors from the server. All use `model.objective`. Every request counts, be
it for a value and a gradient or for one product with the Hessian. The functions are Rosenbrock's valley in the plane,
where the ways can be seen, and a logistic regression on real data (breast cancer, 569 x 30).
"""

from collections.abc import Callable

import numpy as np
from _gallery import BLUE, GREEN, ORANGE, arguments, connected, panels, save
from scipy.optimize import minimize, rosen
from sklearn.datasets import load_breast_cancer

import pullback as pb
from pullback import Objective

DESCENT, QUASI, NEWTON = "gradient descent", "L-BFGS", "Newton (trust-ncg)"
COLOURS = {DESCENT: ORANGE, QUASI: BLUE, NEWTON: GREEN}


def descend(o: Objective, step: float, budget: int, note: Callable[[np.ndarray], None]) -> None:
    x = o.x0
    while o.calls.total() < budget:
        x = x - step * o.jac(x)
        note(x)


def ways(make: Callable[[], Objective], step: float, budget: int) -> dict[str, tuple[list[int], np.ndarray]]:
    """By method: the number of calls at each iterate, and the iterates."""
    found = {}
    for name in COLOURS:
        o = make()
        calls, points = [0], [o.x0]

        def note(x: np.ndarray, o: Objective = o, calls: list = calls, points: list = points) -> None:
            calls.append(o.calls.total())
            points.append(x.copy())

        if name == DESCENT:
            descend(o, step, budget, note)
        elif name == QUASI:
            options = {"ftol": 0, "gtol": 1e-10, "maxiter": 1000}
            minimize(o.fun, o.x0, jac=o.jac, method="L-BFGS-B", callback=note, options=options)
        else:
            minimize(o.fun, o.x0, jac=o.jac, hessp=o.hessp, method="trust-ncg", callback=note, options={"gtol": 1e-10})
        found[name] = calls, np.array(points)
    return found


def logistic(client: pb.Client) -> tuple[Callable[[], Objective], float]:
    """The loss as a function of its 30 weights, and the largest step that gradient descent may safely take."""
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    inputs = {"weights": np.zeros(30), "data": x, "labels": y.astype(np.float64)}
    steepest = np.linalg.eigvalsh(x.T @ x / len(x)).max() / 4 + 1e-3
    return lambda: client.model("logistic").objective(inputs, wrt="weights"), 1 / steepest


def main() -> None:
    options = arguments(__doc__, __file__)
    budget = 60 if options.small else 300
    with connected(options, "rosenbrock", "logistic") as client:
        valley = ways(lambda: client.model("rosenbrock").objective(np.array([-1.2, 1.0])), 1e-3, budget)
        make, step = logistic(client)
        regression = ways(make, step, budget)
        judge = make()
        least = judge.fun(regression[NEWTON][1][-1])
        losses = {name: np.array([judge.fun(x) for x in points]) for name, (_, points) in regression.items()}

    figure, (left, right) = panels(1, 2)
    across, up = np.meshgrid(np.linspace(-1.6, 1.5, 200), np.linspace(-0.6, 1.8, 200))
    left.contour(across, up, np.log10(rosen(np.stack([across, up])) + 1e-3), 14, colors="#cccccc", linewidths=0.6)
    print("until the loss is within 1e-10 of the least:")
    needed = {}
    for name, colour in COLOURS.items():
        calls, points = valley[name]
        left.plot(*points.T, color=colour, marker=".", markersize=4, label=f"{name}: {calls[-1]} calls")
        calls, over = regression[name][0], np.maximum(losses[name] - least, 1e-16)
        right.semilogy(calls, over, color=colour, marker=".", markersize=4, label=name)
        needed[name] = next((call for call, one in zip(calls, over, strict=True) if one < 1e-10), None)
        steps = next((step for step, one in enumerate(over) if one < 1e-10), None)
        reached = f"{needed[name]} calls, {steps} steps" if steps else f"{over[-1]:.1e} over it after {calls[-1]} calls"
        print(f"  {name}: {reached}")
    left.plot(1, 1, "k*")
    left.set(title="Rosenbrock's valley", xlabel="x[0]", ylabel="x[1]")
    right.set(title="Logistic regression", xlabel="server calls", ylabel="loss above the least")
    left.legend(loc="lower center")
    right.legend()
    save(figure, options)
    for name in (QUASI, NEWTON):
        np.testing.assert_allclose(valley[name][1][-1], 1, atol=1e-5)
        assert needed[name] is not None
    assert needed[DESCENT] is None


if __name__ == "__main__":
    main()
