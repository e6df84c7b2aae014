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


@model("encoder", inputs={"input": spec("float32", ["batch", 32, 64])}, batch_axis=0)
def encoder() -> nn.Module:
    """A transformer encoder: 2 layers, width 64, 4 heads, 32 tokens."""
    torch.manual_seed(0)
    return Encoder(2, 64, 4).eval()


@model("convnet", inputs={"input": spec("float32", ["batch", 3, 32, 32])}, batch_axis=0)
def convnet() -> nn.Module:
    """A convolutional net of three layers with group norms, for 3x32x32."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(4, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@model("identity", inputs={"input": spec("float32", ["n"])})
def identity(input: torch.Tensor) -> torch.Tensor:
    """Its input: nothing but transport."""
    return input


@model("cube", inputs={"x": spec("float64", ["n"])})
def cube(x: torch.Tensor) -> torch.Tensor:
    """Cubes."""
    return x**3
