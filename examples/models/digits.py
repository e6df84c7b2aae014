"""A small classifier of 8x8 digits. Serve it with: pullback-server serve examples/models/digits.py"""

import torch
from torch import nn

from pullback_server import model, spec


@model("digits", inputs={"x": spec("float32", ["batch", 64])}, batch_axis=0)
class Digits(nn.Module):
    """Logits of ten digits from 64 pixels in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(64, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))
