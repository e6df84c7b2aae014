"""Whether the rows of a model are independent of each other, found out when it loads.

Only then may several callers' rows go through it together. Samples are computed in parts and in one, in double
precision where the model can be copied to that, and must come to the same: outputs and derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.row_trials import Dependent, NotProbed, RowTrial, clock
from pullback_server.engine.samples import choices, shapes
from pullback_server.engine.trial import Compute
from pullback_server.faults import Fault, listed
from pullback_server.hosting.loading import LoadError
from pullback_server.job import SpecRecord

#: Seconds after which nothing more is tried, and after which what is tried must have shown it.
_ENOUGH, _BUDGET = 2.0, 5.0
#: Seconds for the forward of one row, beyond which less is tried.
_SLOW = 4e-3
#: Rows of the parts that are computed alone; of a slow model.
_PARTS, _FEW_PARTS = (1, 2, 3, 5), (1, 2)


def probe_rows(hosted: HostedModel, compute: Compute) -> tuple[str, RowTrial]:
    """Finds out which inputs have the batch axis, where all rows are independent.

    Returns how that is known, and samples with which the model runs.

    Raises NotProbed where it cannot be found out; LoadError where rows depend on each other.
    """
    begin = clock()
    names, alone = _batched(hosted)
    variants = [[record for record in records if record.name in names] for records in choices(hosted)]
    if not variants:
        raise NotProbed("not every input declares its shape")
    if len(variants) > 1 and variants[0] == variants[1]:
        variants.pop()
    try:
        trials = [_probe(hosted, compute, records, begin) for records in variants]
    except Dependent as error:
        raise LoadError(
            f"{hosted.owner} declares batch_axis={hosted.registration.batch_axis}, but its rows depend on each other: "
            f"{error}; leave batch_axis out"
        ) from None
    except (Fault, RuntimeError) as error:
        raise NotProbed(str(error)) from None
    hosted.batched_inputs = names
    exceptions = f"; what gives {listed(alone)} is computed alone" if alone else ""
    return f"probed at load: its rows are independent{exceptions}", trials[0]


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
    if trial.hosted.orders.reverse != -1:
        trial.check_second(parts)
        trial.check_forward(parts)
        trial.check_magnitudes(parts)
        trial.check_repeated(parts)
        return
    # What was shown so far holds for every derivative of torch's own operations. (The first JVP of a process takes a
    # second, in which torch compiles what it needs for that.)
    for check in (trial.check_magnitudes, trial.check_repeated, trial.check_second):
        if clock() < enough:
            check(parts)


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
