"""What a server says of its models."""

from __future__ import annotations

from dataclasses import dataclass, field

from pullback_wire import dtype_name
from pullback_wire.v1 import model_service_pb2 as pb
from pullback_wire.v1 import tensor_pb2


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor of a model's signature looks like; str() gives "x: float32[batch, 784]".

    dtype: torch's name of it; None: any that the model's code takes.
    shape: extents; a str is a free extent with a name, and equal names mean equal extents in one call; None: a free one
        of which nothing more is known. Instead of the tuple None: any shape. Shapes of outputs are what the server saw
        of a few samples in eval mode when it loaded the model.
    optional: the input may be left out.
    minimum, maximum: inclusive bounds of the elements, which the server checks.
    """

    name: str
    dtype: str | None
    shape: tuple[int | str | None, ...] | None
    optional: bool = False
    minimum: float | None = None
    maximum: float | None = None

    def __str__(self) -> str:
        shape = "[...]" if self.shape is None else f"[{', '.join('?' if e is None else str(e) for e in self.shape)}]"
        text = f"{self.name}: {self.dtype or 'any'}{shape}"
        if self.minimum is not None or self.maximum is not None:
            low = "" if self.minimum is None else f"{self.minimum:g}"
            high = "" if self.maximum is None else f"{self.maximum:g}"
            text += f" in {low}..{high}"
        return f"{text} (optional)" if self.optional else text


@dataclass(frozen=True)
class LossInfo:
    """A loss that can follow a model, by its name in torch.nn.functional.

    tensors: its tensor arguments in order; the first is fed by the model's output, the others by target= and targets=.
    optional_tensors: those among its tensor arguments that may be left out.
    options: its other arguments, for pullback.Loss.
    """

    name: str
    tensors: tuple[str, ...]
    optional_tensors: tuple[str, ...]
    options: tuple[str, ...]

    def __str__(self) -> str:
        optional = [f"[{name}]" for name in self.optional_tensors]
        required = [name for name in self.tensors if name not in self.optional_tensors]
        return f"{self.name}({', '.join([*required, *optional, *(f'{name}=' for name in self.options)])})"


@dataclass(frozen=True)
class CheckInfo:
    """A property of its gradients that was looked at when a model was loaded.

    name: "gradient", "second", "rows", "determinism" or "purity".
    outcome: "passed"; "declared" (it does not hold, and the operator says that this is intended, and why); "noted" (it
        does not hold, and is no danger); "skipped" (it was not looked at).
    detail: what was found; for a declared difference the operator's reason.
    """

    name: str
    outcome: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.outcome}" + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class PlacementInfo:
    """A model version on one worker. state: "ready", "loading" or "failed"."""

    worker: str
    device: str
    state: str

    def __str__(self) -> str:
        return f"{self.worker} ({self.device})" + ("" if self.state == "ready" else f", {self.state}")


@dataclass(frozen=True)
class VersionInfo:
    """One version of a model.

    state: "ready", "loading", "failed" or "unloading".
    reason: why it is in that state; for a ready one, why newer contents of it could not be loaded.
    revision, digest: see `ModelInfo`.
    """

    version: str
    state: str
    reason: str
    revision: int
    digest: str

    def __str__(self) -> str:
        return f"{self.version}: {self.state}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class ModelInfo:
    """A hosted model: its signature and what it can do. Of one that is not ready, little but its state is known.

    versions: every version that can be called, oldest first.
    state: "ready", "loading", "failed" or "unloading"; state_reason says why, where it is not ready, and why newer
        contents could not be loaded, where it is.
    inputs: in the order of the model's code, which is the order of positional inputs.
    outputs: where declared, or learned when the model was loaded; may be empty.
    parameters: empty in what Client.models() returns; RemoteModel.info has them.
    batch_axis: the axis along which rows are independent of each other; None: not declared.
    max_order: the highest order of derivative by reverse mode that is promised (1: vjp only); None: any order.
    forward_mode: whether jvp is available.
    order_evidence: how that is known, or what stands against more.
    devices: of the workers that hold the model.
    parameter_count: how many elements the parameters have in all.
    max_batch_rows: rows of several callers' calls that are computed together at most; 0: calls are never merged.
    batch_evidence: how it is known that rows are independent, or why calls are not merged.
    plan: what a compiled plan covers, or why there is none; empty: none was asked for.
    hard_timeout: seconds of computing after which a call is ended; None: the server's own limit.
    source: what it was made from: "python", "pt2" or "torchscript".
    revision: how often this version was loaded anew with other contents.
    digest: SHA-256, in hex, of what it was loaded from; empty where that was neither a repository nor an upload.
    checks: of its gradients, when it was loaded.
    limits: what a model of its source cannot do, each in a sentence.
    memory_bytes: of its parameters and buffers.
    gradient_seconds: of one VJP of the sample that it was tried with at load; None: it was not tried.
    placements: on which workers it is.
    version_statuses: every version that the server knows, also those that cannot be called, oldest first.
    """

    name: str
    version: str
    versions: tuple[str, ...]
    state: str
    state_reason: str
    description: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    parameters: tuple[TensorInfo, ...] = field(repr=False)
    batch_axis: int | None
    losses: tuple[LossInfo, ...] = field(repr=False)
    max_order: int | None
    forward_mode: bool
    order_evidence: str
    devices: tuple[str, ...]
    parameter_count: int
    max_batch_rows: int = 0
    batch_evidence: str = ""
    plan: str = ""
    hard_timeout: float | None = None
    source: str = ""
    revision: int = 0
    digest: str = ""
    checks: tuple[CheckInfo, ...] = field(default=(), repr=False)
    limits: tuple[str, ...] = field(default=(), repr=False)
    memory_bytes: int = 0
    gradient_seconds: float | None = None
    placements: tuple[PlacementInfo, ...] = field(default=(), repr=False)
    version_statuses: tuple[VersionInfo, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        if self.state != "ready":
            version = f" version {self.version}" if self.version else ""
            return f"<ModelInfo {self.name!r}{version}, {self.state}: {self.state_reason or 'no reason given'}>"
        return (
            f"<ModelInfo {self.name!r} version {self.version}: ({', '.join(map(str, self.inputs))}) -> "
            f"({', '.join(map(str, self.outputs)) or 'unknown'}), {self.parameter_count:,} parameters>"
        )


def model_info(message: pb.Model) -> ModelInfo:
    """The `ModelInfo` for the contract's message."""
    return ModelInfo(
        name=message.name,
        version=message.version,
        versions=tuple(message.versions),
        state=_state(message.state),
        state_reason=message.state_reason,
        description=message.description,
        inputs=tuple(map(_tensor_info, message.inputs)),
        outputs=tuple(map(_tensor_info, message.outputs)),
        parameters=tuple(map(_tensor_info, message.parameters)),
        batch_axis=message.batch_axis if message.HasField("batch_axis") else None,
        losses=tuple(map(_loss_info, message.losses)),
        max_order=None if message.orders.reverse < 0 else message.orders.reverse,
        forward_mode=message.orders.forward,
        order_evidence=message.orders.evidence,
        devices=tuple(message.devices),
        parameter_count=message.parameter_count,
        max_batch_rows=message.batching.max_rows,
        batch_evidence=message.batching.evidence,
        plan=message.plan,
        hard_timeout=message.hard_timeout_seconds if message.HasField("hard_timeout_seconds") else None,
        source=message.source,
        revision=message.revision,
        digest=message.digest,
        checks=tuple(CheckInfo(one.name, _outcome(one.outcome), one.detail) for one in message.checks),
        limits=tuple(message.limits),
        memory_bytes=message.memory_bytes,
        gradient_seconds=message.gradient_seconds or None,
        placements=tuple(PlacementInfo(one.worker, one.device, _state(one.state)) for one in message.placements),
        version_statuses=tuple(
            VersionInfo(one.version, _state(one.state), one.reason, one.revision, one.digest)
            for one in message.version_statuses
        ),
    )


def _state(number: int) -> str:
    if number not in pb.ModelState.values():
        return f"unknown({number})"
    return pb.ModelState.Name(number).removeprefix("MODEL_STATE_").lower()  # type: ignore[arg-type]


def _outcome(number: int) -> str:
    if number not in pb.CheckOutcome.values():
        return f"unknown({number})"
    return pb.CheckOutcome.Name(number).removeprefix("CHECK_OUTCOME_").lower()  # type: ignore[arg-type]


def _tensor_info(spec: tensor_pb2.TensorSpec) -> TensorInfo:
    return TensorInfo(
        name=spec.name,
        dtype=dtype_name(spec.dtype) if spec.dtype else None,
        shape=None if spec.any_shape else tuple(map(_extent, spec.shape)),
        optional=spec.optional,
        minimum=spec.minimum if spec.HasField("minimum") else None,
        maximum=spec.maximum if spec.HasField("maximum") else None,
    )


def _extent(dim: tensor_pb2.Dim) -> int | str | None:
    match dim.WhichOneof("extent"):
        case "symbol":
            return dim.symbol
        case "size":
            return dim.size
        case _:
            return None


def _loss_info(message: pb.LossSignature) -> LossInfo:
    return LossInfo(
        name=message.name,
        tensors=tuple(message.tensors),
        optional_tensors=tuple(message.optional_tensors),
        options=tuple(message.options),
    )
