"""`connect` and `Client`: a server, its models, and whether it is well."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from pullback import errors
from pullback._channel import TLS, Address, Token, clean_metadata
from pullback._info import ModelInfo, model_info
from pullback._model import RemoteModel
from pullback._retry import RetryPolicy
from pullback._transport import Transport
from pullback_wire import CALLER_KEY, MODEL_METHODS, PRIORITY_KEY
from pullback_wire.v1 import model_service_pb2

if TYPE_CHECKING:
    from pullback._admin import Progress
    from pullback._session import Session
    from pullback._tensor import Tensor
    from pullback._weights import Weights

_TOKEN_VARIABLE = "PULLBACK_TOKEN"
_HEALTH_CHECK = "/grpc.health.v1.Health/Check"
# grpc.health.v1 by hand: an empty HealthCheckRequest asks about the server as a whole, and a HealthCheckResponse is
# one enum field. The generated messages would cost a dependency.
_WHOLE_SERVER = b""
_SERVING = b"\x08\x01"


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

    def models(self, *, timeout: float | None = None) -> list[ModelInfo]:
        """The hosted models, sorted by name, the latest version of each, without their parameter lists.

        Also those that are being loaded or could not be, of which little but `state` and `state_reason` is known.

        Raises PullbackError.
        """
        response, _ = self._transport.call(
            MODEL_METHODS["ListModels"],
            model_service_pb2.ListModelsRequest(),
            (),
            model_service_pb2.ListModelsResponse,
            "models",
            timeout,
        )
        return [model_info(model) for model in response.models]

    def load_model(self, name: str, version: str | int | None = None, *, timeout: float | None = 600.0) -> ModelInfo:
        """Loads a version from the server's repository, or loads it anew. Returns the model once it is ready.

        What served before goes on serving until then, and if the new one cannot be loaded. It goes on too when this
        call runs out of time. Needs the right "admin" (see `token` of `connect`). Made again only where no server was
        reached, or where one wants a fresher token.

        version: None: those that the model's version policy picks; others are unloaded.
        timeout: seconds; None: the client's default.

        Raises LoadFailed (with the reason), LoadConflict, NotInRepository, ModelNotFound, VersionNotFound,
        AdminDisabled, Unauthenticated, PermissionDenied, ...
        """
        from pullback import _admin

        return _admin.load(self._transport, name, version, timeout)

    def unload_model(
        self,
        name: str,
        version: str | int | None = None,
        *,
        delete_uploads: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Takes a version out of service: calls do not find it any more, those under way end, sessions keep theirs.

        Needs the right "admin". Made again only where no server was reached, or where one wants a fresher token.

        version: None: all of them.
        delete_uploads: also deletes what was uploaded, so that no restart brings it back and its number is free again;
            this needs the right "upload" as well.

        Raises LoadConflict, NotInRepository, ModelNotFound, VersionNotFound, AdminDisabled, Unauthenticated,
        PermissionDenied, ...
        """
        from pullback import _admin

        _admin.unload(self._transport, name, version, delete_uploads, timeout)

    def upload_weights(
        self,
        model: str,
        weights: Weights,
        version: str | int,
        architecture_version: str | int | None = None,
        *,
        timeout: float | None = 3600.0,
        progress: Progress | None = None,
    ) -> ModelInfo:
        """Makes a new version of a model's architecture with other weights. Returns the model once it is ready.

        Needs the right "upload". Where anything goes wrong, nothing of it is left on the server. Made again
        only where no server was reached, or where one wants a fresher token.

        weights: the path of a safetensors file, its bytes, a binary file that can seek (taken from where it stands),
            or arrays by name, of any dtype but complex128; bfloat16 and float8 are ml_dtypes'. Read twice: for the
            SHA-256 that goes ahead, and as they are sent, 1 MiB at a time.
        version: the number of the version to create, 1 or more.
        architecture_version: the version whose code it gets; None: the latest.
        timeout: seconds for sending, checking and loading; None: the client's default.
        progress: called with the bytes sent so far and all of them, as `progress(sent, total)`, by this thread; what it
            raises ends the upload.

        Raises BadUpload, VersionExists, StorageFull, LoadFailed, LoadConflict, ModelNotFound, VersionNotFound,
        AdminDisabled, Unauthenticated, PermissionDenied, ...; OSError for a file that cannot be read, TypeError and
        ValueError for what holds no weights.
        """
        from pullback import _admin

        return _admin.upload(self._transport, model, weights, version, architecture_version, timeout, progress)

    def ping(self, *, timeout: float | None = None) -> float:
        """Seconds of one round trip that asks whether the server serves (grpc.health.v1). Never retried.

        The first one includes connecting. Raises NotReady when the server does not serve, or PullbackError.
        """
        began = time.perf_counter()
        answer = self._transport.send(_HEALTH_CHECK, _WHOLE_SERVER, "ping", timeout, attempts=1)
        seconds = time.perf_counter() - began
        if answer != _SERVING:
            raise errors.NotReady(f"ping: {self.target} answers, but is not serving")
        return seconds

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
    return Client(Transport(address, timeout, RetryPolicy() if retry is None else retry))


def _token(token: Token | None, authorized: bool) -> Token | None:
    """The token to be sent; None: none. authorized: whether the metadata tell who is calling. Raises ValueError."""
    if token is None:
        return None if authorized else os.environ.get(_TOKEN_VARIABLE, "").strip() or None
    if not (isinstance(token, str) or callable(token)):
        raise ValueError(f"token is {type(token).__name__}, expected a str, or a function that returns one")
    if token and authorized:
        raise ValueError("token is given, and metadata has an authorization too; give one of them")
    return token or None
