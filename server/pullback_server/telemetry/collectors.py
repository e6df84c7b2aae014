"""What is not counted but read at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from pullback_server.telemetry import declarations as names
from pullback_server.telemetry.declarations import Declared


@dataclass(frozen=True)
class Reading:
    """What is known of a worker's memory, or of a device; None: it does not say.

    worker: its name; empty: this is about a device.
    device: its name in torch's words, e.g. "cuda:0"; empty: this is about a worker.
    held: bytes that the worker holds. used, total: bytes of the device. utilization: 0 to 1.
    """

    worker: str = ""
    device: str = ""
    held: int | None = None
    used: int | None = None
    total: int | None = None
    utilization: float | None = None


class Expiry(Collector):
    """When the certificate ends. There is none without TLS, and 0 would have alerts fire."""

    def __init__(self) -> None:
        self._seconds: float | None = None

    def set(self, seconds: float) -> None:
        """seconds: since 1970."""
        self._seconds = seconds

    def collect(self) -> Iterator[Metric]:
        family = names.CERTIFICATE_EXPIRY.gauges()
        if self._seconds is not None:
            family.add_metric([], self._seconds)
        yield family


class Watched(Collector):
    """Numbers of other floors, read and not counted twice.

    single: without labels. workers: by state. versions: by model and state.
    """

    def __init__(
        self,
        single: Mapping[Declared, Callable[[], float]],
        workers: Callable[[], Mapping[str, int]],
        versions: Callable[[], Mapping[tuple[str, str], int]],
        devices: Callable[[], Sequence[Reading]],
    ) -> None:
        self._single = single
        self._workers = workers
        self._versions = versions
        self._devices = devices

    def collect(self) -> Iterator[Metric]:
        for one, read in self._single.items():
            family = one.counters() if one.kind == "counter" else one.gauges()
            family.add_metric([], read())
            yield family
        states = names.WORKERS.gauges()
        for state, number in self._workers().items():
            states.add_metric([state], number)
        yield states
        versions = names.MODEL_VERSIONS.gauges()
        for labels, number in self._versions().items():
            versions.add_metric(labels, number)
        yield versions
        yield from _of_devices(self._devices())


def _of_devices(readings: Sequence[Reading]) -> Iterator[Metric]:
    held, used, total, busy = (
        one.gauges() for one in (names.WORKER_MEMORY, names.DEVICE_USED, names.DEVICE_TOTAL, names.DEVICE_UTILIZATION)
    )
    for reading in readings:
        for family, label, value in (
            (held, reading.worker, reading.held),
            (used, reading.device, reading.used),
            (total, reading.device, reading.total),
            (busy, reading.device, reading.utilization),
        ):
            if label and value is not None:
                family.add_metric([label], value)
    yield from (held, used, total, busy)
