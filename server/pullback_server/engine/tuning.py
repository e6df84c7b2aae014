"""How many rows are best computed in one, found out when a model loads."""

from __future__ import annotations

from pullback_server.engine.call import out_of_memory
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.row_trials import NotProbed, RowTrial, clock
from pullback_server.engine.rows import check_many, probe_rows, refusing
from pullback_server.engine.trial import Compute
from pullback_server.faults import Fault
from pullback_server.hosting.loading import LoadError
from pullback_server.job import BatchRecord

#: More rows than this are not tried.
_MOST = 1024
#: Seconds for all timings.
_BUDGET = 1.0
#: What makes more rows better: this much more of them in a second. Patience: so many doublings without that.
_GAIN, _PATIENCE = 1.1, 2
_REPEATED = 3
#: A computation of several rows takes so many seconds at most, or so many times as long as one row: whoever comes
#: next waits for it.
_LONGEST, _STRETCH = 0.01, 4


def settle_batching(hosted: HostedModel, compute: Compute) -> None:
    """Finds out how requests for a model may be merged. Raises LoadError where its batch axis is none."""
    registration = hosted.registration
    options, batching = registration.options, registration.options.batching
    if registration.batch_axis is None:
        return
    if not batching.enabled and options.micro_batch is None:
        hosted.batch = BatchRecord(evidence="batching is switched off")
        return
    try:
        evidence, trial = probe_rows(hosted, compute)
    except NotProbed as error:
        if options.micro_batch is not None:
            raise LoadError(
                f"{hosted.owner} has micro_batch={options.micro_batch}, but it is not known whether its rows are "
                f"independent: {error}"
            ) from None
        hosted.batch = BatchRecord(evidence=f"not known whether its rows are independent: {error}")
        return
    rows, most = batching.max_rows, options.micro_batch
    if not batching.enabled:
        with refusing(hosted):
            check_many(trial, _MOST)
        hosted.batch = BatchRecord(evidence=f"batching is switched off; {evidence}")
        return
    if rows is None:
        rows, gain = best_rows(trial, batching.max_bytes, most or _MOST)
        what = f"{rows} rows are computed {gain:.1f} times as fast as one by one" if rows > 1 else "one row is best"
        evidence = f"{evidence}; {what}"
    with refusing(hosted):
        check_many(trial, rows)
    names = sorted(hosted.batched_inputs)
    hosted.batch = BatchRecord(min(rows, most or rows), batching.max_bytes, batching.max_delay, evidence, names)


def best_rows(trial: RowTrial, max_bytes: int, most: int = _MOST) -> tuple[int, float]:
    """The rows (`most` at most) with the most rows a second, and how many times as many that is as of one row."""
    begin = clock()
    trial.allow(begin + _BUDGET)
    bytes_of_row = trial.bytes_of_row()
    found: dict[int, float] = {}
    best, rows = 1, 1
    while rows <= min(most, _MOST) and (rows == 1 or rows * bytes_of_row <= max_bytes):
        try:
            seconds = trial.seconds_of(rows)
            for _ in range(_REPEATED if seconds < _BUDGET / 30 else 1):
                seconds = min(seconds, trial.seconds_of(rows))
        except NotProbed:
            break
        except (Fault, RuntimeError, MemoryError) as error:
            if not isinstance(error, Fault) and not out_of_memory(error):
                raise
            break
        if rows > 1 and seconds > max(_LONGEST, _STRETCH / found[1]):
            break
        found[rows] = rows / seconds
        if found[rows] > _GAIN * found[best] or rows == 1:
            best = rows
        elif rows >= best << _PATIENCE:
            break
        # The next takes twice as long, several times.
        if clock() - begin + 2 * seconds > _BUDGET:
            break
        rows *= 2
    # Timings are noisy, and a larger batch makes everybody in it wait longer: the smallest that is nearly as good.
    best = min((rows for rows in found if found[rows] * _GAIN >= found[best]), default=1)
    return best, (found[best] / found[1] if found else 1.0)
