"""What the page shows, and /status.json: collected when somebody looks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from pullback_server.fleet.seam import Fleet
from pullback_server.registry import Table
from pullback_server.scheduling import Scheduler
from pullback_server.telemetry.collectors import Reading
from pullback_server.telemetry.metrics import Metrics, own_version
from pullback_server.telemetry.page_history import INTERVAL, History
from pullback_server.telemetry.page_shapes import Document, Gauges, ModelRow, Now, ServerRow, SessionRow, WorkerRow
from pullback_server.telemetry.page_traffic import traffic
from pullback_server.telemetry.page_versions import model_rows
from pullback_server.telemetry.vitals import Vitals

#: Seconds for which what was collected is shown to others as well, and in which the event loop has to answer.
_FRESH = 0.9
_PATIENCE = 1.0
#: Sessions that are told one by one, those that hold most.
_SESSIONS = 50

_encoder = msgspec.json.Encoder()


class _View(msgspec.Struct, frozen=True):
    """What only the event loop can tell without being in its own way."""

    models: list[ModelRow] = []
    workers: list[WorkerRow] = []
    sessions: list[SessionRow] = []
    gauges: Gauges = Gauges()


class Status:
    """How one server is.

    `watch` and `beat` belong to the event loop, the rest may be called in any thread.
    """

    def __init__(self, metrics: Metrics, vitals: Vitals) -> None:
        self._vitals = vitals
        self._history = History(metrics)
        self._began = time.time()
        self._since = time.monotonic()
        self._look: Callable[[], _View] = _View
        self._devices: Callable[[], Sequence[Reading]] = list
        self._gauges: Callable[[], Gauges] = Gauges
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._view = _View()
        self._now: Now | None = None
        self._collected = 0.0

    def watch(self, fleet: Fleet, scheduler: Scheduler, table: Table, devices: Callable[[], Sequence[Reading]]) -> None:
        """Tells of these from now on. devices: read in the thread of whoever looks."""
        self._loop = asyncio.get_running_loop()
        self._look = lambda: _view(fleet, scheduler, table)
        self._devices = devices
        self._gauges = lambda: _gauges(fleet, scheduler)

    def beat(self) -> None:
        """To be called about once a second."""
        self._history.beat(self._gauges())

    def now(self) -> Now:
        """How it is, or was less than a second ago."""
        with self._lock:
            if self._now is None or time.monotonic() - self._collected > _FRESH:
                self._now = self._made()
                self._collected = time.monotonic()
            return self._now

    def json(self, since: float) -> bytes:
        """`Document` with the points after a time. since: seconds since 1970."""
        document = Document(now=self.now(), interval_seconds=INTERVAL, points=self._history.points(since))
        return _encoder.encode(document)

    def _made(self) -> Now:
        self._asked()
        view, readings = self._view, self._devices()
        held = {one.worker: one.held for one in readings if one.worker}
        devices = {one.device: one for one in readings if one.device}
        for worker in view.workers:
            worker.memory_bytes = held.get(worker.name)
            if (device := devices.get(worker.device)) is not None:
                worker.device_used_bytes, worker.device_total_bytes = device.used, device.total
                worker.device_utilization = device.utilization
        server = ServerRow(
            version=own_version(),
            time=time.time(),
            started=self._began,
            uptime_seconds=time.monotonic() - self._since,
            ready=self._vitals.ready,
            state="ready" if self._vitals.ready else self._vitals.hindrance,
            silent_seconds=self._vitals.silence,
        )
        sessions = sorted(view.sessions, key=lambda one: -one.retained_bytes)
        return Now(
            server=server,
            gauges=view.gauges,
            models=view.models,
            workers=view.workers,
            sessions=sessions[:_SESSIONS],
            traffic=traffic(self._history),
        )

    def _asked(self) -> None:
        """Has the event loop look; where it is stuck, what it last saw stays."""
        if self._loop is None:
            return
        answer: concurrent.futures.Future[_View] = concurrent.futures.Future()

        def look() -> None:
            try:
                answer.set_result(self._look())
            # Whoever asked is to learn of it, not the loop.
            except Exception as error:
                answer.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(look)
        except RuntimeError:
            # The loop is closed: the server is stopping.
            return
        with contextlib.suppress(TimeoutError):
            self._view = answer.result(_PATIENCE)


def _gauges(fleet: Fleet, scheduler: Scheduler) -> Gauges:
    seats = [seat for worker in fleet.workers for seat in worker.seats]
    return Gauges(
        queued=scheduler.queued,
        oldest_seconds=scheduler.oldest,
        in_flight=scheduler.calls,
        bytes_in_flight=scheduler.bytes,
        sessions=len(seats),
        handles=sum(seat.live for seat in seats),
        retained_bytes=sum(seat.retained for seat in seats),
    )


def _view(fleet: Fleet, scheduler: Scheduler, table: Table) -> _View:
    now = time.monotonic()
    workers: list[WorkerRow] = []
    sessions: list[SessionRow] = []
    for worker in fleet.workers:
        workers.append(
            WorkerRow(
                name=worker.name,
                device=worker.device,
                state="changing models" if worker.busy_changing else worker.state.value,
                restarts=worker.restarts,
                outstanding=worker.outstanding,
                sessions=len(worker.seats),
                retained_bytes=sum(seat.retained for seat in worker.seats),
            )
        )
        sessions += [
            SessionRow(worker.name, now - seat.since, seat.live, seat.graphs, seat.retained) for seat in worker.seats
        ]
    return _View(model_rows(fleet, scheduler, table), workers, sessions, _gauges(fleet, scheduler))
