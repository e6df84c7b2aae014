"""The gRPC server: which services there are, on which port, with which limits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pullback_server.fleet.seam import Fleet
from pullback_server.registry import Curator, UploadStore
from pullback_server.rpc.catalogue import Catalogue
from pullback_server.rpc.computing import Computing
from pullback_server.rpc.decoding import Decoding
from pullback_server.rpc.gradient import GradientHandler
from pullback_server.rpc.graphs import Graphs
from pullback_server.rpc.inference import Descriptors, InferHandler, MetadataHandler, Streams, handlers
from pullback_server.rpc.journal import Journal
from pullback_server.rpc.models import ModelHandler
from pullback_server.rpc.probes import Probes, bound, is_open
from pullback_server.rpc.request import ResultLimits, Translator
from pullback_server.rpc.security import Access, Gate
from pullback_server.rpc.session import SessionHandler
from pullback_server.rpc.stream import SessionOptions
from pullback_server.rpc.tls import Certificates
from pullback_server.rpc.unary import Handler, Unary
from pullback_server.rpc.uploading import UploadHandler
from pullback_server.scheduling import Scheduler
from pullback_server.telemetry import Metrics
from pullback_server.telemetry.tracing import Tracing
from pullback_wire import GRADIENT_METHODS, MODEL_METHODS, SESSION_SERVICE, Method
from pullback_wire.inference import INFERENCE_SERVICE

#: Room for a response's names and shapes besides its payloads.
_DESCRIPTIONS = 4 << 20
#: Milliseconds in which a connection must have got through TLS and HTTP/2's first frames.
_HANDSHAKE_MS = 20_000


@dataclass(frozen=True)
class FrontOptions:
    """How the front listens and what it lets in.

    max_message_bytes: of one request, and of the tensors of one response.
    max_metadata_bytes: of one call. max_connections: at once. max_connection_streams: calls and sessions of one.
    max_connection_age_seconds: after which one is told to go; None: never.
    max_call_seconds: what a call without a deadline may take, and an op of a session.
    session_bytes, session_idle_seconds, session_heartbeat_seconds: see SessionOptions.
    access_log: whether there is a line in the log for each call, and each session at its end.
    """

    host: str
    port: int
    max_message_bytes: int
    max_metadata_bytes: int
    max_connections: int
    max_connection_streams: int
    max_connection_age_seconds: float | None
    max_cotangents: int
    max_call_seconds: float
    session_bytes: int | None
    session_idle_seconds: float
    session_heartbeat_seconds: float
    access_log: bool = False
    reflection: bool = True


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
        probes: Probes,
        tracing: Tracing | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        self._options = options
        self._access = access
        self._certificates = certificates
        #: Goes by files that may change.
        self._following: list[asyncio.Task[None]] = []
        self._probes = probes
        self._catalogue = Catalogue(fleet, curator.table, scheduler.unmerged)
        # Joins large answers off the event loop.
        self._executor = ThreadPoolExecutor(2, "pullback-encode")
        self._health = probes.servicer
        journal = Journal(metrics, self._catalogue.label, tracing, options.access_log)
        unary = Unary(metrics, journal, options.max_call_seconds)
        limits = ResultLimits(options.max_message_bytes, options.max_cotangents)
        translator = Translator(self._catalogue, limits)
        computing = Computing(scheduler, metrics)
        gradients = GradientHandler(translator, computing, self._executor)
        by_certificate = certificates is not None and certificates.client_certificates
        gate = Gate(access, by_certificate, options.max_metadata_bytes, journal.refused)
        self._server = grpc.aio.server(interceptors=[Decoding(), gate], options=_channel_options(options))
        session_options = SessionOptions(
            options.session_bytes,
            options.session_idle_seconds,
            options.session_heartbeat_seconds,
            options.max_message_bytes,
            options.max_call_seconds,
        )
        self.sessions = SessionHandler(
            session_options, self._catalogue, limits, scheduler, metrics, self._executor, journal, access
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SESSION_SERVICE, {"Session": self.sessions.method_handler()}),)
        )
        self._models = ModelHandler(self._catalogue, curator, Graphs(self._catalogue, scheduler))
        self._uploading = UploadHandler(self._catalogue, curator, uploads, metrics, journal)
        infer = InferHandler(self._catalogue, translator, computing, self._executor, options.max_message_bytes)
        self._streams = Streams(infer, unary, metrics)
        inference = handlers(unary, infer, MetadataHandler(self._catalogue), self._streams, probes)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(INFERENCE_SERVICE, inference),))
        self._services = [
            self._add(unary, GRADIENT_METHODS.values(), gradients),
            SESSION_SERVICE,
            self._add(unary, MODEL_METHODS.values(), self._models, UploadWeights=self._uploading.method_handler()),
            INFERENCE_SERVICE,
        ]
        self._table = curator.table
        #: Models whose health says that they are served.
        self._announced: set[str] = set()
        self._announcing = asyncio.Lock()
        #: About to announce what has changed, however much that is.
        self._telling: asyncio.Task[None] | None = None
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [*self._services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME]
        if options.reflection:
            reflection.enable_server_reflection(names, self._server, pool=Descriptors())
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
        certificates = self._certificates
        credentials = None if certificates is None else certificates.credentials()
        self.port = bound(self._server, self._options.host, self._options.port, credentials)
        await self._server.start()
        self._following.append(asyncio.create_task(self._access.follow()))
        if certificates is not None:
            self._following.append(asyncio.create_task(certificates.follow()))
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
        await self._probes.ready(serving)
        await self._announce_models()

    async def _announce_models(self) -> None:
        """The health of each model that can be called, or could be."""
        async with self._announcing:
            states = health_pb2.HealthCheckResponse
            names = {name for name in self._catalogue.names() if not is_open(name)} if self._serving else set()
            for name in sorted(names ^ self._announced):
                await self._health.set(name, states.SERVING if name in names else states.NOT_SERVING)
            self._announced = names

    async def drain(self, seconds: float) -> None:
        """Turns callers away who ask whether to come: health says no, and sessions learn that they have `seconds` left.

        Calls are answered as before; what would change the models is not begun any more.
        """
        await self.announce(False)
        self.sessions.drain(seconds)
        await asyncio.gather(self._models.close(), self._uploading.close())

    async def stop(self, grace: float) -> None:
        """Refuses new calls, lets those that run end within `grace` seconds, then ends them.

        May be called again, with less grace, when the one before was cancelled.
        """
        await self.drain(grace)
        self._streams.stop()
        await self._server.stop(grace)
        for task in self._following:
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)
        self._executor.shutdown(wait=False)


def _channel_options(options: FrontOptions) -> list[tuple[str, Any]]:
    """What gRPC is told about limits and about keeping connections."""
    settings: list[tuple[str, Any]] = [
        # Two servers on one port would share its callers without anybody having said so.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", options.max_message_bytes),
        # Results are held to the limit before they are computed; what describes them comes on top.
        ("grpc.max_send_message_length", min(options.max_message_bytes + _DESCRIPTIONS, 2**31 - 1)),
        # Both: between the two gRPC refuses at random, as more than the first is only told to clients as a wish.
        ("grpc.max_metadata_size", options.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", options.max_metadata_bytes),
        ("grpc.max_allowed_incoming_connections", options.max_connections),
        ("grpc.max_concurrent_streams", options.max_connection_streams),
        # A connection that does not get as far as HTTP/2's settings holds a place of those allowed.
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        # Notices peers that vanished; lets clients ping an idle connection.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    if options.max_connection_age_seconds is not None:
        # Without max_connection_age_grace_ms, whose end would kill sessions.
        settings.append(("grpc.max_connection_age_ms", max(int(options.max_connection_age_seconds * 1000), 1)))
    return settings
