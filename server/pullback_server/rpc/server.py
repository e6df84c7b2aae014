"""The gRPC server: which services there are, on which port, with which limits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from pullback_server.fleet.seam import Fleet
from pullback_server.registry import Curator, UploadStore
from pullback_server.rpc.access import Access
from pullback_server.rpc.catalogue import Catalogue
from pullback_server.rpc.gradient import GradientHandler
from pullback_server.rpc.models import ModelHandler
from pullback_server.rpc.request import ResultLimits, Translator
from pullback_server.rpc.session import SessionHandler
from pullback_server.rpc.stream import SessionOptions
from pullback_server.rpc.unary import Handler, Unary
from pullback_server.rpc.uploading import UploadHandler
from pullback_server.scheduling import Scheduler
from pullback_server.telemetry import Metrics
from pullback_wire import GRADIENT_METHODS, MODEL_METHODS, SESSION_SERVICE, Method

#: Room for a response's names and shapes besides its payloads.
_DESCRIPTIONS = 4 << 20


@dataclass(frozen=True)
class FrontOptions:
    """How the front listens and what it lets in.

    max_message_bytes: of one request, and of the tensors of one response.
    max_call_seconds: what a call without a deadline may take, and an op of a session.
    session_bytes, session_idle_seconds, session_heartbeat_seconds: see SessionOptions.
    """

    host: str
    port: int
    max_message_bytes: int
    max_cotangents: int
    max_call_seconds: float
    session_bytes: int | None
    session_idle_seconds: float
    session_heartbeat_seconds: float


class Front:
    """The services on one port."""

    def __init__(
        self,
        options: FrontOptions,
        fleet: Fleet,
        scheduler: Scheduler,
        curator: Curator,
        uploads: UploadStore | None,
        access: Access,
        metrics: Metrics,
    ) -> None:
        self._options = options
        self._catalogue = Catalogue(fleet, curator.table, scheduler.unmerged)
        # Joins large answers off the event loop.
        self._executor = ThreadPoolExecutor(2, "pullback-encode")
        self._health = HealthServicer()
        unary = Unary(metrics, self._catalogue.label, options.max_call_seconds)
        limits = ResultLimits(options.max_message_bytes, options.max_cotangents)
        translator = Translator(self._catalogue, limits)
        gradients = GradientHandler(translator, scheduler, metrics, self._executor)
        self._server = grpc.aio.server(
            options=[
                # Two servers on one port would share its callers without anybody having said so.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", options.max_message_bytes),
                # Results are held to the limit before they are computed; what describes them comes on top.
                ("grpc.max_send_message_length", min(options.max_message_bytes + _DESCRIPTIONS, 2**31 - 1)),
                ("grpc.max_metadata_size", 16 * 1024),
                # Notices peers that vanished; lets clients ping an idle connection.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ]
        )
        session_options = SessionOptions(
            options.session_bytes,
            options.session_idle_seconds,
            options.session_heartbeat_seconds,
            options.max_message_bytes,
            options.max_call_seconds,
        )
        self.sessions = SessionHandler(session_options, self._catalogue, limits, scheduler, metrics, self._executor)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SESSION_SERVICE, {"Session": self.sessions.method_handler()}),)
        )
        self._models = ModelHandler(self._catalogue, curator, access)
        self._uploading = UploadHandler(self._catalogue, curator, uploads, access, metrics)
        self._services = [
            self._add(unary, GRADIENT_METHODS.values(), gradients),
            SESSION_SERVICE,
            self._add(unary, MODEL_METHODS.values(), self._models, UploadWeights=self._uploading.method_handler()),
        ]
        self._table = curator.table
        #: Models whose health says that they are served.
        self._announced: set[str] = set()
        self._announcing = asyncio.Lock()
        #: About to announce what has changed, however much that is.
        self._telling: asyncio.Task[None] | None = None
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [*self._services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self._server)
        self.port = 0
        self._serving = False

    def _add(self, unary: Unary, methods: Iterable[Method], handler: Handler, **others: grpc.RpcMethodHandler) -> str:
        methods = list(methods)
        handlers = {method.name: unary.method_handler(method, handler) for method in methods} | others
        service = methods[0].service
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        return service

    async def start(self) -> None:
        """Listens and answers. Raises OSError when the address cannot be bound."""
        host = f"[{self._options.host}]" if ":" in self._options.host else self._options.host
        address = f"{host}:{self._options.port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from None
        await self._server.start()
        self._table.on_change = self._changed
        await self.announce(True)

    def _changed(self) -> None:
        self._catalogue.changed()
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        # What changes from here on is for the next one to tell.
        self._telling = None
        await self._announce_models()

    async def announce(self, serving: bool) -> None:
        """Sets the health of the server, of each service, and of each model."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        self._serving = serving
        for name in ["", *self._services]:
            await self._health.set(name, state)
        await self._announce_models()

    async def _announce_models(self) -> None:
        """The health of each model that can be called, or could be."""
        async with self._announcing:
            states = health_pb2.HealthCheckResponse
            names = set(self._catalogue.names()) if self._serving else set()
            for name in sorted(names ^ self._announced):
                await self._health.set(name, states.SERVING if name in names else states.NOT_SERVING)
            self._announced = names

    async def stop(self, grace: float) -> None:
        """Refuses new calls, lets those that run end within `grace` seconds, then ends them."""
        await self.announce(False)
        await asyncio.gather(self._models.close(), self._uploading.close())
        self.sessions.drain(grace)
        await self._server.stop(grace)
        self._executor.shutdown(wait=False)
