"""The autograd graph of a model, from the worker that draws it."""

from __future__ import annotations

from typing import cast

from pullback_server.faults import Fault
from pullback_server.job import GraphRecord, Job, Outcome, split_id
from pullback_server.rpc.catalogue import Catalogue
from pullback_server.rpc.unary import Call
from pullback_server.scheduling import Scheduler
from pullback_wire import Reason
from pullback_wire.v1 import function_pb2
from pullback_wire.v1 import model_service_pb2 as pb

#: Nodes where the request does not say, and at most.
_NODES, _MOST_NODES = 2_000, 20_000
_KINDS = {
    "input": pb.GRAPH_NODE_KIND_INPUT,
    "parameter": pb.GRAPH_NODE_KIND_PARAMETER,
    "operation": pb.GRAPH_NODE_KIND_OPERATION,
    "output": pb.GRAPH_NODE_KIND_OUTPUT,
}


class Graphs:
    """Answers GetModelGraph. A job like any other: it waits its turn, and has a deadline."""

    def __init__(self, catalogue: Catalogue, scheduler: Scheduler) -> None:
        self._catalogue = catalogue
        self._scheduler = scheduler

    async def __call__(self, request: pb.GetModelGraphRequest, call: Call) -> bytes:
        """Raises Fault."""
        signature = self._catalogue.find(request.name, request.version).signature
        job = _job(signature.name, signature.id, request)
        scheduled = await self._scheduler.submit(job, (), call.deadline, call.origin)
        with scheduled.reply as reply:
            found = cast(Outcome, reply.outcome).graph
        if found is None:
            raise Fault(Reason.INTERNAL, "the worker sent no graph")
        return _response(split_id(job.version)[0], found).SerializeToString()


def _job(name: str, id: str, request: pb.GetModelGraphRequest) -> Job:
    if request.mode not in function_pb2.Mode.values():
        raise Fault(Reason.BAD_OPTION, f"mode is {request.mode}, expected MODE_EVAL or MODE_TRAIN", "mode")
    if request.max_nodes < 0:
        raise Fault(Reason.BAD_OPTION, f"max_nodes is {request.max_nodes}, expected 0 or more", "max_nodes")
    return Job(
        kind="graph",
        model=name,
        version=id,
        loss=None,
        train=request.mode == function_pb2.MODE_TRAIN,
        seed=None,
        inputs=[],
        parameters=[],
        targets=[],
        wrt=[],
        cotangents=[],
        batched=False,
        tangents=[],
        allow_unused=True,
        return_outputs=False,
        return_cotangent_derivatives=False,
        result_dtype=0,
        max_norm=None,
        max_result_bytes=0,
        max_cotangents=0,
        max_nodes=min(request.max_nodes or _NODES, _MOST_NODES),
    )


def _response(version: str, found: GraphRecord) -> pb.GetModelGraphResponse:
    return pb.GetModelGraphResponse(
        version=version,
        nodes=[
            pb.GraphNode(
                id=number,
                kind=_KINDS[node.kind],
                name=node.name,
                module=node.module,
                dtype=node.dtype,  # type: ignore[arg-type]
                shape=node.shape,
            )
            for number, node in enumerate(found.nodes)
        ],
        edges=[pb.GraphEdge(source=source, target=target) for source, target in found.edges],
        truncated=found.truncated,
    )
