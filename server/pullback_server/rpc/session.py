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
from pullback_server.rpc.journal import Entry, Journal
from pullback_server.rpc.kept import Kept
from pullback_server.rpc.ops import OpTranslator
from pullback_server.rpc.origin import origin_of, told
from pullback_server.rpc.request import ResultLimits, Translator
from pullback_server.rpc.security import Access, SessionUse, caller
from pullback_server.rpc.stream import SessionOptions, Stream
from pullback_server.rpc.transfers import WINDOW, ProtocolBreach
from pullback_server.scheduling import NOBODY, Origin, Pinned, Scheduler
from pullback_server.telemetry import Metrics
from pullback_wire import SESSION_SERVICE, Reason, decode, encode
from pullback_wire.v1 import session_service_pb2 as pb

logger = logging.getLogger(__name__)

#: Seconds a stream may take to say what it wants, and to find a worker that is ready.
_OPENING = 30.0
#: Seconds by which two ends of a session are told apart.
_SAME_TIME = 0.5


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
        journal: Journal,
        access: Access,
    ) -> None:
        self._access = access
        self._journal = journal
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
        """Tells every session that it has so long to end, if it has not been told of an earlier time."""
        end = time.monotonic() + seconds
        if self._draining is not None and end >= self._draining - _SAME_TIME:
            return
        self._draining = end
        for stream in self._streams:
            self._send_away(stream)

    def _send_away(self, stream: Stream) -> None:
        if self._draining is not None:
            left = max(self._draining - time.monotonic(), 0.0)
            # It shall end with its own status, before gRPC ends what is left.
            stream.go_away(left - min(_SAME_TIME, left / 10), "the server is shutting down")

    async def _serve(self, _: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        code = grpc.StatusCode.CANCELLED
        fault: Fault | None = None
        metadata = told(context)
        entry = self._journal.open(SESSION_SERVICE, "Session", metadata, time.monotonic())
        entry.open_session()
        origin = NOBODY
        try:
            entry.check()
            origin = origin_of(context, metadata)
            await self._session(context, origin, entry)
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
            entry.close_session(code.name, fault, origin.caller)
        if fault is not None:
            await entry.abort(context, fault)

    async def _session(self, context: grpc.aio.ServicerContext, origin: Origin, entry: Entry) -> None:
        # It counts from its first byte on: else those that never say what they want would not.
        with SessionUse(caller().usage, self._scheduler) as use:
            opening = await self._opening(context)
            if self._draining is not None:
                raise Fault(Reason.NOT_READY, "the server is shutting down", "", 1.0)
            kept = Kept(self._catalogue)
            try:
                await self._run(context, opening, kept, origin, entry, use)
            finally:
                kept.release()

    async def _run(
        self,
        context: grpc.aio.ServicerContext,
        opening: pb.SessionRequest,
        kept: Kept,
        origin: Origin,
        entry: Entry,
        use: SessionUse,
    ) -> None:
        named = [kept.find(ref.name, ref.version, "open.models.").signature for ref in opening.open.models]
        models = list(dict.fromkeys((signature.name, signature.id) for signature in named))
        options = self._options
        deadline = time.monotonic() + _OPENING
        pinned = await Pinned.open(self._scheduler, deadline, origin, models)
        try:
            stream = Stream(
                context,
                pinned,
                opening.open,
                options,
                OpTranslator(kept, Translator(kept, self._limits)),
                self._metrics,
                self._executor,
                use,
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
            await context.send_initial_metadata(entry.trailers(None))
            await context.write(encode(answer.SerializeToString(), ()))
            self._streams.add(stream)
            # Where that was said while it was opened.
            self._send_away(stream)
            try:
                with self._access.keep(caller(), "session", stream.end):
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
        frame, _ = decode(pb.SessionRequest, data, bounded=True)
        if frame.WhichOneof("frame") != "open":
            raise ProtocolBreach(f"the first frame is {frame.WhichOneof('frame')!r}, expected 'open'")
        return frame
