"""Whether the rows of a model are independent of each other, found out when it loads.

Only then may several callers' rows go through it together. Samples are computed in parts and in one, in double
precision where the model can be copied to that, and must come to the same: outputs and derivatives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from pullback_server.engine._dtypes import differentiable
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.row_trials import Dependent, NotProbed, RowTrial, clock
from pullback_server.engine.samples import choices, shapes
from pullback_server.engine.trial import Compute, Tensors
from pullback_server.faults import Fault, listed
from pullback_server.hosting.loading import LoadError
from pullback_server.job import SpecRecord

#: Seconds after which nothing more is tried, and after which what is tried must have shown it.
_ENOUGH, _BUDGET = 2.0, 5.0
#: Seconds for the forward of one row, beyond which less is tried.
_SLOW = 4e-3
#: Rows of the parts that are computed alone; of a slow model.
_PARTS, _FEW_PARTS = (1, 2, 3, 5), (1, 2)
#: Rows that are compared with the same in two parts, at most; and the seconds that may be expected to take.
_MANY, _MANY_SECONDS = 64, 0.2
#: How far a sum of gradients over parts may be from that over all rows, relative to the norms of the parts.
_SUMS = {1: 5e-2, 2: 5e-2, 4: 1e-3, 8: 1e-6}


class RowsDepend(LoadError):
    """Rows of a declared batch axis depend on each other. how: in what."""

    def __init__(self, message: str, how: str) -> None:
        super().__init__(message)
        self.how = how


def probe_rows(hosted: HostedModel, compute: Compute) -> tuple[str, RowTrial]:
    """Finds out which inputs have the batch axis, where all rows are independent.

    Returns how that is known, and samples with which the model runs.

    Raises NotProbed where it cannot be found out; RowsDepend where rows depend on each other.
    """
    begin = clock()
    names, alone = _batched(hosted)
    variants = [[record for record in records if record.name in names] for records in choices(hosted)]
    if not variants:
        raise NotProbed("not every input declares its shape")
    if len(variants) > 1 and variants[0] == variants[1]:
        variants.pop()
    try:
        with refusing(hosted):
            trials = [_probe(hosted, compute, records, begin) for records in variants]
    except (Fault, RuntimeError) as error:
        raise NotProbed(str(error)) from None
    for trial in trials:
        trial.allow(clock() + _BUDGET)
    apart = next(filter(None, map(_not_additive, trials)), "")
    hosted.additive = not apart
    hosted.batched_inputs = names
    exceptions = f"; what gives {listed(alone)} is computed alone" if alone else ""
    if apart:
        exceptions += f"; gradients by parameters are always computed in one: {apart}"
    return f"probed at load: its rows are independent{exceptions}", trials[0]


@contextlib.contextmanager
def refusing(hosted: HostedModel) -> Iterator[None]:
    """Raises RowsDepend where rows turn out to depend on each other."""
    try:
        yield
    except Dependent as error:
        raise RowsDepend(
            f"{hosted.owner} declares batch_axis={hosted.registration.batch_axis}, but its rows depend on each other: "
            f"{error}; leave batch_axis out",
            str(error),
        ) from None


def check_many(trial: RowTrial, rows: int) -> None:
    """As many rows as one computation may have, as far as that is quick. Raises Dependent."""
    rows = min(rows, _MANY)
    while rows > 1 and rows * trial.seconds * 20 > _MANY_SECONDS:
        rows //= 2
    if rows < 2 or (rows <= sum(_PARTS) and trial.seconds <= _SLOW):
        return
    trial.allow(clock() + 2 * _MANY_SECONDS)
    half = (rows // 2, rows - rows // 2)
    with contextlib.suppress(NotProbed):
        for parts in (half, (1, rows - 1)):
            trial.compare(trial.first_order, trial.sample(rows), trial.cotangents(rows), parts, f", of {rows}")
        trial.check_repeated(half)


def _batched(hosted: HostedModel) -> tuple[frozenset[str], list[str]]:
    """The inputs that have the batch axis, and the others, none of which must be given. Raises NotProbed."""
    axis = hosted.registration.batch_axis
    assert axis is not None
    records = hosted.input_records()
    extents = [record.shape[axis] for record in records if record.shape is not None and len(record.shape) > axis]
    symbol = next((extent for extent in extents if isinstance(extent, str)), None)
    if symbol is None:
        raise NotProbed(f"no input declares a named extent at the axis {axis}")
    names = {
        record.name
        for record in records
        if record.shape is not None and record.shape.count(symbol) == 1 and record.shape.index(symbol) == axis
    }
    others = [record for record in records if record.name not in names]
    for record in others:
        if not record.optional:
            raise NotProbed(f"the input {record.name!r} does not declare {symbol!r} as its axis {axis}, and only there")
    return frozenset(names), [record.name for record in others]


def _probe(hosted: HostedModel, compute: Compute, records: list[SpecRecord], begin: float) -> RowTrial:
    """Raises Dependent, NotProbed."""
    axis = hosted.registration.batch_axis
    assert axis is not None
    enough, deadline = begin + _ENOUGH, begin + _BUDGET
    failure = "no free extents fit"
    for extents in shapes(records):
        own = RowTrial(hosted, compute, records, extents, axis, deadline)
        failure = own.explore(sum(_PARTS), _FEW_PARTS)
        if not failure:
            break
    else:
        raise NotProbed(f"no sample input made the model run ({failure})")
    slow = own.seconds > _SLOW
    parts = _FEW_PARTS if slow or not own.fits else _PARTS
    wide = None if slow or own.is_wide else _widened(own)
    dtype = torch.get_default_dtype()
    if wide is not None:
        torch.set_default_dtype(torch.float64)
        try:
            _check(wide, parts, enough)
        finally:
            torch.set_default_dtype(dtype)
        # In its own precision it may go another way.
        own.check_values(_FEW_PARTS)
        own.check_strangers(_FEW_PARTS)
    else:
        _check(own, parts, enough)
    return own


def _check(trial: RowTrial, parts: Sequence[int], enough: float) -> None:
    trial.check_values(parts)
    trial.check_single(parts)
    trial.check_strangers(parts)
    trial.check_order(parts)
    for check in (_check_cotangents, _check_bounds, _check_integers):
        if clock() < enough:
            check(trial, parts)
    if trial.hosted.orders.reverse != -1:
        trial.check_second(parts)
        trial.check_forward(parts)
        trial.check_magnitudes(parts)
        trial.check_repeated(parts)
        return
    # What was shown so far holds for every derivative of torch's own operations. (The first JVP of a process takes a
    # second, in which torch compiles what it needs for that.)
    for further in (trial.check_magnitudes, trial.check_repeated, trial.check_second):
        if clock() < enough:
            further(parts)


def _strange(trial: RowTrial, rows: int) -> tuple[Tensors, Tensors, torch.Tensor, Tensors]:
    """A sample, cotangents, which rows are to stay as they are, and what the sample comes to."""
    inputs, v = trial.sample(rows), trial.cotangents(rows)
    half = torch.arange(rows, device=trial.hosted.device) % 2 == 0
    return inputs, v, half, trial.run(trial.first_order, inputs, v)


def _check_cotangents(trial: RowTrial, parts: Sequence[int]) -> None:
    """What other rows are pulled back with changes nothing."""
    if not trial.outputs:
        return
    inputs, v, half, expected = _strange(trial, sum(parts))
    for value in (1e6, 1e-6, float("nan")):
        strange = {name: torch.where(trial.each(half, own), own, own * value) for name, own in v.items()}
        try:
            found = trial.run("vjp", inputs, strange)
        except (Fault, RuntimeError):
            # It may refuse such numbers.
            continue
        trial.hold(found, expected, "vjp", inputs, v, f", with cotangents times {value:g} in other rows", half)


def _check_bounds(trial: RowTrial, parts: Sequence[int]) -> None:
    """A declared bound itself in other rows changes nothing. Samples keep away from bounds."""
    bounds = ("minimum", "maximum")
    if all(getattr(record, end) is None for record in trial.records for end in bounds):
        return
    inputs, v, half, expected = _strange(trial, sum(parts))
    for end in bounds:
        strange = dict(inputs)
        try:
            for record in trial.records:
                bound, own = getattr(record, end), inputs[record.name]
                if bound is not None:
                    strange[record.name] = torch.where(trial.each(half, own), own, torch.full_like(own, bound))
            found = trial.run(trial.first_order, strange, v)
        except (Fault, RuntimeError):
            continue
        trial.hold(found, expected, trial.first_order, inputs, v, f", with the {end} in other rows", half)


def _check_integers(trial: RowTrial, parts: Sequence[int]) -> None:
    """Integers of which nothing is declared: others than 0 and 1, where the model takes them."""
    # An index out of range would cost a CUDA device's context.
    if trial.hosted.device.type != "cpu":
        return
    rows = sum(parts)
    inputs, v = trial.sample(rows), trial.cotangents(rows)
    free = [
        inputs[record.name]
        for record in trial.records
        if record.maximum is None and not differentiable(inputs[record.name].dtype)
    ]
    free = [tensor for tensor in free if tensor.dtype != torch.bool]
    if not free:
        return
    generator = torch.Generator().manual_seed(rows)
    for most in sorted({2, 3, *trial.extents} - {0, 1}):
        for tensor in free:
            tensor.copy_(torch.randint(0, most + 1, tensor.shape, generator=generator))
        try:
            trial.run(trial.first_order, inputs, v)
        except (Fault, RuntimeError):
            return
        with contextlib.suppress(NotProbed):
            trial.compare(trial.first_order, inputs, v, parts, ", for other integers")


def _not_additive(trial: RowTrial) -> str:
    """Why gradients by parameters are not known to be sums over any parts of the rows; empty: they are.

    In the model as it is: a copy has none of the hooks of its parameters.
    """
    if not trial.hosted.parameters:
        return ""
    slow = trial.seconds > _SLOW or not trial.fits
    parts = _FEW_PARTS if slow else _PARTS[:3]
    rows = sum(parts)
    try:
        outputs = trial.connected(trial.sample(rows), "param")
        if not outputs:
            return ""
        # Large ones for what clips, equal rows for what counts them.
        ways = [(trial.sample(rows), 1.0), (trial.equal(rows), 1e4)]
        if not slow:
            ways.append((trial.sample(rows), 1e4))
        for inputs, scale in ways:
            v = {name: tensor * scale for name, tensor in trial.cotangents(rows, outputs).items()}
            if why := _summed_apart(trial, inputs, v, parts, scale):
                return why
    except (NotProbed, Fault, RuntimeError) as error:
        return f"it is not known whether they are sums over rows ({error})"
    return ""


def _summed_apart(trial: RowTrial, inputs: Tensors, v: Tensors, parts: Sequence[int], scale: float) -> str:
    whole = {name: _wide(tensor) for name, tensor in trial.by_parameters(inputs, v).items()}
    sums = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    sizes = dict.fromkeys(whole, 0.0)
    start = 0
    for rows in parts:
        pieces = trial.by_parameters(trial.cut(inputs, start, rows), trial.cut(v, start, rows))
        for name, piece in pieces.items():
            if name not in whole:
                return f"that by {name!r} is none for {sum(parts)} rows, and one for {rows}"
            sums[name] += _wide(piece)
            sizes[name] += _size(_wide(piece))
        start += rows
    largest = max(sizes.values(), default=0.0)
    for name, found in whole.items():
        finite = found.isfinite()
        if scale == 1 and not bool(finite.any()):
            return f"that by {name!r} is not finite for a sample"
        if not torch.equal(finite, sums[name].isfinite()):
            return f"that by {name!r} is finite for some rows, and not for all"
        gap = _size(torch.where(finite, found - sums[name], 0))
        # What is nothing next to the others may be nothing but rounding.
        if not gap <= _SUMS[trial.width] * (sizes[name] + 1e-3 * largest):
            return f"that by {name!r} differs by {gap:.3g} from the sum over parts, which is of size {sizes[name]:.3g}"
    return ""


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In single precision at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _size(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(torch.where(tensor.isfinite(), tensor, 0)))


def _widened(own: RowTrial) -> RowTrial | None:
    """The trial in double precision; None where the model has none, or computes in single precision all the same."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        twin = own.hosted.widened()
        twin.probing = True
        twin.orders = own.hosted.orders
        twin.forward_mode, twin.no_jvp = own.hosted.forward_mode, own.hosted.no_jvp
        trial = own.like(twin)
        return trial if not trial.explore(sum(_PARTS), _FEW_PARTS) and trial.is_wide else None
    # A model's own copying may raise anything.
    except Exception:
        return None
    finally:
        torch.set_default_dtype(dtype)
