"""What a registered model is."""

from pullback_server.hosting.gate import Gate
from pullback_server.hosting.items import Item
from pullback_server.hosting.options import Batching, Compile, GradientHealth, Options
from pullback_server.hosting.spec import Abilities, Registration, TensorSpec, model, spec

__all__ = [
    "Abilities",
    "Batching",
    "Compile",
    "Gate",
    "GradientHealth",
    "Item",
    "Options",
    "Registration",
    "TensorSpec",
    "model",
    "spec",
]
