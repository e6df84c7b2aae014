"""Pullback's server: hosts registered PyTorch models and answers gradient requests."""

from pullback_server.hosting import Batching, Compile, Gate, GradientHealth, TensorSpec, model, spec

__all__ = ["Batching", "Compile", "Gate", "GradientHealth", "Server", "TensorSpec", "model", "spec"]


def __getattr__(name: str) -> object:
    # A model file imports this package inside a worker, which must not pull in the front (grpc).
    if name == "Server":
        from pullback_server.embedded import Server

        return Server
    raise AttributeError(f"module 'pullback_server' has no attribute {name!r}")
