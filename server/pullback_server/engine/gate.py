"""What is shown of a model before it is served: see hosting.gate.

Python code may hold any backward, so its derivatives are held against differences of what it computes. What torch
itself made (a .pt2 file, TorchScript) holds none, and is looked at only where its operator asks for that.
"""

from __future__ import annotations

import time

import torch

from pullback_server.engine.gate_checks import Checks
from pullback_server.engine.gate_slopes import Told
from pullback_server.engine.gate_state import Runs
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.probe import Ground
from pullback_server.engine.rows import RowsDepend
from pullback_server.engine.trial import Compute, Failed
from pullback_server.engine.tuning import settle_batching
from pullback_server.hosting.gate import CHECKS
from pullback_server.hosting.loading import LoadError
from pullback_server.job import BatchRecord, CheckRecord, OrdersRecord

_WHAT_TO_DO = {
    "gradient": "fix the backward (a gradient cut off by detach or no_grad is missing too)",
    "second": "fix the derivative of the backward",
    "determinism": "let it draw its random numbers from torch's generators",
    "purity": "let it keep what it keeps in buffers, of which every call gets its own",
}


def pass_gate(hosted: HostedModel, compute: Compute, ground: Ground) -> None:
    """Fills in the model's checks but for that of its rows, and the seconds that a VJP takes.

    Raises LoadError where something does not hold, and is not declared as intended.
    """
    deadline = time.monotonic() + hosted.registration.gate.seconds
    names = [name for name in CHECKS if name != "rows"]
    why = _closed(hosted, ground)
    if why:
        if not ground.why:
            _time(hosted, compute, ground, deadline)
        hosted.checks = [CheckRecord(name, "skipped", why) for name in names]
        return
    told = Checks(hosted, compute, ground, deadline)()
    reasons = {name: _reason(hosted, name, told) for name in names}
    refused = [name for name in names if told[name].outcome == "failed" and not reasons[name]]
    if refused:
        raise LoadError(f"{hosted.owner}: {'; '.join(_refusal(name, told[name]) for name in refused)}")
    hosted.checks = [_record(hosted, name, told[name], reasons[name]) for name in names]
    if told["second"].outcome == "failed":
        hosted.orders = _declared_orders(hosted, reasons["second"])


def pass_rows(hosted: HostedModel, compute: Compute) -> None:
    """Finds out how requests may be merged, and fills in the check of its rows.

    Raises LoadError where rows depend on each other, and that is not declared as intended.
    """
    reason = hosted.registration.gate.intended.get("rows", "")
    try:
        settle_batching(hosted, compute)
    except RowsDepend as error:
        if not reason or hosted.registration.options.micro_batch is not None:
            raise
        hosted.batched_inputs, hosted.additive = frozenset(), False
        hosted.batch = BatchRecord(evidence=f"its rows depend on each other, as is intended: {reason}")
        record = CheckRecord("rows", "declared", f"{reason} ({error.how})")
    else:
        record = CheckRecord("rows", "passed" if hosted.batched_inputs else "skipped", hosted.batch.evidence)
    place = CHECKS.index("rows")
    hosted.checks = [*hosted.checks[:place], record, *hosted.checks[place:]]


def _closed(hosted: HostedModel, ground: Ground) -> str:
    """Why there is no gate; empty: there is one. Raises LoadError where one was asked for in vain."""
    registration = hosted.registration
    if registration.gate.enabled is False:
        return "switched off by its gate"
    if registration.gate.enabled is None and registration.source != "python":
        return f"what is made from {registration.source} is looked at where gate=True says so"
    if ground.why and registration.gate.enabled:
        raise LoadError(
            f"{hosted.owner} has gate=True, but there is nothing to try it with: {ground.why}; every input that must "
            "be given needs a declared shape that it runs with, and perhaps low and high"
        )
    return ground.why


def _time(hosted: HostedModel, compute: Compute, ground: Ground, deadline: float) -> None:
    try:
        runs = Runs(hosted, compute, ground.variants[-1], deadline)
        runs.time()
    except Failed:
        return
    hosted.gradient_seconds = runs.gradient_seconds


def _reason(hosted: HostedModel, name: str, told: dict[str, Told]) -> str:
    """What the operator said of a check that fails; empty: nothing."""
    intended = hosted.registration.gate.intended
    reason = intended.get(name, "")
    if name == "second" and told["gradient"].outcome == "failed":
        # A gradient that is not one of its outputs has no derivative that both agree on.
        reason = reason or intended.get("gradient", "")
    if name == "determinism" and hosted.module is None:
        # A function cannot be copied, so nobody can tell chance from what it keeps.
        reason = reason or intended.get("purity", "")
    return reason


def _declared_orders(hosted: HostedModel, reason: str) -> OrdersRecord:
    """The orders of a model whose second derivative is not that of its gradient.

    Where that is so of its first one already, every order is that of the gradient that torch computes.
    """
    orders = hosted.orders
    evidence = f"its second derivative is not that of its gradient, as is intended: {reason}"
    if "second" in hosted.registration.gate.intended:
        return OrdersRecord(1, orders.forward, evidence + hosted.no_jvp)
    return OrdersRecord(orders.reverse, orders.forward, f"{orders.evidence}; {evidence}")


def _peculiar(hosted: HostedModel) -> bool:
    """Whether it depends on the indices that a sample draws what a gradient of torch's own modules comes to."""
    assert hosted.module is not None
    return any(isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) for module in hosted.module.modules())


def _refusal(name: str, told: Told) -> str:
    return f'{told.detail}; {_WHAT_TO_DO[name]}, or declare intended={{"{name}": "why"}}'


def _record(hosted: HostedModel, name: str, told: Told, reason: str) -> CheckRecord:
    """Raises LoadError where what is declared cannot be."""
    if told.outcome == "failed":
        return CheckRecord(name, "declared", f"{reason} ({told.detail})")
    if name in hosted.registration.gate.intended and told.outcome == "passed":
        if hosted.stock and name in ("gradient", "second") and not _peculiar(hosted):
            raise LoadError(
                f"{hosted.owner} declares intended={{{name!r}: {reason!r}}}, but it is made of torch's own modules "
                f"alone, and this check passes: {told.detail}; take that out"
            )
        return CheckRecord(name, "passed", f"{told.detail}; declared all the same: {reason}")
    return CheckRecord(name, told.outcome, told.detail)
