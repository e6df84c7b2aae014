"""The composition root: the only place that knows every floor."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
from collections import Counter
from collections.abc import Sequence

from pullback_server.config import Config
from pullback_server.fleet import LocalFleet, StartError
from pullback_server.fleet.seam import WorkerState
from pullback_server.hosting import Registration
from pullback_server.hosting.manifest import RepositoryError
from pullback_server.hosting.repository import Repository
from pullback_server.job import Signature
from pullback_server.registry import Curator, Registry, StateDir, UploadStore, Versions
from pullback_server.rpc import (
    Access,
    CertificateError,
    Certificates,
    Front,
    FrontOptions,
    PrincipalsError,
    Probes,
    TlsFiles,
    vacant,
)
from pullback_server.scheduling import Limits, Policy, Scheduler, Tally
from pullback_server.telemetry import Devices, Endpoint, Metrics, Status, Vitals
from pullback_server.telemetry.tracing import Tracing, TracingError
from pullback_wire.malloc import pin_malloc

logger = logging.getLogger(__name__)


class App:
    """One server: a fleet, a queue before it, a front on a port, and an endpoint for probes.

    registrations: models besides those of config.models, carried to the workers by value.
    """

    def __init__(self, config: Config, registrations: Sequence[Registration] = ()) -> None:
        self._config = config
        self._fleet = LocalFleet(
            sources=config.models,
            registrations=registrations,
            devices=config.devices,
            threads=config.threads,
            load_timeout=config.load_timeout,
            hard_timeout=config.hard_timeout,
            memory_bytes=config.worker_memory_bytes,
            float32_precision=config.float32_precision,
            gate=config.gate,
            log_format=config.log_format,
            log_level=config.log_level,
            gradient_health=config.gradient_health,
            gradient_health_cost=config.gradient_health_cost,
            empty=config.repository is not None,
        )
        self._metrics = Metrics()
        self._vitals = Vitals()
        self._status = Status(self._metrics, self._vitals) if config.page else None
        self._endpoint: Endpoint | None = None
        self._probes = Probes()
        self._front: Front | None = None
        self._tracing: Tracing | None = None
        self._state: StateDir | None = None
        self._uploads: UploadStore | None = None
        self._curator: Curator | None = None
        self._beating: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The gRPC port, once started."""
        return self._front.port if self._front else 0

    @property
    def health_port(self) -> int:
        """The port for probes alone, once started; 0: there is none."""
        return self._probes.port

    @property
    def metrics_port(self) -> int:
        """The HTTP port, once started."""
        return self._endpoint.port if self._endpoint else 0

    async def start(self) -> None:
        """Binds the ports, loads the models, serves. The probes answer from the beginning.

        Raises StartError (a model does not load, a worker does not start) or OSError (a port is taken); nothing is
        left running then.
        """
        config = self._config
        try:
            self._beating = asyncio.create_task(self._beat())
            access, certificates = _secured(config, self._metrics)
            self._endpoint = Endpoint(
                config.host,
                config.metrics_port,
                self._metrics.registry,
                self._vitals,
                status=self._status,
                admit=access.admit_metrics,
                tls=certificates.context() if certificates is not None and config.metrics_tls else None,
            )
            self._vitals.reason = "loading models"
            await self._probes.start(config.host, config.health_port)
            # The port opens when the models are loaded; that it is taken shall not be found out only then.
            vacant(config.host, config.port)
            self._tracing = _tracing(config)
            await self._fleet.start()
            scheduler = Scheduler(self._fleet, _policy(config), _Tally(self._metrics))
            curator = self._curator = self._made_curator(scheduler)
            devices = Devices(lambda: self._fleet.workers)
            if self._status is not None:
                self._status.watch(self._fleet, scheduler, curator.table, devices.read)
            await curator.begin(config.load_model, strict=config.exit_on_error)
            self._metrics.watch(
                queued=lambda: scheduler.queued,
                oldest=lambda: scheduler.oldest,
                bytes_in_flight=lambda: scheduler.bytes,
                restarts=lambda: self._fleet.restarts,
                passed_over=lambda: self._fleet.passed_over,
                workers=lambda: Counter(worker.state.value for worker in self._fleet.workers),
                sessions=lambda: sum(len(worker.seats) for worker in self._fleet.workers),
                handles=lambda: sum(seat.live for worker in self._fleet.workers for seat in list(worker.seats)),
                graphs=lambda: sum(seat.graphs for worker in self._fleet.workers for seat in list(worker.seats)),
                retained=lambda: sum(seat.retained for worker in self._fleet.workers for seat in list(worker.seats)),
                versions=curator.table.counts,
                devices=devices.read,
            )
            options = FrontOptions(
                host=config.host,
                port=config.port,
                max_message_bytes=config.max_message_bytes,
                max_metadata_bytes=config.max_metadata_bytes,
                max_connections=config.max_connections,
                max_connection_streams=config.max_connection_streams,
                max_connection_age_seconds=config.max_connection_age_seconds,
                max_cotangents=config.max_cotangents,
                max_call_seconds=config.max_call_seconds,
                session_bytes=config.session_bytes,
                session_idle_seconds=config.session_idle_seconds,
                session_heartbeat_seconds=config.session_heartbeat_seconds,
                access_log=config.access_log,
                reflection=config.reflection,
            )
            self._front = Front(
                options,
                self._fleet,
                scheduler,
                curator,
                self._uploads,
                access,
                self._metrics,
                self._probes,
                self._tracing,
                certificates,
            )
            await self._look()
            await self._front.start()
        except BaseException:
            await self.stop(0)
            raise
        self._vitals.serving = True
        self._tell()

    async def shut_down(self, drain: float, grace: float) -> None:
        """Ends without a call lost: for `drain` seconds health and probes already say that calls should go elsewhere
        while they are still answered; then the port closes, and calls under way have `grace` seconds to end.

        Sessions are told at the beginning how long they have.
        """
        self._vitals.serving = False
        self._vitals.reason = "draining"
        self._metrics.draining.set(1)
        if self._curator is not None:
            self._curator.stop()
        if self._front is not None:
            await self._front.drain(drain + grace)
        await asyncio.sleep(drain)
        await self.stop(grace)

    async def stop(self, grace: float, *, at_once: bool = False) -> None:
        """Stops serving: calls have `grace` seconds to end, then come the workers.

        at_once: kills workers instead of asking them. May be called again when it was cancelled.
        """
        self._vitals.serving = False
        self._vitals.reason = "stopping"
        if self._curator is not None:
            self._curator.stop()
        if self._front is not None:
            await self._front.stop(grace)
        if self._curator is not None:
            await self._curator.close()
        await self._fleet.close(grace=0.0 if at_once else 5.0)
        await self._probes.close()
        tracing, self._tracing = self._tracing, None
        if tracing is not None:
            # Sends the last spans.
            await asyncio.to_thread(tracing.close)
        folders, self._uploads, self._state = (self._uploads, self._state), None, None
        for folder in folders:
            if folder is not None:
                await asyncio.to_thread(folder.close)
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            # Waits for the thread that serves; a scrape under way may take a moment.
            await asyncio.to_thread(endpoint.close)
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait([self._beating])

    def _made_curator(self, scheduler: Scheduler) -> Curator:
        """Raises StartError, OSError."""
        config = self._config
        self._state = StateDir(config.state_dir)
        if config.uploads is not None:
            self._uploads = UploadStore(config.uploads, config.max_upload_bytes, config.max_uploads_bytes)
        try:
            repository = Repository(config.repository, config.repository_options) if config.repository else None
        except RepositoryError as error:
            raise StartError(str(error)) from error

        def registered(name: str, version: str) -> bool:
            found = registry.table.find(name, version)
            return found is not None and found.origin == "start"

        def counted(model: str, good: bool, seconds: float) -> None:
            self._metrics.model_loads.labels(model, "ready" if good else "failed").inc()
            self._metrics.model_load_seconds.labels(model).observe(seconds)

        versions = Versions(repository, self._uploads, registered)
        registry = Registry(self._fleet, scheduler, versions, self._state.path, counted)
        return Curator(
            registry,
            repository,
            self._uploads,
            config.repository_mode,
            config.repository_poll_seconds,
            config.repository_settle_seconds,
        )

    async def _beat(self) -> None:
        while True:
            self._vitals.beat()
            if self._status is not None:
                self._status.beat()
            if self._curator is not None:
                self._curator.table.refresh()
            await self._look()
            await asyncio.sleep(1.0)

    async def _look(self) -> None:
        self._vitals.computing = any(worker.state is WorkerState.READY for worker in self._fleet.workers)
        await self._probes.computing(self._vitals.computing)

    def _tell(self) -> None:
        for versions in self._fleet.signatures.values():
            for signature in versions.values():
                logger.info("serving %s", _sentence(signature))
        if self.health_port:
            logger.info("probes alone on %s:%d", self._config.host, self.health_port)
        logger.info("gRPC on %s:%d, metrics on %s://%s:%d/metrics, workers: %s",
                    self._config.host, self.port,
                    "https" if self._config.metrics_tls else "http", self._config.host, self.metrics_port,
                    ", ".join(worker.name for worker in self._fleet.workers))  # fmt: skip


def _secured(config: Config, metrics: Metrics) -> tuple[Access, Certificates | None]:
    """Who may come in, and TLS. Raises StartError."""
    files = None
    if config.tls_cert is not None and config.tls_key is not None:
        files = TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca)
    elif config.tls_cert is not None or config.tls_key is not None:
        raise StartError("--tls-cert and --tls-key belong together: give both or neither")
    elif config.tls_client_ca is not None or config.metrics_tls:
        option = "--metrics-tls" if config.metrics_tls else "--tls-client-ca"
        raise StartError(f"{option} is of no use without --tls-cert and --tls-key")
    if files is None and not config.insecure and not _loopback(config.host):
        raise StartError(
            f"--host {config.host} can be reached by others, who could read and change what is sent, for there is no "
            "TLS: give --tls-cert and --tls-key, or --insecure where something else protects it, or --host 127.0.0.1"
        )
    if config.principals is not None and not config.metrics_tls and not _loopback(config.host):
        logger.warning("tokens that come to the metrics port come in plain text (see --metrics-tls)")
    try:
        access = Access(config.principals, metrics, config.metrics_tls and config.tls_client_ca is not None)
        return access, None if files is None else Certificates(files, metrics.certificate_expiry.set)
    except (PrincipalsError, CertificateError) as error:
        raise StartError(str(error)) from error


def _loopback(host: str) -> bool:
    """Whether an address to listen on cannot be reached from other machines. Of names, only localhost is."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _tracing(config: Config) -> Tracing | None:
    """Raises StartError."""
    try:
        return Tracing() if config.tracing else None
    except TracingError as error:
        raise StartError(str(error)) from error


def _policy(config: Config) -> Policy:
    limits = Limits(
        calls=config.max_calls,
        bytes=config.max_bytes,
        model_calls=config.max_model_calls,
        model_bytes=config.max_model_bytes,
        caller_calls=config.max_caller_calls,
        caller_bytes=config.max_caller_bytes,
        queue_seconds=config.max_queue_seconds,
    )
    return Policy(limits, config.caller_weights, config.batching, config.shadow_share, config.quarantine_seconds)


class _Tally(Tally):
    """What scheduling has to tell, as metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def batch(self, model: str, rows: int, computed: int, alone: int) -> None:
        self._metrics.batch_rows.labels(model).observe(rows)
        self._metrics.merged_calls.labels(model).inc(computed)
        self._metrics.unmerged_calls.labels(model).inc(alone)

    def split(self, model: str, times: int) -> None:
        self._metrics.memory_splits.labels(model).inc(times)

    def dropped(self, where: str) -> None:
        self._metrics.dropped_calls.labels(where).inc()

    def killed(self, model: str, why: str) -> None:
        self._metrics.worker_deaths.labels(model, why).inc()


def _sentence(signature: Signature) -> str:
    inputs = ", ".join(spec.name for spec in signature.inputs)
    orders = "any order" if signature.orders.reverse < 0 else f"order {signature.orders.reverse}"
    if signature.orders.reverse == 1 and "not probed" in signature.orders.evidence:
        orders = "order 1 at least (not probed, for not every input declares its shape; each call is checked)"
    return (
        f"{signature.name} version {signature.version}: inputs {inputs or 'none'}; "
        f"{signature.parameter_count} parameters; gradients of {orders}"
    )


def prepare_process() -> None:
    """What a process that is a server and nothing else does first: pins glibc's malloc (see pullback_wire.malloc)."""
    if not pin_malloc():
        logger.debug("malloc is left as it is")


def settle_process() -> None:
    """What such a process does when it has started: what is there now stays, and is not looked through for garbage.

    Else full collections hold up every caller for tens of milliseconds, several times a minute.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
