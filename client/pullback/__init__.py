"""Gradients of models that live elsewhere: the client of a Pullback server.

    import pullback as pb

    client = pb.connect("localhost:8470")
    model = client.model("square")
    outputs, grads = model.vjp(x, v)
    value, grads = model.value_and_grad(x, loss="cross_entropy", target=t, wrt=["x", "fc1.*"])

Needs neither torch nor the server.
"""

from typing import TYPE_CHECKING

from pullback import errors
from pullback._channel import TLS
from pullback._client import Client, connect
from pullback._info import LossInfo, ModelInfo, TensorInfo
from pullback._loss import Loss
from pullback._model import RemoteModel
from pullback._results import HessianResult, HvpResult, JvpResult, VjpResult
from pullback._retry import RetryPolicy
from pullback.errors import PullbackError
from pullback_wire.malloc import pin_malloc as tune_malloc

__all__ = [
    "TLS",
    "Client",
    "HessianResult",
    "HvpResult",
    "JvpResult",
    "Loss",
    "LossInfo",
    "ModelInfo",
    "PullbackError",
    "RemoteModel",
    "RetryPolicy",
    "TensorInfo",
    "VjpResult",
    "__version__",
    "connect",
    "errors",
    "tune_malloc",
]

if TYPE_CHECKING:
    __version__: str


def __getattr__(name: str) -> str:
    # Looked up when asked for: it takes longer than importing the rest of this package.
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("pullback")
        except PackageNotFoundError:
            return "unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
