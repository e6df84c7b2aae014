"""Tensors of an asyncio session: ops on them do not wait, reading them is awaited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pullback._tensor import Tensor as SyncTensor
from pullback.aio._held import Held, in_turn
from pullback.aio._threads import in_event_loop


class Tensor(SyncTensor):
    """A `pullback.Tensor` in a session of an asyncio client.

        loss = model(x).pow(2).sum()
        await loss.backward()
        print(await loss.item(), await x.grad.numpy())

    Operators and methods that make tensors send and do not wait. What must wait is awaited: `ready`, `numpy`, `item`,
    `tolist`, `backward`. What is plain Python and would have to wait (`shape` or `dtype` of what the server has not
    made yet, `float(t)`, `np.asarray(t)`) raises RuntimeError in an event loop, and works once the value is here.

    In a thread without an event loop, as in `Session.run`, all of it is as of `pullback.Tensor`: nothing is awaited.
    """

    __slots__ = ()

    async def ready(self) -> Tensor:
        """Waits until the server has made it: then its shape, dtype and requires_grad are known. Returns it.

        Raises what the first op failed with that was sent up to here and that nobody has heard of.
        """
        await in_turn([self], self._known)
        return self

    # What these return depends on the thread, as the docstring of the class says; types tell of event loops.

    def numpy(self) -> Any:
        """Awaited: a copy of its value. Raises PullbackError."""
        return self._awaited(SyncTensor.numpy)

    def item(self) -> Any:
        """Awaited: the value of a tensor of one element, as a Python number. Raises ValueError for any other."""
        return self._awaited(SyncTensor.item)

    def tolist(self) -> Any:
        """Awaited: its values as nested lists of Python numbers."""
        return self._awaited(SyncTensor.tolist)

    def backward(
        self,
        gradient: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: SyncTensor | Sequence[SyncTensor] | None = None,
    ) -> Any:
        """Awaited: accumulates gradients into `.grad`; see `pullback.Tensor.backward`."""
        return self._awaited(SyncTensor.backward, gradient, retain_graph, create_graph, inputs)

    def _awaited(self, method: Any, *args: Any) -> Any:
        return in_turn([self], method, self, *args) if in_event_loop() else method(self, *args)


Held.tensor_type = Tensor
