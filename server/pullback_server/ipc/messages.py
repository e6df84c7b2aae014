"""What front and worker say to one another. The order of messages on the socket is the only synchronisation.

Payloads stand beside a message: in its tail when they are small, else in one shared segment (`Slot`).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pullback_server.hosting.items import Item
from pullback_server.job import Batch, BatchOutcome, FaultRecord, Job, Outcome, Signature, Verdict
from pullback_server.ops import SessionJob, SessionOutcome


class Slot(msgspec.Struct, array_like=True, frozen=True):
    """A segment by its owner's number. `size` is set in the message that brings its descriptor, else 0."""

    segment: int
    size: int = 0


class Note(msgspec.Struct, array_like=True, tag="note"):
    """News of segments.

    released: of the receiver's, which the sender has read and will not look at again.
    kept: of the receiver's, which something on the sender's side still looks at: they must never be used again.
    dropped: of the sender's, which it has given up: the receiver should forget its mapping.
    """

    released: list[int] = []
    kept: list[int] = []
    dropped: list[int] = []


class Setup(msgspec.Struct, array_like=True, tag="setup"):
    """The first message to a worker. `registrations`: a cloudpickle of `list[Registration]`."""

    name: str
    device: str
    threads: int
    sources: list[str]
    registrations: bytes | None
    #: The front's sys.path, so that what it can import, a worker can.
    path: list[str]
    #: Idle segment bytes that the worker may hold on to.
    idle_bytes: int
    #: Names of all workers, in order, so that each can tell which models are placed on it.
    workers: list[str] = []
    #: Bytes that the worker may allocate besides its models; None: what the machine or device has.
    memory_bytes: int | None = None
    #: torch.set_float32_matmul_precision: "highest" (IEEE), "high" (TF32), "medium" (bfloat16).
    float32_precision: str = "highest"
    #: Loaded besides what `sources` and `registrations` say; one of these that does not load costs nothing else.
    items: list[tuple[Item, Verdict | None]] = []
    #: Only find out what the sources register, and build none of it: for a process that loads items alone.
    only_register: bool = False
    #: Whether models pass the gate where they do not say themselves.
    gate: bool = True
    #: How the worker logs: see `logs`.
    log_format: Literal["console", "json"] = "console"
    log_level: str = "warning"
    #: Whether the health of gradients is looked at, where a model does not say itself that it is not.
    gradient_health: bool = True
    #: Share of the worker's time that may go into that; 0: no limit.
    gradient_health_cost: float = 0.0


class Load(msgspec.Struct, array_like=True, tag="load"):
    """Load a model when what was sent before is done; answered by `Installed` or `NotInstalled`.

    verdict: what another process found out about it; None: find it out.
    """

    number: int
    item: Item
    verdict: Verdict | None


class Unload(msgspec.Struct, array_like=True, tag="unload"):
    """Forget a model when what was sent before is done; answered by `Unloaded`, also where it was not there."""

    number: int
    model: str
    id: str


class Run(msgspec.Struct, array_like=True, tag="run"):
    """Compute a job unless `deadline` (time.monotonic, one clock for all processes) has passed.

    note: to be heeded first; it rides along, since a message of its own would wake the worker twice.
    uploads: segments (see `Uploaded`) with one payload each, whose indices follow those of `lengths`, and their bytes.
        The front gives them up when the job is answered: their memory goes when the worker's last view of it does.
    request, traceparent: see `tracking.Request`. Not in the job, which is shared by those who ask for the same.
    """

    id: int
    job: Job | Batch | SessionJob
    deadline: float
    lengths: list[int]
    slot: Slot | None
    note: Note | None = None
    uploads: list[tuple[int, int]] = []
    request: str = ""
    traceparent: str = ""


class Uploaded(msgspec.Struct, array_like=True, tag="uploaded"):
    """Segments, each with its descriptor, that a later `Run` refers to."""

    slots: list[Slot]


class EndSession(msgspec.Struct, array_like=True, tag="end_session"):
    """Free everything that a session holds; its ops that have not begun are not begun."""

    session: int


class Cancel(msgspec.Struct, array_like=True, tag="cancel"):
    """Do not begin this job if it has not begun; of a batch (member >= 0) that member only."""

    id: int
    member: int = -1


class Loading(msgspec.Struct, array_like=True, tag="loading"):
    """At its start a worker begins with one of `Setup.items`, so that it is known which one it dies of."""

    model: str
    id: str


class Loaded(msgspec.Struct, array_like=True, tag="loaded"):
    """All models are loaded. memory: bytes that the device has in all. failed: items that were not, by model and id.

    registered: names and versions that the sources register, be they loaded here or not.
    device_id: the UUID of a CUDA device, "" of others.
    """

    signatures: list[Signature]
    memory: int = 0
    failed: list[tuple[str, str, str]] = []
    registered: list[tuple[str, str]] = []
    device_id: str = ""


class LoadFailed(msgspec.Struct, array_like=True, tag="load_failed"):
    """Models could not be loaded. `message` is for the operator, `traceback` for the log."""

    message: str
    traceback: str


class Changing(msgspec.Struct, array_like=True, tag="changing"):
    """The worker begins with a `Load` or `Unload`; what was sent before is done."""

    number: int


class Installed(msgspec.Struct, array_like=True, tag="installed"):
    """A `Load` that succeeded. verdict: what was found out about the model, by this worker or before."""

    number: int
    signature: Signature
    verdict: Verdict


class NotInstalled(msgspec.Struct, array_like=True, tag="not_installed"):
    """A `Load` that did not. `message` is for the operator, `traceback` for the log."""

    number: int
    message: str
    traceback: str


class Unloaded(msgspec.Struct, array_like=True, tag="unloaded"):
    """An `Unload` that is done."""

    number: int


class Done(msgspec.Struct, array_like=True, tag="done"):
    """A computed job. `kept`: the model still holds inputs, so their slot must never be used again.

    began: when computing began, on the time.monotonic clock.
    """

    id: int
    kept: bool
    outcome: Outcome | BatchOutcome | SessionOutcome
    compute: float
    lengths: list[int]
    slot: Slot | None
    began: float = 0.0


class Failed(msgspec.Struct, array_like=True, tag="failed"):
    """A job that came to nothing."""

    id: int
    kept: bool
    fault: FaultRecord


class Again(msgspec.Struct, array_like=True, tag="again"):
    """The model writes into its inputs: send the job again, with the original bytes and `copy_inputs`."""

    id: int
    kept: bool


class Skipped(msgspec.Struct, array_like=True, tag="skipped"):
    """A job that was not begun: its deadline had passed or it was cancelled."""

    id: int


class Leaving(msgspec.Struct, array_like=True, tag="leaving"):
    """The worker ends itself, since its device is of no more use. No job that is still unanswered is to blame."""

    message: str


Change = Installed | NotInstalled | Unloaded

ToWorker = Setup | Run | Cancel | Note | Uploaded | EndSession | Load | Unload
ToFront = Loading | Loaded | LoadFailed | Changing | Change | Done | Failed | Again | Skipped | Leaving | Note

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_to_front = msgspec.msgpack.Decoder(ToFront).decode
