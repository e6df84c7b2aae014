"""ModelService.UploadWeights: safetensors, streamed, become a new version of an architecture that is registered."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator

import grpc

from pullback_server.faults import Fault
from pullback_server.fleet.seam import LoadFailure
from pullback_server.hosting.manifest_paths import is_version
from pullback_server.registry import Curator, UploadStore
from pullback_server.registry.incoming import Incoming
from pullback_server.registry.threads import to_end_or_undone
from pullback_server.rpc import status
from pullback_server.rpc.catalogue import Catalogue
from pullback_server.rpc.interruptible import Interruptible
from pullback_server.rpc.journal import Journal
from pullback_server.rpc.origin import told
from pullback_server.rpc.security import caller
from pullback_server.telemetry import Metrics
from pullback_wire import MODEL_METHODS, Reason
from pullback_wire.framing import parse
from pullback_wire.v1 import model_service_pb2 as pb

logger = logging.getLogger(__name__)

#: Seconds that a caller may keep silent between two parts.
_SILENCE = 60.0
#: An upload must have come within so many seconds, and one for so many bytes.
_SECONDS, _BYTES_PER_SECOND = 60.0, 64 << 10
_NAME = "UploadWeights"


class UploadHandler:
    """Takes uploads. store: where they are kept; None: there are none."""

    def __init__(
        self,
        catalogue: Catalogue,
        curator: Curator,
        store: UploadStore | None,
        metrics: Metrics,
        journal: Journal,
    ) -> None:
        self._journal = journal
        self._catalogue = catalogue
        self._curator = curator
        self._store = store
        self._metrics = metrics
        self._uploads = Interruptible()

    async def close(self) -> None:
        """Interrupts the uploads under way."""
        await self._uploads.close()

    def method_handler(self) -> grpc.RpcMethodHandler:
        """The gRPC handler. No (de)serialisers, as in `unary`."""
        return grpc.stream_unary_rpc_method_handler(self._serve)

    async def _serve(self, _: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        began = time.monotonic()
        in_flight = self._metrics.in_flight.labels(_NAME)
        in_flight.inc()
        code = grpc.StatusCode.CANCELLED
        fault: Fault | None = None
        entry = self._journal.open(MODEL_METHODS["GetModel"].service, _NAME, told(context), began)
        answer, model = b"", ""
        try:
            entry.check()
            header = await self._uploads.result(self._header(context))
            model = header.model
            answer = await self._uploads.result(self._upload(header, context))
            code = grpc.StatusCode.OK
        except asyncio.CancelledError:
            raise
        except LoadFailure as error:
            fault = Fault(Reason.LOAD_FAILED, str(error))
        except Exception as error:
            fault = status.fault_of(error, "an upload")
        finally:
            if fault is not None:
                code = status.grpc_code(fault.reason)
            in_flight.dec()
            entry.close(code.name, fault, model=model, sent=len(answer))
        if fault is not None:
            await entry.abort(context, fault)
        context.set_trailing_metadata(entry.trailers(None))
        return answer

    async def _header(self, context: grpc.aio.ServicerContext) -> pb.UploadHeader:
        part = await self._part(context)
        if part is None or part.WhichOneof("part") != "header":
            raise Fault(Reason.MALFORMED_REQUEST, "the first part of an upload is its header", "header")
        return part.header

    async def _upload(self, header: pb.UploadHeader, context: grpc.aio.ServicerContext) -> bytes:
        who = caller()
        who.need_model(header.model, "header.model")
        who.usage.bring(max(header.size_bytes, 0))
        store = self._store
        if store is None:
            raise Fault(Reason.ADMIN_DISABLED, "this server takes no uploads (it was started without --uploads)")
        architecture = self._architecture(header)
        _check_header(header)
        self._curator.check_upload(header.model, header.version)
        incoming = await to_end_or_undone(lambda: store.begin(header.size_bytes, header.sha256), Incoming.discard)
        try:
            await self._receive(incoming, context)
            await incoming.finish()
            # It may have taken an hour.
            who.recheck("upload")
            logger.info("principal %r uploaded version %s of model %r", who.name, header.version, header.model)
            await self._curator.upload(header.model, header.version, architecture, incoming)
        finally:
            # Also what a cancelled caller leaves; of what was kept there is nothing here any more.
            await asyncio.shield(asyncio.to_thread(incoming.discard))
        model = self._catalogue.describe_any(header.model, header.version, parameters=True)
        return pb.UploadWeightsResponse(model=model).SerializeToString()

    async def _receive(self, incoming: Incoming, context: grpc.aio.ServicerContext) -> None:
        seconds = _SECONDS + incoming.size / _BYTES_PER_SECOND
        try:
            async with asyncio.timeout(seconds):
                while (part := await self._part(context)) is not None:
                    if part.WhichOneof("part") != "data":
                        raise Fault(Reason.MALFORMED_REQUEST, "after its header an upload has data alone", "data")
                    self._metrics.received_bytes.labels(_NAME).inc(len(part.data))
                    await incoming.write(part.data)
        except TimeoutError:
            raise Fault(
                Reason.DEADLINE_EXCEEDED, f"the {incoming.size} bytes of the upload did not come within {seconds:.0f} s"
            ) from None

    def _architecture(self, header: pb.UploadHeader) -> str:
        """The version whose architecture is meant."""
        signature = self._catalogue.find(header.model, header.architecture_version, "header.").signature
        return self._curator.architecture(signature.name, signature.version)

    async def _part(self, context: grpc.aio.ServicerContext) -> pb.UploadWeightsRequest | None:
        """The next part; None when there is none."""
        try:
            async with asyncio.timeout(_SILENCE):
                data = await context.read()
        except TimeoutError:
            raise Fault(Reason.DEADLINE_EXCEEDED, f"nothing came for {_SILENCE:g} s") from None
        if data is grpc.aio.EOF:
            return None
        return parse(pb.UploadWeightsRequest, data)


def _check_header(header: pb.UploadHeader) -> None:
    """Raises Fault (BAD_UPLOAD)."""
    number = header.version
    if not is_version(number):
        raise Fault(
            Reason.BAD_UPLOAD,
            f"version is {number!r}, expected a number of at most 18 digits, without leading zeros",
            "header.version",
        )
    if header.size_bytes < 8:
        raise Fault(
            Reason.BAD_UPLOAD,
            f"size_bytes is {header.size_bytes}, no safetensors file is as short",
            "header.size_bytes",
        )
    if len(header.sha256) != 32:
        raise Fault(Reason.BAD_UPLOAD, f"sha256 has {len(header.sha256)} bytes, expected 32", "header.sha256")
