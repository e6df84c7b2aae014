"""Gradients of models that live elsewhere: the client of a Pullback server.

    import pullback as pb

    client = pb.connect("localhost:8470")
    model = client.model("square")

    x = pb.tensor(array, requires_grad=True)
    y = model(x)                      # forward on the server; its graph stays there
    y.backward(gradient=v)
    x.grad.numpy()

    outputs, grads = model.vjp(x, v)  # stateless, one round trip
    value, grads = model.value_and_grad(x, loss="cross_entropy", target=t, wrt=["x", "fc1.*"])

Needs neither torch nor the server.
"""

from typing import TYPE_CHECKING, Any

from pullback import errors
from pullback._calls import CallTimings, record_timings, request_id
from pullback._channel import TLS
from pullback._client import Client, connect
from pullback._grad_mode import enable_grad, is_grad_enabled, no_grad
from pullback._info import CheckInfo, LossInfo, ModelInfo, PlacementInfo, TensorInfo, VersionInfo
from pullback._loss import Loss
from pullback._model import RemoteModel
from pullback._results import HessianResult, HvpResult, JacobianResult, JvpResult, VjpResult
from pullback._retry import RetryPolicy
from pullback.errors import PullbackError
from pullback_wire.malloc import pin_malloc as tune_malloc

__all__ = [
    "TLS",
    "CallTimings",
    "CheckInfo",
    "Client",
    "GraphNode",
    "HessianResult",
    "HvpResult",
    "JacobianResult",
    "JvpResult",
    "Loss",
    "LossInfo",
    "ModelGraph",
    "ModelInfo",
    "Objective",
    "PlacementInfo",
    "PullbackError",
    "RemoteModel",
    "RetryPolicy",
    "Session",
    "Tensor",
    "TensorInfo",
    "VersionInfo",
    "VjpResult",
    "__version__",
    "aio",
    "autograd",
    "cat",
    "connect",
    "enable_grad",
    "errors",
    "functional",
    "is_grad_enabled",
    "matmul",
    "no_grad",
    "record_timings",
    "request_id",
    "stack",
    "tensor",
    "tune_malloc",
    "where",
]

if TYPE_CHECKING:
    from pullback import aio, autograd, functional
    from pullback._functions import cat, matmul, stack, where
    from pullback._graph import GraphNode, ModelGraph
    from pullback._objective import Objective
    from pullback._session import Session
    from pullback._tensor import Tensor, tensor

    __version__: str

#: Loaded when first asked for: what stateless calls do without.
_LAZY = {
    "GraphNode": "_graph",
    "ModelGraph": "_graph",
    "Objective": "_objective",
    "Session": "_session",
    "Tensor": "_tensor",
    "aio": "",
    "autograd": "",
    "cat": "_functions",
    "functional": "",
    "matmul": "_functions",
    "stack": "_functions",
    "tensor": "_tensor",
    "where": "_functions",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        # It takes longer than importing the rest of this package.
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("pullback")
        except PackageNotFoundError:
            return "unknown"
    if name in _LAZY:
        from importlib import import_module

        module = _LAZY[name]
        found = getattr(import_module(f"pullback.{module}"), name) if module else import_module(f"pullback.{name}")
        globals()[name] = found
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
