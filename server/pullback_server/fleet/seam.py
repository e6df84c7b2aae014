"""Where workers live, as the floors above see it.

`scheduling` knows only this file: a local fleet of processes stands behind it today, a cluster engine could tomorrow.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from pullback_server.hosting.items import Item
from pullback_server.job import Batch, BatchOutcome, Job, Outcome, Signature, Verdict
from pullback_server.ops import SessionJob, SessionOutcome

Buffer = bytes | bytearray | memoryview


class WorkerState(enum.Enum):
    """Whether a worker can take jobs."""

    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"


class StartError(Exception):
    """The fleet cannot serve: a model does not load, or workers do not start. The message is for the operator."""


class LoadFailure(Exception):
    """A model cannot be loaded. The message names it and the cause; nothing is left of it."""


class Transient(LoadFailure):
    """A model that could not be loaded for now; nothing speaks against another try."""


class WorkerLost(Exception):
    """The worker died before it answered.

    suspect: whether this job was the one it was computing, so that the job may be the cause.
    overdue: whether the worker was ended because it computed this job for longer than the model's hard limit.
    """

    def __init__(self, message: str, suspect: bool, overdue: bool = False) -> None:
        super().__init__(message)
        self.suspect = suspect
        self.overdue = overdue


Obituary = Callable[[WorkerLost], None]


class Reply(Protocol):
    """A computed job. The payloads may be views of shared memory: leave the context when they have been copied."""

    outcome: Outcome | BatchOutcome | SessionOutcome
    payloads: Sequence[Buffer]
    #: Seconds by stage, measured by the fleet: "transfer" (bytes to and from the worker), "compute"; and "began": when
    #: the worker began to compute, on the time.monotonic clock.
    timings: Mapping[str, float]

    def __enter__(self) -> Reply: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Upload(Protocol):
    """A large tensor that comes bit by bit, straight into memory that its worker will read."""

    size: int
    received: int

    @property
    def complete(self) -> bool: ...

    @property
    def view(self) -> memoryview:
        """The bytes; not to be looked at once a job has the upload."""

    def write(self, data: memoryview) -> None:
        """Appends bytes. Raises OSError where there is no memory for them."""

    def drop(self) -> None:
        """Gives the memory back, if no job has the upload."""


class Pending(Protocol):
    """An op that was sent. answered: done when the worker has answered it, with any result, or it was abandoned."""

    @property
    def answered(self) -> asyncio.Future[Any]: ...

    async def reply(self) -> Reply:
        """Raises Fault, WorkerLost. Cancelling this abandons the op."""


class BatchPending(Protocol):
    """A batch that was sent."""

    async def reply(self) -> Reply:
        """Raises Fault, WorkerLost. Cancelling this abandons the batch."""

    def pass_over(self, member: int) -> None:
        """Nobody waits for a member any more: it is not computed, if the batch has not begun."""


class Seat(Protocol):
    """A session's place on one worker process: what it holds there, and the way to it.

    session: its number there. since: when it was taken, on the time.monotonic clock.
    lost: done when the process is gone, and everything with it.
    live, graphs, retained: handles, those of them with a graph behind them, and bytes that the session held after its
        latest answered op.
    """

    session: int
    since: float
    live: int
    graphs: int
    retained: int

    @property
    def lost(self) -> asyncio.Future[None]: ...

    def upload(self, size: int) -> Upload:
        """Raises Fault where there is no memory, WorkerLost."""

    async def post(
        self, job: Job | SessionJob, payloads: Sequence[Buffer], deadline: float, uploads: Sequence[Upload] = ()
    ) -> Pending:
        """Sends an op. Those posted one after the other, each when the one before was sent, run in that order.

        uploads: payloads whose indices follow those of `payloads`; they are the op's from now on.

        Raises Fault, WorkerLost.
        """

    def close(self) -> None:
        """Frees everything the session holds on the worker, and abandons its ops."""


class Worker(Protocol):
    """One worker, on one device."""

    @property
    def name(self) -> str:
        """Short and stable, fit for a metric label, e.g. "cpu-0", "cuda-1"."""

    @property
    def state(self) -> WorkerState: ...

    @property
    def device(self) -> str:
        """Its device in torch's words, e.g. "cpu", "cuda:1"."""

    @property
    def restarts(self) -> int:
        """How many times its process has been replaced, or was to be."""

    @property
    def outstanding(self) -> int:
        """Jobs sent and not yet answered (abandoned ones included until the worker has passed over them)."""

    async def run(
        self, job: Job, payloads: Sequence[Buffer], deadline: float, obituary: Obituary | None = None
    ) -> Reply:
        """Computes one job.

        obituary: called when the worker dies of the job after it was abandoned, so that nobody else would learn of it.
        payloads: the bytes of the job's tensors by index; the caller keeps them unchanged until this returns.
        deadline: on the time.monotonic clock; a job that has not begun by then is not begun.

        Cancelling the awaiting task abandons the job: it is passed over if it has not begun.

        Raises Fault (the job failed), WorkerLost.
        """

    async def post(self, batch: Batch, payloads: Sequence[Buffer], deadline: float) -> BatchPending:
        """Sends a batch; otherwise as `run`, whose reply this one's is."""

    def holds(self, model: str, id: str) -> bool:
        """Whether it has loaded a version of a model, by its id (`Signature.id`); no id: any."""

    @property
    def busy_changing(self) -> bool:
        """Whether it is loading or forgetting a model, so that it computes nothing for a while."""

    def changing(self, model: str, id: str) -> bool:
        """Whether it is loading or forgetting this one."""

    @property
    def memory(self) -> int:
        """Its share of the bytes that its device has in all."""

    @property
    def pid(self) -> int | None:
        """Of its present process, where that is on this machine."""

    @property
    def device_id(self) -> str:
        """The UUID of a CUDA device, "" of others."""

    @property
    def device_memory(self) -> int | None:
        """Bytes on a CUDA device that its allocator holds, as of its latest answer; None: it did not say."""

    @property
    def seats(self) -> Collection[Seat]:
        """Those that are taken."""

    def open(self) -> Seat:
        """A place for a session on the present process. Raises WorkerLost."""


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal found out about an item."""

    signature: Signature
    verdict: Verdict


class Fleet(Protocol):
    """All workers."""

    #: Called, on the event loop, whenever a worker may be able to take more: it changed state, or answered.
    on_change: Callable[[], None]

    @property
    def workers(self) -> Sequence[Worker]: ...

    @property
    def signatures(self) -> Mapping[str, Mapping[str, Signature]]:
        """Signatures by model name and id; filled by `start`, `install` and `uninstall`."""

    async def rehearse(self, item: Item) -> Rehearsed:
        """Loads an item in a process apart, checks it there, and forgets it again. Raises LoadFailure."""

    async def install(self, item: Item, rehearsed: Rehearsed) -> Signature:
        """Loads an item on every worker that should hold it, now and whenever one is replaced.

        Raises LoadFailure; then no worker holds it.
        """

    async def uninstall(self, model: str, id: str) -> None:
        """Has every worker forget a model, and gives its memory back. Nobody may use it any more."""

    @property
    def restarts(self) -> int:
        """How many workers have been replaced so far."""

    @property
    def passed_over(self) -> int:
        """How many jobs that workers had were not begun, since their time had passed or nobody waited any more."""

    async def start(self) -> None:
        """Starts the workers and waits until all of them hold all models. Raises StartError."""

    async def close(self, grace: float) -> None:
        """Ends every worker, by force after `grace` seconds."""
