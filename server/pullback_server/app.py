"""The composition root: the only place that knows every floor."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Sequence

from pullback_server.config import Config
from pullback_server.fleet import LocalFleet, StartError
from pullback_server.hosting import Registration
from pullback_server.hosting.manifest import RepositoryError
from pullback_server.hosting.repository import Repository
from pullback_server.job import Signature
from pullback_server.registry import Curator, Registry, StateDir, UploadStore, Versions
from pullback_server.rpc import Access, Front, FrontOptions, KeyFileError, read_keys
from pullback_server.scheduling import Limits, Policy, Scheduler, Tally
from pullback_server.telemetry import Endpoint, Metrics, Vitals
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
            empty=config.repository is not None,
        )
        self._metrics = Metrics()
        self._vitals = Vitals()
        self._endpoint: Endpoint | None = None
        self._front: Front | None = None
        self._state: StateDir | None = None
        self._uploads: UploadStore | None = None
        self._curator: Curator | None = None
        self._beating: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The gRPC port, once started."""
        return self._front.port if self._front else 0

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
            self._endpoint = Endpoint(config.host, config.metrics_port, self._metrics.registry, self._vitals)
            self._vitals.reason = "loading models"
            access = _keys(config)
            await self._fleet.start()
            scheduler = Scheduler(self._fleet, _policy(config), _Tally(self._metrics))
            curator = self._curator = self._made_curator(scheduler)
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
                retained=lambda: sum(seat.retained for worker in self._fleet.workers for seat in list(worker.seats)),
                versions=curator.table.counts,
            )
            options = FrontOptions(
                host=config.host,
                port=config.port,
                max_message_bytes=config.max_message_bytes,
                max_cotangents=config.max_cotangents,
                max_call_seconds=config.max_call_seconds,
                session_bytes=config.session_bytes,
                session_idle_seconds=config.session_idle_seconds,
                session_heartbeat_seconds=config.session_heartbeat_seconds,
            )
            self._front = Front(options, self._fleet, scheduler, curator, self._uploads, access, self._metrics)
            await self._front.start()
        except BaseException:
            await self.stop(0)
            raise
        self._vitals.ready = True
        self._tell()

    async def stop(self, grace: float) -> None:
        """Stops serving: probes first, then calls within `grace` seconds, then workers."""
        self._vitals.ready = False
        self._vitals.reason = "stopping"
        if self._curator is not None:
            self._curator.stop()
        if self._front is not None:
            await self._front.stop(grace)
        if self._curator is not None:
            await self._curator.close()
        await self._fleet.close(grace=5.0)
        for folder in (self._uploads, self._state):
            if folder is not None:
                await asyncio.to_thread(folder.close)
        if self._endpoint is not None:
            # Waits for the thread that serves; a scrape under way may take a moment.
            await asyncio.to_thread(self._endpoint.close)
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
            if self._curator is not None:
                self._curator.table.refresh()
            await asyncio.sleep(1.0)

    def _tell(self) -> None:
        for versions in self._fleet.signatures.values():
            for signature in versions.values():
                logger.info("serving %s", _sentence(signature))
        logger.info("gRPC on %s:%d, metrics on http://%s:%d/metrics, workers: %s",
                    self._config.host, self.port, self._config.host, self.metrics_port,
                    ", ".join(worker.name for worker in self._fleet.workers))  # fmt: skip


def _keys(config: Config) -> Access:
    """Raises StartError."""
    try:
        return read_keys(config.principals)
    except KeyFileError as error:
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
