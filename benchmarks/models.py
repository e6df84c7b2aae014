"""Models that the benchmarks host."""

import torch
from torch import nn

from pullback_server import model, spec


@model("mlp", inputs={"input": spec("float32", ["batch", 784])}, batch_axis=0)
def mlp() -> nn.Module:
    """An MLP 784-256-10."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


class Encoder(nn.Module):
    """A transformer encoder over embedded tokens, and classes of their mean."""

    def __init__(self, layers: int, width: int, heads: int, classes: int = 10) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.encoder(input).mean(1))
        return logits


@model("encoder", inputs={"input": spec("float32", ["batch", 32, 128])}, batch_axis=0)
def encoder() -> nn.Module:
    """A transformer encoder: 2 layers, width 128, 4 heads, 32 tokens."""
    torch.manual_seed(0)
    return Encoder(2, 128, 4).eval()


class Residual(nn.Module):
    """Two convolutions with group norms, beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1),
            nn.GroupNorm(4, after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1),
            nn.GroupNorm(4, after),
        )
        self.shortcut = nn.Identity() if stride == 1 and before == after else nn.Conv2d(before, after, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.path(x) + self.shortcut(x))


@model("convnet", inputs={"input": spec("float32", ["batch", 3, 32, 32])}, batch_axis=0)
def convnet() -> nn.Module:
    """A ResNet-8 with group norms for 3x32x32: widths 16, 32, 64."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1), nn.GroupNorm(4, 16), nn.ReLU()]
    layers += [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@model("identity", inputs={"input": spec("float32", ["n"])})
def identity(input: torch.Tensor) -> torch.Tensor:
    """Its input: nothing but transport."""
    return input


@model("cube", inputs={"x": spec("float64", ["n"])})
def cube(x: torch.Tensor) -> torch.Tensor:
    """Cubes."""
    return x**3
