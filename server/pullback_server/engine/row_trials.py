"""Samples computed in parts and in one, and held against each other row by row."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Sequence

import torch

from pullback_server.engine._dtypes import describe, differentiable
from pullback_server.engine.attempt import attempt
from pullback_server.engine.call import Again, Call, WritesInputs
from pullback_server.engine.guards import generator_states
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.results import EngineResult
from pullback_server.engine.samples import sample
from pullback_server.engine.trial import Compute, Tensors, job_by_everything
from pullback_server.engine.widths import Widths
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
#: How often a computation is tried anew with what was learned about the model.
_ATTEMPTS = 4


class NotProbed(Exception):
    """Why it cannot be told whether rows are independent."""


class Dependent(Exception):
    """How rows depend on each other."""


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
        self.records = records
        self._extents = extents
        self.axis = axis
        self._deadline = deadline
        self._width = 8
        #: Of one forward of one row.
        self.seconds = 0.0
        #: Outputs by name that can be differentiated by the inputs, with the shape of one row.
        self.outputs: Tensors = {}

    def like(self, hosted: HostedModel) -> RowTrial:
        """The same with another model."""
        return RowTrial(hosted, self._compute, self.records, self._extents, self.axis, self._deadline)

    @property
    def is_wide(self) -> bool:
        """Whether everything is computed in double precision."""
        return self._width == 8

    @property
    def width(self) -> int:
        """The bytes of the narrowest real numbers that are computed with."""
        return self._width

    @property
    def extents(self) -> set[int]:
        """Every extent of the inputs."""
        return {extent for shape in self._extents.values() for extent in shape}

    @property
    def fits(self) -> bool:
        """Whether samples of many rows are small."""
        return sum(tensor.numel() for tensor in self.sample(1).values()) * 11 < _MOST

    def explore(self, rows: int, few: Sequence[int]) -> str:
        """Whether these extents suit the model: why not, or nothing. Raises NotProbed."""
        if not self.fits:
            rows = sum(few)
        inputs = self.sample(rows)
        try:
            with Widths() as widths:
                self.outputs = self.connected(inputs, "input")
            self._width = widths.least
            before = generator_states(self.hosted.device, not self.hosted.stock)
            first = self.run("evaluate", inputs)
            begin = time.perf_counter()
            second = self.run("evaluate", inputs)
            self.seconds = (time.perf_counter() - begin) / rows
            # An extent may happen to be that of the rows.
            fewer = self.run("evaluate", self.sample(rows - 1))
        except (Fault, RuntimeError, WritesInputs) as error:
            return f"{type(error).__name__}: {error}" if not isinstance(error, Fault) else error.message
        if generator_states(self.hosted.device, not self.hosted.stock) != before:
            raise NotProbed("it draws random numbers")
        for found, count in ((first, rows), (fewer, rows - 1)):
            for name, tensor in found.items():
                if tensor.ndim <= self.axis or tensor.shape[self.axis] != count:
                    raise NotProbed(f"{name} does not have the batch axis: it is {describe(tensor)} for {count} rows")
        for name, tensor in first.items():
            if any(self._gaps(tensor, second[name])):
                raise NotProbed("it computes something else each time")
        return ""

    def check_values(self, parts: Sequence[int]) -> None:
        """Outputs and gradients, in parts and in one."""
        inputs = self.sample(sum(parts))
        self.compare(self.first_order, inputs, self.cotangents(sum(parts)), parts, "")

    def check_single(self, parts: Sequence[int]) -> None:
        """A cotangent for one row moves no other."""
        rows = sum(parts)
        if not self.outputs:
            return
        for row in (0, rows - 1):
            v = {
                name: torch.zeros_like(tensor).index_copy_(
                    self.axis,
                    torch.tensor([row], device=tensor.device),
                    tensor.narrow(self.axis, row, 1),
                )
                for name, tensor in self.cotangents(rows).items()
            }
            self.compare(self.first_order, self.sample(rows), v, parts, f", for a cotangent of row {row} alone")

    def check_strangers(self, parts: Sequence[int]) -> None:
        """What stands in other rows, NaN included, changes nothing."""
        rows = sum(parts)
        inputs, v = self.sample(rows), self.cotangents(rows)
        half = torch.arange(rows, device=self.hosted.device) % 2 == 0
        expected = self.run(self.first_order, inputs, v)
        for value in (1e4, float("nan"), float("inf")):
            strange = {
                record.name: self._with_rows(inputs[record.name], ~half, value, self.is_free(record))
                for record in self.records
            }
            try:
                found = self.run(self.first_order, strange, v)
            except (Fault, RuntimeError):
                # It may refuse such numbers.
                continue
            self.hold(found, expected, self.first_order, inputs, v, f", with {value:g} in other rows", half)

    def check_order(self, parts: Sequence[int]) -> None:
        """Rows in another order come to the same in that order."""
        rows = sum(parts)
        inputs, v = self.sample(rows), self.cotangents(rows)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).to(self.hosted.device)
        found = self.run(self.first_order, self.picked(inputs, order), self.picked(v, order))
        back = {name: tensor.index_select(self.axis, order.argsort()) for name, tensor in found.items()}
        expected = self.run(self.first_order, inputs, v)
        self.hold(back, expected, self.first_order, inputs, v, ", in another order")

    def check_magnitudes(self, parts: Sequence[int]) -> None:
        """Rows of very different sizes, and masks that are full or empty."""
        rows = sum(parts)
        inputs, v = self.sample(rows), self.cotangents(rows)
        scale = torch.tensor([1.0, 1e3, 1e-3])[torch.arange(rows) % 3].to(self.hosted.device)
        for record in self.records:
            tensor = inputs[record.name]
            if tensor.dtype == torch.bool:
                place = self.each(torch.arange(rows, device=tensor.device) % 4, tensor)
                inputs[record.name] = (tensor | (place == 0)) & (place != 1)
            elif self.is_free(record) and differentiable(tensor.dtype):
                inputs[record.name] = tensor * self.each(scale, tensor).to(tensor.dtype)
        self.compare(self.first_order, inputs, v, parts, ", for rows of different sizes")

    def check_second(self, parts: Sequence[int]) -> None:
        """Second derivatives, where there are any."""
        self.compare("hvp", self.sample(sum(parts)), self.cotangents(sum(parts)), parts, "", may_fail=True)

    def check_forward(self, parts: Sequence[int]) -> None:
        """JVPs, where there are any."""
        self.compare("jvp", self.sample(sum(parts)), {}, parts, "", may_fail=True)

    def check_repeated(self, parts: Sequence[int]) -> None:
        """The same row again and again."""
        rows = sum(parts)
        self.compare(self.first_order, self.equal(rows), self.cotangents(rows), parts, f", for {rows} equal rows")

    # What the comparisons are made of.

    @property
    def first_order(self) -> str:
        """The kind of job that gives the outputs, and gradients by inputs where there are any."""
        return "vjp" if self.outputs else "evaluate"

    def is_free(self, record: SpecRecord) -> bool:
        return record.minimum is None and record.maximum is None

    def sample(self, rows: int) -> Tensors:
        """Inputs of so many rows."""
        extents = {name: (*shape[: self.axis], rows, *shape[self.axis + 1 :]) for name, shape in self._extents.items()}
        device = self.hosted.device
        found = sample(
            self.records,
            extents,
            torch.Generator().manual_seed(rows),
            wide=torch.get_default_dtype() == torch.float64,
            cautious=device.type == "cuda",
        )
        return {name: tensor.to(device) for name, tensor in found.items()}

    def equal(self, rows: int) -> Tensors:
        """Inputs of so many equal rows."""
        return self.picked(self.sample(rows), torch.zeros(rows, dtype=torch.long, device=self.hosted.device))

    def cotangents(self, rows: int, outputs: Tensors | None = None) -> Tensors:
        """outputs: those of one row that have cotangents, where they are not those that depend on inputs."""
        generator = torch.Generator().manual_seed(rows + 1)
        found = {}
        for name, row in (self.outputs if outputs is None else outputs).items():
            shape = (*row.shape[: self.axis], rows, *row.shape[self.axis + 1 :])
            found[name] = torch.randn(shape, generator=generator, dtype=_drawn(row.dtype)).to(row.device, row.dtype)
        return found

    def picked(self, named: Tensors, rows: torch.Tensor) -> Tensors:
        """Rows by their index."""
        return {name: tensor.index_select(self.axis, rows) for name, tensor in named.items()}

    def each(self, values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """One value for each row, in the shape that broadcasts with a tensor."""
        shape = [1] * tensor.ndim
        shape[self.axis] = len(values)
        return values.reshape(shape)

    def _with_rows(self, tensor: torch.Tensor, which: torch.Tensor, value: float, free: bool) -> torch.Tensor:
        """A sample with other numbers in some rows."""
        with_value = free and differentiable(tensor.dtype)
        return torch.where(
            self.each(which, tensor), torch.full_like(tensor, value) if with_value else tensor.flip(self.axis), tensor
        )

    def _job(
        self, kind: str, inputs: Tensors, v: Tensors | None = None, t: Tensors | None = None, place: str = "input"
    ) -> tuple[Job, list[torch.Tensor]]:
        job, tensors = job_by_everything(kind, self.hosted, inputs, cotangents=v or {}, tangents=t or {})
        job.wrt = [wrt for wrt in job.wrt if wrt.place == place] if kind != "evaluate" else []
        job.seed = None
        return job, tensors

    def connected(self, inputs: Tensors, place: str) -> Tensors:
        """The outputs that can be differentiated by what is in that place, with the shape of one row."""
        job, tensors = self._job("hvp", inputs, place=place)
        for _ in range(_ATTEMPTS):
            try:
                outputs = attempt(
                    job, self.hosted, lambda: Call(job, self.hosted, tensors), lambda call: call.forward().outputs
                )
            except Again:
                continue
            return {
                name: tensor.detach().narrow(self.axis, 0, 1)
                for name, tensor in outputs.items()
                if tensor.requires_grad and tensor.ndim > self.axis and tensor.shape[self.axis]
            }
        raise NotProbed("the model keeps changing its state")

    def run(self, kind: str, inputs: Tensors, v: Tensors | None = None) -> Tensors:
        """Every tensor of a result, by what it is. Raises Fault and RuntimeError where the model fails."""
        t = {}
        if kind in ("hvp", "jvp"):
            for name, tensor in inputs.items():
                if differentiable(tensor.dtype):
                    # Of the rows' own, whatever part they are in.
                    t[f"input:{name}"] = torch.sin(3 * tensor.to(_drawn(tensor.dtype)) + 1).to(tensor.dtype)
        found = self._computed(*self._job(kind, inputs, v, t))
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

    def by_parameters(self, inputs: Tensors, v: Tensors) -> Tensors:
        """Gradients by parameters. Raises as `run`."""
        job, tensors = self._job("vjp", inputs, v, place="param")
        job.return_outputs = False
        found = self._computed(job, tensors)
        return {
            grad.name.removeprefix("param:"): found.tensors[grad.value.payload]
            for grad in found.outcome.gradients
            if grad.value is not None
        }

    def _computed(self, job: Job, tensors: list[torch.Tensor]) -> EngineResult:
        if clock() > self._deadline:
            raise NotProbed("it takes too long to probe")
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(Again):
                return self._compute(job, self.hosted, tensors)
        raise NotProbed("the model keeps changing its state")

    def compare(
        self, kind: str, inputs: Tensors, v: Tensors, parts: Sequence[int], how: str, *, may_fail: bool = False
    ) -> None:
        """Computes in one and in parts."""
        if kind in ("hvp", "jvp") and not self.outputs:
            return
        try:
            found = self.run(kind, inputs, v)
        except (Fault, RuntimeError) as error:
            if may_fail:
                return
            raise NotProbed(f"its {kind} fails{how}: {error}") from None
        self.hold(found, None, kind, inputs, v, how, parts=parts)

    def cut(self, named: Tensors, start: int, rows: int) -> Tensors:
        """Some rows."""
        return {name: tensor.narrow(self.axis, start, rows).contiguous() for name, tensor in named.items()}

    def _in_parts(self, kind: str, inputs: Tensors, v: Tensors, parts: Sequence[int]) -> Tensors:
        pieces: list[Tensors] = []
        start = 0
        for rows in parts:
            pieces.append(self.run(kind, self.cut(inputs, start, rows), self.cut(v, start, rows)))
            start += rows
        return {name: torch.cat([piece[name] for piece in pieces], self.axis) for name in pieces[0]}

    def hold(
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
            return self._in_parts(kind, inputs, v, parts) if parts else self.run(kind, inputs, v)

        if expected is None:
            try:
                expected = again(inputs)
            except (Fault, RuntimeError) as error:
                if 1 not in parts:
                    raise NotProbed(f"rows that are computed together fail in parts: {error}") from None
                # A model that normalises by its rows refuses to do so with one.
                self.hold(found, None, kind, inputs, v, how, parts=(parts[0] + parts[1], *parts[2:]))
                raise NotProbed(f"a row alone fails: {error}") from None
        rows = next(iter(inputs.values())).shape[self.axis]
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
                moved = self._gaps(nudged[name], alone)
                # A row that happens to stay where it is may be one of a model that takes most of them far.
                usual = statistics.median(gap / size if size else 0.0 for gap, size in zip(moved, sizes, strict=True))
                if not gaps[row] <= _AMPLIFIED * max(moved[row], usual * sizes[row]):
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
        rows = tensor.movedim(self.axis, 0).reshape(tensor.shape[self.axis], -1)
        return [math.inf if norm != norm else norm for norm in torch.linalg.vector_norm(rows, dim=1).tolist()]

    def seconds_of(self, rows: int) -> float:
        """What a gradient (or, where there is none, the outputs) of so many rows takes. Raises Fault, RuntimeError."""
        inputs, v = self.sample(rows), self.cotangents(rows)
        begin = time.perf_counter()
        self.run(self.first_order, inputs, v)
        if self.hosted.device.type == "cuda":
            torch.cuda.current_stream(self.hosted.device).synchronize()
        return time.perf_counter() - begin

    def bytes_of_row(self) -> int:
        """Bytes of the inputs of one row."""
        return sum(tensor.nbytes for tensor in self.sample(1).values())

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
