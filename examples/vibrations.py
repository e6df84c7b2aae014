"""Relax a cluster of seven atoms by its forces, then find how it vibrates from the Hessian: both from a server.

Force is minus the gradient of the energy. At rest the eigenvalues of the Hessian are the squared frequencies of the
normal modes; six of them are zero, since moving or turning the whole cluster costs nothing. This program checks that.
"""

from pathlib import Path

import numpy as np

import pullback as pb
from pullback_server import Server


def newton_cg(model: pb.RemoteModel, x: np.ndarray, steps: int = 50) -> np.ndarray:
    """Minimises the energy by Newton steps, each solved by conjugate gradients on Hessian-vector products.

    Where the curvature along a search direction is not positive, the step so far is taken (Steihaug, 1983).
    """
    for _ in range(steps):
        energy, force = model.value_and_grad(x)
        gradient = force["x"]
        if np.abs(gradient).max() < 1e-10:
            break
        step, residual = np.zeros_like(x), -gradient
        direction = residual.copy()
        for _ in range(x.size):
            curved = model.hvp(x, direction, return_outputs=False).hvps
            curvature = float((direction * curved).sum())
            if curvature <= 1e-12 * float((direction**2).sum()):
                step = step if step.any() else 1e-2 * direction
                break
            length = float((residual**2).sum()) / curvature
            step = step + length * direction
            new = residual - length * curved
            if np.abs(new).max() < 1e-12:
                break
            direction = new + float((new**2).sum()) / float((residual**2).sum()) * direction
            residual = new
        # Halve the step until the energy falls.
        while model.evaluate(x + step) > energy and np.abs(step).max() > 1e-14:
            step = step / 2
        x = x + step
    return x


def main() -> None:
    # A pentagonal bipyramid, shaken.
    ring = [[0.95 * np.cos(angle), 0.95 * np.sin(angle), 0.0] for angle in 2 * np.pi * np.arange(5) / 5]
    start = np.array([*ring, [0, 0, 0.57], [0, 0, -0.57]]) * 1.05
    start += np.random.default_rng(0).normal(scale=0.02, size=start.shape)
    with Server(Path(__file__).parent / "models" / "energy.py") as server, pb.connect(server.target) as client:
        model = client.model("energy")
        x = newton_cg(model, start)
        energy, gradients = model.value_and_grad(x)
        hessian = model.hessian(x).reshape(21, 21)
    squared = np.linalg.eigvalsh((hessian + hessian.T) / 2)
    print(f"energy at rest {float(energy):.6f} (the known minimum of seven atoms is -16.505384)")
    print(f"largest force {np.abs(gradients['x']).max():.1e}")
    print(f"squared frequencies {np.round(squared, 3)}")
    assert abs(float(energy) + 16.505384) < 1e-5
    assert (np.abs(squared[:6]) < 1e-6).all()
    assert squared[6] > 1


if __name__ == "__main__":
    main()
