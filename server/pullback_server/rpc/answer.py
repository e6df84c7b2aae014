"""From an `Outcome` to the response message of its RPC."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

from google.protobuf.message import Message

from pullback_server.fleet.seam import Buffer
from pullback_server.job import BlockRef, GradRef, Kind, Outcome, TensorRef, split_id
from pullback_wire import PAYLOADS_FIELD, encode
from pullback_wire.v1 import gradient_service_pb2 as pb
from pullback_wire.v1 import tensor_pb2

#: Answers larger than this are joined off the event loop; joining gives up the interpreter lock from 1 MiB on.
_JOIN_ASIDE = 1 << 20


async def join(header: bytes, payloads: Sequence[Buffer], executor: Executor, field: int = PAYLOADS_FIELD) -> bytes:
    """A message and its payloads in one. field: number of theirs."""
    if sum(len(payload) for payload in payloads) < _JOIN_ASIDE:
        return encode(header, payloads, field)
    # Not cancelled half-way: leaving the reply's context gives the memory that is being read back to the worker.
    joining = asyncio.get_running_loop().run_in_executor(executor, encode, header, payloads, field)
    try:
        return await asyncio.shield(joining)
    except asyncio.CancelledError:
        await asyncio.wait([joining])
        raise


def header(kind: Kind, outcome: Outcome, id: str) -> bytes:
    """`response`, serialised. Callers ask for the same thing again and again, so that the latest are kept."""
    if outcome.norms or outcome.blocks:
        return response(kind, outcome, id).SerializeToString()
    return _header(
        kind,
        id,
        tuple(outcome.outputs),
        tuple(outcome.gradients),
        tuple(outcome.hvps),
        tuple(outcome.cotangent_derivatives),
    )


@functools.lru_cache(1024)
def _header(
    kind: Kind,
    id: str,
    outputs: tuple[TensorRef, ...],
    gradients: tuple[GradRef, ...],
    hvps: tuple[GradRef, ...],
    derivatives: tuple[GradRef, ...],
) -> bytes:
    outcome = Outcome(list(outputs), list(gradients), list(hvps), list(derivatives))
    return response(kind, outcome, id).SerializeToString()


def response(kind: Kind, outcome: Outcome, id: str) -> Message:
    """The message, without payloads: its tensors refer to them by the outcome's own indices.

    id: of the version that answered.
    """
    message: Any = _response(kind, outcome)
    message.model_version, message.model_revision = split_id(id)
    found: Message = message
    return found


def _response(kind: Kind, outcome: Outcome) -> Any:
    outputs = [_tensor(ref) for ref in outcome.outputs]
    if kind == "evaluate":
        return pb.EvaluateResponse(outputs=outputs)
    if kind == "vjp":
        return pb.ComputeVjpResponse(outputs=outputs, gradients=_gradients(outcome.gradients), norms=outcome.norms)
    if kind == "jvp":
        return pb.ComputeJvpResponse(outputs=outputs, tangents=_gradients(outcome.gradients))
    if kind == "hvp":
        return pb.ComputeHvpResponse(
            outputs=outputs,
            gradients=_gradients(outcome.gradients),
            hvps=_gradients(outcome.hvps),
            cotangent_derivatives=_gradients(outcome.cotangent_derivatives),
        )
    blocks = [_block(ref) for ref in outcome.blocks]
    if kind == "jacobian":
        return pb.ComputeJacobianResponse(outputs=outputs, blocks=blocks)
    return pb.ComputeHessianResponse(outputs=outputs, gradients=_gradients(outcome.gradients), blocks=blocks)


def tensors_of(message: Any) -> Iterator[tensor_pb2.Tensor]:
    """Every tensor of a response that has bytes."""
    yield from message.outputs
    for field in ("gradients", "tangents", "hvps", "cotangent_derivatives", "blocks"):
        for element in getattr(message, field, ()):
            if not element.unused:
                yield element.value


def _tensor(ref: TensorRef) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(name=ref.name, dtype=ref.dtype, shape=ref.shape, payload=ref.payload)  # type: ignore[arg-type]


def _gradients(refs: Sequence[GradRef]) -> list[pb.Gradient]:
    return [
        pb.Gradient(name=ref.name, unused=True)
        if ref.value is None
        else pb.Gradient(name=ref.name, value=_tensor(ref.value))
        for ref in refs
    ]


def _block(ref: BlockRef) -> pb.Block:
    if ref.value is None:
        return pb.Block(row=ref.row, column=ref.column, unused=True)
    return pb.Block(row=ref.row, column=ref.column, value=_tensor(ref.value))
