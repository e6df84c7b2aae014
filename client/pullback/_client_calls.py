"""What a client asks of a server beside its models' calls, as coroutines, for both clients."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pullback import errors
from pullback._info import ModelInfo, model_info
from pullback._transport import Transport
from pullback_wire import MODEL_METHODS
from pullback_wire.v1 import model_service_pb2

if TYPE_CHECKING:
    from pullback._admin import Progress
    from pullback._weights import Weights

_HEALTH_CHECK = "/grpc.health.v1.Health/Check"
# grpc.health.v1 by hand: an empty HealthCheckRequest asks about the server as a whole, and a HealthCheckResponse is
# one enum field. The generated messages would cost a dependency.
_WHOLE_SERVER = b""
_SERVING = b"\x08\x01"


class ClientCalls:
    """The catalogue, administration, and whether the server is well."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def models(self, *, timeout: float | None = None) -> list[ModelInfo]:
        """The hosted models, sorted by name, the latest version of each, without their parameter lists.

        Also those that are being loaded or could not be, of which little but `state` and `state_reason` is known.

        Raises PullbackError.
        """
        response, _ = await self._transport.call(
            MODEL_METHODS["ListModels"],
            model_service_pb2.ListModelsRequest(),
            (),
            model_service_pb2.ListModelsResponse,
            "models",
            timeout,
        )
        return [model_info(model) for model in response.models]

    async def load_model(
        self, name: str, version: str | int | None = None, *, timeout: float | None = 600.0
    ) -> ModelInfo:
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

        return await _admin.load(self._transport, name, version, timeout)

    async def unload_model(
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

        await _admin.unload(self._transport, name, version, delete_uploads, timeout)

    async def upload_weights(
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

        return await self._transport.aside(
            _admin.upload, self._transport.line(), model, weights, version, architecture_version, timeout, progress
        )

    async def ping(self, *, timeout: float | None = None) -> float:
        """Seconds of one round trip that asks whether the server serves (grpc.health.v1). Never retried.

        The first one includes connecting. Raises NotReady when the server does not serve, or PullbackError.
        """
        began = time.perf_counter()
        answer = await self._transport.send(_HEALTH_CHECK, _WHOLE_SERVER, "ping", timeout, attempts=1)
        seconds = time.perf_counter() - began
        if answer != _SERVING:
            raise errors.NotReady(f"ping: {self._transport.address.target} answers, but is not serving")
        return seconds
