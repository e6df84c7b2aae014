"""Heat conduction in a plate that is partly copper. Serve it with: pullback-server serve examples/models/heat.py"""

import torch
from torch.nn import functional

from pullback_server import model, spec

#: How well copper conducts, as a multiple of what the rest of the plate does.
COPPER = 200.0


@model(
    "heat",
    inputs={
        "copper": spec("float64", ["rows", "columns"], low=0, high=1),
        "power": spec("float64", [], low=1, high=8),
        "blur": spec("float64", [], low=0, high=1),
    },
    outputs=["temperature"],
)
def heat(copper: torch.Tensor, power: torch.Tensor, blur: torch.Tensor) -> torch.Tensor:
    """Steady temperature [rows, columns] of the upper half of a plate that is heated evenly.

    Its left edge is held at 0 in the first eighth of the rows (of the whole plate, a window in the middle); elsewhere
    nothing passes the edges. The first row is next to the axis of symmetry. Lengths are in widths of the plate, so that
    temperatures are multiples of heating * width² / conductivity of the plate without copper.

    copper: the share of copper in each cell.
    power: a cell conducts 1 + (COPPER - 1) * share ** power; above 1, halves are worth less than they cost.
    blur: how much of its share a cell has from its neighbours; with 1 no detail of a design is finer than about three.
    """
    rows, columns = copper.shape
    ring = (
        torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]], dtype=copper.dtype, device=copper.device) / 16
    )
    padded = functional.pad(copper[None, None], (1, 1, 1, 1), mode="replicate")
    share = (1 - blur) * copper + blur * functional.conv2d(padded, ring[None, None])[0, 0]
    k = 1 + (COPPER - 1) * share**power
    # Finite volumes: between two cells their resistances add up.
    upward = 2 / (1 / k[1:] + 1 / k[:-1])
    across = 2 / (1 / k[:, 1:] + 1 / k[:, :-1])
    held = torch.zeros_like(k[:, 0])
    held[: max(rows // 8, 1)] = 1
    own = functional.pad(upward, (0, 0, 0, 1)) + functional.pad(upward, (0, 0, 1, 0))
    own = own + functional.pad(across, (0, 1)) + functional.pad(across, (1, 0))
    own = own + functional.pad((2 * held * k[:, 0])[:, None], (0, columns - 1))
    # One column after the other: blocks on the diagonal, and diagonal blocks beside them.
    source = torch.full_like(k[:, 0], 1 / columns**2)
    inverses, sources = [], []
    for column in range(columns):
        off = -upward[:, column]
        block = torch.diag(own[:, column]) + torch.diag(off, 1) + torch.diag(off, -1)
        right = source
        if column:
            beside = across[:, column - 1]
            block = block - beside[:, None] * inverses[-1] * beside
            right = source + beside * (inverses[-1] @ sources[-1])
        inverses.append(torch.linalg.inv(block))
        sources.append(right)
    found = [inverses[-1] @ sources[-1]]
    for column in range(columns - 2, -1, -1):
        found.append(inverses[column] @ (sources[column] + across[:, column] * found[-1]))
    return torch.stack(found[::-1], 1)
