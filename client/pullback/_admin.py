"""Administrative calls: they change what a server serves, need rights, and are not repeated once one may have begun.

They are made again only where no server was reached, or where one did not take the token and there is another by now.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

from pullback._errand import errand
from pullback._info import ModelInfo, model_info
from pullback._transport import Transport
from pullback._weights import PIECE, Source, Weights, opened
from pullback_wire import MODEL_METHODS
from pullback_wire.v1 import model_service_pb2 as pb

M = TypeVar("M", bound=Message)

#: Called with the bytes sent so far, and all.
Progress = Callable[[int, int], None]
#: Version as users give it.
Number = str | int | None

_UPLOAD = f"/{MODEL_METHODS['LoadModel'].service}/UploadWeights"
#: Parts that wait for gRPC to take them.
_WAITING = 2
#: Seconds between looks whether the server has ended a call while it takes no parts.
_LOOK_AGAIN = 0.1


async def load(transport: Transport, name: str, version: Number, timeout: float | None) -> ModelInfo:
    """See Client.load_model."""
    request = pb.LoadModelRequest(name=name, version=_number(version))
    answer = await _call(transport, "LoadModel", request, pb.LoadModelResponse, f"load {name!r}", timeout)
    return model_info(answer.model)


async def unload(transport: Transport, name: str, version: Number, delete: bool, timeout: float | None) -> None:
    """See Client.unload_model."""
    request = pb.UnloadModelRequest(name=name, version=_number(version), delete_uploads=delete)
    await _call(transport, "UnloadModel", request, pb.UnloadModelResponse, f"unload {name!r}", timeout)


def upload(
    transport: Transport,
    model: str,
    weights: Weights,
    version: str | int,
    architecture_version: Number,
    timeout: float | None,
    progress: Progress | None,
) -> ModelInfo:
    """See Client.upload_weights. Blocks."""
    what = f"upload {model!r} version {version}"
    with opened(weights) as source:
        header = pb.UploadHeader(
            model=model,
            version=_number(version),
            size_bytes=source.size,
            sha256=source.sha256(),
            architecture_version=_number(architecture_version),
        )
        # Room for a message's tags and lengths.
        most = max(min(PIECE, transport.address.max_message_bytes - 64), 1)

        def send(begin: Callable[[Any], Any]) -> bytes:
            return _send(begin, header, source, most, progress)

        answer = transport.upload(_UPLOAD, send, what, timeout)
    response, _ = transport.read(pb.UploadWeightsResponse, answer, what)
    return model_info(response.model)


def _number(version: Number) -> str:
    return "" if version is None else str(version)


async def _call(
    transport: Transport, name: str, request: Message, response: type[M], what: str, timeout: float | None
) -> M:
    answer, _ = await transport.call(MODEL_METHODS[name], request, (), response, what, timeout, pure=False)
    return answer


def _send(
    begin: Callable[[Any], Any], header: pb.UploadHeader, source: Source, most: int, progress: Progress | None
) -> bytes:
    """Streams an upload, and returns the answer. What raises here, be it Ctrl-C, ends the call at the server too."""
    parts: queue.Queue[bytes | None] = queue.Queue(_WAITING)
    # gRPC's thread takes the parts, this one makes them: so files and `progress` are used where the caller is.
    call = begin(iter(parts.get, None))
    mine = errand.get()
    try:
        with contextlib.nullcontext() if mine is None else mine.ending(call.cancel):
            _hand_over(parts, pb.UploadWeightsRequest(header=header), call)
            sent = 0
            for piece in source.pieces(most):
                if not _hand_over(parts, pb.UploadWeightsRequest(data=bytes(piece)), call):
                    break
                sent += len(piece)
                if progress is not None:
                    progress(sent, source.size)
            else:
                _hand_over(parts, None, call)
            answer: bytes = call.result()
            return answer
    except BaseException:
        call.cancel()
        raise
    finally:
        # gRPC's thread may still wait for a part.
        with contextlib.suppress(queue.Empty):
            while True:
                parts.get_nowait()
        parts.put(None)


def _hand_over(parts: queue.Queue[bytes | None], part: Message | None, call: Any) -> bool:
    """Whether gRPC will take it; False where the call is over."""
    data = None if part is None else part.SerializeToString()
    while not call.done():
        with contextlib.suppress(queue.Full):
            parts.put(data, timeout=_LOOK_AGAIN)
            return True
    return False
