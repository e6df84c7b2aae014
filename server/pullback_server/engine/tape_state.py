"""What a session holds: its tensors by handle, what is known of the graphs behind them, and which handles failed."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from pullback_server import ops
from pullback_server.engine._dtypes import describe, differentiable
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.retained import Ledger, node_of
from pullback_server.faults import Fault
from pullback_server.job import HealthRecord
from pullback_wire import Reason

#: Most handles of one session, the failed ones included.
MOST_HANDLES = 1_000_000
#: A call may make more outputs than it has handles; so many numbers behind the last one are taken for such outputs.
_ROOM = 65_536

_NO_MODELS: frozenset[HostedModel] = frozenset()


@dataclass(frozen=True, slots=True)
class Lineage:
    """What made the graph behind a tensor, as far as it is not made of torch's own operations for sure.

    models: hosted models whose code may have put code of its own into the graph.
    hooked: those of them that registered hooks on tensors.
    order: how many gradients were taken of gradients on the way, at most; 0: none.
    fast: whether a model ran with kernels that have no derivatives of higher order.
    apart: those models that ran on a replica, which a backward may run again.
    labels: names of all hosted models that the graph went through, and what is said of their health.
    """

    models: frozenset[HostedModel] = _NO_MODELS
    hooked: frozenset[HostedModel] = _NO_MODELS
    order: int = 0
    fast: bool = False
    apart: frozenset[HostedModel] = _NO_MODELS
    labels: frozenset[tuple[str, HealthRecord]] = frozenset()

    @property
    def label(self) -> tuple[str, HealthRecord]:
        """That of the one hosted model that the graph went through; without a name where there was none, or more."""
        return next(iter(self.labels)) if len(self.labels) == 1 else ("", HealthRecord())


#: Nothing but torch's own operations.
PLAIN = Lineage()


def merged(lineages: Iterable[Lineage]) -> Lineage:
    found = PLAIN
    for lineage in lineages:
        if lineage is found or lineage is PLAIN:
            continue
        if found is PLAIN or found == lineage:
            found = lineage
            continue
        found = Lineage(
            found.models | lineage.models,
            found.hooked | lineage.hooked,
            max(found.order, lineage.order),
            found.fast or lineage.fast,
            found.apart | lineage.apart,
            found.labels | lineage.labels,
        )
    return found


@dataclass(slots=True)
class Held:
    """A tensor of the session. handle 0: it came with the op and is not stored."""

    tensor: torch.Tensor
    lineage: Lineage = PLAIN
    handle: int = 0
    #: How many hooks of models were found on it.
    hooks: int = 0
    #: Whether there was a graph behind it when it was stored.
    graph: bool = False


#: What an op made or read: handle, name, tensor (None: an unused gradient).
Made = list[tuple[int, str, Held | None]]


@dataclass(frozen=True, slots=True)
class Cause:
    """Why an op failed. Nothing but words: an exception would hold on to graphs."""

    number: int
    kind: str
    reason: str
    message: str

    def __str__(self) -> str:
        return f"op {self.number} ({self.kind}) failed: {self.reason}: {self.message}"


class Dependency(Exception):
    """An op used a handle that an earlier op failed to make."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Handles:
    """The handles of a session."""

    def __init__(self, ledger: Ledger) -> None:
        self.held: dict[int, Held] = {}
        #: How many of them have a graph behind them.
        self.graphs = 0
        self._failed: dict[int, Cause] = {}
        #: The last handles of failed calls, in order.
        self._last: list[int] = []
        #: What hooks that models put on the session's own tensors bring into every graph.
        self.planted = PLAIN
        self._ledger = ledger

    def release(self, handles: Iterable[int]) -> None:
        """Forgets handles; unknown ones are passed over."""
        for handle in handles:
            if (held := self.held.pop(handle, None)) is not None:
                self.graphs -= held.graph
                self._ledger.dropped(1)
            elif self._failed.pop(handle, None) is not None:
                at = bisect.bisect_left(self._last, handle)
                if at < len(self._last) and self._last[at] == handle:
                    del self._last[at]

    def __getitem__(self, handle: int) -> Held:
        held = self.held.get(handle)
        if held is not None:
            return held
        raise self._missing(handle)

    def memory(self, call: ops.Call) -> dict[int, int]:
        """The operands of a call that have handles, by the storage they lie in. Raises Fault, Dependency."""
        found: dict[int, int] = {}
        for operand in (*call.inputs, *call.targets, *call.parameters):
            if handle := operand.handle or operand.keep:
                found.setdefault(self[handle].tensor.untyped_storage()._cdata, handle)
        return found

    def _missing(self, handle: int) -> Exception:
        cause = self._failed.get(handle)
        if cause is None and self._last:
            at = bisect.bisect_left(self._last, handle) - 1
            if at >= 0 and handle - self._last[at] <= _ROOM:
                cause = self._failed.get(self._last[at])
        if cause is not None:
            return Dependency(cause)
        return Fault(Reason.BAD_HANDLE, f"the session has no handle {handle}", "handle")

    def check_free(self, handles: Sequence[int]) -> None:
        """Whether new tensors can have these handles. Raises Fault."""
        if not handles:
            return
        if len(self.held) + len(self._failed) + len(handles) > MOST_HANDLES:
            raise Fault(
                Reason.SESSION_BUDGET,
                f"the session has {len(self.held)} handles and {len(self._failed)} failed ones, at most "
                f"{MOST_HANDLES} are allowed; release what is no longer needed",
                "handles",
            )
        for handle in handles:
            if handle <= 0:
                raise Fault(Reason.BAD_HANDLE, f"{handle} is no handle; they are numbers from 1", "handles")
            if handle in self.held or handle in self._failed:
                raise Fault(
                    Reason.BAD_HANDLE,
                    f"the handle {handle} is in use already; each number is assigned once, or after its release",
                    "handles",
                )
        if len(set(handles)) != len(handles):
            raise Fault(Reason.BAD_HANDLE, "a handle is given to two tensors of one op", "handles")

    def store(self, handle: int, held: Held) -> None:
        held.handle = handle
        held.graph = node_of(held.tensor) is not None
        self.graphs += held.graph
        self.held[handle] = held
        self._ledger.note(held.tensor)

    def fail(self, handles: Sequence[int], cause: Cause, open_ended: bool) -> None:
        """Marks the handles that a failed op should have made; those in use stay as they are.

        open_ended: whether the numbers behind the last may have been meant as well.
        """
        for handle in handles:
            if handle > 0 and handle not in self.held and handle not in self._failed:
                if len(self.held) + len(self._failed) >= MOST_HANDLES:
                    break
                self._failed[handle] = cause
                if open_ended and handle == handles[-1]:
                    bisect.insort(self._last, handle)

    def spoil(self, helds: list[Held], cause: Cause) -> None:
        """Marks handles whose tensors are no longer what they were, and those that share their memory."""
        storages = {held.tensor.untyped_storage()._cdata for held in helds}
        helds.clear()
        lost = [handle for handle, held in self.held.items() if held.tensor.untyped_storage()._cdata in storages]
        for handle in lost:
            self.graphs -= self.held.pop(handle).graph
            self._failed[handle] = cause
        self._ledger.dropped(len(lost))

    def plant(self, hosted: HostedModel, given: Iterable[Held], hooks: bool) -> None:
        """After a call, failed or not: whether its model put hooks on the session's, where other graphs meet them.

        hooks: whether it hung any at all.
        """
        if hosted.stock:
            return
        hung = False
        for held in given:
            count = len(held.tensor._backward_hooks or ())
            hung |= count != held.hooks
            held.hooks = count
        if hung or (hooks and hosted not in self.planted.models):
            own = frozenset([hosted])
            # Those on nodes alone show when a backward is about to run them, if it is watched.
            self.planted = merged([self.planted, Lineage(own, own if hung else _NO_MODELS)])

    def clear(self) -> None:
        self.held.clear()
        self.graphs = 0
        self._failed.clear()
        self._last.clear()


class Afford:
    """The budget of a session, asked before memory is taken."""

    def __init__(self, ledger: Ledger, budget: int) -> None:
        self._ledger = ledger
        self.budget = budget

    def __call__(self, size: int) -> None:
        """Raises Fault (SESSION_BUDGET) where so many bytes more cannot be held."""
        if self._ledger.bound + size > self.budget:
            held = self._ledger.settle()
            if held + size > self.budget:
                raise self.over(held, held + size)

    def at_all(self, size: int) -> None:
        """Raises Fault (SESSION_BUDGET) for a tensor that no session could hold."""
        if size > self.budget:
            raise Fault(
                Reason.SESSION_BUDGET,
                f"the result would be a tensor of {size} bytes, the session's budget is {self.budget}",
            )

    def over(self, held: int, wanted: int) -> Fault:
        return Fault(
            Reason.SESSION_BUDGET,
            f"the session holds {held} bytes and would hold {wanted}, its budget is {self.budget}; release tensors, or "
            "run backward without retain_graph",
        )


class Operands:
    """Where an op's arguments come from: the session's handles and the op's own tensors."""

    def __init__(self, handles: Handles, tensors: Sequence[torch.Tensor]) -> None:
        self.handles = handles
        self._tensors = tensors

    def leaf(self, operand: ops.Operand, field: str) -> Held:
        """A tensor that came with the op. Raises Fault."""
        ref = operand.value
        if ref is None:
            raise Fault(Reason.BAD_HANDLE, f"{field} has neither a handle nor a value", field)
        # Of its own: as a view of what it came in, it would lose the gradients of what is written to it.
        tensor = self._tensors[ref.payload].detach()
        if operand.requires_grad and operand.keep:
            if not differentiable(tensor.dtype):
                raise Fault(
                    Reason.NOT_DIFFERENTIABLE,
                    f"{field} is {describe(tensor)}; only floating-point and complex tensors can require grad",
                    field,
                )
            tensor = tensor.requires_grad_()
        return Held(tensor, PLAIN)

    def take(self, operand: ops.Operand, field: str) -> Held:
        """What an operand stands for. Raises Fault, Dependency."""
        if operand.handle:
            return self.handles[operand.handle]
        if operand.keep:
            # It was stored before the op.
            return self.handles[operand.keep]
        return self.leaf(operand, field)
