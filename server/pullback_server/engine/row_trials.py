"""Samples computed in parts and in one, and held against each other row by row."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pullback_server.engine._dtypes import describe, differentiable
from pullback_server.engine.attempt import attempt
from pullback_server.engine.call import Again, Call, WritesInputs
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.merged import random_states
from pullback_server.engine.samples import sample
from pullback_server.engine.trial import Compute, Tensors, job_by_everything
from pullback_server.faults import Fault
from pullback_server.job import GradRef, Job, SpecRecord

#: How far a row may be from itself computed alone, relative to its norm, by the bytes of a real number; and, relative
#: to the largest row, in units of rounding.
_TOLERANCE = {1: 0.5, 2: 5e-2, 4: 1e-3, 8: 1e-6}
_ROUNDING = {1: 0.1, 2: 1e-2, 4: 1e-7, 8: 2e-16}
_UNITS = {1: 1, 2: 4, 4: 1000, 8: 1000}
#: So many times farther than a step of rounding in the inputs takes it.
_AMPLIFIED = 100
#: What budgets are measured by: a machine that is busy with other things must not decide what is found out.
clock = time.thread_time
#: More elements than this in all inputs make samples in many parts slow.
_MOST = 1 << 22


class NotProbed(Exception):
    """Why it cannot be told whether rows are independent."""


class Dependent(Exception):
    """How rows depend on each other."""


class _Widths(TorchFunctionMode):
    """Sees the narrowest floating numbers that are computed with. (A dispatch mode would import torch._dynamo.)"""

    least = 8

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim and differentiable(tensor.dtype):
                self.least = min(self.least, tensor.itemsize // (2 if tensor.is_complex() else 1))
        return found


class RowTrial:
    """Comparisons with one model and one choice of inputs. All of them raise Dependent and NotProbed."""

    def __init__(
        self,
        hosted: HostedModel,
        compute: Compute,
        records: list[SpecRecord],
        extents: dict[str, tuple[int, ...]],
        axis: int,
        deadline: float,
    ) -> None:
        self.hosted = hosted
        self._compute = compute
        self._records = records
        self._extents = extents
        self._axis = axis
        self._deadline = deadline
        self._width = 8
        #: Of one forward of one row.
        self.seconds = 0.0
        #: Outputs by name that can be differentiated by the inputs, with the shape of one row.
        self._outputs: Tensors = {}

    def like(self, hosted: HostedModel) -> RowTrial:
        """The same with another model."""
        return RowTrial(hosted, self._compute, self._records, self._extents, self._axis, self._deadline)

    @property
    def is_wide(self) -> bool:
        """Whether everything is computed in double precision."""
        return self._width == 8

    @property
    def fits(self) -> bool:
        """Whether samples of many rows are small."""
        return sum(tensor.numel() for tensor in self._sample(1).values()) * 11 < _MOST

    def explore(self, rows: int, few: Sequence[int]) -> str:
        """Whether these extents suit the model: why not, or nothing. Raises NotProbed, Dependent."""
        if not self.fits:
            rows = sum(few)
        inputs = self._sample(rows)
        job, tensors = self._job("hvp", inputs)
        try:
            with _Widths() as widths:
                self._outputs = self._connected(job, tensors)
            self._width = widths.least
            before = random_states(self.hosted)
            first = self._run("evaluate", inputs)
            begin = time.perf_counter()
            second = self._run("evaluate", inputs)
            self.seconds = (time.perf_counter() - begin) / rows
        except (Fault, RuntimeError, WritesInputs) as error:
            return f"{type(error).__name__}: {error}" if not isinstance(error, Fault) else error.message
        if random_states(self.hosted) != before:
            raise NotProbed("it draws random numbers")
        for name, tensor in first.items():
            if tensor.ndim <= self._axis or tensor.shape[self._axis] != rows:
                raise Dependent(f"{name} is {describe(tensor)} for {rows} rows")
            if any(self._gaps(tensor, second[name])):
                raise NotProbed("it computes something else each time")
        return ""

    def check_values(self, parts: Sequence[int]) -> None:
        """Outputs and gradients, in parts and in one."""
        inputs = self._sample(sum(parts))
        self._compare(self._first_order, inputs, self._cotangents(sum(parts)), parts, "")

    def check_single(self, parts: Sequence[int]) -> None:
        """A cotangent for one row moves no other."""
        rows = sum(parts)
        if not self._outputs:
            return
        for row in (0, rows - 1):
            v = {
                name: torch.zeros_like(tensor).index_copy_(
                    self._axis,
                    torch.tensor([row], device=tensor.device),
                    tensor.narrow(self._axis, row, 1),
                )
                for name, tensor in self._cotangents(rows).items()
            }
            self._compare(self._first_order, self._sample(rows), v, parts, f", for a cotangent of row {row} alone")

    def check_strangers(self, parts: Sequence[int]) -> None:
        """What stands in other rows, NaN included, changes nothing."""
        rows = sum(parts)
        inputs, v = self._sample(rows), self._cotangents(rows)
        half = torch.arange(rows, device=self.hosted.device) % 2 == 0
        expected = self._run(self._first_order, inputs, v)
        for value in (1e4, float("nan"), float("inf")):
            strange = {
                record.name: self._with_rows(inputs[record.name], ~half, value, self._is_free(record))
                for record in self._records
            }
            try:
                found = self._run(self._first_order, strange, v)
            except (Fault, RuntimeError):
                # It may refuse such numbers.
                continue
            self._hold(found, expected, self._first_order, inputs, v, f", with {value:g} in other rows", half)

    def check_order(self, parts: Sequence[int]) -> None:
        """Rows in another order come to the same in that order."""
        rows = sum(parts)
        inputs, v = self._sample(rows), self._cotangents(rows)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).to(self.hosted.device)
        found = self._run(self._first_order, self._picked(inputs, order), self._picked(v, order))
        back = {name: tensor.index_select(self._axis, order.argsort()) for name, tensor in found.items()}
        expected = self._run(self._first_order, inputs, v)
        self._hold(back, expected, self._first_order, inputs, v, ", in another order")

    def check_magnitudes(self, parts: Sequence[int]) -> None:
        """Rows of very different sizes, and masks that are full or empty."""
        rows = sum(parts)
        inputs, v = self._sample(rows), self._cotangents(rows)
        scale = torch.tensor([1.0, 1e3, 1e-3])[torch.arange(rows) % 3].to(self.hosted.device)
        for record in self._records:
            tensor = inputs[record.name]
            shape = [1] * tensor.ndim
            shape[self._axis] = rows
            if tensor.dtype == torch.bool:
                place = torch.arange(rows, device=tensor.device).reshape(shape) % 4
                inputs[record.name] = (tensor | (place == 0)) & (place != 1)
            elif self._is_free(record) and differentiable(tensor.dtype):
                inputs[record.name] = tensor * scale.reshape(shape).to(tensor.dtype)
        self._compare(self._first_order, inputs, v, parts, ", for rows of different sizes")

    def check_second(self, parts: Sequence[int]) -> None:
        """Second derivatives, where there are any."""
        self._compare("hvp", self._sample(sum(parts)), self._cotangents(sum(parts)), parts, "", may_fail=True)

    def check_forward(self, parts: Sequence[int]) -> None:
        """JVPs, where there are any."""
        self._compare("jvp", self._sample(sum(parts)), {}, parts, "", may_fail=True)

    def check_repeated(self, parts: Sequence[int]) -> None:
        """The same row again and again."""
        rows = sum(parts)
        first = torch.zeros(rows, dtype=torch.long, device=self.hosted.device)
        inputs = self._picked(self._sample(rows), first)
        self._compare(self._first_order, inputs, self._cotangents(rows), parts, ", for equal rows")

    # What the comparisons are made of.

    @property
    def _first_order(self) -> str:
        return "vjp" if self._outputs else "evaluate"

    def _is_free(self, record: SpecRecord) -> bool:
        return record.minimum is None and record.maximum is None

    def _sample(self, rows: int) -> Tensors:
        extents = {
            name: (*shape[: self._axis], rows, *shape[self._axis + 1 :]) for name, shape in self._extents.items()
        }
        device = self.hosted.device
        found = sample(
            self._records,
            extents,
            torch.Generator().manual_seed(rows),
            wide=torch.get_default_dtype() == torch.float64,
            cautious=device.type == "cuda",
        )
        return {name: tensor.to(device) for name, tensor in found.items()}

    def _cotangents(self, rows: int) -> Tensors:
        generator = torch.Generator().manual_seed(rows + 1)
        found = {}
        for name, row in self._outputs.items():
            shape = (*row.shape[: self._axis], rows, *row.shape[self._axis + 1 :])
            found[name] = torch.randn(shape, generator=generator, dtype=_drawn(row.dtype)).to(row.device, row.dtype)
        return found

    def _picked(self, named: Tensors, rows: torch.Tensor) -> Tensors:
        return {name: tensor.index_select(self._axis, rows) for name, tensor in named.items()}

    def _with_rows(self, tensor: torch.Tensor, which: torch.Tensor, value: float, free: bool) -> torch.Tensor:
        """A sample with other numbers in some rows."""
        shape = [1] * tensor.ndim
        shape[self._axis] = len(which)
        if free and differentiable(tensor.dtype):
            return torch.where(which.reshape(shape), torch.full_like(tensor, value), tensor)
        return torch.where(which.reshape(shape), tensor.flip(self._axis), tensor)

    def _job(
        self, kind: str, inputs: Tensors, v: Tensors | None = None, t: Tensors | None = None
    ) -> tuple[Job, list[torch.Tensor]]:
        job, tensors = job_by_everything(kind, self.hosted, inputs, cotangents=v or {}, tangents=t or {})
        job.wrt = [wrt for wrt in job.wrt if wrt.place == "input"] if kind != "evaluate" else []
        job.seed = None
        return job, tensors

    def _connected(self, job: Job, tensors: list[torch.Tensor]) -> Tensors:
        for _ in range(4):
            try:
                outputs = attempt(
                    job, self.hosted, lambda: Call(job, self.hosted, tensors), lambda call: call.forward().outputs
                )
            except Again:
                continue
            return {
                name: tensor.detach().narrow(self._axis, 0, 1)
                for name, tensor in outputs.items()
                if tensor.requires_grad and tensor.ndim > self._axis and tensor.shape[self._axis]
            }
        raise NotProbed("the model keeps changing its state")

    def _run(self, kind: str, inputs: Tensors, v: Tensors | None = None) -> Tensors:
        """Every tensor of a result, by what it is. Raises Fault and RuntimeError where the model fails."""
        if clock() > self._deadline:
            raise NotProbed("it takes too long to probe")
        t = {}
        if kind in ("hvp", "jvp"):
            for name, tensor in inputs.items():
                if differentiable(tensor.dtype):
                    # Of the rows' own, whatever part they are in.
                    t[f"input:{name}"] = torch.sin(3 * tensor.to(_drawn(tensor.dtype)) + 1).to(tensor.dtype)
        job, tensors = self._job(kind, inputs, v, t)
        for _ in range(4):
            try:
                found = self._compute(job, self.hosted, tensors)
            except Again:
                continue
            outcome = found.outcome
            named: list[tuple[str, list[GradRef]]] = [
                ("output", [GradRef(ref.name, ref) for ref in outcome.outputs]),
                ("tangent of" if kind == "jvp" else "gradient of", outcome.gradients),
                ("HVP of", outcome.hvps),
                ("derivative of", outcome.cotangent_derivatives),
            ]
            return {
                f"{what} {grad.name.removeprefix('input:')!r}": found.tensors[grad.value.payload]
                for what, grads in named
                for grad in grads
                if grad.value is not None
            }
        raise NotProbed("the model keeps changing its state")

    def _compare(
        self, kind: str, inputs: Tensors, v: Tensors, parts: Sequence[int], how: str, *, may_fail: bool = False
    ) -> None:
        """Computes in one and in parts."""
        if kind in ("hvp", "jvp") and not self._outputs:
            return
        try:
            found = self._run(kind, inputs, v)
        except (Fault, RuntimeError) as error:
            if may_fail:
                return
            raise NotProbed(f"its {kind} fails{how}: {error}") from None
        self._hold(found, None, kind, inputs, v, how, parts=parts)

    def _in_parts(self, kind: str, inputs: Tensors, v: Tensors, parts: Sequence[int]) -> Tensors:
        pieces: list[Tensors] = []
        start = 0
        for rows in parts:
            own = [{k: t.narrow(self._axis, start, rows).contiguous() for k, t in d.items()} for d in (inputs, v)]
            pieces.append(self._run(kind, *own))
            start += rows
        return {name: torch.cat([piece[name] for piece in pieces], self._axis) for name in pieces[0]}

    def _hold(
        self,
        found: Tensors,
        expected: Tensors | None,
        kind: str,
        inputs: Tensors,
        v: Tensors,
        how: str,
        which: torch.Tensor | None = None,
        *,
        parts: Sequence[int] = (),
    ) -> None:
        """Holds results against those of the parts, or those given. which: the rows to look at."""

        def again(inputs: Tensors) -> Tensors:
            return self._in_parts(kind, inputs, v, parts) if parts else self._run(kind, inputs, v)

        if expected is None:
            try:
                expected = again(inputs)
            except (Fault, RuntimeError) as error:
                if 1 not in parts:
                    raise NotProbed(f"rows that are computed together fail in parts: {error}") from None
                # A model that normalises by its rows refuses to do so with one.
                self._hold(found, None, kind, inputs, v, how, parts=(parts[0] + parts[1], *parts[2:]))
                raise NotProbed(f"a row alone fails: {error}") from None
        rows = next(iter(inputs.values())).shape[self._axis]
        nudged: Tensors | None = None
        for name, alone in expected.items():
            if name not in found or found[name].shape != alone.shape:
                raise Dependent(f"{name} is {describe(alone)} in parts, {describe(found[name])} in one{how}")
            gaps, sizes = self._gaps(found[name], alone), self._sizes(alone)
            bounds = [self._bound(size, max(sizes)) for size in sizes]
            for row in range(rows):
                if gaps[row] <= bounds[row] or (which is not None and not bool(which[row])):
                    continue
                if nudged is None:
                    nudged = again(_nudged(inputs, _ROUNDING[self._width]))
                rounding = self._gaps(nudged[name], alone)[row]
                if not gaps[row] <= _AMPLIFIED * rounding:
                    raise Dependent(
                        f"row {row} of {name} is of size {sizes[row]:.3g}, and differs by {gaps[row]:.3g} when it is "
                        f"computed with others{how}"
                    )

    def _bound(self, size: float, largest: float) -> float:
        return _TOLERANCE[self._width] * size + _UNITS[self._width] * _ROUNDING[self._width] * largest

    def _gaps(self, a: torch.Tensor, b: torch.Tensor) -> list[float]:
        """The norm of each row's difference. What is the same, NaN or infinite as it may be, does not count."""
        wide = torch.complex128 if b.is_complex() else torch.float64
        equal = (a == b) | ((a != a) & (b != b))
        return self._norms(torch.where(equal, torch.zeros((), dtype=wide, device=b.device), a.to(wide) - b.to(wide)))

    def _sizes(self, tensor: torch.Tensor) -> list[float]:
        """The norm of each row, as far as it is finite."""
        wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
        return self._norms(torch.where(wide.abs() < float("inf"), wide, torch.zeros_like(wide)))

    def _norms(self, tensor: torch.Tensor) -> list[float]:
        rows = tensor.movedim(self._axis, 0).reshape(tensor.shape[self._axis], -1)
        return [math.inf if norm != norm else norm for norm in torch.linalg.vector_norm(rows, dim=1).tolist()]

    def seconds_of(self, rows: int) -> float:
        """What a gradient (or, where there is none, the outputs) of so many rows takes. Raises Fault, RuntimeError."""
        inputs, v = self._sample(rows), self._cotangents(rows)
        begin = time.perf_counter()
        self._run(self._first_order, inputs, v)
        if self.hosted.device.type == "cuda":
            torch.cuda.current_stream(self.hosted.device).synchronize()
        return time.perf_counter() - begin

    def bytes_of_row(self) -> int:
        """Bytes of the inputs of one row."""
        return sum(tensor.nbytes for tensor in self._sample(1).values())

    def allow(self, deadline: float) -> None:
        """Lets it go on until then, by `clock`."""
        self._deadline = deadline


def _drawn(dtype: torch.dtype) -> torch.dtype:
    """What random numbers are drawn as."""
    return torch.complex128 if dtype.is_complex else torch.float64


def _nudged(named: Tensors, rounding: float) -> Tensors:
    """The same but for a step of rounding."""
    found = {}
    for name, tensor in named.items():
        if differentiable(tensor.dtype):
            sign = torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape) % 2 * 2 - 1
            tensor = tensor * (1 + 4 * rounding * sign).to(tensor.dtype)
        found[name] = tensor
    return found
