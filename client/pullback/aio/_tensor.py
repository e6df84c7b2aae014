"""Tensors of an asyncio session: ops on them do not wait, reading them is awaited."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, cast

from pullback import _backward
from pullback._repr import shown
from pullback._tensor import Tensor as SyncTensor
from pullback.aio._held import Held, in_turn
from pullback.aio._threads import in_event_loop, works_for_a_task

#: Values of at most so many bytes are copied in the event loop, where they are here already.
_AT_ONCE = 1 << 20


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
        if self._pending is not None:
            await in_turn([self], self._known)
        return self

    # What these return depends on the thread, as the docstring of the class says; types tell of event loops.

    def numpy(self) -> Any:
        """Awaited: a copy of its value. Raises PullbackError."""
        return self._read("numpy", SyncTensor.numpy)

    def item(self) -> Any:
        """Awaited: the value of a tensor of one element, as a Python number. Raises ValueError for any other."""
        return self._read("item", SyncTensor.item)

    def tolist(self) -> Any:
        """Awaited: its values as nested lists of Python numbers."""
        return self._read("tolist", SyncTensor.tolist)

    def backward(
        self,
        gradient: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: SyncTensor | Sequence[SyncTensor] | None = None,
    ) -> Any:
        """Awaited: accumulates gradients into `.grad`; see `pullback.Tensor.backward`.

        Cancelled while the server computes, it accumulates nothing.
        """
        if not in_event_loop():
            return super().backward(gradient, retain_graph, create_graph, inputs)
        return _named(accumulate([self], [gradient], retain_graph, create_graph, inputs), "backward")

    def __repr__(self) -> str:
        # asyncio shows results of tasks by the way, where nobody expects to wait.
        return shown(self, ask=works_for_a_task())

    def _read(self, name: str, method: Callable[[SyncTensor], Any]) -> Any:
        return _named(self._value_of(method), name) if in_event_loop() else method(self)

    async def _value_of(self, method: Callable[[SyncTensor], Any]) -> Any:
        if self._pending is not None and self._pending.done():
            # Waits for nothing.
            self._known()
        if self.is_here and self.nbytes <= _AT_ONCE:
            return method(self)
        return await in_turn([self], method, self)


def _named(coroutine: Any, name: str) -> Coroutine[Any, Any, Any]:
    """Named as the warning shall say that comes when it is never awaited."""
    coroutine.__qualname__ = f"Tensor.{name}"
    return cast("Coroutine[Any, Any, Any]", coroutine)


async def accumulate(
    outputs: Sequence[Any],
    gradients: Sequence[Any],
    retain_graph: bool | None,
    create_graph: bool,
    inputs: SyncTensor | Sequence[SyncTensor] | None,
) -> None:
    """A backward. Cancelled before its gradients are here, it accumulates none, now or later."""
    found = await in_turn(outputs, _backward.computed, outputs, gradients, retain_graph, create_graph, inputs)
    # In the event loop itself, so that no thread does it when nobody expects it any more.
    waits = found.waits or not isinstance(found.session, Held)
    sums = await in_turn(outputs, _backward.accumulated, found) if waits else _backward.accumulated(found)
    if sums.sent:
        await in_turn(outputs, _backward.settle_sums, sums)
    elif sums.failure is not None:
        raise sums.failure


Held.tensor_type = Tensor
