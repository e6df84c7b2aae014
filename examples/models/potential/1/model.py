"""Silicon by the potential of Stillinger and Weber, Phys. Rev. B 31, 5262 (1985), with their parameters."""

import torch

from pullback_server import model

#: Depth of the pair potential: 50 kcal/mol in eV, so that diamond has -2 * EPSILON per atom.
EPSILON = 2.1682
#: Length in Angstrom; diamond's bonds are 2^(1/6) SIGMA long.
SIGMA = 2.0951
#: The published A, B, a, lambda and gamma, without dimension (p = 4 and q = 0 are written out below).
A, B, REACH, LAMBDA, GAMMA = 7.049556277, 0.6022245584, 1.80, 21.0, 1.20
CUTOFF = REACH * SIGMA


def bonds(positions: torch.Tensor, box: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs closer than the cutoff, each from both ends: the index of the first atom [n], and the vector [n, 3]
    from it to the second one or to a periodic image of it, in units of SIGMA."""
    # Which images can be near is no smooth function of anything; a force comes from those that are.
    between = positions[None] - positions[:, None]
    between = between - box * torch.round(between.detach() / box.detach())
    # With components of at most half an edge, images this far away can be within the cutoff. Large boxes: none but 0.
    far = [int(CUTOFF / edge + 0.5) for edge in box.tolist()]
    image = torch.cartesian_prod(*(torch.arange(-n, n + 1, device=box.device) for n in far))
    vectors = (between[:, :, None] + image * box) / SIGMA
    near = vectors.detach().square().sum(-1) < REACH**2
    # An atom is not its own neighbour, but its images are. By index, not by distance: two atoms in one place are wrong.
    near[..., (image == 0).all(-1)] &= ~torch.eye(len(positions), dtype=torch.bool, device=box.device)[..., None]
    return near.nonzero()[:, 0], vectors[near]


@model("potential")
def potential(positions: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """Energy in eV of silicon atoms in a periodic box.

    positions: [atoms, 3] in Angstrom, inside of the box or not. box: its edges [3] in Angstrom, at right angles.
    Torch's own operations alone, all of them smooth here, so that derivatives of any order are right.
    """
    centre, vectors = bonds(positions, box)
    r = vectors.square().sum(-1).sqrt()
    # Pairs: f2(r) = A (B r^-4 - 1) exp(1 / (r - a)). Each is there from both ends.
    pairs = 0.5 * (A * (B * r**-4 - 1) * torch.exp(1 / (r - REACH))).sum()
    # Bonds of one centre, two by two: h = lambda exp(gamma / (r1 - a) + gamma / (r2 - a)) (cos theta + 1/3)^2.
    first, second = torch.triu(centre[:, None] == centre, 1).nonzero(as_tuple=True)
    decay = torch.exp(GAMMA / (r - REACH))
    cosine = (vectors[first] * vectors[second]).sum(-1) / (r[first] * r[second])
    angles = (LAMBDA * decay[first] * decay[second] * (cosine + 1 / 3) ** 2).sum()
    return EPSILON * (pairs + angles)
