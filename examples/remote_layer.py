"""A hosted model in the middle of a local network: its gradient alone teaches a stem to put pixels back in order.

Somebody's digit classifier is on a server and stays as it is. Here the digits come with their pixels in disorder, which
it makes nothing of. A local stem (a soft permutation of the pixels), the frozen remote layer and a local head are one
torch network, whose loss goes backward through the server into the stem. The same network with a copy of the layer in
this process must give the same losses, step by step, to rounding; this program checks that it does.
"""

import numpy as np
import torch
from _gallery import BLUE, RED, arguments, connected, digits, panels, save, show
from torch import nn
from torch.nn import functional

import pullback as pb
from pullback.torch import RemoteModule

BATCH = 64


class LocalCopy(nn.Module):
    """The layer that examples/models/digits-conv hosts, with the hosted weights, in this process."""

    def __init__(self, model: pb.RemoteModel) -> None:
        super().__init__()
        weights = RemoteModule(model, parameters=True).state_dict()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.fc = nn.Linear(128, 10)
        self.load_state_dict(weights)
        self.requires_grad_(False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = functional.avg_pool2d(functional.silu(self.conv1(image[:, None])), 2)
        x = functional.avg_pool2d(functional.silu(self.conv2(x)), 2)
        return self.fc(x.flatten(1))


class Stem(nn.Module):
    """Images [n, 8, 8] with their pixels moved: each pixel of the result is a mixture of those given."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(64, 64))

    def mixture(self) -> torch.Tensor:
        """[64, 64], rows and columns adding up to 1 (Sinkhorn): what a permutation is when it is not yet decided."""
        logs = self.scores
        for _ in range(4):
            logs = logs.log_softmax(1).log_softmax(0)
        return logs.exp()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1) @ self.mixture().T).reshape(-1, 8, 8)


def network(layer: nn.Module) -> nn.Sequential:
    """Stem, layer, head. The head begins as the identity."""
    head = nn.Linear(10, 10)
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(Stem(), layer, head)


def train(net: nn.Sequential, x: torch.Tensor, y: torch.Tensor, steps: int) -> list[float]:
    """Steps of Adam; returns the losses."""
    stem, _, head = net
    optimiser = torch.optim.Adam([{"params": stem.parameters(), "lr": 0.3}, {"params": head.parameters(), "lr": 3e-3}])
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        loss = functional.cross_entropy(net(x[rows]), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Percent."""
    return 100 * (net(x).argmax(1) == y).float().mean().item()


def main() -> None:
    options = arguments(__doc__, __file__)
    torch.set_num_threads(1)  # small tensors
    steps = 200 if options.small else 500
    x, y, held_x, held_y = map(torch.from_numpy, digits())
    disorder = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    straight = held_x
    x, held_x = (images.flatten(1)[:, disorder].reshape(-1, 8, 8) for images in (x, held_x))
    with connected(options, "digits-conv") as client:
        model = client.model("digits-conv")
        hosted = RemoteModule(model, max_order=1)  # only first derivatives are wanted
        remote, local = network(hosted), network(LocalCopy(model))
        before = accuracy(hosted, held_x, held_y)
        losses = train(remote, x, y, steps)
        same = train(local, x, y, steps)
        after, ordered = accuracy(remote, held_x, held_y), accuracy(hosted, straight, held_y)
        shown = remote[0](held_x).detach()
    apart = max(abs(a - b) for a, b in zip(losses, same, strict=True))
    print(f"the hosted layer: {ordered:.1f} % of digits in order, {before:.1f} % of those in disorder")
    print(f"between stem and head, after {steps} steps: {after:.1f} % of those in disorder")
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; the local network's is apart by {apart:.1e} at most")
    assert apart < 1e-3, "the remote layer's gradients are not those of the local one"
    assert after > before + 50, "the stem has learned nothing"

    picture, axes = panels(3, 9, width_ratios=[2, 2, 2, 0.6] + [1.3] * 5)
    for one in axes[:, :4].flat:
        one.remove()
    left = picture.add_subplot(axes[0, 0].get_gridspec()[:, :3])
    left.plot(losses, color=BLUE, linewidth=3.5, alpha=0.4, label="layer on the server")
    left.plot(same, color=RED, linewidth=0.7, label="layer in this process")
    left.set(xlabel="step of Adam", ylabel="cross-entropy of a batch", yscale="log")
    left.set_title(f"Two trainings; largest difference of a loss: {apart:.1e}")
    left.legend(loc="lower left")
    for column, at in enumerate(np.unique(held_y, return_index=True)[1][[0, 2, 3, 6, 9]], 4):
        for row, image in enumerate((straight[at], held_x[at], shown[at])):
            show(axes[row, column], image.numpy(), f"a {held_y[at]}" if row == 0 else "")
    for row, name in enumerate(("digit", "given,\nin disorder", "as the stem\nreads it")):
        axes[row, 4].set_ylabel(name)
    picture.suptitle(f"Recognised in disorder: {before:.0f} % without the stem, {after:.0f} % with it", fontsize=11)
    save(picture, options)


if __name__ == "__main__":
    main()
