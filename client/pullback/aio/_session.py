"""`Session`: remote autograd whose ops do not wait, and whose values are awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from pullback._apply import Arguments
from pullback._session import Session as SyncSession
from pullback._session import current, enter, leave
from pullback._tensor import Tensor as SyncTensor
from pullback._tensor import tensor as make_tensor
from pullback.aio._held import Held
from pullback.aio._model import RemoteModel
from pullback.aio._tensor import Tensor
from pullback.aio._threads import gently, in_event_loop, in_thread, on_errand
from pullback.aio._transport import LoopTransport

P = ParamSpec("P")
R = TypeVar("R")

#: Data of at least so many bytes is sent by a thread.
_LARGE = 1 << 20
#: Of a block that is left by one of these nothing may be waited for any more.
_AT_ONCE = (asyncio.CancelledError, GeneratorExit)


def _task() -> asyncio.Task[Any] | None:
    """Who is running; None where a coroutine is collected that its loop has left."""
    return asyncio.current_task() if in_event_loop() else None


class Session:
    """A session with a server: tensors and graphs on one worker of it, for as long as the session lasts.

        async with client.session(models=[model]) as session:
            x = await session.tensor(array, requires_grad=True)
            loss = model(x).pow(2).sum()
            await loss.backward()
            gradient = await x.grad.numpy()

    In its `async with` block it is the current session of the task, and of tasks that are started inside; at its end it
    is closed. Ops are sent and not waited for, so a failure is raised where something is awaited next, and at the
    latest at the end of the block; its message says which op failed.

    Cancelling a task that awaits a value leaves the session as it is. A block that is left by a cancellation ends it at
    once, and what the server computes for it with it. A session belongs to the event loop in which it was opened.
    """

    def __init__(self, held: Held) -> None:
        self._held = held
        #: What was current before each `async with`, by task.
        self._around: dict[asyncio.Task[Any] | None, list[SyncSession | None]] = {}

    def __repr__(self) -> str:
        return repr(self._held).replace("<pullback.Session", "<pullback.aio.Session", 1)

    @property
    def id(self) -> str:
        """The server's name for the session, as it stands in the server's log."""
        return self._held.id

    @property
    def device(self) -> str:
        """Device of its worker, e.g. "cuda:0"."""
        return self._held.device

    @property
    def budget_bytes(self) -> int:
        """Bytes that its tensors and graphs may hold on the worker."""
        return self._held.budget_bytes

    @property
    def usable(self) -> bool:
        """False once it is known to have ended."""
        return self._held.usable

    async def use(self, *models: RemoteModel) -> None:
        """Asks for the signatures of models, so that they can be called in this session without waiting.

        For those that were not named when it was opened. Raises ModelNotFound, ... as any call.
        """
        for model in models:
            caller = model._caller
            if (caller.name, caller.version) not in self._held.signatures:
                caller.forget()
                self._held.signatures.setdefault((caller.name, caller.version), await caller.learn())

    async def tensor(self, data: Any, requires_grad: bool = False, dtype: Any = None) -> Tensor:
        """A tensor of this session with a copy of `data`, on its way to the server.

        Arguments and errors as of `pullback.tensor`, and SessionLost. Of large data all is sent when this returns.
        """
        if isinstance(data, Tensor):
            data = await data.numpy()
        if isinstance(data, bool | int | float | complex) or (
            # Of a sync client's tensor the value may have to be waited for; of torch's and others the size is known.
            not isinstance(data, SyncTensor | list | tuple) and getattr(data, "nbytes", _LARGE) < _LARGE
        ):
            return self._put(data, requires_grad, dtype)
        return await gently(self._put, data, requires_grad, dtype)

    def _put(self, data: Any, requires_grad: bool, dtype: Any) -> Tensor:
        made = make_tensor(data, requires_grad, dtype)
        tensor = Tensor(made.portable_data(), requires_grad, self._held)
        Arguments(self._held).handle(tensor)
        return tensor

    async def synchronize(self, timeout: float | None = None) -> None:
        """Waits until all ops are done. Raises the first failure that nobody has heard of."""
        await self._held.wait_for(self._held.synchronize, timeout)

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What a function returns, called in a thread with this session as the current one.

        In it tensors are those of the sync client: `t.item()`, `float(t)`, `loss.backward()` wait, and nothing is
        awaited. Context variables go along. Cancelling it ends the session, as a thread cannot be stopped otherwise.
        """

        def call() -> R:
            current.set(self._held)
            return function(*args, **kwargs)

        return await on_errand(call)

    async def close(self) -> None:
        """Ends the session and frees everything that it holds on the server. Closing twice is harmless."""
        await in_thread(self._held.close)

    async def __aenter__(self) -> Session:
        self._held._stream.check("")
        enter(self._held, self._around, _task())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        leave(self._around, _task())
        at_once = kind is not None and issubclass(kind, _AT_ONCE)
        try:
            if kind is None:
                await self.synchronize()
        except _AT_ONCE:
            at_once = True
            raise
        finally:
            if not self._around:
                if at_once:
                    self._held._stream.hang_up()
                else:
                    await self.close()


class Opening:
    """A session that is about to be opened: `async with` it, or await it for one to be closed by hand."""

    def __init__(self, transport: LoopTransport, models: Sequence[RemoteModel], timeout: float | None) -> None:
        self._transport = transport
        self._models = models
        self._timeout = timeout
        self._session: Session | None = None

    def __await__(self) -> Generator[Any, None, Session]:
        return self._open().__await__()

    async def _open(self) -> Session:
        names = [(model.name, model.version) for model in self._models]
        held = await on_errand(Held, self._transport, names, self._timeout, asyncio.get_running_loop())
        session = Session(held)
        try:
            await session.use(*self._models)
        except BaseException:
            held._stream.hang_up()
            raise
        return session

    async def __aenter__(self) -> Session:
        self._session = await self._open()
        return await self._session.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.__aexit__(kind, error, trace)
