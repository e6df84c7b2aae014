"""Health as gRPC tells it, and a port for probes alone.

Kubernetes' gRPC probes speak plaintext and bring no credentials, and ask before the models are loaded; so they get a
port of their own, on which nothing else is.
"""

from __future__ import annotations

import socket
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from pullback_server.rpc.decoding import Decoding
from pullback_wire.inference import INFERENCE_SERVICE

_STATES = health_pb2.HealthCheckResponse
#: Whether the event loop runs: whoever answers does. Whether calls should come here.
LIVENESS, READINESS = "liveness", "readiness"
#: What names of services begin with, besides these. Whatever else health is asked about is a model.
_SERVICES = ("pullback.v1.", "grpc.")


def is_open(name: str) -> bool:
    """Whether a name that health is asked about is none of a model's, so that everybody may ask.

    A model that is called so has no health of its own: it must not pass for the server's.
    """
    return name in ("", LIVENESS, READINESS, INFERENCE_SERVICE) or name.startswith(_SERVICES)


class _Health(HealthServicer):  # type: ignore[misc]
    async def List(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        """Would name every model to everybody. Without this one gRPC writes a traceback for each such call."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


class Probes:
    """What health says of the process; `servicer` says so on the port of the other services too."""

    def __init__(self) -> None:
        self.servicer = _Health()
        self._server: grpc.aio.Server | None = None
        self.port = 0
        self._ready, self._computing = False, True

    async def start(self, host: str, port: int | None) -> None:
        """Answers from now on, with a port of its own where one is given (0: a free one).

        Raises OSError where it cannot be bound.
        """
        await self.servicer.set(LIVENESS, _STATES.SERVING)
        await self.ready(False)
        if port is None:
            return
        self._server = grpc.aio.server(
            interceptors=[Decoding()],
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", 4096),
                ("grpc.max_concurrent_streams", 16),
                ("grpc.max_allowed_incoming_connections", 256),
                ("grpc.server_handshake_timeout_ms", 5000),
                # A prober that leaves its connection open does not keep one of the places for ever.
                ("grpc.max_connection_idle_ms", 60_000),
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.servicer, self._server)
        self.port = bound(self._server, host, port, None)
        await self._server.start()

    @property
    def is_ready(self) -> bool:
        """Whether calls should come here, and a worker could compute one."""
        return self._ready and self._computing

    async def ready(self, ready: bool) -> None:
        """Sets whether calls are taken here."""
        self._ready = ready
        await self._tell()

    async def computing(self, computing: bool) -> None:
        """Sets whether a worker could compute one: else a call had better go where one can, and not wait."""
        if computing is not self._computing:
            self._computing = computing
            await self._tell()

    async def _tell(self) -> None:
        await self.servicer.set(READINESS, _STATES.SERVING if self.is_ready else _STATES.NOT_SERVING)

    async def close(self) -> None:
        """Stops answering. Doing so twice is harmless."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(0)


def bound(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    """The port on which a server will listen. Raises OSError when the address cannot be bound."""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    vacant(host, port)
    try:
        if credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from None


def vacant(host: str, port: int) -> None:
    """Raises OSError where a port cannot be listened on now, and says why, which gRPC does not."""
    problem: OSError | None = None
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    trial.bind(address)
                    # As gRPC, which is content with one address of several.
                    return
                except OSError as error:
                    problem = error
    except OSError as error:
        problem = error
    reason = "" if problem is None else problem.strerror or str(problem)
    raise OSError(f"cannot listen on {host}:{port}: {reason}") from problem
