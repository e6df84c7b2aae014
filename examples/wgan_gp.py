"""Train a generator here against a critic on a server: a Wasserstein GAN with gradient penalty on eight Gaussians.

The critic's forward and backward run on the server; its weights are mirrored here, where torch's own optimiser steps
them. The penalty (Gulrajani et al., 2017) keeps the critic's gradient near length 1, so training it differentiates that
gradient again: the second derivative goes through the server too. What the critic tells the generator, how far the
generated points are from the real ones (the Wasserstein distance), falls as the generator learns.
"""

import argparse
import math

import torch
from torch import nn

import pullback as pb
from pullback.torch import RemoteModule
from pullback_server import Server, model, spec

BATCH, CRITIC_STEPS, PENALTY, NOISE = 128, 3, 0.1, 4
ANGLES = torch.arange(8) * (math.pi / 4)
CENTRES = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


@model("critic", inputs={"input": spec("float32", ["points", 2])}, batch_axis=0)
def critic() -> nn.Module:
    """A score for each point of the plane. Smooth, as its gradient is differentiated."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))


def eight_gaussians(count: int) -> torch.Tensor:
    """Points around eight centres on a circle of radius 1: [count, 2]."""
    return CENTRES[torch.randint(8, (count,))] + 0.05 * torch.randn(count, 2)


def gradient_penalty(score: nn.Module, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Mean of (|∇score| - 1)² between real and generated points: a scalar, differentiable by the critic's weights."""
    mix = torch.rand(len(real), 1)
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(score(between).sum(), between, create_graph=True)
    return (gradient.norm(dim=1) - 1).square().mean()


def train(score: nn.Module, steps: int) -> tuple[nn.Module, list[float]]:
    """Trains critic and generator. Returns the generator, and the estimated distance at each of its steps."""
    generator = nn.Sequential(nn.Linear(NOISE, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    for_critic = torch.optim.Adam(score.parameters(), lr=5e-3, betas=(0.0, 0.9))
    for_generator = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.0, 0.9))
    distances = []
    for step in range(steps):
        for _ in range(CRITIC_STEPS):
            real = eight_gaussians(BATCH)
            with torch.no_grad():
                fake = generator(torch.randn(BATCH, NOISE))
            on_real, on_fake = score(torch.cat([real, fake])).split(BATCH)
            distance = on_real.mean() - on_fake.mean()
            for_critic.zero_grad()
            (PENALTY * gradient_penalty(score, real, fake) - distance).backward()
            for_critic.step()
        distances.append(distance.item())
        # The generator learns through the critic's gradient by its input; the critic's weights rest.
        score.requires_grad_(False)
        for_generator.zero_grad()
        (-score(generator(torch.randn(BATCH, NOISE))).mean()).backward()
        for_generator.step()
        score.requires_grad_(True)
        if step % 20 == 0 or step == steps - 1:
            recent = distances[-20:]
            print(f"step {step:4}: Wasserstein estimate {sum(recent) / len(recent):.3f}")
    return generator, distances


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--steps", type=int, default=200, help="how often the generator is stepped")
    steps = arguments.parse_args().steps
    torch.manual_seed(0)
    with Server(critic, threads=1) as server, pb.connect(server.target) as client:
        generator, distances = train(RemoteModule(client.model("critic"), parameters=True), steps)
    with torch.no_grad():
        away, nearest = torch.cdist(generator(torch.randn(2000, NOISE)), CENTRES).min(1)
    reached = int((torch.bincount(nearest[away < 0.2], minlength=8) >= 20).sum())
    first, last = max(distances), sum(distances[-20:]) / len(distances[-20:])
    print(f"the estimate fell from {first:.3f} to {last:.3f}; {reached} of 8 Gaussians are reached")
    if steps >= 200:
        assert last < 0.2 * first
        assert reached >= 6


if __name__ == "__main__":
    main()
