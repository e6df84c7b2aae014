"""The shapes of a model's outputs, learned when it loads: in terms of the free extents of its inputs.

Its forward is run with one extent after the other at several values, and then with all of them different; `shape_fit`
says what that allows to be told. Where values decide, nothing is told: where the code looks at numbers (`item`, a
branch), or other numbers gave other shapes. Where it only makes tensors whose extents depend on values (`nonzero`, a
mask as an index), scalars are told alone. What is told is for callers, and the server itself makes no use of it: a call
whose outputs have other shapes is answered.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pullback_server.engine._dtypes import TORCH
from pullback_server.engine.call import Again, Call
from pullback_server.engine.guards import Ambience, plain_kernels
from pullback_server.engine.hosted import HostedModel, copied
from pullback_server.engine.probe import Ground
from pullback_server.engine.samples import sampled
from pullback_server.engine.shape_fit import Claim, Point, common, fit
from pullback_server.engine.trial import Tensors, job_by_everything
from pullback_server.job import SpecRecord

#: Seconds of computing (not by the clock: a busy machine would tell less) for a model, and of one forward; slower ones
#: are left alone. By the clock it is over after so many.
_BUDGET, _SLOW, _PATIENCE = 1.0, 0.5, 5.0
#: Values of an extent: 1 (which squeeze() and broadcasting treat in their own way) and a few more; where fewer than two
#: of these suit the model besides what it was probed with, the next; and far ones, where cuts and strides would show.
_NEAR, _EVEN, _FAR = (1, 2, 3, 5), (4, 8, 16), (17, 67, 521, 4099)
#: Values of all extents together, in turn, until one suits the model.
_TOGETHER = ((7, 11, 13, 17, 19, 23), (8, 16, 32, 64, 4, 2), (6, 10, 4, 14, 12, 18))
#: Far extents must come to no more elements of inputs, of the largest tensor, and seconds; by how it grew before.
_MOST_GIVEN, _MOST, _LONG = 1 << 18, 1 << 20, 0.1
#: So many optional inputs are tried one by one.
_SINGLES = 8
#: Operations whose results' extents depend on values, although torch does not say so.
_PACKING = (torch.ops.aten._pack_padded_sequence.default, torch.ops.aten._pad_packed_sequence.default)
#: Bytes of a model on another device of which a copy is made for this on the CPU.
_COPIED = 1 << 28


class _Unknown(Exception):
    """Nothing is told."""


@dataclass(frozen=True)
class _Seen:
    """A forward: what it returned (dtypes and shapes by name), its seconds, and its largest tensor's elements."""

    outputs: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    seconds: float
    largest: int


def learn_shapes(hosted: HostedModel, ground: Ground) -> None:
    """Fills in the shapes of a model's outputs where they can be told; a dtype that varies becomes any."""
    records = hosted.input_records()
    if not ground.variants:
        return
    if any(record.optional and record.shape is None for record in records):
        # What these would do is not known.
        return
    try:
        # A warning about made-up numbers is nobody's, and one that was shown would not be shown to whom it concerns.
        with warnings.catch_warnings(action="ignore"):
            found = _Learner(_at_hand(hosted), ground)()
    except _Unknown:
        return
    if list(found) == [output.name for output in hosted.outputs]:
        hosted.outputs = [
            SpecRecord(output.name, output.dtype if found[output.name][0] else 0, found[output.name][1])
            for output in hosted.outputs
        ]


def _at_hand(hosted: HostedModel) -> HostedModel:
    """The model on the CPU: an index out of range, as an extent may make it, costs a CUDA device's context.

    Raises _Unknown where that is too much.
    """
    if hosted.device.type == "cpu":
        return hosted
    if hosted.memory > _COPIED:
        raise _Unknown
    cpu = torch.device("cpu")
    try:
        target = hosted.code if hosted.module is None else copied(hosted.module, lambda tensor: tensor.to(cpu))
        twin = HostedModel(hosted.registration, target, cpu)
    # A model's own copying may raise anything.
    except Exception as error:
        raise _Unknown from error
    twin.natural = hosted.natural
    return twin


class _Learner:
    """Runs a model until it has seen enough. Its calls raise _Unknown."""

    def __init__(self, hosted: HostedModel, ground: Ground) -> None:
        self._hosted = hosted
        self._variants = ground.variants
        self._begin = time.process_time(), time.monotonic()
        self._number = 0
        self._names: list[str] | None = None
        self._dtypes: dict[str, set[torch.dtype]] = {}
        #: Whether extents within the model depend on values.
        self._selects = False

    def __call__(self) -> dict[str, tuple[bool, Claim | None]]:
        """For each output whether it had one dtype, and its shape."""
        *others, (records, shapes) = self._variants
        points = self._all_points(records, _sizes(records, shapes), thorough=True)
        claims = {name: fit(seen) for name, seen in points.items()}
        for some, their_shapes in [*others, *self._alone(records, shapes)]:
            points = self._all_points(some, _sizes(some, their_shapes), thorough=False)
            claims = {name: common(claims[name], fit(seen)) for name, seen in points.items()}
        if self._selects:
            claims = {name: claim if claim == () else None for name, claim in claims.items()}
        return {name: (len(self._dtypes[name]) == 1, claim) for name, claim in claims.items()}

    def _alone(
        self, records: Sequence[SpecRecord], shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[list[SpecRecord], dict[str, tuple[int, ...]]]]:
        """Each optional input without the others, where the probe has not tried that."""
        optional = [record for record in records if record.optional]
        if len(optional) > _SINGLES:
            raise _Unknown
        if len(optional) < 2 or len(self._variants) > 2:
            return
        for one in optional:
            some = [record for record in records if not record.optional or record is one]
            if self._run(some, _sizes(some, shapes), self._random(some, _sizes(some, shapes))) is not None:
                yield some, {record.name: shapes[record.name] for record in some}

    def _all_points(
        self, records: Sequence[SpecRecord], base: Mapping[str, int], thorough: bool
    ) -> dict[str, list[Point]]:
        """Of each output. thorough: with far extents."""
        found: list[tuple[Mapping[str, int], _Seen]] = []

        def note(sizes: Mapping[str, int], seen: _Seen | None) -> _Seen | None:
            if seen is not None:
                found.append((sizes, seen))
            return seen

        first = note(base, self._run(records, base, self._random(records, base)))
        if first is None:
            raise _Unknown
        for inputs in self._other_values(records, base):
            note(base, self._run(records, base, inputs))
        for name in base:
            seen = {base[name]: first}
            for value in (*_NEAR, *_EVEN):
                enough = len(seen.keys() - {1, base[name]}) >= 2
                if value in seen or (enough and value in _EVEN):
                    continue
                sizes = {**base, name: value}
                if one := note(sizes, self._run(records, sizes, self._random(records, sizes))):
                    seen[value] = one
            if len(seen.keys() - {1, base[name]}) < 2:
                raise _Unknown
            for value in _FAR if thorough else ():
                sizes = {**base, name: value}
                if value in seen or not self._affords(records, sizes, seen, value):
                    break
                one = note(sizes, self._run(records, sizes, self._random(records, sizes)))
                if one is None:
                    break
                seen[value] = one
        if base and not any(
            note(sizes, self._run(records, sizes, self._random(records, sizes))) for sizes in _together(base)
        ):
            raise _Unknown
        return {name: [(sizes, one.outputs[name][1]) for sizes, one in found] for name in first.outputs}

    def _affords(
        self, records: Sequence[SpecRecord], sizes: Mapping[str, int], seen: Mapping[int, _Seen], value: int
    ) -> bool:
        """Whether a farther extent takes little, if all grows as it did from the last but one to the last."""
        given = sum(math.prod(shape) for shape in _shapes(records, sizes).values())
        before, last = sorted(seen)[-2:]
        if given > _MOST_GIVEN or self._is_late():
            return False

        def expected(old: float, new: float) -> float:
            exponent = max(math.log(max(new, 1e-9) / max(old, 1e-9)) / math.log(last / before), 1.0)
            return new * math.exp(min(exponent, 50.0) * math.log(value / last))

        return (
            expected(seen[before].largest, seen[last].largest) <= _MOST
            and expected(seen[before].seconds, seen[last].seconds) <= _LONG
        )

    def _is_late(self) -> bool:
        computing, clock = self._begin
        return time.process_time() - computing > _BUDGET or time.monotonic() - clock > _PATIENCE

    def _random(self, records: Sequence[SpecRecord], sizes: Mapping[str, int]) -> Tensors:
        self._number += 1
        return sampled(records, _shapes(records, sizes), self._number)

    def _other_values(self, records: Sequence[SpecRecord], sizes: Mapping[str, int]) -> Iterator[Tensors]:
        """Further numbers, also the extreme ones; then other dtypes, where the model takes any."""
        shapes = _shapes(records, sizes)
        yield self._random(records, sizes)
        for high in (False, True):
            yield {record.name: _even(record, shapes[record.name], high) for record in records}
        if any(record.dtype == 0 for record in records):
            inputs = self._random(records, sizes)
            for dtype in (torch.float64, torch.int64):
                yield {r.name: inputs[r.name] if r.dtype else inputs[r.name].to(dtype) for r in records}

    def _run(self, records: Sequence[SpecRecord], sizes: Mapping[str, int], inputs: Tensors) -> _Seen | None:
        """What a forward returned; None where it raised."""
        if self._is_late():
            raise _Unknown
        hosted = self._hosted
        job, tensors = job_by_everything("evaluate", hosted, inputs)
        job.wrt = []
        for _ in range(4):
            hosted.watch_parameters(False)
            watch = _Watch()
            try:
                with Ambience(), plain_kernels(), Call(job, hosted, tensors) as call, watch:
                    begin = time.process_time()
                    outputs = call.forward().outputs
                    seconds = time.process_time() - begin
                    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in outputs.items()}
            except Again:
                continue
            # The model's own code runs at extents that nobody promised to suit it.
            except Exception:
                return None
            finally:
                hosted.restore_state()
                if hosted.spoilt:
                    raise _Unknown
            if watch.looks or seconds > _SLOW:
                raise _Unknown
            self._selects = self._selects or watch.selects
            self._note(found)
            return _Seen(found, seconds, watch.largest)
        return None

    def _note(self, outputs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        if self._names is None:
            self._names = list(outputs)
        if list(outputs) != self._names:
            raise _Unknown
        for name, (dtype, _) in outputs.items():
            self._dtypes.setdefault(name, set()).add(dtype)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what depends on the values of tensors besides values, and how large tensors become.

    looks: numbers were looked at; selects: extents of tensors depend on them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.looks = self.selects = False
        self.largest = 1

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled meanwhile (plain_kernels); to make sure of it torch would import its compiler: seconds.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tags = func.tags
        if torch.Tag.data_dependent_output in tags:
            self.looks = True
        elif torch.Tag.dynamic_output_shape in tags or func in _PACKING:
            self.selects = self.selects or func is not torch.ops.aten.index.Tensor or _masks(args[1])
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return found


def _masks(indices: Iterable[torch.Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _sizes(records: Sequence[SpecRecord], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The free extents of these shapes, by name."""
    return {
        extent: size
        for record in records
        for extent, size in zip(record.shape or (), shapes[record.name], strict=True)
        if isinstance(extent, str)
    }


def _shapes(records: Sequence[SpecRecord], sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    return {record.name: tuple(sizes[e] if isinstance(e, str) else e for e in record.shape or ()) for record in records}


def _together(base: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Extents that are all different, where there are not too many."""
    for values in _TOGETHER:
        more = [*values, *range(max(values) + 1, max(values) + 1 + len(base))]
        yield dict(zip(base, more, strict=False))


def _even(record: SpecRecord, shape: tuple[int, ...], high: bool) -> torch.Tensor:
    """All elements the same: the lowest or the highest of the bounds, else 0 or 1."""
    dtype = TORCH.get(record.dtype, torch.float32)
    low, top = record.minimum, record.maximum
    value = 1.0 if high else 0.0
    if high and top is not None:
        value = top
    elif not high and low is not None:
        value = low
    else:
        value = min(max(value, low if low is not None else value), top if top is not None else value)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.full(shape, value).to(dtype)
    value = math.floor(value) if high else math.ceil(value)
    return torch.full(shape, value, dtype=torch.int64).to(dtype)
