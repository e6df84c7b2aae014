"""What was found out about a model, carried from the process that found it out to others that load the same."""

from __future__ import annotations

from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.probe import probe
from pullback_server.engine.trial import Compute
from pullback_server.job import Verdict

#: What a verdict and a hosted model call by one name.
_SAME = (
    "orders",
    "forward_mode",
    "no_jvp",
    "honest",
    "outputs",
    "batch",
    "additive",
    "writes_inputs",
    "writes_buffers",
    "writes_parameters",
    "needs_natural",
    "recomputes",
    "checks",
    "gradient_seconds",
)


def verdict_of(hosted: HostedModel) -> Verdict:
    """What others need not find out again."""
    options = hosted.registration.options
    return Verdict(
        **{name: getattr(hosted, name) for name in _SAME},
        batched_inputs=sorted(hosted.batched_inputs),
        # What is proven is proven of kinds of nodes, which are objects of this process.
        probe_again=bool(hosted.proven),
        devices=list(options.devices),
        replicas=options.replicas,
    )


def adopt(hosted: HostedModel, verdict: Verdict, compute: Compute) -> None:
    """Believes a verdict. What it says of code in backwards is probed again; the lower order of both is promised."""
    for name in _SAME:
        setattr(hosted, name, getattr(verdict, name))
    hosted.batched_inputs = frozenset(verdict.batched_inputs)
    if not verdict.probe_again:
        return
    probe(hosted, compute)
    hosted.outputs = verdict.outputs
    if hosted.proven:
        hosted.orders = verdict.orders
    hosted.honest = hosted.honest and verdict.honest
