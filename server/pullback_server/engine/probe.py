"""Which derivatives of a model can be promised, found out when it loads.

A graph of torch's own operations has every order. Where code of the model's own runs in the backward, its second
derivative is compared, in double precision and at random points, with finite differences of its VJP: along each input,
the parameters and the cotangent separately, so that no part hides behind another.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from pullback_server.engine._dtypes import WIRE
from pullback_server.engine.call import Again, Call, WritesInputs
from pullback_server.engine.guards import Ambience, plain_kernels
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.samples import choices, sample, shapes
from pullback_server.engine.trial import TRIES, Compute, Failed, Trial, job_by_everything
from pullback_server.engine.tripwire import HOOK, has_hooks, is_foreign, key_of, nodes, title
from pullback_server.faults import Fault
from pullback_server.job import OrdersRecord, SpecRecord

#: Seconds after which a probe gives up.
_BUDGET = 30.0


def probe(hosted: HostedModel, compute: Compute) -> None:
    """Fills in the model's orders, what is proven of it, and its outputs as far as they can be known."""
    if not choices(hosted):
        hosted.orders = _unprobed(hosted)
        return
    found: list[tuple[list[SpecRecord], dict[str, tuple[int, ...]]]] = []
    foreign: dict[Any, str] = {}
    for records in choices(hosted):
        try:
            found.append((records, _explore(hosted, records, foreign)))
        except Failed as failure:
            hosted.orders = OrdersRecord(1, False, f"not probed: no sample input made the model run ({failure})")
            return
    if not foreign:
        hosted.orders = OrdersRecord(-1, True, "probed at load: its graph holds operations of torch alone")
        return
    names = ", ".join(sorted(foreign.values()))
    begin = time.monotonic()
    try:
        twin = hosted.widened()
    except Exception as error:
        hosted.orders = OrdersRecord(
            1, False, f"its backward runs {names}, and it cannot be copied to probe it: {error}"
        )
        return
    twin.probing = True
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        trial = Trial(twin, compute, begin + _BUDGET)
        trials = [(records, extents, number) for records, extents in found for number in range(TRIES)]
        forward, why_not = trial.check_forward(found)
        hosted.forward_mode, hosted.no_jvp = twin.forward_mode, why_not
        trial.check_second(trials, len(found))
        proven = set(twin.seen)
        if not foreign.keys() <= proven:
            torch.set_default_dtype(dtype)
            proven |= trial.check_narrow(hosted, found)
    except Failed as failure:
        hosted.orders = OrdersRecord(
            1, forward, f"its backward runs {names}, and the probe at load failed: {failure}{why_not}"
        )
    else:
        hosted.proven = proven
        hosted.honest = trial.honest
        hosted.orders = OrdersRecord(
            2,
            forward,
            f"probed at load: its backward runs {names}, whose derivative agrees with finite differences"
            + (
                ""
                if trial.honest
                else "; it is not the derivative of its forward, so with a loss there is order 1 only"
            )
            + why_not,
        )
    finally:
        torch.set_default_dtype(dtype)


def _unprobed(hosted: HostedModel) -> OrdersRecord:
    if hosted.stock:
        return OrdersRecord(-1, True, "it consists of torch's own modules alone")
    return OrdersRecord(
        1,
        False,
        "not probed at load, for not every input declares its shape; instead the graph of every call "
        "is looked at: one that holds operations of torch alone has every order",
    )


def _explore(hosted: HostedModel, records: list[SpecRecord], foreign: dict[Any, str]) -> dict[str, tuple[int, ...]]:
    """Finds extents with which the model runs; notes its outputs, and what in its graph is not torch's."""
    failure = "no free extents fit"
    for extents in shapes(records):
        inputs = sample(records, extents, torch.Generator().manual_seed(0), cautious=hosted.device.type == "cuda")
        hosted.watch_parameters(False)
        try:
            job, tensors = job_by_everything("evaluate", hosted, inputs)
            tensors = [tensor.to(hosted.device) for tensor in tensors]
            with Ambience(), plain_kernels(), Call(job, hosted, tensors) as call:
                fw = call.forward(watch=True)
                hosted.outputs = [SpecRecord(name, WIRE.get(tensor.dtype, 0)) for name, tensor in fw.outputs.items()]
                for node in nodes(fw.outputs.values()):
                    if is_foreign(node):
                        foreign[key_of(node)] = title(node)
                if fw.witness.hooks or hosted.hooked or any(map(has_hooks, nodes(fw.outputs.values()))):
                    foreign[HOOK] = "a hook"
                return extents
        except (Fault, WritesInputs, Again) as error:
            failure = str(error)
        except RuntimeError as error:
            failure = f"{type(error).__name__}: {error}"
        finally:
            hosted.restore_state()
    raise Failed(failure)
