"""A fleet of worker processes on this machine."""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pullback_server.fleet import devices as devices_
from pullback_server.fleet.carrying import carry
from pullback_server.fleet.copying import Copier
from pullback_server.fleet.link import Link
from pullback_server.fleet.process import Spawner
from pullback_server.fleet.seam import StartError
from pullback_server.fleet.signatures import Signatures, by_name, check_equal, weakest
from pullback_server.fleet.watchdog import Work
from pullback_server.fleet.worker import LocalWorker
from pullback_server.hosting.spec import Registration
from pullback_server.ipc import messages
from pullback_server.job import Batch, Job, Signature

_log = logging.getLogger(__name__)


class LocalFleet:
    """See `seam.Fleet`.

    sources: Python files and importable modules that register models.
    registrations: models defined in this process; they are carried to the workers by cloudpickle.
    devices: see `devices.resolve`.
    threads: of torch, per worker; None: OMP_NUM_THREADS, else a fair share of the cores.
    load_timeout: seconds a worker may take to load all models.
    idle_bytes: of shared memory that each worker, and the front for each worker, keeps for the next job.
    hard_timeout: seconds of computing after which a job costs its worker, where its model says nothing else.
    memory_bytes, float32_precision: see `messages.Setup`.
    """

    def __init__(
        self,
        sources: Sequence[str],
        registrations: Sequence[Registration] = (),
        devices: str = "auto",
        threads: int | None = None,
        load_timeout: float = 600.0,
        idle_bytes: int = 256 << 20,
        hard_timeout: float = 600.0,
        memory_bytes: int | None = None,
        float32_precision: str = "highest",
    ) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._sources = list(sources)
        self._registrations = list(registrations)
        self._devices = devices
        self._threads = threads
        self._load_timeout = load_timeout
        self._idle_bytes = idle_bytes
        self._hard_timeout = hard_timeout
        self._memory_bytes = memory_bytes
        self._float32_precision = float32_precision
        self._workers: list[LocalWorker] = []
        #: Every process of which something may be left.
        self._links: set[Link] = set()
        self._setups: dict[str, messages.Setup] = {}
        self._signatures: Signatures = {}
        #: What each worker's present process holds.
        self._held: dict[str, Signatures] = {}
        self._spawner = Spawner()
        # One copy fills a good part of the memory's bandwidth: a few at once are enough.
        self._copier = Copier(max(2, min(8, devices_.cores() // 2)))

    @property
    def workers(self) -> Sequence[LocalWorker]:
        return self._workers

    @property
    def signatures(self) -> Mapping[str, Mapping[str, Signature]]:
        return self._signatures

    @property
    def restarts(self) -> int:
        return sum(worker.restarts for worker in self._workers)

    @property
    def passed_over(self) -> int:
        return sum(worker.passed_over for worker in self._workers)

    async def start(self) -> None:
        if not self._sources and not self._registrations:
            raise StartError("there is no model to serve")
        names = await self._prepare()
        sharing = Counter(setup.device for setup in self._setups.values())
        self._workers = [
            LocalWorker(name, setup.device, sharing[setup.device], self._launch, self._changed)
            for name, setup in ((name, self._setups[name]) for name in names)
        ]
        starts = [asyncio.create_task(worker.start()) for worker in self._workers]
        try:
            done, _ = await asyncio.wait(starts, return_when=asyncio.FIRST_EXCEPTION)
            # Fails as the first that did; which worker that is does not matter, since all load the same.
            for start in done:
                start.result()
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.close(0.0)
            raise

    async def close(self, grace: float) -> None:
        await asyncio.gather(*(worker.close(grace) for worker in self._workers))
        # Those whose start failed, and was interrupted while they were put away.
        await asyncio.gather(*(link.close(0.0) for link in self._links))
        self._spawner.close()
        self._copier.close()

    async def _prepare(self) -> list[str]:
        # May ask a child process; the event loop has other things to do meanwhile.
        found = await asyncio.to_thread(devices_.resolve, self._devices)
        names = devices_.worker_names(found)
        threads = self._threads or devices_.threads_per_worker(len(found))
        registrations = carry(self._registrations) if self._registrations else None
        # A worker is started without the current directory in its path, where a module may well be.
        path = [*sys.path, str(Path.cwd())]
        self._setups = {
            name: messages.Setup(
                name,
                device,
                threads,
                self._sources,
                registrations,
                path,
                self._idle_bytes,
                names,
                self._memory_bytes,
                self._float32_precision,
            )
            for name, device in zip(names, found, strict=True)
        }
        return names

    def _limit_of(self, work: Work) -> float:
        """Seconds that a job may compute."""
        if isinstance(work, Batch):
            # At once, then for a moment one by one, and the last of these may take as long as any.
            return 2 * self._limit_of(work.members[0]) + 1.0
        if isinstance(work, Job):
            limit = self._hard_timeout_of(work.model, work.version)
            return self._hard_timeout if limit is None else limit
        # A session's op runs through the graphs of any of its models.
        return self._hard_timeout

    def _hard_timeout_of(self, model: str, version: str) -> float | None:
        signature = self._signatures.get(model, {}).get(version)
        return None if signature is None else signature.hard_timeout

    async def _launch(self, worker: LocalWorker) -> tuple[Link, Signatures]:
        try:
            link = Link(self._setups[worker.name], self._copier, worker.lost, worker.changed, self._limit_of)
        except OSError as error:
            raise StartError(f"worker {worker.name} cannot be started: {error}") from error
        self._links.add(link)
        link.ended.add_done_callback(lambda _: self._links.discard(link))
        theirs = by_name(await link.start(self._spawner, self._load_timeout))
        try:
            check_equal(worker.name, theirs, self._signatures)
        except StartError:
            await link.close(0.0)
            raise
        self._held[worker.name] = theirs
        # Of what there is now: what a process promised that is no more binds nobody.
        self._signatures = functools.reduce(weakest, self._held.values(), {})
        return link, theirs

    def _changed(self) -> None:
        self.on_change()
