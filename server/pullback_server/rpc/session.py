"""SessionService: one stream is one session, pinned to one worker."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor

import grpc

from pullback_server.faults import Fault
from pullback_server.rpc import status
from pullback_server.rpc.catalogue import Catalogue
from pullback_server.rpc.kept import Kept
from pullback_server.rpc.ops import OpTranslator
from pullback_server.rpc.origin import origin_of
from pullback_server.rpc.request import ResultLimits, Translator
from pullback_server.rpc.stream import SessionOptions, Stream
from pullback_server.rpc.transfers import WINDOW, ProtocolBreach
from pullback_server.scheduling import Pinned, Scheduler
from pullback_server.telemetry import Metrics
from pullback_wire import Reason, decode, encode
from pullback_wire.v1 import session_service_pb2 as pb

logger = logging.getLogger(__name__)

#: Seconds a stream may take to say what it wants, and to find a worker that is ready.
_OPENING = 30.0


class SessionHandler:
    """Serves the streams."""

    def __init__(
        self,
        options: SessionOptions,
        catalogue: Catalogue,
        limits: ResultLimits,
        scheduler: Scheduler,
        metrics: Metrics,
        executor: Executor,
    ) -> None:
        self._options = options
        self._catalogue = catalogue
        self._limits = limits
        self._scheduler = scheduler
        self._metrics = metrics
        self._executor = executor
        self._streams: set[Stream] = set()
        self._draining: float | None = None

    def method_handler(self) -> grpc.RpcMethodHandler:
        """The gRPC handler of SessionService.Session. No (de)serialisers, as in `unary`."""
        return grpc.stream_stream_rpc_method_handler(self._serve)

    def drain(self, seconds: float) -> None:
        """Tells every session that it has so long to end."""
        self._draining = time.monotonic() + seconds
        for stream in self._streams:
            stream.go_away(seconds, "the server is shutting down")

    async def _serve(self, _: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        code = grpc.StatusCode.CANCELLED
        fault: Fault | None = None
        try:
            await self._session(context)
            code = grpc.StatusCode.OK
        except asyncio.CancelledError:
            raise
        except ProtocolBreach as error:
            fault = Fault(Reason.MALFORMED_REQUEST, str(error))
        except Exception as error:
            fault = status.fault_of(error, "a session")
        finally:
            if fault is not None:
                code = status.grpc_code(fault.reason)
            self._metrics.sessions_ended.labels(code.name).inc()
        if fault is not None:
            await context.abort(code, status.clip(fault.message), ((status.DETAILS_KEY, status.details(fault)),))

    async def _session(self, context: grpc.aio.ServicerContext) -> None:
        opening = await self._opening(context)
        if self._draining is not None:
            raise Fault(Reason.NOT_READY, "the server is shutting down", "", 1.0)
        kept = Kept(self._catalogue)
        try:
            await self._run(context, opening, kept)
        finally:
            kept.release()

    async def _run(self, context: grpc.aio.ServicerContext, opening: pb.SessionRequest, kept: Kept) -> None:
        named = [kept.find(ref.name, ref.version, "open.models.").signature for ref in opening.open.models]
        models = [(signature.name, signature.id) for signature in named]
        options = self._options
        deadline = time.monotonic() + _OPENING
        pinned = await Pinned.open(self._scheduler, deadline, origin_of(context), models)
        try:
            stream = Stream(
                context,
                pinned,
                opening.open,
                options,
                OpTranslator(kept, Translator(kept, self._limits)),
                self._scheduler,
                self._metrics,
                self._executor,
            )
            opened = pb.SessionOpened(
                session_id=secrets.token_hex(8),
                budget_bytes=stream.budget,
                credit_bytes=WINDOW,
                device=pinned.worker.device,
                max_message_bytes=options.max_message_bytes,
            )
            opened.heartbeat_timeout.FromMilliseconds(int(options.heartbeat_seconds * 1000))
            opened.idle_timeout.FromMilliseconds(int(options.idle_seconds * 1000))
            answer = pb.SessionResponse(op=opening.op, opened=opened)
            await context.write(encode(answer.SerializeToString(), ()))
            self._streams.add(stream)
            try:
                await stream.serve(opening.op)
            finally:
                self._streams.discard(stream)
        finally:
            pinned.close()

    async def _opening(self, context: grpc.aio.ServicerContext) -> pb.SessionRequest:
        try:
            async with asyncio.timeout(_OPENING):
                data = await context.read()
        except TimeoutError:
            raise Fault(Reason.DEADLINE_EXCEEDED, f"nothing came within {_OPENING:g} s") from None
        if data is grpc.aio.EOF:
            raise ProtocolBreach("the stream ended before its first frame")
        frame, _ = decode(pb.SessionRequest, data)
        if frame.WhichOneof("frame") != "open":
            raise ProtocolBreach(f"the first frame is {frame.WhichOneof('frame')!r}, expected 'open'")
        return frame
