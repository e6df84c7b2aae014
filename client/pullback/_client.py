"""`connect` and `Client`: a server, its models, and whether it is well."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from pullback._blocking import blocking
from pullback._channel import TLS, Address, Token, clean_metadata
from pullback._client_calls import ClientCalls
from pullback._model import RemoteModel
from pullback._retry import RetryPolicy
from pullback._transport import Transport
from pullback_wire import CALLER_KEY, PRIORITY_KEY

if TYPE_CHECKING:
    from pullback._session import Session
    from pullback._tensor import Tensor

_TOKEN_VARIABLE = "PULLBACK_TOKEN"


class Client:
    """A connection to a Pullback server, made by `connect`. Usable as a context manager.

    Nothing is sent before the first call. One client serves many threads; it may be pickled (with its metadata, token
    and TLS settings, so treat the bytes as the secrets they hold; a function that gives tokens must be one that pickle
    takes), and a forked child gets a connection of its own. A fork waits up to two seconds for calls that other threads
    have under way; while calls last longer than that, start processes by spawn or forkserver instead, as a child forked
    out of a gRPC call may crash.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def __repr__(self) -> str:
        return f"<pullback.Client of {self.target}{', closed' if self._transport.closed else ''}>"

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

    def session(
        self,
        *,
        models: Iterable[str | RemoteModel] = (),
        pipelined: bool = False,
        timeout: float | None = None,
    ) -> Session:
        """Opens a session: `with client.session(): ...` makes it the current one, and ends it.

        Without one, tensors use the client's own session, which is opened when it is needed and lasts as long as the
        client.

        models: that will be used in it; a worker that has them all is chosen.
        pipelined: ops do not wait for their answers; see `Session`.
        timeout: seconds for each op; None: the client's default.

        Raises PullbackError.
        """
        from pullback._session import Session

        named = [(one.name, one.version) if isinstance(one, RemoteModel) else (one, "") for one in models]
        return Session(self._transport, named, pipelined=pipelined, timeout=timeout)

    def tensor(self, data: Any, requires_grad: bool = False, dtype: Any = None) -> Tensor:
        """A tensor of this client's: arguments as of `pullback.tensor`.

        It is used in the session of the `with client.session():` around, else in the client's own.
        """
        from pullback._tensor import tensor

        return tensor(data, requires_grad, dtype, session=self._transport)

    models = blocking(ClientCalls.models)
    load_model = blocking(ClientCalls.load_model)
    unload_model = blocking(ClientCalls.unload_model)
    upload_weights = blocking(ClientCalls.upload_weights)
    ping = blocking(ClientCalls.ping)

    def close(self) -> None:
        """Closes the connection. Calls that run, or come later, raise ClientClosed. Closing twice is harmless."""
        self._transport.close()
        from pullback._current import end_default

        end_default(self._transport)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
    token: Token | None = None,
    allow_plaintext_token: bool = False,
) -> Client:
    """A client of the server at `target`. Connects at its first call.

    target: "host:port", "unix:/path", or any gRPC target. "dns:///host:port" spreads calls over all addresses of the
        name (round robin), as a headless Kubernetes Service wants it, "ipv4:10.0.0.1:8470,10.0.0.2:8470" over those
        listed. Proxies from the environment are respected, except for loopback and Unix sockets.
    tls: None: plain text; TLS() for a server with a public certificate.
    timeout: seconds for each call and all its attempts, where the call says nothing; None: no limit.
    connect_timeout: seconds that one attempt to connect may take.
    max_message_bytes: of one request and of one answer; the server has a limit of its own.
    metadata: sent with each call, e.g. {"authorization": "Bearer ..."}. Over plain text anyone on the way reads it.
    retry: None: `RetryPolicy()`; RetryPolicy(attempts=1) for none.
    name: who is calling, put before the user agent.
    caller: whom calls are counted for where a server shares its workers out among callers; empty: each connection is
        a caller of its own.
    priority: "high": before this caller's other calls, and with a larger share of the workers.
    token: what the server knows this client by, sent with each call as `authorization: Bearer TOKEN`; or a function
        that returns it, for tokens that expire. That is called before each call, in the thread that makes it, and once
        more where a server no longer takes what it gave, so it should keep what it has while that is good. None: the
        environment variable PULLBACK_TOKEN, where `metadata` has no authorization of its own; empty: none.
    allow_plaintext_token: without it a token is never sent in plain text to another machine. True where nobody on the
        way can listen, as where something else encrypts.

    Raises ValueError for a setting that cannot be, OSError for a TLS file that cannot be read.
    """
    address = addressed(
        target, tls, connect_timeout, max_message_bytes, metadata, name, caller, priority, token, allow_plaintext_token
    )
    return Client(Transport(address, timeout, RetryPolicy() if retry is None else retry))


def addressed(
    target: str,
    tls: TLS | None,
    connect_timeout: float,
    max_message_bytes: int,
    metadata: Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]],
    name: str,
    caller: str,
    priority: str,
    token: Any,
    allow_plaintext_token: bool,
) -> Address:
    """What `connect` was given of where to connect and as whom. Raises ValueError, OSError."""
    if priority not in ("normal", "high"):
        raise ValueError(f"priority is {priority!r}, expected 'normal' or 'high'")
    told = [*clean_metadata(metadata)]
    secret = _token(token, any(name == "authorization" for name, _ in told))
    told += [(CALLER_KEY, caller)] if caller else []
    told += [(PRIORITY_KEY, priority)] if priority != "normal" else []
    address = Address(
        target=target,
        tls=tls,
        connect_timeout=connect_timeout,
        max_message_bytes=max_message_bytes,
        metadata=clean_metadata(told),
        name=name,
        token=secret,
    )
    if isinstance(secret, str):
        # What cannot be sent is better said now than at the first call.
        address.authorization()
    if secret is not None and not (address.is_private or allow_plaintext_token):
        raise ValueError(
            f"a token is given (by token= or {_TOKEN_VARIABLE}), and {target} would get it in plain text; give tls= "
            "too, or, where nobody on the way can listen, allow_plaintext_token=True"
        )
    return address


def _token(token: Any, authorized: bool) -> Any:
    """The token to be sent; None: none. authorized: whether the metadata tell who is calling. Raises ValueError."""
    if token is None:
        return None if authorized else os.environ.get(_TOKEN_VARIABLE, "").strip() or None
    if not (isinstance(token, str) or callable(token)):
        raise ValueError(f"token is {type(token).__name__}, expected a str, or a function that returns one")
    if token and authorized:
        raise ValueError("token is given, and metadata has an authorization too; give one of them")
    return token or None
