"""The asyncio client: what `pullback` offers, awaited.

    import pullback as pb

    async with pb.aio.connect("localhost:8470") as client:
        model = client.model("square")
        outputs, grads = await model.vjp(x, v)
        several = await asyncio.gather(*(model.vjp(x, v) for x in many))

        async with client.session(models=[model]) as session:
            x = await session.tensor(array, requires_grad=True)
            y = model(x).sum()                      # sent, not waited for
            (g,) = await pb.aio.grad(y, x, create_graph=True)
            print(await g.numpy())

`pb.no_grad`, `pb.request_id`, `pb.record_timings`, `pb.autograd.detect_anomaly`, `pb.functional` and the errors are the
same for both clients; they hold for the task that uses them.
"""

from typing import TYPE_CHECKING, Any

from pullback.aio._client import Client, connect
from pullback.aio._model import RemoteModel

__all__ = ["Client", "RemoteModel", "Session", "Tensor", "backward", "connect", "grad"]

if TYPE_CHECKING:
    from pullback.aio._autograd import backward, grad
    from pullback.aio._session import Session
    from pullback.aio._tensor import Tensor

#: Loaded when first asked for: what stateless calls do without.
_LAZY = {"Session": "_session", "Tensor": "_tensor", "backward": "_autograd", "grad": "_autograd"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        found = getattr(import_module(f"pullback.aio.{_LAZY[name]}"), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
