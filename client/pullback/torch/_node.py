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
from torch.autograd.function import Function, FunctionCtx

from pullback._lineage import Ref
from pullback._session import Session

Tensors = Sequence[torch.Tensor]
Results = tuple[torch.Tensor | None, ...]


@dataclass
class Graph:
    """What a node's backward needs of the server.

    leaves: one for each tensor of the node that requires grad, in order.
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

    record: whether it will be differentiated: the server keeps a graph, and `graph` tells how to reach it.
    """

    def __init__(self, record: bool) -> None:
        self.record = record
        self.graph: Graph | None = None

    def run(self, tensors: Tensors) -> Results:
        """Does it, on the node's tensors. Raises PullbackError."""
        raise NotImplementedError

    def gradient(self, graph: Graph, wanted: list[int], given: list[int]) -> Step:
        """The step that differentiates results of this one's like. See Node.backward."""
        raise NotImplementedError

    def batched(self, in_dims: Sequence[int | None], size: int, tensors: Tensors) -> tuple[Step, list[torch.Tensor]]:
        """The step for a whole batch, and its tensors with the batch in front. Raises RuntimeError."""
        raise NotImplementedError


class Node(Function):
    """Node.apply(step, *tensors) -> results of `step.run(tensors)`, differentiable by all tensors that require grad."""

    @staticmethod
    def forward(step: Step, *tensors: torch.Tensor) -> Results:
        """See the class."""
        return step.run(tensors)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Results) -> None:
        """Saves what backward needs: the tensors that require grad, and the token."""
        step, *tensors = inputs
        # The step itself is not kept: through it the graph would live as long as the node.
        graph, step.graph = step.graph, None
        ctx.set_materialize_grads(False)
        refs = [None] * len(output) if graph is None else graph.results
        constant = [result for result, ref in zip(output, refs, strict=True) if result is not None and ref is None]
        ctx.mark_non_differentiable(*constant)
        if graph is None or len(constant) == len(output):
            return
        needed = ctx.needs_input_grad[1:]  # type: ignore[attr-defined]
        saved = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
        assert len(saved) == len(graph.leaves)
        ctx.positions = [index for index, need in enumerate(needed) if need]  # type: ignore[attr-defined]
        ctx.pull = step.pull  # type: ignore[attr-defined]
        ctx.save_for_backward(*saved, _token(graph))

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Any:
        """Gradients by the tensors that need them, each with a graph of its own under create_graph.

        Raises PullbackError; OrderUnavailable where the server does not have the graph that is asked for.
        """
        *tensors, token = ctx.saved_tensors
        graph = _graph_of(token)
        needs = ctx.needs_input_grad
        gradients: list[torch.Tensor | None] = [None] * len(needs)
        wanted = [leaf for leaf, position in enumerate(ctx.positions) if needs[1 + position]]
        given = [
            index for index, one in enumerate(cotangents) if one is not None and graph.results[index] is not None
        ]
        if not wanted or not given:
            return tuple(gradients)
        step = ctx.pull(graph, wanted, given, torch.is_grad_enabled())
        found = Node.apply(step, *tensors, *(cotangents[index] for index in given))
        for leaf, gradient in zip(wanted, found, strict=True):
            gradients[1 + ctx.positions[leaf]] = gradient
        return tuple(gradients)
