"""A physical potential. Serve it with: pullback-server serve examples/models/energy.py"""

import torch

from pullback_server import model, spec


@model("energy", inputs={"x": spec("float64", ["atoms", 3])})
def energy(x: torch.Tensor) -> torch.Tensor:
    """Energy of a Lennard-Jones cluster, in units of its well depth, from positions in units of its length."""
    # Not torch.pdist, which has no second derivative.
    first, second = torch.triu_indices(len(x), len(x), 1)
    r2 = (x[first] - x[second]).square().sum(-1)
    return 4 * (r2**-6 - r2**-3).sum()
