"""What two ways to one derivative come to: in two precisions, and by forward mode and reverse mode."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch

from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.order_trial import widened
from pullback_server.engine.trial import Failed, TooLong, Trial, Variant, double_precision, paired
from pullback_server.job import OrdersRecord

#: Points at which two ways must agree; and so many in all, of which one may be at a kink.
_POINTS, _TRIED = 2, 4
#: How far <J^H v, t> and <v, J t> may lie apart, in units of their terms, by the bytes of a real number.
_APART = {8: 1e-6, 4: 1e-3}


def agrees_with(narrow: Trial, wide: Trial, variant: Variant) -> bool:
    """Whether the VJP in a model's own precision is that in double, at some point. Raises Failed."""
    return any(_agrees(narrow, wide, variant, number) for number in range(_TRIED))


def _agrees(narrow: Trial, wide: Trial, variant: Variant, number: int) -> bool:
    point = narrow.point(*variant, number)
    found, values = narrow.run("vjp", point.inputs, cotangents=point.v)
    with double_precision():
        sure, expected = wide.run("vjp", widened(point.inputs), cotangents=widened(point.v))
    types = [tensor.dtype for tensor in (*point.t.values(), *point.v.values())]
    eps = max((torch.finfo(dtype).eps for dtype in types), default=0.0)
    eps = max(eps, {4: torch.finfo(torch.float32).eps, 2: torch.finfo(torch.bfloat16).eps}.get(point.width, 0.0))
    tolerance = min(10 * math.sqrt(eps), 0.1)
    for name, tangent in point.t.items():
        t = {name: tangent}
        size = paired(sure.gradients, expected, t, absolute=True)
        gap = abs(paired(found.gradients, values, t) - paired(sure.gradients, expected, t))
        if not gap <= tolerance * size + 1e-10:
            return False
    return True


def settle_forward_mode(hosted: HostedModel, trial: Trial, variants: Sequence[Variant]) -> None:
    """Finds out whether J t is the adjoint of J^H v; by two backwards it is where forward mode is not."""
    with double_precision() if trial.wide else contextlib.nullcontext():
        why = _skewed(trial, variants)
        if why and trial.hosted.forward_mode:
            hosted.forward_mode = trial.hosted.forward_mode = False
            # What is NaN by two backwards as well is seen by whoever asks for it.
            why = _skewed(trial, variants, infinite=False)
    if why:
        hosted.no_jvp = f"; no JVP: {why}"
        hosted.orders = OrdersRecord(hosted.orders.reverse, False, hosted.orders.evidence + hosted.no_jvp)


def _skewed(trial: Trial, variants: Sequence[Variant], infinite: bool = True) -> str:
    """How <J^H v, t> and <v, J t> differ, in words, wherever they can be compared; empty: they do not.

    infinite: whether NaN differs.
    """
    why = ""
    for variant in variants:
        for number in range(_POINTS):
            try:
                point = trial.point(*variant, number)
                pulled, values = trial.run("vjp", point.inputs, cotangents=point.v)
                left, size = (paired(pulled.gradients, values, point.t, absolute) for absolute in (False, True))
                pushed, values = trial.run("jvp", point.inputs, tangents=_everything(trial, point.inputs, point.t))
                right, other = (paired(pushed.gradients, values, point.v, absolute) for absolute in (False, True))
            except TooLong:
                return why
            # Whatever stands against a JVP, a call says itself.
            except Failed:
                continue
            comparable = math.isfinite(left) and (infinite or math.isfinite(right))
            if comparable and not abs(left - right) <= _APART.get(point.width, 0.1) * (size + other):
                why = f"<J^H v, t> is {left:.6g}, <v, J t> {right:.6g}"
    return why


def _everything(trial: Trial, inputs: dict[str, torch.Tensor], t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tangents of all that a job is by: what stays has one of zero."""
    own = {f"input:{name}": tensor for name, tensor in inputs.items()}
    own |= {f"param:{name}": tensor.detach() for name, tensor in trial.hosted.parameters.items()}
    return {
        name: t[name] if name in t else torch.zeros_like(tensor)
        for name, tensor in own.items()
        if tensor.is_floating_point() or tensor.is_complex()
    }
