"""What happens in a worker before its first job: settling into the process, and loading the models."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from pullback_server.engine import Engine, operators
from pullback_server.hosting.loading import LoadError, check_unique, load_source, place
from pullback_server.hosting.spec import Registration
from pullback_server.ipc.lifeline import tie_to_parent
from pullback_server.ipc.messages import Setup
from pullback_server.job import Signature
from pullback_wire.malloc import trim_malloc

_DESCRIPTORS = 1 << 16


def settle(parent: int) -> None:
    """Makes this process one that lives and dies with its front, and by its front's word only."""
    tie_to_parent(parent)
    # The front drains when a whole process group or container is told to end; the workers' jobs are a part of that.
    # Handlers, not SIG_IGN, which a program started by a model would inherit.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    # The front started this process with them blocked, for importing torch takes seconds.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    # Every mapped segment costs a descriptor.
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = _DESCRIPTORS if most == resource.RLIM_INFINITY else min(_DESCRIPTORS, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(usual, enough), most))
    faulthandler.enable()


def choose_device(setup: Setup) -> torch.device:
    """The device of the setup, made the current one. Raises LoadError where it cannot be used."""
    torch.set_num_threads(setup.threads)
    torch.set_float32_matmul_precision(setup.float32_precision)
    # Left to itself, cuDNN would convolve in TF32.
    torch.backends.cudnn.allow_tf32 = setup.float32_precision != "highest"
    device = torch.device(setup.device)
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
            torch.empty(1, device=device)
        # Drivers and builds of torch fail in many ways.
        except Exception as error:
            raise LoadError(f"device {device} cannot be used: {told(error)}") from error
    return device


def device_memory(device: torch.device) -> int:
    """Bytes that a device has in all; on the CPU what the machine has, or what this process's control group may use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            most = min(most, int(Path(limit).read_text()))
    return most


def device_id(device: torch.device) -> str:
    """The UUID of a CUDA device, by which others know it whatever they see of the machine; "" where there is none."""
    if device.type != "cuda":
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


def limit_memory(device: torch.device, allowance: int | None) -> None:
    """Lets the process allocate so many bytes besides what it has; more fails where it is asked for. None: any.

    On the CPU the machine's own limit would cost the process, or another one, at a time of the system's choosing.
    """
    if allowance is None:
        return
    if device.type == "cuda":
        _set_limit(device, _bytes_in_use(device) + allowance)
        return
    # What the first computation on several threads takes for good is not taken from the allowance.
    some = torch.ones(512, 512)
    (some @ some).sum()
    torch.ones(1 << 20).add_(1)
    _set_limit(device, _bytes_in_use(device) + allowance)


@contextlib.contextmanager
def moving_limit(device: torch.device, allowance: int | None) -> Iterator[None]:
    """While models are loaded or forgotten: no limit, and then the one before, moved by what that has taken or freed.

    Not a new one besides what there is: that would add what sessions hold. allowance: as in `limit_memory`.
    """
    before = None if allowance is None else _limit(device)
    if before is None:
        yield
        return
    used = _bytes_in_use(device)
    _set_limit(device, None)
    try:
        yield
    finally:
        _set_limit(device, before + _bytes_in_use(device) - used)


def _limit(device: torch.device) -> int | None:
    """Bytes that the process may have; None: any."""
    if device.type == "cuda":
        share: float = torch.cuda.get_per_process_memory_fraction(device)
        return None if share >= 1.0 else int(share * device_memory(device))
    usual, most = resource.getrlimit(resource.RLIMIT_DATA)
    return None if usual == most else usual


def _set_limit(device: torch.device, limit: int | None) -> None:
    if device.type == "cuda":
        share = 1.0 if limit is None else min(max(limit / device_memory(device), 0.0), 1.0)
        torch.cuda.set_per_process_memory_fraction(share, device)
        return
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    if limit is None or (most != resource.RLIM_INFINITY and limit > most):
        limit = most
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def _bytes_in_use(device: torch.device) -> int:
    # What loading and probing took and gave back to the allocator alone would count as the process's own.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.memory_allocated(device))
    trim_malloc()
    return _data_bytes()


def _data_bytes() -> int:
    """Bytes that count against RLIMIT_DATA: private and writable. Shared segments do not."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("this system does not tell how much memory a process has")


def load_models(engine: Engine, setup: Setup) -> tuple[list[Signature], dict[tuple[str, str], Registration]]:
    """Loads every model of the setup's sources, and tells what is registered there, by name and version.

    Raises LoadError, whose message names the source, the cause, and the line where it can.
    """
    sys.path += [entry for entry in setup.path if entry not in sys.path]
    operators.watch()
    found: list[tuple[str, Registration]] = []
    for source in setup.sources:
        try:
            found += [(source, registration) for registration in load_source(source)]
            operators.check()
        except LoadError as error:
            raise LoadError(f"{error}{_line_in(source, error.__cause__)}") from error
    if setup.registrations is not None:
        try:
            given: list[Registration] = pickle.loads(setup.registrations)
        except Exception as error:
            raise LoadError(
                f"the given models cannot be carried into a worker process: {told(error)}; "
                "put them into a file and name the file"
            ) from error
        found += [("", registration) for registration in given]
    check_unique(registration for _, registration in found)
    known = {(registration.name, registration.version): registration for _, registration in found}
    if setup.only_register:
        return [], known
    mine = place([registration for _, registration in found], setup.workers or [setup.name])[setup.name]
    signatures = [
        _load(engine, source, gated(registration, setup.gate)) for source, registration in found if registration in mine
    ]
    # Every process starts torch at one and the same seed, which suits loading; but two workers' dropout must differ.
    torch.seed()
    return signatures, known


def gated(registration: Registration, gate: bool) -> Registration:
    """What the server says of the gate, for a model that does not say itself."""
    if gate or registration.gate.enabled is not None:
        return registration
    return replace(registration, gate=replace(registration.gate, enabled=False))


def _load(engine: Engine, source: str, registration: Registration) -> Signature:
    origin = f"{source}: " if source else ""
    try:
        return engine.load(registration)
    except LoadError as error:
        raise LoadError(f"{origin}{error}{_line_in(source, error.__cause__)}") from error
    # A model's code may raise anything, and may even exit.
    except (Exception, SystemExit) as error:
        raise LoadError(
            f"{origin}model {registration.name!r} version {registration.version} does not load: "
            f"{told(error)}{_line_in(source, error)}"
        ) from error


def told(error: BaseException) -> str:
    """An exception in words, even one that cannot say what it is."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _line_in(source: str, error: BaseException | None) -> str:
    """Where in the operator's file an error arose, in words; empty when it is not known."""
    if error is None or isinstance(error, SyntaxError):
        return ""
    path = str(Path(source).resolve())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f" (line {lines[-1]})" if lines else ""
