"""Whether a gradient of a session may be differentiated again.

As tripwire.py, for graphs that are made by many ops. torch.autograd.grad with create_graph runs some nodes of a graph
and returns a graph of what they did. Where such a node is torch's own, that graph is right, to any order. Where it is
not (an autograd.Function, a compiled backward, a hook), its own model must have shown at load that the derivative of
its backward is right; and as that was shown once, nothing that came out of it may be run with create_graph again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.provenance import adopt, hooks_of, owner_of
from pullback_server.engine.tape_state import Lineage
from pullback_server.engine.tripwire import (
    HOOK,
    declared_wrong,
    is_compiled,
    is_error,
    is_foreign,
    key_of,
    nodes,
    title,
    watcher,
    wrong_twice,
)
from pullback_server.faults import Fault
from pullback_wire import Reason

#: Mark in a node's metadata: it came out of a backward that is not torch's own.
_DERIVED = "pullback.derived"


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


class Watch:
    """Watches one backward with create_graph. Raises Fault (ORDER_UNAVAILABLE)."""

    def __init__(
        self,
        lineage: Lineage,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        given: Sequence[torch.Tensor | None] = (),
    ) -> None:
        self._models = lineage.models
        self._tripped: list[str] = []
        for hosted in self._models:
            if why := declared_wrong(hosted):
                raise self._fault(f"{hosted.owner} is declared to have another second derivative than that: {why}")
        run, self._before = executed(outputs, inputs)
        # No backward runs what made the grad_outputs, but the gradients' graph leads there.
        self._before.update(nodes(given, self._before))
        #: What no backward of this one made, or whose maker is known.
        self._placed = set(self._before)
        self.foreign: list[Any] = []
        hooked: set[HostedModel] = set(lineage.hooked)
        for node in run:
            if _DERIVED in node.metadata:
                raise self._fault(
                    f"its graph holds {node.metadata[_DERIVED]} differentiated already, which is proven for order 2 "
                    "and no more"
                )
            if why := wrong_twice(node):
                raise self._fault(why)
            owner = owner_of(node)
            if is_foreign(node):
                self._admit(node, [] if owner is None else [owner])
                self.foreign.append(node)
            # Not remembered: a later call may hang one on it.
            count, left = hooks_of(node)
            if count > left or (count and owner is None):
                raise self._fault(
                    f"its backward runs a hook on {title(node)}, which another model hung there than the one that "
                    "made it: its own derivative is not proven"
                )
            if count and owner is not None:
                hooked.add(owner)
        for hosted in hooked:
            if HOOK not in hosted.proven:
                raise self._fault(
                    f"the backward of {hosted.owner} runs a hook on a tensor or module, whose own derivative is not "
                    f"proven: {hosted.orders.evidence}"
                )
        self._hooked = hooked
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

    def _admit(self, node: Any, makers: Sequence[HostedModel]) -> None:
        """makers: the models that may have made the node; each of them must have proven its kind."""
        if is_compiled(node):
            raise self._fault(
                f"its graph holds {title(node)}, a backward compiled by torch.compile, which has no derivative"
            )
        key = key_of(node)
        unproven = [hosted for hosted in makers or self._models if not makers or key not in hosted.proven]
        if unproven:
            evidence = "; ".join(sorted({f"{hosted.owner} {hosted.orders.evidence}" for hosted in unproven}))
            raise self._fault(f"its backward runs {title(node)}, whose own derivative is not proven ({evidence})")

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Around the backward."""
        handles = [node.register_hook(watcher(title(node), True, self._tripped)) for node in self.foreign]
        handles += [
            node.register_hook(self._places(owner)) for node in self.foreign if (owner := owner_of(node)) is not None
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if self._tripped:
            raise self._fault(self._tripped[0])

    def _places(self, owner: HostedModel) -> Callable[..., None]:
        """A hook for a foreign node: what its backward made is its model's."""

        def look(gradients: Sequence[torch.Tensor | None], incoming: Sequence[torch.Tensor | None]) -> None:
            # What came from before it in the backward is not of its making.
            self._placed.update(nodes(incoming, self._placed))
            for node in nodes(gradients, self._placed):
                self._placed.add(node)
                if is_foreign(node):
                    adopt(node, owner)

        return look

    def _makers(self, node: Any) -> list[HostedModel]:
        """Which models may have made a node of the gradients' graph.

        What no foreign node made was made by hooks, or by a forward that was run again, as it had run before.
        """
        owner = owner_of(node)
        if owner is not None:
            return [owner]
        return [hosted for hosted in self._models if hosted in self._hooked or type(node) in hosted.met]

    def check(self, gradients: Sequence[torch.Tensor | None], rehearsal: bool = False) -> None:
        """After the backward: what the graph of the gradients is made of."""
        for node in nodes(gradients, self._before):
            if is_error(node):
                raise self._fault(f"the graph of the gradient holds {title(node)}, which has no derivative")
            if is_foreign(node):
                makers = self._makers(node)
                if len(makers) == 1:
                    adopt(node, makers[0])
                if self._owed:
                    self._admit(node, makers)
            if self._owed and not rehearsal:
                node.metadata[_DERIVED] = self._owed
