"""What travels along the road rpc -> scheduling -> fleet -> engine, and back.

A `Job` describes one stateless call after its names were resolved. The bytes of its tensors are not in it: they stand
in a list beside it, and tensors refer to them by index. `Outcome` is the same for results. Both are msgspec structs,
because they cross a process boundary; dtypes are the wire's numbers.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

#: "graph": no derivative, but the model's autograd graph, on a sample that the worker makes.
Kind = Literal["evaluate", "vjp", "jvp", "hvp", "jacobian", "hessian", "graph"]
Place = Literal["input", "param", "target"]


class TensorRef(msgspec.Struct, array_like=True, frozen=True):
    """A tensor: name, wire number of its dtype, shape, and index of its bytes in the payload list beside the record."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    payload: int


class Wrt(msgspec.Struct, array_like=True, frozen=True):
    """One thing to differentiate with respect to. `label` is what the caller sees it called."""

    place: Place
    name: str
    label: str


class LossCall(msgspec.Struct, array_like=True, frozen=True):
    """A loss by its name in torch.nn.functional; `bindings`: argument -> model output (empty: the only one, first)."""

    name: str
    options: dict[str, Any]
    bindings: dict[str, str]


class Job(msgspec.Struct, array_like=True, tag="job"):
    """One stateless call. Fields as in the contract's requests (protos/pullback_wire/v1/gradient_service.proto)."""

    kind: Kind
    model: str
    version: str
    loss: LossCall | None
    train: bool
    seed: int | None
    inputs: list[TensorRef]
    parameters: list[TensorRef]
    targets: list[TensorRef]
    #: Resolved; for a JVP exactly those that have a tangent, in the tangents' order.
    wrt: list[Wrt]
    #: Named by output.
    cotangents: list[TensorRef]
    #: Whether the cotangents have a leading axis K.
    batched: bool
    #: Named by the label of a member of `wrt`.
    tangents: list[TensorRef]
    allow_unused: bool
    return_outputs: bool
    return_cotangent_derivatives: bool
    #: Wire number for real floating results; 0: as computed.
    result_dtype: int
    max_norm: float | None
    #: Largest sum of result bytes; more is refused before it is computed, where that can be known.
    max_result_bytes: int
    #: Largest number of cotangents in one call.
    max_cotangents: int
    #: Copy inputs before the model sees them. Set when the model turned out to write into its inputs.
    copy_inputs: bool = False
    #: Look for the operation that first makes NaN or infinity of finite numbers, and fail with its name.
    detect_anomaly: bool = False
    #: Nodes of a graph at most.
    max_nodes: int = 0


class Health(msgspec.Struct, array_like=True, frozen=True):
    """How the numbers of one call were, as computed on its device.

    norm: 2-norm over all its gradients, NaN where one of them is; None: there were none.
    elements, zeros: of the gradients, and how many of them are exactly zero.
    gradient_nans, gradient_infs, output_nans, output_infs: elements that are no finite numbers.
    """

    norm: float | None = None
    elements: int = 0
    zeros: int = 0
    gradient_nans: int = 0
    gradient_infs: int = 0
    output_nans: int = 0
    output_infs: int = 0


class GraphNode(msgspec.Struct, array_like=True, frozen=True):
    """A node of an autograd graph; fields as in the contract's, whose id is its place in the list.

    kind: "input", "parameter", "operation" or "output".
    """

    kind: str
    name: str
    module: str
    dtype: int
    shape: tuple[int, ...]


class GraphRecord(msgspec.Struct, array_like=True):
    """A model's autograd graph. edges: from where to where, by place in `nodes`. truncated: there are more nodes."""

    nodes: list[GraphNode]
    edges: list[tuple[int, int]]
    truncated: bool


class GradRef(msgspec.Struct, array_like=True, frozen=True):
    """A derivative named as `Wrt.label` (or as an output); `value` None: unused."""

    name: str
    value: TensorRef | None


class BlockRef(msgspec.Struct, array_like=True, frozen=True):
    """A block of a dense derivative; `value` None: unused."""

    row: str
    column: str
    value: TensorRef | None


class Outcome(msgspec.Struct, array_like=True, tag="outcome"):
    """What a job came to. Fields that its kind does not have stay empty."""

    outputs: list[TensorRef] = []
    #: VJP; for a JVP the tangents of the outputs.
    gradients: list[GradRef] = []
    hvps: list[GradRef] = []
    cotangent_derivatives: list[GradRef] = []
    blocks: list[BlockRef] = []
    norms: list[float] = []
    #: Seconds by stage: "forward", "backward", "copy_in", "copy_out".
    timings: dict[str, float] = {}
    #: Bytes of device memory in use after the job (0 where the device does not say).
    device_memory: int = 0
    #: How often the rows had to be split because memory ran out.
    splits: int = 0
    #: None: it was not looked at.
    health: Health | None = None
    graph: GraphRecord | None = None


class Batch(msgspec.Struct, array_like=True, tag="batch"):
    """Jobs for one function whose rows go through the model together.

    They agree in model, version, kind, loss, `wrt`, the names, dtypes and row shapes of their tensors, and differ in
    the number of rows. None has parameters, a seed or train mode; `wrt` names inputs only.

    counts: payloads of each member, in order: the members' own payload indices begin at 0 each.
    deadlines: of each member, on the time.monotonic clock; a member whose deadline has passed is not computed.
    shadow: the member that is computed alone as well and compared with; -1: none.
    """

    members: list[Job]
    counts: list[int]
    deadlines: list[float]
    shadow: int = -1


class Skip(msgspec.Struct, array_like=True, frozen=True, tag="skip"):
    """A member that was not computed, since nobody waits for it any more."""


class Alone(msgspec.Struct, array_like=True, frozen=True, tag="alone"):
    """A member that must be computed by itself, since it could not be computed together with the others."""


class Answered(msgspec.Struct, array_like=True, frozen=True, tag="answered"):
    """A member's outcome, and how many of the batch's payloads are its own; its indices begin at 0."""

    outcome: Outcome
    count: int


class FaultRecord(msgspec.Struct, array_like=True, frozen=True, tag="fault"):
    """A `faults.Fault` on its way to the front; `traceback` is for the log only."""

    reason: str
    message: str
    field: str = ""
    retry_after: float | None = None
    traceback: str = ""


class BatchOutcome(msgspec.Struct, array_like=True, tag="batch_outcome"):
    """What a batch came to.

    members: in the batch's order.
    merged: how many of them were computed in one.
    refused: why this model's requests must not be merged any more; empty: nothing stands against it.
    splits: how often the rows had to be split because memory ran out.
    """

    members: list[Answered | FaultRecord | Skip | Alone]
    merged: int
    refused: str = ""
    splits: int = 0
    timings: dict[str, float] = {}
    device_memory: int = 0


class SpecRecord(msgspec.Struct, array_like=True, frozen=True):
    """What a tensor of a signature looks like. dtype 0: any. shape None: any; a str in it is a named free extent.

    In the shape of an output "" is a free extent of which nothing more is known.
    """

    name: str
    dtype: int = 0
    shape: tuple[int | str, ...] | None = None
    optional: bool = False
    minimum: float | None = None
    maximum: float | None = None


class LossRecord(msgspec.Struct, array_like=True, frozen=True):
    """A loss and its arguments; the first of `tensors` is what the model's output feeds."""

    name: str
    tensors: tuple[str, ...]
    optional_tensors: tuple[str, ...]
    options: tuple[str, ...]


class OrdersRecord(msgspec.Struct, array_like=True, frozen=True):
    """Promised orders: `reverse` -1: any order; `forward`: JVPs available; `evidence`: how that is known."""

    reverse: int
    forward: bool
    evidence: str


class BatchRecord(msgspec.Struct, array_like=True, frozen=True):
    """How requests for a model may be merged.

    max_rows: rows of one merged computation at most; 0: none is ever merged.
    max_bytes: bytes of its input tensors at most.
    max_delay: seconds that a request may wait for others while a worker is free.
    evidence: how row-independence is known, or why nothing is merged, for people.
    inputs: names of those that have the batch axis; a request with another one is not merged.
    """

    max_rows: int = 0
    max_bytes: int = 0
    max_delay: float = 0.0
    evidence: str = "no batch axis is declared"
    inputs: list[str] = []


class CheckRecord(msgspec.Struct, array_like=True, frozen=True):
    """What the gate found of one property of a model when it was loaded.

    name: "gradient", "second", "rows", "determinism" or "purity".
    outcome: "passed"; "declared" (it does not hold, and the operator said that this is intended, and why); "noted" (it
        does not hold, and is no danger); "skipped" (it was not looked at; the detail says why).
    detail: for people.
    """

    name: str
    outcome: str
    detail: str = ""


class HealthRecord(msgspec.Struct, array_like=True, frozen=True):
    """Whether the health of a model's numbers is looked at; norms of gradients that are too small or large for it."""

    enabled: bool = True
    vanishing_below: float | None = None
    exploding_above: float | None = None


class Signature(msgspec.Struct, array_like=True):
    """What a worker tells of a model it holds.

    version, revision: its number, and how often that version has been loaded anew with other contents.
    """

    name: str
    version: str
    description: str
    inputs: list[SpecRecord]
    outputs: list[SpecRecord]
    parameters: list[SpecRecord]
    batch_axis: int | None
    losses: list[LossRecord]
    orders: OrdersRecord
    device: str
    parameter_count: int
    batch: BatchRecord = BatchRecord()
    #: Seconds of computing after which a call costs its worker; None: the server's own limit.
    hard_timeout: float | None = None
    #: What a compiled plan covers, or why there is none although one was asked for; empty: none was asked for.
    plan: str = ""
    revision: int = 0
    #: What it was made from: "python", "pt2" or "torchscript".
    source: str = "python"
    #: SHA-256 of what it was loaded from, in hex; empty where it did not come from a repository or an upload.
    digest: str = ""
    checks: list[CheckRecord] = []
    #: What a model of its source cannot do, each in a sentence.
    limits: list[str] = []
    #: Bytes of its parameters and buffers.
    memory: int = 0
    #: Seconds of one VJP of the sample that it was probed with; 0: it was not probed.
    gradient_seconds: float = 0.0
    health: HealthRecord = HealthRecord()

    @property
    def id(self) -> str:
        """What jobs call it: its version, and "+N" after its Nth revision."""
        return version_id(self.version, self.revision)


def version_id(version: str, revision: int) -> str:
    """What jobs call a revision of a version."""
    return f"{version}+{revision}" if revision else version


def split_id(id: str) -> tuple[str, int]:
    """Version and revision of what `version_id` made."""
    version, _, revision = id.partition("+")
    return version, int(revision or 0)


class Verdict(msgspec.Struct, array_like=True):
    """What was found out about a model in one process, so that others that load the same need not find it out again.

    probe_again: it runs code of its own in backwards, of which only the process that runs it can keep what is proven.
    devices, replicas: as in hosting.Options: where it may be.
    """

    orders: OrdersRecord
    forward_mode: bool
    no_jvp: str
    honest: bool
    outputs: list[SpecRecord]
    batch: BatchRecord
    batched_inputs: list[str]
    additive: bool
    writes_inputs: bool
    writes_buffers: bool
    writes_parameters: bool
    needs_natural: bool
    recomputes: bool
    checks: list[CheckRecord]
    gradient_seconds: float
    probe_again: bool
    devices: list[str] = []
    replicas: int | None = None
