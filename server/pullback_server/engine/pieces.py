"""One job computed piece by piece, some rows at a time, which takes less memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
import torch

from pullback_server.engine._dtypes import differentiable
from pullback_server.engine.attempt import attempt
from pullback_server.engine.backward import gradients
from pullback_server.engine.call import Call, Forward
from pullback_server.engine.cotangents import cotangents
from pullback_server.engine.health import joined
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.merged import separable
from pullback_server.engine.results import EngineResult, Results, add_seconds
from pullback_server.engine.reverse import finish_vjp
from pullback_server.engine.thrift import thrift
from pullback_server.job import GradRef, Job, TensorRef

Tensors = Sequence[torch.Tensor]
_UNLIMITED = 1 << 62

Compute = Callable[[Job, HostedModel, Tensors], EngineResult]


class InOne(Exception):
    """The job can only be computed in one."""


def pieceable(job: Job, hosted: HostedModel) -> int:
    """The rows of a job that can be computed piece by piece; 0 where it cannot, as far as its shapes tell."""
    rows = separable(job, hosted)
    if not hosted.additive and any(wrt.place == "param" for wrt in job.wrt):
        # They are added up over the pieces.
        return 0
    if job.kind in ("jvp", "hvp") and (job.loss is not None or any(wrt.place != "input" for wrt in job.wrt)):
        return 0
    return rows


def in_pieces(job: Job, hosted: HostedModel, tensors: Tensors, most: int, compute: Compute) -> EngineResult:
    """Computes at most `most` rows at a time. compute: a job of one piece.

    Raises InOne where that cannot be; otherwise as `compute`.
    """
    rows, axis = pieceable(job, hosted), hosted.registration.batch_axis
    if axis is None or rows <= most:
        raise InOne
    sizes = [min(most, rows - start) for start in range(0, rows, most)]
    if job.kind == "vjp" or job.loss is not None:
        work = _vjp if job.kind == "vjp" else _evaluate
        return attempt(job, hosted, lambda: PieceCall(job, hosted, tensors, axis, sizes), work)
    with thrift.for_all_pieces(hosted.registration.name):
        return _apart(job, hosted, tensors, axis, sizes, compute)


def _apart(
    job: Job, hosted: HostedModel, tensors: Tensors, axis: int, sizes: Sequence[int], compute: Compute
) -> EngineResult:
    """Each piece as a job of its own; everything that comes of them has the batch axis."""
    found: list[EngineResult] = []
    start = 0
    for size in sizes:
        given = list(tensors)
        cut = {
            name: [_cut(ref, given, axis, start, size, sum(sizes)) for ref in getattr(job, name)]
            for name in ("inputs", "cotangents", "tangents")
        }
        # How much is too much is said of all rows.
        piece = msgspec.structs.replace(job, max_result_bytes=_UNLIMITED, **cut)
        found.append(compute(piece, hosted, given))
        if start == 0:
            of_first = sum(tensor.nbytes for tensor in found[0].tensors)
            Results(job).refuse_over(of_first * sum(sizes) // size, "")
        start += size
    return _rejoined(job, found, axis, sizes)


def _cut(ref: TensorRef, tensors: list[torch.Tensor], axis: int, start: int, size: int, rows: int) -> TensorRef:
    """A piece of a tensor, in its place."""
    if len(ref.shape) <= axis or ref.shape[axis] != rows:
        # In one, it is told what is wrong with it.
        raise InOne
    piece = tensors[ref.payload] = tensors[ref.payload].narrow(axis, start, size).contiguous()
    return msgspec.structs.replace(ref, shape=tuple(piece.shape))


def _rejoined(job: Job, found: Sequence[EngineResult], axis: int, sizes: Sequence[int]) -> EngineResult:
    results = Results(job)
    outcome = results.outcome

    def whole(refs: Sequence[TensorRef | None]) -> TensorRef | None:
        if any(ref is None for ref in refs):
            return None
        parts = [result.tensors[ref.payload] for result, ref in zip(found, refs, strict=True) if ref is not None]
        if any(part.ndim <= axis or part.shape[axis] != size for part, size in zip(parts, sizes, strict=True)):
            raise InOne
        return results.add("", torch.cat(parts, axis))

    def named(columns: Sequence[Sequence[GradRef]]) -> list[GradRef]:
        grads = []
        for column in zip(*columns, strict=True):
            value, name = whole([grad.value for grad in column]), column[0].name
            grads.append(GradRef(name, None if value is None else msgspec.structs.replace(value, name=name)))
        return grads

    outputs = named([[GradRef(ref.name, ref) for ref in result.outcome.outputs] for result in found])
    outcome.outputs = [grad.value for grad in outputs if grad.value is not None]
    outcome.gradients = named([result.outcome.gradients for result in found])
    outcome.hvps = named([result.outcome.hvps for result in found])
    outcome.cotangent_derivatives = named([result.outcome.cotangent_derivatives for result in found])
    for result in found:
        add_seconds(outcome.timings, result.outcome.timings)
    results.signs = joined([result.signs for result in found])
    return results.finish()


class PieceCall(Call):
    """A call whose model sees some rows at a time, and whose outputs are the model's, not the loss's."""

    def __init__(self, job: Job, hosted: HostedModel, tensors: Tensors, axis: int, sizes: Sequence[int]) -> None:
        super().__init__(job, hosted, tensors)
        self.axis = axis
        self.sizes = sizes
        self.whole = job
        self._all = self.inputs
        #: What `wrt` stands for, all rows of it.
        self.values = self.wrt_values()

    def composed(
        self, outputs: dict[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return outputs

    def pieces(self, *places: str) -> Iterator[tuple[int, int, Forward]]:
        """Runs every piece: where it begins, its rows, and its forward by the members of `wrt` in these places."""
        start = 0
        self.job = msgspec.structs.replace(self.whole, wrt=[wrt for wrt in self.whole.wrt if wrt.place in places])
        try:
            for size in self.sizes:
                self.inputs = {name: tensor.narrow(self.axis, start, size) for name, tensor in self._all.items()}
                fw = self.forward()
                for tensor in fw.outputs.values():
                    if tensor.ndim <= self.axis or tensor.shape[self.axis] != size:
                        raise InOne
                yield start, size, fw
                start += size
        finally:
            self.job, self.inputs = self.whole, self._all

    def loss_of(self, outputs: dict[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The loss of all rows. Raises Fault."""
        return super().composed(outputs, targets)

    def like(self, piece: torch.Tensor) -> torch.Tensor:
        """What an output of all rows looks like, without data."""
        shape = (*piece.shape[: self.axis], sum(self.sizes), *piece.shape[self.axis + 1 :])
        return torch.empty(shape, dtype=piece.dtype, device="meta")


def _outputs(call: PieceCall) -> dict[str, torch.Tensor]:
    """The model's outputs for all rows, without graphs."""
    parts: dict[str, list[torch.Tensor]] = {}
    for _, _, fw in call.pieces():
        for name, tensor in fw.outputs.items():
            parts.setdefault(name, []).append(tensor.detach())
    return {name: torch.cat(tensors, call.axis) for name, tensors in parts.items()}


def _evaluate(call: PieceCall) -> EngineResult:
    results = Results(call.job)
    outputs = call.loss_of(_outputs(call), call.targets)
    results.check_size(outputs, ())
    results.examine(call.hosted, outputs.values())
    results.add_outputs(outputs)
    results.outcome.timings = call.timings
    return results.finish()


def _vjp(call: PieceCall) -> EngineResult:
    """Gradients by inputs piece by piece, by parameters as a sum over the pieces."""
    results = Results(call.job)
    outputs: dict[str, torch.Tensor] = {}
    pulled: dict[str, torch.Tensor] = {}
    by_targets: dict[str, torch.Tensor | None] = {}
    if call.loss is not None:
        outputs, pulled, by_targets = _through_loss(call, results)
    parts: dict[str, list[torch.Tensor]] = {}
    gathered = _Gathered(call)
    for start, size, fw in call.pieces("input", "param"):
        if call.loss is None:
            if not pulled:
                pulled = _cotangents(call, results, fw)
            for name, tensor in fw.outputs.items():
                parts.setdefault(name, []).append(tensor.detach())
        begin = time.perf_counter()
        names = [name for name in pulled if fw.outputs[name].requires_grad]
        if not names:
            raise InOne
        values = [pulled[name].narrow(call.axis, start, size) for name in names]
        gathered.add(gradients(call, [fw.outputs[name] for name in names], fw.wrt, values), fw.wrt)
        call.timings["backward"] = call.timings.get("backward", 0.0) + time.perf_counter() - begin
    if call.loss is None and call.job.return_outputs:
        outputs = {name: torch.cat(tensors, call.axis) for name, tensors in parts.items()}
    found = iter(gathered.joined())
    every = [by_targets[wrt.name] if wrt.place == "target" else next(found) for wrt in call.job.wrt]
    seen = outputs.values() or [part for tensors in parts.values() for part in tensors]
    results.examine(call.hosted, seen, every)
    finish_vjp(call, results, Forward(outputs, []), every)
    results.outcome.timings = call.timings
    return results.finish()


class _Gathered:
    """Gradients of the pieces: one after the other by inputs, added by parameters."""

    def __init__(self, call: PieceCall) -> None:
        self._axis = call.axis
        self._sums = [wrt.place == "param" for wrt in call.job.wrt if wrt.place != "target"]
        self._parts: list[list[torch.Tensor | None]] = [[] for _ in self._sums]
        self._dtypes: list[torch.dtype | None] = [None for _ in self._sums]
        self._stands: list[list[torch.Tensor]] = [[] for _ in self._sums]

    def add(self, found: Sequence[torch.Tensor | None], stands: Sequence[torch.Tensor]) -> None:
        for index, (gradient, stand) in enumerate(zip(found, stands, strict=True)):
            if not self._sums[index]:
                self._parts[index].append(gradient)
                self._stands[index].append(stand.detach())
            elif gradient is not None:
                self._dtypes[index] = gradient.dtype
                (total,) = self._parts[index] or [None]
                if gradient.is_floating_point() and gradient.itemsize < 4 and gradient.layout is torch.strided:
                    # Every sum in so few bits would lose some.
                    gradient = gradient.float()
                self._parts[index] = [gradient if total is None else total + gradient]

    def joined(self) -> list[torch.Tensor | None]:
        """None: unused by every piece."""
        found: list[torch.Tensor | None] = []
        for sums, parts, stands, dtype in zip(self._sums, self._parts, self._stands, self._dtypes, strict=True):
            if all(part is None for part in parts):
                found.append(None)
            elif sums:
                found.append(None if parts[0] is None else parts[0].to(dtype))
            else:
                dense = [torch.zeros_like(s) if p is None else p for p, s in zip(parts, stands, strict=True)]
                found.append(torch.cat([part.to_dense() for part in dense], self._axis))
        return found


def _cotangents(call: PieceCall, results: Results, fw: Forward) -> dict[str, torch.Tensor]:
    """The cotangents of all rows, held against what the outputs of all rows will be. Raises Fault."""
    names = [ref.name for ref in call.job.cotangents]
    if not names or any(name in fw.outputs and not fw.outputs[name].requires_grad for name in names):
        # To tell why may take another forward.
        raise InOne
    outputs = {name: call.like(tensor) for name, tensor in fw.outputs.items()}
    for name in names:
        if name in outputs and differentiable(outputs[name].dtype):
            outputs[name].requires_grad_()
    pull = cotangents(call, Forward(outputs, []))
    results.check_size(outputs, call.values)
    return dict(zip(pull.names, pull.cotangents, strict=True))


def _through_loss(
    call: PieceCall, results: Results
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
    """The loss of all rows; its gradients by the model's outputs, and by targets. Raises Fault."""
    leaves = {
        name: tensor.requires_grad_() if differentiable(tensor.dtype) else tensor
        for name, tensor in _outputs(call).items()
    }
    stands = {
        wrt.name: call.targets[wrt.name].detach().requires_grad_() for wrt in call.job.wrt if wrt.place == "target"
    }
    losses = call.loss_of(leaves, call.targets | stands)
    if not losses["loss"].requires_grad:
        raise InOne
    pull = cotangents(call, Forward(losses, []))
    results.check_size(losses, call.values)
    by = {name: tensor for name, tensor in leaves.items() if tensor.requires_grad}
    found = gradients(call, pull.outputs, [*by.values(), *stands.values()], pull.cotangents)
    outputs = {name: gradient for name, gradient in zip(by, found, strict=False) if gradient is not None}
    return losses, outputs, dict(zip(stands, found[len(by) :], strict=True))
