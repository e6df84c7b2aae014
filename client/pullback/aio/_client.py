"""`connect` and `Client` for asyncio."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from pullback._channel import TLS
from pullback._client import addressed
from pullback._client_calls import ClientCalls
from pullback._fork import gate
from pullback._retry import RetryPolicy
from pullback.aio._model import RemoteModel
from pullback.aio._threads import in_thread
from pullback.aio._transport import AnyToken, LoopTransport

if TYPE_CHECKING:
    from pullback.aio._session import Opening


class Client(ClientCalls):
    """A connection to a Pullback server, made by `pullback.aio.connect`. Usable with `async with`.

    Nothing is sent before the first call. It may be used in any event loop, in several even, and by thousands of tasks
    at once; it may be pickled, and a forked child gets a connection of its own, as `pullback.Client` says. Cancelling a
    task cancels its call at the server.

    `upload_weights` reads and sends in a thread, which is also what calls `progress`. Requests of 256 MiB and more go
    through a session, in a thread too.
    """

    _transport: LoopTransport

    def __repr__(self) -> str:
        return f"<pullback.aio.Client of {self.target}{', closed' if self._transport.closed else ''}>"

    @property
    def target(self) -> str:
        """Where calls go."""
        return self._transport.address.target

    def model(self, name: str, version: str | int | None = None) -> RemoteModel:
        """A hosted model; version None: the latest that is ready at each call. Calls nobody.

        Raises TypeError for a name that is none.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"a model is named by a str, not {name!r}")
        return RemoteModel(self._transport, name, "" if version is None else str(version))

    def session(self, *, models: Iterable[str | RemoteModel] = (), timeout: float | None = None) -> Opening:
        """Opens a session: `async with client.session(models=[model]) as session:`, or awaited.

        models: that will be used in it; a worker that has them all is chosen, and their signatures are asked for, so
            that `model(x)` need not wait.
        timeout: seconds for what is awaited; None: the client's default.

        Raises PullbackError, once it is awaited or entered.
        """
        from pullback.aio._session import Opening

        named = [one if isinstance(one, RemoteModel) else self.model(one) for one in models]
        return Opening(self._transport, named, timeout)

    async def close(self) -> None:
        """Closes the connection. Calls that run, or come later, raise ClientClosed. Closing twice is harmless."""
        await in_thread(self._transport.close)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is GeneratorExit:
            # Nothing can be awaited any more.
            self._transport.close()
            return
        await self.close()


def connect(
    target: str,
    *,
    tls: TLS | None = None,
    timeout: float | None = 30.0,
    connect_timeout: float = 10.0,
    max_message_bytes: int = 256 << 20,
    metadata: Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]] = (),
    retry: RetryPolicy | None = None,
    name: str = "",
    caller: str = "",
    priority: Literal["normal", "high"] = "normal",
    token: AnyToken | None = None,
    allow_plaintext_token: bool = False,
) -> Client:
    """An asyncio client of the server at `target`. Connects at its first call; nothing is awaited here.

    All arguments and errors are those of `pullback.connect`. token may also be an async function; functions are called
    in the event loop.
    """
    address = addressed(
        target, tls, connect_timeout, max_message_bytes, metadata, name, caller, priority, token, allow_plaintext_token
    )
    with gate:
        # Not in the event loop, at the first call; it takes long.
        import grpc  # noqa: F401
    return Client(LoopTransport(address, timeout, RetryPolicy() if retry is None else retry))
