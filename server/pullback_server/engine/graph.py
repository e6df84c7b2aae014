"""The autograd graph of a model, as a backward would walk it: found on a sample that fits its signature."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch

from pullback_server.engine._dtypes import WIRE
from pullback_server.engine.attempt import attempt
from pullback_server.engine.call import Again, Call, Forward, WritesInputs
from pullback_server.engine.guards import compiled_code_as_written
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.places import Places, followed, place_of
from pullback_server.engine.results import EngineResult
from pullback_server.engine.samples import choices, sample, shapes
from pullback_server.engine.trial import job_by_everything
from pullback_server.faults import Fault
from pullback_server.job import GraphNode, GraphRecord, Job, Outcome
from pullback_wire import Reason

#: How often a sample is run again with what was learned about the model.
_ATTEMPTS = 5


def graph(job: Job, hosted: HostedModel) -> EngineResult:
    """The graph of a forward. Raises Fault, and what torch raises when memory runs out."""
    if not choices(hosted):
        raise Fault(Reason.UNSUPPORTED_BY_MODEL, _no_sample(hosted))
    failure: Fault | None = None
    # All inputs that declare a shape, and where that does not run, those alone that must be given.
    for records in reversed(choices(hosted)):
        for extents in shapes(records):
            inputs = sample(records, extents, torch.Generator().manual_seed(0), cautious=hosted.device.type == "cuda")
            try:
                return EngineResult(Outcome(graph=_of_sample(job, hosted, inputs)), [])
            except Fault as fault:
                failure = failure or fault
    if failure is None:
        raise Fault(Reason.UNSUPPORTED_BY_MODEL, f"{hosted.owner}: every sample that fits its inputs is too large")
    if failure.reason is not Reason.MODEL_ERROR:
        raise failure
    raise Fault(
        Reason.UNSUPPORTED_BY_MODEL,
        f"{hosted.owner}: no sample made of its declared inputs makes it run ({failure.message})",
    ) from failure


def _no_sample(hosted: HostedModel) -> str:
    missing = [record.name for record in hosted.input_records() if record.shape is None and not record.optional]
    if not missing:
        return f"{hosted.owner} declares no shape of any input, so that there is no sample to draw its graph with"
    return (
        f"{hosted.owner} declares no shape of its input {missing[0]!r}, so that there is no sample to draw its graph "
        "with; its author can say inputs={...} when it is registered"
    )


def _of_sample(job: Job, hosted: HostedModel, inputs: dict[str, torch.Tensor]) -> GraphRecord:
    """Raises Fault, and what torch raises when memory runs out."""
    for _ in range(_ATTEMPTS):
        # A seed, so that the worker's generators are afterwards where they were.
        sampled, tensors = job_by_everything("vjp", hosted, inputs, seed=0)
        sampled = msgspec.structs.replace(sampled, train=job.train, copy_inputs=hosted.writes_inputs)
        tensors = [tensor.to(hosted.device, copy=True) for tensor in tensors]

        def work(call: Call) -> GraphRecord:
            # Compiled code, and a compiled plan, have a graph of one node.
            with compiled_code_as_written(), followed(Places()):
                fw = call.forward(watch=True)
            return _Drawing(call, fw, job.max_nodes).record()

        with contextlib.suppress(Again, WritesInputs):
            return attempt(sampled, hosted, lambda made=sampled, given=tensors: Call(made, hosted, given), work)  # type: ignore[misc]
    raise Fault(Reason.INTERNAL, f"{hosted.owner}: no attempt of {_ATTEMPTS} to draw its graph came to an end")


class _Drawing:
    """The nodes of one forward, in their order."""

    def __init__(self, call: Call, fw: Forward, most: int) -> None:
        self._call = call
        self._fw = fw
        self._most = most
        #: What stands for the leaves of the graph, by identity.
        self._stands: dict[int, str] = {}
        for wrt, tensor in zip(call.job.wrt, fw.wrt, strict=True):
            self._stands[id(tensor)] = f"{wrt.place}:{wrt.name}"

    def record(self) -> GraphRecord:
        """As many nodes as are wanted; where there are more, those nearest to the inputs."""
        inputs, outputs = self._call.inputs, self._fw.outputs
        parameters = self._call.hosted.parameters
        room = self._most - len(inputs) - len(outputs)
        operations, used, complete = self._chosen(room)
        unused = [name for name in parameters if name not in used]
        spare = room - len(operations) - len(used)
        shown = used | set(unused[: max(spare, 0)])
        record = GraphRecord([], [], not complete or spare < len(unused))
        ids: dict[Any, int] = {}

        def add(kind: str, key: Any, name: str, module: str, dtype: int, shape: Sequence[int]) -> int:
            ids[key] = len(record.nodes)
            record.nodes.append(GraphNode(kind, name, module, dtype, tuple(shape)))
            return ids[key]

        for name, tensor in inputs.items():
            add("input", f"input:{name}", name, "", WIRE.get(tensor.dtype, 0), tensor.shape)
        for name, parameter in parameters.items():
            if name in shown:
                module = name.rpartition(".")[0]
                add("parameter", f"param:{name}", name, module, WIRE.get(parameter.dtype, 0), parameter.shape)
        for node in operations:
            place = place_of(node)
            dtype, shape = _result_of(node)
            number = add("operation", node, node.name(), "" if place is None else place.path, dtype, shape)
            sources = (ids.get(self._source(one)) for one, _ in node.next_functions if one is not None)
            record.edges += [(one, number) for one in dict.fromkeys(sources) if one is not None]
        for name, tensor in outputs.items():
            number = add("output", f"output:{name}", name, "", WIRE.get(tensor.dtype, 0), tensor.shape)
            source = self._leaf(tensor) if tensor.grad_fn is None else self._source(tensor.grad_fn)
            if source in ids:
                record.edges.append((ids[source], number))
        if len(record.nodes) > self._most:
            record.nodes, record.truncated = record.nodes[: self._most], True
            record.edges = [(a, b) for a, b in record.edges if a < self._most and b < self._most]
        return record

    def _chosen(self, room: int) -> tuple[list[Any], set[str], bool]:
        """The operations to show, the parameters that they use, and whether these are all there are."""
        operations: list[Any] = []
        used: set[str] = set()
        for node in _in_order([t.grad_fn for t in self._fw.outputs.values() if t.grad_fn is not None]):
            if isinstance(self._source(node), str):
                continue
            keys = [self._source(one) for one, _ in node.next_functions if one is not None]
            more = {key.removeprefix("param:") for key in keys if isinstance(key, str) and key.startswith("param:")}
            if len(operations) + 1 + len(used | more) > room:
                return operations, used, False
            operations.append(node)
            used |= more
        return operations, used, True

    def _source(self, node: Any) -> Any:
        """What a node stands for: a leaf's name where it gathers a leaf's gradient, else itself."""
        variable = getattr(node, "variable", None)
        if variable is not None:
            return self._stands.get(id(variable), node)
        if self._call.copies and node.name() == "CloneBackward0" and place_of(node) is None:
            # The copy that a model gets which writes into its inputs.
            (following, _), *_ = node.next_functions
            return self._source(following) if following is not None else node
        return node

    def _leaf(self, tensor: torch.Tensor) -> Any:
        return self._stands.get(id(tensor))


def _result_of(node: Any) -> tuple[int, tuple[int, ...]]:
    """dtype and shape of what an operation returned first; 0 and () where it does not say."""
    for meta in node._input_metadata[:1]:
        return WIRE.get(meta.dtype, 0), tuple(meta.shape)
    return 0, ()


def _in_order(roots: Sequence[Any]) -> Iterator[Any]:
    """Every node, each after those that it leads to; always in the same order for the same model."""
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(root, False) for root in reversed(roots)]
    while stack:
        node, left = stack.pop()
        if left:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((one, False) for one, _ in reversed(node.next_functions) if one is not None)
