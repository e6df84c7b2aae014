"""What travels along the road rpc -> fleet -> engine for a session: one op, and what it came to.

As in `job`, tensors' bytes stand in a list beside the record. Handles are the client's numbers.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pullback_server.job import FaultRecord, Health, HealthRecord, LossCall, TensorRef


class Operand(msgspec.Struct, array_like=True, frozen=True):
    """An argument: a handle, or (`handle` 0) a value in the payloads, stored under `keep` too where that is not 0."""

    name: str
    handle: int = 0
    value: TensorRef | None = None
    keep: int = 0
    requires_grad: bool = False


class Model(msgspec.Struct, array_like=True, frozen=True, tag="model"):
    """A hosted model as callee, with or without a loss."""

    name: str
    version: str
    loss: LossCall | None
    train: bool
    seed: int | None
    detect_anomaly: bool = False


class Loss(msgspec.Struct, array_like=True, frozen=True, tag="loss"):
    """A loss alone; its input is the one of `Call.inputs`, by name or as the only one."""

    loss: LossCall


class Operation(msgspec.Struct, array_like=True, frozen=True, tag="operation"):
    """A tensor operation of `pullback_wire.operations`; `options` as parsed from JSON."""

    name: str
    options: dict[str, Any]


class Put(msgspec.Struct, array_like=True, tag="put"):
    """Stores values; each operand has a value and a `keep`."""

    values: list[Operand]


class Parameters(msgspec.Struct, array_like=True, tag="parameters"):
    """Makes leaves of a hosted model's parameters."""

    model: str
    version: str
    names: list[str]
    handles: list[int]


class Call(msgspec.Struct, array_like=True, tag="call"):
    """Runs a function and keeps its graph. Fields as in the contract's CallOp."""

    callee: Model | Loss | Operation
    inputs: list[Operand]
    targets: list[Operand]
    parameters: list[Operand]
    handles: list[int]
    fetch: list[int]
    fetch_below: int
    max_order: int | None
    no_grad: bool


class Grad(msgspec.Struct, array_like=True, tag="grad"):
    """torch.autograd.grad. Fields as in the contract's GradOp; a grad_output None stands for None."""

    outputs: list[int]
    grad_outputs: list[Operand | None]
    inputs: list[int]
    handles: list[int]
    retain_graph: bool | None
    create_graph: bool
    allow_unused: bool
    batched: bool
    fetch: list[int]
    fetch_below: int
    detect_anomaly: bool = False


class Get(msgspec.Struct, array_like=True, tag="get"):
    """Reads values."""

    handles: list[int]


class Release(msgspec.Struct, array_like=True, tag="release"):
    """Nothing but the release list."""


class Broken(msgspec.Struct, array_like=True, tag="broken"):
    """An op that was refused on its way, in its place in the order: why, and the handles it would have made."""

    handles: list[int]
    fault: FaultRecord


Op = Put | Parameters | Call | Grad | Get | Release | Broken


class SessionJob(msgspec.Struct, array_like=True, tag="op"):
    """One op of a session. `release` goes first. A session's first op makes it known to its worker.

    budget: bytes that the session's tensors and graphs may hold.
    max_result_bytes: largest sum of bytes of values that may come back.
    """

    session: int
    number: int
    release: list[int]
    op: Op
    budget: int
    max_result_bytes: int


class HandleRecord(msgspec.Struct, array_like=True, frozen=True):
    """A tensor that an op made or read. `value`: where its bytes are, if they come along. unused: it does not exist.

    shares: the handle of an operand that lies in the same memory; 0: none.
    """

    handle: int
    name: str
    dtype: int
    shape: tuple[int, ...]
    requires_grad: bool
    unused: bool = False
    value: TensorRef | None = None
    shares: int = 0


class SessionOutcome(msgspec.Struct, array_like=True, tag="session"):
    """What an op came to, and what the session holds after it: live handles and retained bytes.

    graphs: handles with a graph behind them.
    model: what was called, or the one hosted model that the graph of a Grad went through; "": none, or several.
    limits: that model's thresholds.
    """

    handles: list[HandleRecord]
    live: int
    retained: int
    #: Seconds by stage, as in job.Outcome.
    timings: dict[str, float] = {}
    device_memory: int = 0
    graphs: int = 0
    model: str = ""
    limits: HealthRecord | None = None
    #: None: it was not looked at, or nothing was computed by a model.
    health: Health | None = None
