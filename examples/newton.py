"""Newton's method on a graph that the server holds: logistic regression on real data (breast cancer, 569 x 30).

Each step sends the weights, keeps the graph of loss and gradient on the server, and has the whole Hessian from it in
one op: the gradient's own gradients along all unit vectors at once. The data goes to the server once and stays there.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer

import pullback as pb
from pullback_server import Server


def main() -> None:
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    with Server(Path(__file__).parent / "models" / "logistic.py") as server, pb.connect(server.target) as client:
        model = client.model("logistic")
        data, labels = client.tensor(x), client.tensor(y.astype(np.float64))
        current, norms = np.zeros(x.shape[1]), []
        for step in range(12):
            weights = client.tensor(current, requires_grad=True)
            loss = model(weights, data, labels)
            (gradient,) = pb.autograd.grad(loss, weights, create_graph=True)
            (hessian,) = pb.autograd.grad(gradient, weights, np.eye(len(current)), is_grads_batched=True)
            norms.append(float(np.abs(gradient.numpy()).max()))
            print(f"step {step}: loss {loss.item():.10f}, largest gradient {norms[-1]:.1e}")
            if norms[-1] < 1e-12:
                break
            current = current - np.linalg.solve(hessian.numpy(), gradient.numpy())
        right = float(((x @ current > 0) == y).mean())
    print(f"right on {right:.1%} of the rows it was fitted to")
    assert norms[-1] < 1e-12
    # Quadratic convergence: with a Hessian that is off by a little, the last steps would gain a constant factor each.
    assert norms[-2] < 1e-5


if __name__ == "__main__":
    main()
