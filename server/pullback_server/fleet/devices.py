"""Which devices there are, and how many cores: found out without loading torch into this process."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

from pullback_server.fleet.seam import StartError

_COUNT = "import torch; print(torch.cuda.device_count())"
_DEVICE_FILES = ("nvidia[0-9]*", "dxg", "kfd")


def cuda_device_count() -> int:
    """How many CUDA (or ROCm) devices torch sees. Takes seconds where there are any. Raises StartError."""
    if not any(next(Path("/dev").glob(pattern), None) for pattern in _DEVICE_FILES):
        return 0
    try:
        asked = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, timeout=120)
        return int(asked.stdout.split()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise StartError(
            f"cannot find out which CUDA devices there are ({type(error).__name__}); name them with --devices"
        ) from error


def resolve(devices: str) -> list[str]:
    """Torch's names of the devices to put a worker on, in order; a CPU may have several.

    devices: "auto" (every CUDA device, else one CPU worker), "cuda" (every CUDA device), or names with commas between
    them: "cuda:0,cuda:1", "cpu", "cpu:3" (three CPU workers).

    Raises StartError for a text that names no devices, and for "cuda" where there is none.
    """
    text = devices.strip()
    if text in ("auto", "cuda"):
        count = cuda_device_count()
        if count:
            return [f"cuda:{index}" for index in range(count)]
        if text == "cuda":
            raise StartError("devices 'cuda': torch sees no CUDA device here")
        return ["cpu"]
    found: list[str] = []
    for part in text.split(","):
        kind, colon, number = part.strip().partition(":")
        if kind not in ("cpu", "cuda") or (colon and not (number.isascii() and number.isdecimal())):
            raise StartError(f"devices {devices!r}: expected auto, cpu, cpu:COUNT, cuda or cuda:INDEX, got {part!r}")
        if kind == "cpu":
            count = int(number) if colon else 1
            if count < 1:
                raise StartError(f"devices {devices!r}: at least one worker is needed")
            found += ["cpu"] * count
        elif not colon:
            raise StartError(f"devices {devices!r}: in a list, name each CUDA device by its index, as in cuda:0")
        elif (name := f"cuda:{int(number)}") in found:
            raise StartError(f"devices {devices!r}: {name} is named twice")
        else:
            found.append(name)
    return found


def worker_names(devices: list[str]) -> list[str]:
    """A name for the worker on each device: "cpu-0", "cpu-1", "cuda-0"."""
    names = []
    cpus = 0
    for device in devices:
        kind, _, index = device.partition(":")
        if kind == "cpu":
            index = str(cpus)
            cpus += 1
        names.append(f"{kind}-{index}")
    return names


def cores() -> int:
    """Cores this process may use: its affinity, and its container's quota, which os.cpu_count() does not know."""
    available = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            available = min(available, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass
    return max(1, available)


def threads_per_worker(workers: int) -> int:
    """What each of `workers` workers may use: OMP_NUM_THREADS where the operator set it, else a fair share."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isascii() and chosen.isdecimal() and int(chosen) > 0:
        return int(chosen)
    return max(1, cores() // workers)
