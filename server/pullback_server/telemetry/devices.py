"""Memory and load of workers and their devices, looked up at each scrape, in the scrape's own thread.

Of the CPU the kernel tells, of CUDA devices NVIDIA's management library, where nvidia-ml-py is installed. What cannot
be found out is left out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pullback_server.fleet.devices import cores
from pullback_server.fleet.seam import Worker
from pullback_server.telemetry.collectors import Reading

logger = logging.getLogger(__name__)

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICK = os.sysconf("SC_CLK_TCK")
#: What a control group may use and does, in its second version and in its first.
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
_GROUP = Path("/sys/fs/cgroup")
#: Seconds that a share of time is taken over at least: several may scrape, one right after the other.
_SPAN = 1.0


class Devices:
    """Reads what is known of workers and devices. workers: those there are."""

    def __init__(self, workers: Callable[[], Sequence[Worker]]) -> None:
        self._workers = workers
        self._management = _Management()
        self._lock = threading.Lock()
        #: Seconds that each process had computed when that was last looked at, when that was, and what came of it.
        self._spent: dict[int, float] = {}
        self._since = time.monotonic()
        self._share = 0.0

    def read(self) -> list[Reading]:
        """Of each worker, and of each device that one of them is on."""
        workers = list(self._workers())
        found = [Reading(worker=worker.name, held=_held(worker)) for worker in workers]
        pids = [worker.pid for worker in workers if worker.device == "cpu" and worker.pid is not None]
        if any(worker.device == "cpu" for worker in workers):
            used, total = _machine()
            found.append(Reading(device="cpu", used=used, total=total, utilization=self._load(pids)))
        cuda = {worker.device: worker.device_id for worker in workers if worker.device != "cpu" and worker.device_id}
        found += [self._management.read(name, uuid) for name, uuid in cuda.items()]
        return found

    def _load(self, pids: Sequence[int]) -> float:
        """The share of the time since the last look in which workers computed, of all cores there are for them."""
        with self._lock:
            now = time.monotonic()
            passed = now - self._since
            if passed < _SPAN:
                return self._share
            spent = {pid: seconds for pid in pids if (seconds := _cpu_seconds(pid)) is not None}
            # Of one that was not there yet, all that it has computed.
            computed = sum(max(0.0, seconds - self._spent.get(pid, 0.0)) for pid, seconds in spent.items())
            self._share = min(1.0, computed / (passed * cores()))
            self._spent, self._since = spent, now
            return self._share


def _held(worker: Worker) -> int | None:
    """Bytes that a worker holds: of its device, or of the machine's memory."""
    if worker.device != "cpu":
        return worker.device_memory
    with contextlib.suppress(OSError, ValueError, IndexError):
        if worker.pid is not None:
            return int(Path(f"/proc/{worker.pid}/statm").read_text().split()[1]) * _PAGE
    return None


def _cpu_seconds(pid: int) -> float | None:
    """Seconds that a process has computed; None: it is gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # The name stands in parentheses, and may contain some.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK
    return None


def _machine() -> tuple[int | None, int | None]:
    """Bytes in use and in all: of this process's control group where that has a limit, else of the machine."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = (line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        sizes = {name: int(value.split()[0]) << 10 for name, value in lines}
        total = sizes["MemTotal"]
        for limit, current in _LIMITS:
            with contextlib.suppress(OSError, ValueError):
                allowed = int((_GROUP / limit).read_text())
                if allowed < total:
                    return int((_GROUP / current).read_text()), allowed
        return total - sizes["MemAvailable"], total
    return None, None


class _Management:
    """NVIDIA's management library, loaded when it is first needed."""

    def __init__(self) -> None:
        self._library: ModuleType | None = None
        self._told = False
        #: Handles of devices by UUID.
        self._handles: dict[str, Any] = {}

    def read(self, name: str, uuid: str) -> Reading:
        """name: in torch's words. uuid: as torch tells it."""
        try:
            library = self._loaded()
            handle = self._handles.get(uuid)
            if handle is None:
                handle = self._handles[uuid] = _handle(library, uuid)
            memory = library.nvmlDeviceGetMemoryInfo(handle)
        # There may be no such module, no driver, no permission, or an instance (MIG) that does not tell.
        except Exception as error:
            self._tell(name, error)
            return Reading()
        utilization = None
        try:
            utilization = library.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        except Exception as error:
            self._tell(name, error)
        return Reading(device=name, used=int(memory.used), total=int(memory.total), utilization=utilization)

    def _loaded(self) -> ModuleType:
        if self._library is None:
            import pynvml  # type: ignore[import-untyped]

            pynvml.nvmlInit()
            self._library = pynvml
        return self._library

    def _tell(self, name: str, error: Exception) -> None:
        if not self._told:
            self._told = True
            logger.warning("memory or load of device %s cannot be told: %s: %s", name, type(error).__name__, error)


def _handle(library: ModuleType, uuid: str) -> Any:
    """The device with a UUID, which torch tells without saying whether it is a whole one."""
    try:
        return library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except library.NVMLError_NotFound:
        return library.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
