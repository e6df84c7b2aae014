"""The node of torch's graph that stands for an op on the server, and whose backward is again such a node.

A forward sends tensors to the server as leaves and gets back results, whose graph stays there. The node's backward is
torch.autograd.grad on the server, from those leaves and results. What it returns is in turn a function of the same
leaves and of the cotangents. So under create_graph the backward applies a node whose leaves are all of these, and whose
results are the gradients that the server holds; that node's backward works the same way, and so on to any order. The
server refuses an order that is not to be had; nothing here returns a gradient without the graph that was asked for.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._C._functorch import TransformType, get_interpreter_stack, is_legacy_batchedtensor
from torch.autograd.function import Function

from pullback._anomaly import is_anomaly_enabled
from pullback._arrays import as_array
from pullback._frames import Keep, Operand
from pullback._lineage import Ref
from pullback._session import Pending, Session
from pullback.torch._convert import to_torch

Tensors = Sequence[torch.Tensor]
Results = tuple[torch.Tensor | None, ...]


@dataclass
class Graph:
    """What a node's backward needs of the server.

    leaves: one for each tensor that the node saves, in order.
    results: one for each result of the node; None: it is not differentiable.
    """

    session: Session
    leaves: list[Ref]
    results: list[Ref | None]


#: Graphs that torch may ask for, by the numbers in their tokens.
_graphs: dict[int, Graph] = {}
_numbers = itertools.count(1)


def _token(graph: Graph) -> torch.Tensor:
    """A tensor that a node saves for backward, and that holds its graph.

    A Function's backward cannot see retain_graph. But torch drops what was saved when a backward without it is over, or
    when nothing refers to the node any more; then the token's memory is freed, and the graph goes with it. It is found
    by number, as a saved tensor may come back as another one with the same memory: so it does under checkpoint, where
    it comes from the forward that was run again, together with that forward's graph.
    """
    number = next(_numbers)
    anchor = np.array([number])
    _graphs[number] = graph
    weakref.finalize(anchor, _graphs.pop, number, None).atexit = False
    return torch.from_numpy(anchor)


def _graph_of(token: torch.Tensor) -> Graph:
    graph = _graphs.get(int(token))
    if graph is None:
        raise RuntimeError(
            "the graph of a RemoteModule is gone from the server, as the tensor that stood for it was replaced: hooks "
            "on saved tensors that copy them (save_on_cpu with pin_memory, writing to disk) cannot be used around it"
        )
    return graph


class Step:
    """What a node does when it runs.

    record: whether it will be differentiated. Then the server keeps a graph.
    leaves, results: once it has run, where the graph begins and ends: for each tensor what stands for it on the server
        as a leaf, for each result its handle; None: it takes no part in derivatives.
    """

    def __init__(self, session: Session, record: bool) -> None:
        self.session = session
        self.record = record
        self.leaves: list[Ref | None] = []
        self.results: list[Ref | None] = []

    def run(self, tensors: Tensors) -> Results:
        """Does it, on the node's tensors. Raises PullbackError."""
        raise NotImplementedError

    def graph(self, positions: Sequence[int]) -> Graph | None:
        """What backward needs to differentiate by the tensors at `positions`; None: there is no graph.

        The step forgets it, so that nothing else keeps it alive.
        """
        leaves, results = self.leaves, self.results
        self.leaves, self.results = [], []
        if not any(results):
            return None
        found = [leaf for position in positions if (leaf := leaves[position]) is not None]
        assert len(found) == len(positions)
        return Graph(self.session, found, results)

    def operand(self, tensor: torch.Tensor, field: str, leaves: list[Ref | None]) -> Operand:
        """A tensor to send, as a leaf where it requires grad; notes which in `leaves`. Raises TypeError."""
        array = as_array(tensor, field)
        if not (self.record and tensor.requires_grad):
            leaves.append(None)
            return array
        ref = Ref(self.session, self.session.new_handle())
        leaves.append(ref)
        return Keep(array, ref.handle, True)

    def take(self, pending: Pending, leaves: list[Ref | None], devices: Sequence[torch.device]) -> Results:
        """The results of an op, on these devices. Raises PullbackError."""
        infos = pending.result()
        refs = [None if info.unused else Ref(self.session, info.handle) for info in infos]
        results: list[torch.Tensor | None] = []
        for info, device in zip(infos, devices, strict=True):
            value = info.value
            if value is None and not info.unused:
                # Values that are too large to come together come one by one.
                value = self.session.get([info.handle])[0]
            results.append(None if value is None else to_torch(value, device))
        if self.record:
            self.leaves = leaves
            self.results = [ref if info.requires_grad else None for ref, info in zip(refs, infos, strict=True)]
        return tuple(results)


class Gradient(Step):
    """torch.autograd.grad of a graph's results by its leaves.

    wanted, given: which leaves, and for which results there are cotangents, in order.
    The node's tensors are those of the graph's own node, one for each leaf, and then the cotangents.
    batched: the cotangents have a leading axis of independent ones, and so have the gradients.
    """

    def __init__(self, graph: Graph, wanted: list[int], given: list[int], record: bool, batched: bool = False) -> None:
        super().__init__(graph.session, record)
        self._of = graph
        self._wanted = wanted
        self._given = given
        self._batched = batched

    def run(self, tensors: Tensors) -> Results:
        """The gradients; None: the results do not depend on that leaf."""
        leaves: list[Ref | None] = [*self._of.leaves]
        cotangents = [self.operand(tensor, "gradient", leaves) for tensor in tensors[len(leaves) :]]
        pending = self.session.grad(
            [self._handle(index) for index in self._given],
            [self._of.leaves[index].handle for index in self._wanted],
            cotangents,
            # Torch has the say: when it frees its side of the graph, the handles go.
            retain_graph=True,
            create_graph=self.record,
            allow_unused=True,
            is_grads_batched=self._batched,
            detect_anomaly=torch.is_anomaly_enabled() or is_anomaly_enabled(),
            fetch=True,
        )
        return self.take(pending, leaves, [tensors[index].device for index in self._wanted])

    def _handle(self, index: int) -> int:
        ref = self._of.results[index]
        assert ref is not None
        return ref.handle

    def over_batch(
        self, dims: Sequence[int | None], size: int, tensors: Tensors
    ) -> tuple[Gradient, list[torch.Tensor]] | None:
        """The step for a batch of cotangents, and its tensors; None: the batch is not one of cotangents alone."""
        count = len(self._of.leaves)
        if self._batched or any(dim is not None for dim in dims[:count]):
            return None
        moved = [
            tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for dim, tensor in zip(dims[count:], tensors[count:], strict=True)
        ]
        return Gradient(self._of, self._wanted, self._given, self.record, True), [*tensors[:count], *moved]


def _differentiated(step: Gradient, tensors: Tensors, cotangents: list[Any]) -> Results:
    """Runs a gradient's node; for a whole batch at once where the cotangents are one. Raises RuntimeError."""
    if any(one.key() != TransformType.Vmap for one in get_interpreter_stack() or ()):
        raise RuntimeError(NO_TRANSFORMS)
    some = next(filter(is_legacy_batchedtensor, cotangents), None)
    if some is None:
        return Node.apply(step, *tensors, *cotangents)  # type: ignore[no-any-return, no-untyped-call]
    # is_grads_batched, which asks Functions for no rule: out of the batch and back into it as its own code goes. This
    # is how to learn the level.
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    size = torch._remove_batch_dim(some, level, 1, 0).shape[0]
    plain = [torch._remove_batch_dim(one, level, size, 0) for one in cotangents]
    batch = step.over_batch([None] * len(tensors) + [0] * len(plain), size, [*tensors, *plain])
    if batch is None or any(map(is_legacy_batchedtensor, plain)):
        raise RuntimeError(_ONE_BATCH)
    found: Results = Node.apply(batch[0], *batch[1])  # type: ignore[no-untyped-call]
    return tuple(None if one is None else torch._add_batch_dim(one, 0, level) for one in found)


_ONE_BATCH = (
    "a RemoteModule goes with is_grads_batched on one level only: a batch of cotangents, no batch of inputs and no "
    "batch of batches; call it on inputs that are stacked, or differentiate in a loop"
)


class Node(Function):
    """Node.apply(step, *tensors) -> results of step.run(tensors), differentiable by all tensors that require grad."""

    @staticmethod
    def forward(step: Step, *tensors: torch.Tensor) -> Results:
        """See the class."""
        return step.run(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        """Saves what backward needs: the tensors that require grad, and the token."""
        step: Step = inputs[0]
        ctx.set_materialize_grads(False)
        refs = step.results or [None] * len(output)
        ctx.mark_non_differentiable(
            *(result for result, ref in zip(output, refs, strict=True) if result is not None and ref is None)
        )
        ctx.positions = [index for index, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        graph = step.graph(ctx.positions)
        if graph is not None:
            ctx.save_for_backward(*(inputs[1 + index] for index in ctx.positions), _token(graph))

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Gradients by the tensors that need them, with a graph of their own under create_graph.

        Raises PullbackError; OrderUnavailable where the server does not have the graph that is asked for.
        """
        *tensors, token = ctx.saved_tensors
        graph = _graph_of(token)
        wanted = [leaf for leaf, position in enumerate(ctx.positions) if ctx.needs_input_grad[1 + position]]
        given = [
            index
            for index, (cotangent, ref) in enumerate(zip(cotangents, graph.results, strict=True))
            if cotangent is not None and ref is not None
        ]
        gradients: list[torch.Tensor | None] = [None] * len(ctx.needs_input_grad)
        if wanted and given:
            step = Gradient(graph, wanted, given, torch.is_grad_enabled())
            found = _differentiated(step, tensors, [cotangents[index] for index in given])
            for leaf, gradient in zip(wanted, found, strict=True):
                gradients[1 + ctx.positions[leaf]] = gradient
        return tuple(gradients)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], step: Step, *tensors: torch.Tensor) -> tuple[Any, Any]:
        """What is_grads_batched and vectorize=True come to. Raises RuntimeError for batches of anything else."""
        batch = step.over_batch(in_dims[1:], info.batch_size, tensors) if isinstance(step, Gradient) else None
        if batch is None:
            raise RuntimeError(_ONE_BATCH)
        results = Node.apply(batch[0], *batch[1])  # type: ignore[no-untyped-call]
        return results, tuple(None if result is None else 0 for result in results)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Raises NotImplementedError."""
        raise NotImplementedError(NO_FORWARD_MODE)


NO_TRANSFORMS = (
    "a RemoteModule cannot be used inside torch.func transforms (grad, vmap, jvp, ...): pullback.torch.func has some "
    "of its own, each a call of the server; or use torch.autograd.grad with create_graph or is_grads_batched, or "
    "torch.autograd.functional"
)
NO_FORWARD_MODE = (
    "a RemoteModule has no forward mode: use torch.autograd.functional.jvp, which goes backward twice, or "
    "pullback.torch.func.jvp"
)
