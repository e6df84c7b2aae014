"""What a registered model is."""

from pullback_server.hosting.options import Batching, Compile, Options
from pullback_server.hosting.spec import Registration, TensorSpec, model, spec

__all__ = ["Batching", "Compile", "Options", "Registration", "TensorSpec", "model", "spec"]
