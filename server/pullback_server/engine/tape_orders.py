"""Whether a gradient of a session may be differentiated again.

As tripwire.py, for graphs that are made by many ops. torch.autograd.grad with create_graph runs some nodes of a graph
and returns a graph of what they did. Where such a node is torch's own, that graph is right, to any order. Where it is
not (an autograd.Function, a compiled backward, a hook), its model must have shown at load that the derivative of its
backward is right; and as that was shown once, nothing that came out of it may be run with create_graph again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.tape_state import Lineage
from pullback_server.engine.tripwire import (
    HOOK,
    has_hooks,
    is_compiled,
    is_error,
    is_foreign,
    key_of,
    nodes,
    title,
    watcher,
)
from pullback_server.faults import Fault
from pullback_wire import Reason

#: Mark in a node's metadata: it came out of a backward that is not torch's own.
_DERIVED = "pullback.derived"
#: Mark in a node's metadata: whether it has hooks.
_HOOKED = "pullback.hooked"


def executed(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> tuple[list[Any], set[Any]]:
    """The nodes that a backward from outputs to inputs runs, and all nodes behind the outputs."""
    ends = {tensor.grad_fn for tensor in inputs if tensor.grad_fn is not None}
    leaves = {id(tensor) for tensor in inputs if tensor.grad_fn is None}
    #: Whether a node leads to an input: runs it, or hands it its gradient.
    leads: dict[Any, bool] = {}
    found: list[Any] = []
    stack: list[tuple[Any, bool]] = [(t.grad_fn, False) for t in outputs if t.grad_fn is not None]
    while stack:
        node, left = stack.pop()
        if left:
            runs = any(leads[following] for following, _ in node.next_functions if following is not None)
            if runs:
                found.append(node)
            leads[node] = runs or node in ends or id(getattr(node, "variable", None)) in leaves
        elif node not in leads:
            leads[node] = False
            stack.append((node, True))
            stack.extend((following, False) for following, _ in node.next_functions if following is not None)
    return found, set(leads)


def _hooks_on(node: Any) -> bool:
    marks = node.metadata
    known = marks.get(_HOOKED)
    if known is None:
        known = marks[_HOOKED] = has_hooks(node)
    return bool(known)


class Watch:
    """Watches one backward with create_graph. Raises Fault (ORDER_UNAVAILABLE)."""

    def __init__(self, lineage: Lineage, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        self._models = lineage.models
        self._proven: set[Any] = set()
        for hosted in lineage.models:
            self._proven |= hosted.proven
        self._tripped: list[str] = []
        run, self._before = executed(outputs, inputs)
        self.foreign: list[Any] = []
        hooked: frozenset[HostedModel] = lineage.hooked
        for node in run:
            if _DERIVED in node.metadata:
                raise self._fault(
                    f"its graph holds {node.metadata[_DERIVED]} differentiated already, which is proven for order 2 "
                    "and no more"
                )
            if is_foreign(node):
                self._admit(node)
                self.foreign.append(node)
            elif not hooked and _hooks_on(node):
                hooked = lineage.models
        for hosted in hooked:
            if HOOK not in hosted.proven:
                raise self._fault(
                    f"the backward of {hosted.owner} runs a hook on a tensor or module, whose own derivative is not "
                    f"proven: {hosted.orders.evidence}"
                )
        names = sorted({title(node) for node in self.foreign} | ({"a hook"} if hooked else set()))
        #: What the gradients owe to code that is not torch's own; empty: nothing.
        self._owed = ", ".join(names)

    def _fault(self, why: str) -> Fault:
        owners = " or ".join(sorted(hosted.owner for hosted in self._models))
        return Fault(
            Reason.ORDER_UNAVAILABLE,
            f"a gradient through {owners} cannot be differentiated in turn: {why}; it is available without "
            "create_graph",
            "create_graph",
        )

    def _admit(self, node: Any) -> None:
        if is_compiled(node):
            raise self._fault(
                f"its graph holds {title(node)}, a backward compiled by torch.compile, which has no derivative"
            )
        if key_of(node) not in self._proven:
            evidence = "; ".join(sorted({f"{hosted.owner} {hosted.orders.evidence}" for hosted in self._models}))
            raise self._fault(f"its backward runs {title(node)}, whose own derivative is not proven ({evidence})")

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Around the backward."""
        handles = [node.register_hook(watcher(title(node), True, self._tripped)) for node in self.foreign]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if self._tripped:
            raise self._fault(self._tripped[0])

    def check(self, gradients: Sequence[torch.Tensor | None], rehearsal: bool = False) -> None:
        """After the backward: what the graph of the gradients is made of."""
        if not self._owed:
            return
        for node in nodes(gradients, self._before):
            if is_error(node):
                raise self._fault(f"the graph of the gradient holds {title(node)}, which has no derivative")
            if is_foreign(node):
                self._admit(node)
            if not rehearsal:
                node.metadata[_DERIVED] = self._owed
