"""What the gate asks of a model's runs: that they are repeatable, and leave nothing behind."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from pullback_server.engine._dtypes import differentiable
from pullback_server.engine.gate_slopes import Told
from pullback_server.engine.hosted import HostedModel, copied
from pullback_server.engine.trial import Compute, Point, Tensors, Trial, Variant
from pullback_server.faults import listed

#: How far results of one computation may be apart by rounding, in units of it, relative to the largest element; and as
#: a share of that, where rounding is coarse.
_UNITS, _SHARE = 1000, 0.05
#: Seconds of a VJP of which no more than needed are computed.
_SLOW = 0.1


class Runs:
    """Two calls of a model in its own precision, again and again. Raises Failed."""

    def __init__(self, hosted: HostedModel, compute: Compute, variant: Variant, deadline: float) -> None:
        self.hosted = hosted
        self._compute = compute
        self._trial = Trial(hosted, compute, deadline, wide=False)
        self._variant = variant
        self._points: dict[int, Point] = {}
        self._seconds: list[float] = []

    @property
    def gradient_seconds(self) -> float:
        """Seconds of one VJP, the median."""
        return statistics.median(self._seconds) if self._seconds else 0.0

    def call(self, which: int, seed: int = 0) -> Tensors:
        """A VJP by everything, or the outputs where nothing can be differentiated."""
        return self._call(self._trial, self._point(which), seed)

    def _point(self, which: int) -> Point:
        if which not in self._points:
            self._points[which] = self._trial.point(*self._variant, which)
        return self._points[which]

    def _call(self, trial: Trial, point: Point, seed: int = 0) -> Tensors:
        begin = time.perf_counter()
        outcome, values = trial.run("vjp" if point.v else "evaluate", point.inputs, seed=seed, cotangents=point.v)
        if self.hosted.device.type == "cuda":
            torch.cuda.current_stream(self.hosted.device).synchronize()
        if point.v:
            self._seconds.append(time.perf_counter() - begin)
        found = {f"output {ref.name!r}": values[ref.payload] for ref in outcome.outputs}
        return found | {
            f"the gradient by {grad.name.partition(':')[2]!r}": values[grad.value.payload]
            for grad in outcome.gradients
            if grad.value is not None
        }

    def time(self) -> None:
        """Measures a few VJPs."""
        self.call(0)
        while len(self._seconds) in (1, 2) and self._seconds[0] < _SLOW:
            self.call(0)

    def from_equal_states(self) -> bool | None:
        """Whether two copies of the model, both fresh, come to the same; None: it cannot be copied."""
        if self.hosted.module is None:
            return None
        try:
            twins = [
                HostedModel(self.hosted.registration, copied(self.hosted.module), self.hosted.device) for _ in "ab"
            ]
        # A model's own copying may raise anything.
        except Exception:
            return None
        one, other = (
            self._call(Trial(twin, self._compute, self._trial.deadline, wide=False), self._point(0)) for twin in twins
        )
        return differing(one, other, self.hosted) is None


def check_state(runs: Runs) -> tuple[Told, Told]:
    """Determinism and purity. Raises Failed."""
    hosted = runs.hosted
    before = attributes(hosted)
    first, again = runs.call(0), runs.call(0)
    if (gap := differing(first, again, hosted)) and gap[1]:
        return _attributed(runs, gap[0], before)
    drawn = differing(first, runs.call(0, seed=1), hosted) is not None
    says = "draws random numbers; the same with the same seed" if drawn else "the same again, bit by bit"
    determinism = Told("passed", says) if gap is None else Told("noted", f"{gap[0]}, in the last digits")
    runs.call(1)
    later = runs.call(0)
    if (gap := differing(first, later, hosted)) and gap[1]:
        return determinism, Told("failed", f"after a call with other inputs {gap[0]}{_changed(before, hosted)}")
    own = [
        what for what, does in (("buffers", hosted.writes_buffers), ("parameters", hosted.writes_parameters)) if does
    ]
    if own:
        return determinism, Told("noted", f"writes into its {' and '.join(own)}, of which every call gets its own")
    return determinism, Told("passed", "a call after one with other inputs gives what it gave before")


def _attributed(runs: Runs, gap: str, before: Mapping[str, object]) -> tuple[Told, Told]:
    """Whether it is chance or memory that makes the same call give something else."""
    told = f"the same call with the same seed gives something else: {gap}"
    alike = runs.from_equal_states()
    if alike:
        kept = f"{told}, for it keeps something between calls{_changed(before, runs.hosted)}"
        return Told("passed", "the same from the same state"), Told("failed", kept)
    both = "; it keeps something between calls, or draws numbers from a generator of its own"
    if alike is None:
        return Told("failed", told + both), Told("skipped", "it cannot be told from chance what a call leaves behind")
    return Told("failed", told), Told("skipped", "it is not deterministic, so that nothing can be told")


def differing(a: Tensors, b: Tensors, hosted: HostedModel) -> tuple[str, bool] | None:
    """What differs the most, in words, and whether by more than rounding; None: nothing does, bit by bit."""
    if a.keys() != b.keys():
        return f"one has {listed(a)}, the other {listed(b)}", True
    worst = None
    for name, one in a.items():
        other = b[name]
        if one.dtype != other.dtype or one.shape != other.shape:
            return f"{name} has the shape {list(one.shape)} or {list(other.shape)}", True
        equal = (one == other) | ((one != one) & (other != other))
        if bool(equal.all()):
            continue
        wide = torch.complex128 if one.is_complex() else torch.float64
        gap = float(torch.where(equal, 0, one.to(wide) - other.to(wide)).abs().max())
        size = float(torch.where(one.isfinite(), one, 0).to(wide).abs().max())
        said = f"{name} differs by {gap:.3g} where it is up to {size:.3g}"
        if not gap <= _rounding(one.dtype, hosted) * size:
            return said, True
        worst = said
    return None if worst is None else (worst, False)


def _rounding(dtype: torch.dtype, hosted: HostedModel) -> float:
    if not differentiable(dtype):
        return 0.0
    eps = max(torch.finfo(one).eps for one in (dtype, hosted.autocast or dtype))
    return min(_UNITS * eps, _SHARE)


def attributes(hosted: HostedModel) -> dict[str, object]:
    """What its modules hold besides modules, parameters and buffers: plain values, and of others which object it is."""
    if hosted.module is None:
        return {}
    return {
        f"{path}.{key}".removeprefix("."): _plain(value)
        for path, module in hosted.module.named_modules()
        for key, value in vars(module).items()
        if key not in _OWN
    }


_OWN = frozenset(vars(torch.nn.Module()))


def _plain(value: Any) -> object:
    if isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    return (id(value), len(value)) if isinstance(value, (list, dict, set, tuple)) else id(value)


def _changed(before: Mapping[str, object], hosted: HostedModel) -> str:
    """Which attributes are not what they were, in words."""
    now = attributes(hosted)
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return f" (in {listed(names)})" if names else ""
