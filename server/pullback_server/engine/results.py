"""Results on their way out: detached, dense, contiguous, in the dtype asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pullback_server.engine._dtypes import TORCH, WIRE
from pullback_server.engine.health import Signs, Subject, examine
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.thrift import thrift
from pullback_server.faults import Fault
from pullback_server.job import GradRef, Job, Outcome, TensorRef
from pullback_wire import Reason


@dataclass
class EngineResult:
    """What a job came to. `TensorRef.payload` of the outcome is an index into `tensors`."""

    outcome: Outcome
    tensors: list[torch.Tensor]
    #: What its health is read from when the device is done; None: it was not looked at.
    signs: Signs | None = None


class Results:
    """Collects the results of one job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._dtype = TORCH[job.result_dtype] if job.result_dtype else None
        self.tensors: list[torch.Tensor] = []
        self.outcome = Outcome()
        self.signs: Signs | None = None

    def add(self, name: str, tensor: torch.Tensor) -> TensorRef:
        """Raises Fault (MODEL_ERROR) for a tensor that cannot travel."""
        if tensor.requires_grad:
            tensor = tensor.detach()
        if tensor.layout is not torch.strided:
            tensor = self._dense(name, tensor)
        if self._dtype is not None and tensor.is_floating_point() and tensor.dtype != self._dtype:
            tensor = tensor.to(self._dtype)
        if tensor.is_conj() or tensor.is_neg():
            tensor = tensor.resolve_conj().resolve_neg()
        number = WIRE.get(tensor.dtype)
        if number is None:
            raise Fault(Reason.MODEL_ERROR, f"{name!r} is {tensor.dtype}, which cannot travel")
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        self.tensors.append(tensor)
        return TensorRef(name, number, tuple(tensor.shape), len(self.tensors) - 1)

    def _dense(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        try:
            return tensor.to_dense()
        except (RuntimeError, NotImplementedError) as error:
            raise Fault(
                Reason.MODEL_ERROR, f"{name!r} has the layout {tensor.layout}, which cannot travel: {error}"
            ) from error

    def grad(self, name: str, tensor: torch.Tensor | None) -> GradRef:
        """A derivative; None: unused."""
        return GradRef(name, None if tensor is None else self.add(name, tensor))

    def add_outputs(self, outputs: dict[str, torch.Tensor]) -> None:
        """The function's outputs, unless they are omitted."""
        if self._job.return_outputs:
            self.outcome.outputs = [self.add(name, tensor) for name, tensor in outputs.items()]

    def examine(
        self,
        hosted: HostedModel,
        outputs: Iterable[torch.Tensor],
        gradients: Iterable[torch.Tensor | None] = (),
        others: Iterable[torch.Tensor | None] = (),
    ) -> None:
        """Looks at how the numbers are, as they were computed; see `health.Subject`."""
        if hosted.examined:
            subject = Subject(outputs, gradients, others)
            self.signs = thrift.look(hosted.registration.name, lambda: examine(subject))

    def finish(self) -> EngineResult:
        return EngineResult(self.outcome, self.tensors, self.signs)

    def bytes_of(self, tensor: torch.Tensor, count: int | None = None) -> int:
        """Bytes of a result like `tensor`, with `count` elements instead of its own."""
        dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
        return (tensor.numel() if count is None else count) * dtype.itemsize

    def check_size(self, outputs: dict[str, torch.Tensor], like: Sequence[torch.Tensor], times: int = 1) -> None:
        """Refuses what would be too large: `times` tensors like each of `like`, and the outputs.

        Raises Fault (RESULT_TOO_LARGE).
        """
        total = sum(self.bytes_of(tensor) for tensor in like) * times
        if self._job.return_outputs:
            total += sum(self.bytes_of(tensor) for tensor in outputs.values())
        self.refuse_over(total, "")

    def refuse_over(self, total: int, what: str) -> None:
        """Raises Fault (RESULT_TOO_LARGE) for more bytes than a result may have."""
        limit = self._job.max_result_bytes
        if total > limit:
            raise Fault(
                Reason.RESULT_TOO_LARGE, f"the result{what} would have {total} bytes, at most {limit} are allowed"
            )


def share_out(timings: dict[str, float], kind: str, seconds: float) -> None:
    """Fills in what of so many seconds of computing was not a forward: derivatives, where the job has some."""
    rest = seconds - timings.get("copy_in", 0.0) - timings.get("forward", 0.0)
    if kind == "evaluate":
        timings["forward"] = timings.get("forward", 0.0) + max(rest, 0.0)
    else:
        timings["backward"] = max(rest, 0.0)


def add_seconds(to: dict[str, float], more: Mapping[str, float]) -> None:
    """Adds seconds by stage to others."""
    for stage, seconds in more.items():
        to[stage] = to.get(stage, 0.0) + seconds


def numel(shape: Sequence[int]) -> int:
    """Elements of a shape."""
    return math.prod(shape)
