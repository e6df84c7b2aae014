"""A fleet of worker processes on this machine."""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from pullback_server import logs
from pullback_server.fleet import devices as devices_
from pullback_server.fleet.carrying import carry
from pullback_server.fleet.copying import Copier
from pullback_server.fleet.link import Link
from pullback_server.fleet.process import Spawner
from pullback_server.fleet.rehearsal import Stage
from pullback_server.fleet.seam import LoadFailure, Rehearsed, StartError, Transient, WorkerLost, WorkerState
from pullback_server.fleet.shelf import Shelf, Shelved, chosen
from pullback_server.fleet.signatures import Signatures, by_name, check_equal, weakest
from pullback_server.fleet.watchdog import Work
from pullback_server.fleet.worker import LocalWorker
from pullback_server.hosting.items import Item
from pullback_server.hosting.spec import Registration
from pullback_server.ipc import messages
from pullback_server.job import Batch, Job, Signature

_log = logging.getLogger(__name__)

#: Seconds that a worker may take to forget a model; a destructor of the model's own may run then.
_UNLOADING = 30.0
#: Workers that an item may cost before it is not tried again as it is.
_VICTIMS = 2
#: Processes for rehearsals at most: one model that hangs there holds up no other.
_STAGES = 2


class LocalFleet:
    """See `seam.Fleet`.

    sources: Python files and importable modules that register models.
    registrations: models defined in this process; they are carried to the workers by cloudpickle.
    devices: see `devices.resolve`.
    threads: of torch, per worker; None: OMP_NUM_THREADS, else a fair share of the cores.
    load_timeout: seconds a worker may take to load all models.
    idle_bytes: of shared memory that each worker, and the front for each worker, keeps for the next job.
    hard_timeout: seconds of computing after which a job costs its worker, where its model says nothing else.
    memory_bytes, float32_precision, gate, gradient_health, gradient_health_cost, log_format, log_level: see
        `messages.Setup`.
    empty: whether there need be no model at the start, since others will be installed.
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
        gate: bool = True,
        gradient_health: bool = True,
        gradient_health_cost: float = 0.0,
        log_format: logs.Format = "console",
        log_level: str = "warning",
        empty: bool = False,
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
        self._gate = gate
        self._gradient_health = gradient_health
        self._gradient_health_cost = gradient_health_cost
        self._log_format: logs.Format = log_format
        self._log_level = log_level
        self._empty = empty
        self._workers: list[LocalWorker] = []
        #: Every process of which something may be left.
        self._links: set[Link] = set()
        self._setups: dict[str, messages.Setup] = {}
        self._signatures: Signatures = {}
        #: What each worker's present process holds.
        self._held: dict[str, Signatures] = {}
        self._shelf = Shelf()
        self._stages: list[Stage] = []
        #: Workers that were lost while they loaded an item, by model and digest.
        self._victims: Counter[tuple[str, str]] = Counter()
        #: Items that workers lack, on their way there.
        self._filling: dict[str, asyncio.Task[None]] = {}
        #: Whether some worker may lack an item.
        self._may_lack = False
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
        if not (self._sources or self._registrations or self._empty):
            raise StartError("there is no model to serve")
        names = await self.prepare()
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
        for task in self._filling.values():
            task.cancel()
        await asyncio.gather(*self._filling.values(), return_exceptions=True)
        for stage in self._stages:
            await stage.close()
        await asyncio.gather(*(worker.close(grace) for worker in self._workers))
        # Those whose start failed, and was interrupted while they were put away.
        await asyncio.gather(*(link.close(0.0) for link in self._links))
        self._spawner.close()
        self._copier.close()

    async def prepare(self) -> list[str]:
        """Gets ready to start workers, or to rehearse without any. Returns their names. Raises StartError."""
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
                gate=self._gate,
                gradient_health=self._gradient_health,
                gradient_health_cost=self._gradient_health_cost,
                log_format=self._log_format,
                log_level=self._log_level,
            )
            for name, device in zip(names, found, strict=True)
        }
        aside = msgspec.structs.replace(self._setups[names[0]], name="rehearsal", only_register=True)
        self._stages = [
            Stage(lambda: self._link(aside, _nothing, _nothing), self._spawner, self._load_timeout)
            for _ in range(_STAGES)
        ]
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

    def _link(self, setup: messages.Setup, on_lost: Callable[[], None], on_room: Callable[[], None]) -> Link:
        """A link that `close` will end. Raises OSError."""
        link = Link(setup, self._copier, on_lost, on_room, self._limit_of)
        self._links.add(link)
        link.ended.add_done_callback(lambda _: self._links.discard(link))
        return link

    async def _launch(self, worker: LocalWorker) -> tuple[Link, Signatures]:
        setup = msgspec.structs.replace(self._setups[worker.name], items=self._shelf.of(worker.name))
        try:
            link = self._link(setup, worker.lost, worker.changed)
        except OSError as error:
            raise StartError(f"worker {worker.name} cannot be started: {error}") from error
        try:
            loaded = await link.start(self._spawner, self._load_timeout)
        except StartError:
            if link.loading is not None:
                self._shelf.died(worker.name, *link.loading)
            raise
        for model, id, message in loaded.failed:
            if (model, id) in self._shelf:
                self._shelf.died(worker.name, model, id)
                _log.error("worker %s holds no %s version %s: %s", worker.name, model, id, message)
        theirs = by_name(loaded.signatures)
        self._leave_out(worker.name, [item for item, _ in setup.items], theirs, link)
        try:
            check_equal(worker.name, theirs, self._signatures)
        except StartError:
            await link.close(0.0)
            raise
        self._held[worker.name] = theirs
        self._settle()
        self._may_lack = True
        return link, theirs

    def _leave_out(self, worker: str, items: Sequence[Item], theirs: Signatures, link: Link) -> None:
        """Has a new process forget what was taken out of service while it started, and what is not what it was."""
        for item in items:
            mine = theirs.get(item.name, {})
            if item.id not in mine:
                continue
            signature = self._shelf.signature(item.name, item.id)
            known = signature is not None
            try:
                if signature is not None:
                    check_equal(worker, {item.name: {item.id: mine[item.id]}}, {item.name: {item.id: signature}})
            except StartError as error:
                self._shelf.died(worker, item.name, item.id)
                _log.error("%s; the worker goes on without it", error)
                known = False
            if not known:
                link.forget(item.name, item.id)
                del mine[item.id]

    def _settle(self) -> None:
        # Of what there is now: what a process promised that is no more binds nobody.
        self._signatures = functools.reduce(weakest, self._held.values(), {})

    def _changed(self) -> None:
        # After every job, too: most of the time there is nothing to look for.
        if self._may_lack:
            self._may_lack = self._fill_in()
        self.on_change()

    def _fill_in(self) -> bool:
        """Has workers load what they lack, as one does that was replaced while an item was installed.

        Returns whether to look again.
        """
        again = False
        for worker in self._workers:
            if worker.state is not WorkerState.READY or worker.busy_changing or worker.name in self._filling:
                again = True
            elif missing := self._shelf.missing(worker.name, worker.held):
                again = True
                self._filling[worker.name] = asyncio.create_task(self._fill(worker, missing))
        return again

    async def _fill(self, worker: LocalWorker, missing: Sequence[Shelved]) -> None:
        try:
            for shelved in missing:
                key = (shelved.item.name, shelved.item.id)
                try:
                    await self._install_on(worker, shelved.item, shelved.rehearsed)
                    if key not in self._shelf:
                        # It was taken out of service meanwhile.
                        await self._forget_on(worker, *key)
                except (LoadFailure, WorkerLost) as error:
                    self._shelf.died(worker.name, *key)
                    _log.error("worker %s holds no %s version %s: %s", worker.name, *key, error)
        finally:
            del self._filling[worker.name]
            self._may_lack = True

    # Items.

    async def registered(self) -> list[tuple[str, str]]:
        """Names and versions that the sources register. Raises StartError."""
        return await self._stages[0].registered()

    async def rehearse(self, item: Item) -> Rehearsed:
        return await min(self._stages, key=lambda stage: stage.busy).rehearse(item)

    async def install(self, item: Item, rehearsed: Rehearsed) -> Signature:
        counts = {one.name: (one.state is not WorkerState.READY, len(one.held)) for one in self._workers}
        names = chosen(item, rehearsed.verdict, counts)
        # One that is being replaced gets it afterwards, as long as another has it.
        ready = [one for one in self._workers if one.name in names and one.state is WorkerState.READY]
        if not ready:
            raise Transient(f"{item.owner}: no worker is ready; they are starting")
        try:
            # One after the other: what costs one its life, or much time, shall not meet all of them at once.
            for one in ready:
                await self._install_on(one, item, rehearsed)
        except BaseException as error:
            await self.uninstall(item.name, item.id)
            if isinstance(error, WorkerLost):
                told = f"{item.owner}: {error} while it loaded it"
                self._victims[item.name, item.digest] += 1
                # The first time it may have been chance.
                raise (Transient if self._victims[item.name, item.digest] < _VICTIMS else LoadFailure)(told) from error
            raise
        self._shelf.put(Shelved(item, rehearsed, names))
        self._may_lack = True
        self._changed()
        return self._signatures[item.name][item.id]

    async def _install_on(self, worker: LocalWorker, item: Item, rehearsed: Rehearsed) -> None:
        """Raises LoadFailure, WorkerLost."""
        found = await worker.install(item, rehearsed.verdict, self._load_timeout)
        try:
            check_equal(
                worker.name, {item.name: {item.id: found.signature}}, {item.name: {item.id: rehearsed.signature}}
            )
        except StartError as error:
            await worker.uninstall(item.name, item.id, _UNLOADING)
            raise LoadFailure(str(error)) from error
        self._held[worker.name].setdefault(item.name, {})[item.id] = found.signature
        self._settle()

    async def uninstall(self, model: str, id: str) -> None:
        self._shelf.take(model, id)
        # Also where it is not known to be: a worker may have been about to load it.
        await asyncio.gather(*(self._forget_on(worker, model, id) for worker in self._workers))

    async def _forget_on(self, worker: LocalWorker, model: str, id: str) -> None:
        held = self._held.get(worker.name, {})
        held.get(model, {}).pop(id, None)
        if not held.get(model, True):
            del held[model]
        self._settle()
        await worker.uninstall(model, id, _UNLOADING)


def _nothing() -> None:
    pass
