"""Which derivatives of a model can be promised, found out when it loads.

A graph of torch's own operations has every order. Where code of the model's own runs in the backward, its second
derivative is compared, in double precision and at random points, with finite differences of its VJP: along each input,
the parameters and the cotangent separately, so that no part hides behind another.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from pullback_server.engine._dtypes import WIRE
from pullback_server.engine.call import Again, Call, WritesInputs
from pullback_server.engine.guards import Ambience, plain_kernels
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.order_trial import OrderTrial
from pullback_server.engine.samples import choices, sample, shapes, singles
from pullback_server.engine.trial import Compute, Extents, Failed, Variant, double_precision, job_by_everything
from pullback_server.engine.tripwire import (
    HOOK,
    has_hooks,
    is_foreign,
    key_of,
    lacks_adjoint,
    nodes,
    title,
    wrong_twice,
)
from pullback_server.faults import Fault
from pullback_server.job import OrdersRecord, SpecRecord

#: Seconds after which a probe gives up.
_BUDGET = 30.0


@dataclass
class Ground:
    """What a model can be tried with.

    variants: choices of its inputs, with shapes that it runs with; why: why there are none. foreign: what of its
    graphs is not torch's own, in words.
    """

    hosted: HostedModel
    variants: list[Variant] = field(default_factory=list)
    why: str = ""
    foreign: list[str] = field(default_factory=list)
    #: What of torch's own in its graphs has no second derivative that is right, in words.
    wrong: str = ""
    _twin: HostedModel | None = None

    def twin(self) -> HostedModel:
        """Its copy in double precision, one for all. Raises whatever the model's own copying raises."""
        if self._twin is None:
            self._twin = self.hosted.widened()
            self._twin.probing = True
        return self._twin


def probe(hosted: HostedModel, compute: Compute) -> Ground:
    """Fills in the model's orders, what is proven of it, and its outputs as far as they can be known."""
    ground = Ground(hosted)
    if not choices(hosted):
        ground.why = "not every input declares its shape"
        hosted.orders = _unprobed(hosted)
        return ground
    foreign: dict[Any, str] = {}
    for records in choices(hosted):
        try:
            ground.variants.append((records, _explore(ground, records, foreign)))
        except Failed as failure:
            ground.variants, ground.why = [], f"no sample input made it run ({failure})"
            hosted.orders = OrdersRecord(1, False, f"not probed: no sample input made the model run ({failure})")
            return ground
    for records in singles(hosted):
        # Some are of use together only.
        with contextlib.suppress(Failed):
            ground.variants.insert(1, (records, _explore(ground, records, foreign)))
    if ground.wrong:
        hosted.orders = OrdersRecord(1, not foreign, f"probed at load: {ground.wrong}")
        ground.foreign = sorted(foreign.values())
        return ground
    if not foreign:
        hosted.orders = OrdersRecord(-1, True, "probed at load: its graph holds operations of torch alone")
        return ground
    ground.foreign = sorted(foreign.values())
    _prove(ground, compute, foreign)
    return ground


def _prove(ground: Ground, compute: Compute, foreign: dict[Any, str]) -> None:
    """Fills in the orders of a model whose backward runs code that is not torch's."""
    hosted = ground.hosted
    names = ", ".join(ground.foreign)
    begin = time.monotonic()
    try:
        twin = ground.twin()
    except Exception as error:
        hosted.orders = OrdersRecord(
            1, False, f"its backward runs {names}, and it cannot be copied to probe it: {error}"
        )
        return
    trial = OrderTrial(twin, compute, begin + _BUDGET)
    forward = False
    why_not = ""
    try:
        with double_precision():
            forward, why_not = trial.check_forward(ground.variants)
            hosted.forward_mode, hosted.no_jvp = twin.forward_mode, why_not
            trial.check_second(ground.variants)
        proven = set(twin.seen)
        if not foreign.keys() <= proven:
            proven |= trial.check_narrow(hosted, ground.variants)
    except Failed as failure:
        hosted.orders = OrdersRecord(
            1, forward, f"its backward runs {names}, and the probe at load failed: {failure}{why_not}"
        )
        return
    hosted.proven = proven
    hosted.honest = trial.honest
    dishonest = "; it is not the derivative of its forward, so with a loss there is order 1 only"
    hosted.orders = OrdersRecord(
        2,
        forward,
        f"probed at load: its backward runs {names}, whose derivative agrees with finite differences"
        f"{'' if trial.honest else dishonest}{why_not}",
    )


def _unprobed(hosted: HostedModel) -> OrdersRecord:
    if hosted.stock:
        return OrdersRecord(-1, True, "it consists of torch's own modules alone")
    return OrdersRecord(
        1,
        False,
        "not probed at load, for not every input declares its shape; instead the graph of every call "
        "is looked at: one that holds operations of torch alone has every order",
    )


def _explore(ground: Ground, records: list[SpecRecord], foreign: dict[Any, str]) -> Extents:
    """Finds extents with which the model runs; notes its outputs, and what in its graph is not torch's."""
    hosted = ground.hosted
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
                    ground.wrong = ground.wrong or wrong_twice(node)
                    hosted.forward_mode = hosted.forward_mode and not lacks_adjoint(node)
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
