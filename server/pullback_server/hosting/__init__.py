"""What a registered model is."""

from pullback_server.hosting.spec import Registration, TensorSpec, model, spec

__all__ = ["Registration", "TensorSpec", "model", "spec"]
