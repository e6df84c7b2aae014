"""A small convolutional classifier of 8x8 digits.

With random weights: pullback-server serve examples/models/digits-conv/model.py
"""

import torch
from torch import nn

from pullback_server import model, spec


@model("digits-conv", inputs={"image": spec("float32", ["batch", 8, 8])}, batch_axis=0)
class DigitsConv(nn.Module):
    """Logits of ten digits from images of 8x8 pixels in [0, 1], 0 being paper and 1 ink."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc = nn.Linear(32 * 2 * 2, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        # Smooth activations and mean pooling: a ReLU has no curvature, and maxima jump.
        x = nn.functional.avg_pool2d(nn.functional.silu(self.conv1(image[:, None])), 2)
        x = nn.functional.avg_pool2d(nn.functional.silu(self.conv2(x)), 2)
        return self.fc(x.flatten(1))
