"""`RemoteModel` of an asyncio client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pullback._info import ModelInfo
from pullback._model_calls import ModelCalls, Tensors

if TYPE_CHECKING:
    from pullback._session import Session as SyncSession
    from pullback.aio._session import Session
    from pullback.aio._tensor import Tensor


class RemoteModel(ModelCalls):
    """A model that a server hosts, got from `pullback.aio.Client.model`. Making one calls nobody.

    Its calls are those of `pullback.RemoteModel`, with the same arguments, results and errors, to be awaited:

        outputs, grads = await model.vjp(x, v)

    A task that is cancelled cancels its call at the server. Arrays that are given must not change until the call has
    returned. In a session, `model(x)` does not wait.
    """

    async def info(self) -> ModelInfo:
        """The model's signature, with parameters; see `pullback.RemoteModel.info`, which is a property."""
        return await self._caller.info()

    def __call__(
        self,
        *args: Any,
        parameters: Tensors = None,
        train: bool = False,
        seed: int | None = None,
        max_order: int | None = None,
        detect_anomaly: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Runs the model in the current session, or in that of the tensors given, and does not wait.

        Arguments and results as of `pullback.RemoteModel.__call__`; what fails is raised by what is awaited next.

        Raises RuntimeError without a session, and in one that does not know the model's signature: name the model when
        the session is opened, or `await session.use(model)`.
        """
        from pullback._remote_call import call_model

        return call_model(self._caller, args, kwargs, parameters, train, seed, max_order, detect_anomaly)

    async def forward(
        self,
        *args: Any,
        parameters: Tensors = None,
        train: bool = False,
        seed: int | None = None,
        max_order: int | None = None,
        detect_anomaly: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As calling it, and waits for the answer. For large arrays, and for models whose outputs are not known before.

        Those are models without declared inputs, which the server could not try.
        """
        from pullback._remote_call import call_model
        from pullback.aio._held import in_turn

        values = [*args, *kwargs.values(), *dict(parameters or {}).values()]
        settings = (parameters, train, seed, max_order, detect_anomaly)
        return await in_turn(values, call_model, self._caller, args, kwargs, *settings)

    def named_parameters(self, session: Session | None = None) -> Iterator[tuple[str, Tensor]]:
        """The parameters as tensors of the session, by name; see `pullback.RemoteModel.named_parameters`.

        Does not wait. session: None: the current one.
        """
        from pullback._remote_call import take_parameters

        found: Any = take_parameters(self._caller, _held(session))
        yield from found.items()

    def parameters(self, session: Session | None = None) -> Iterator[Tensor]:
        """As `named_parameters`, without the names."""
        for _, tensor in self.named_parameters(session):
            yield tensor

    def zero_grad(self, session: Session | None = None) -> None:
        """Sets `.grad` of the parameters taken in the session to None."""
        from pullback._remote_call import taken_parameters

        for tensor in taken_parameters(self._caller, _held(session)):
            tensor.grad = None


def _held(session: Session | None) -> SyncSession | None:
    return None if session is None else session._held
