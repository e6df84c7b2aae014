"""The jobs of one worker process: their way there, their answers, and the shared memory they use."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from pullback_server import tracking
from pullback_server.faults import Fault
from pullback_server.fleet.channel import Channel
from pullback_server.fleet.copying import Copier
from pullback_server.fleet.reply import Lease, LocalReply
from pullback_server.fleet.seam import Buffer, Obituary, WorkerLost
from pullback_server.fleet.upload import Upload
from pullback_server.fleet.watchdog import Watchdog, Work
from pullback_server.ipc import messages
from pullback_server.ipc.frames import MAX_FDS, Frame
from pullback_server.ipc.layout import INLINE_LIMIT, place, spaced
from pullback_server.ipc.segments import Arena, Mappings, Segment
from pullback_server.job import Batch, BatchOutcome, FaultRecord, Job
from pullback_server.ops import SessionJob
from pullback_wire import Reason

_log = logging.getLogger(__name__)

#: Seconds after which news of segments is sent although there is no job to take it along.
_NOTE_DELAY = 0.05


class Posted:
    """A job on its way. `transfer`: seconds that writing its bytes took. `uploads`: segments that are its own.

    request: for which it was posted.
    """

    __slots__ = ("answer", "job", "number", "obituary", "request", "segment", "transfer", "uploads")

    def __init__(
        self, job: Job | Batch | SessionJob, segment: Segment | None, transfer: float, uploads: Sequence[Segment] = ()
    ) -> None:
        self.job = job
        self.segment = segment
        self.transfer = transfer
        self.uploads = uploads
        self.number = 0
        self.obituary: Obituary | None = None
        self.request = tracking.current()
        self.answer: asyncio.Future[LocalReply | messages.Again | Fault | WorkerLost]
        self.answer = asyncio.get_running_loop().create_future()


class Jobs:
    """Sends jobs over a channel and takes their answers. Belongs to one event loop.

    on_room: called when a job has left the worker, be it that nobody waits for it any more.
    limit_of: seconds that a job may compute. on_overdue: called when one does for longer; the worker is to be ended.
    """

    def __init__(
        self,
        name: str,
        channel: Channel,
        copier: Copier,
        idle_bytes: int,
        on_room: Callable[[], None],
        limit_of: Callable[[Work], float],
        on_overdue: Callable[[float], None],
    ) -> None:
        self._name = name
        self._channel = channel
        self._copier = copier
        self._on_room = on_room
        self._loop = asyncio.get_running_loop()
        self._arena = Arena(idle_bytes)
        self._mappings = Mappings(writable=False)
        self._count = 0
        self._writing = 0
        #: In the order they were sent, which is the order in which the worker takes them.
        self._sent: dict[int, Posted] = {}
        self._note = messages.Note()
        self._note_timer: asyncio.TimerHandle | None = None
        self._over = False
        self._watchdog = Watchdog(self._computing, limit_of, on_overdue)
        #: Whether the worker has ever computed a job.
        self.proven = False
        #: Jobs that were not begun, since their time had passed or nobody waited for them any more.
        self.passed_over = 0
        #: Bytes that the worker's allocator held after its latest job; None: it did not say.
        self.device_memory: int | None = None

    @property
    def outstanding(self) -> int:
        return len(self._sent) + self._writing

    async def run(
        self, job: Job, views: Sequence[memoryview], deadline: float, obituary: Obituary | None = None
    ) -> LocalReply | messages.Again:
        """Computes one job once; `Again`: the model wrote into the job's inputs. Otherwise as `seam.Worker.run`."""
        posted = await self.post(job, views, deadline)
        posted.obituary = obituary
        return await self.answer(posted)

    async def post(
        self,
        job: Job | Batch | SessionJob,
        views: Sequence[memoryview],
        deadline: float,
        uploads: Sequence[Upload] = (),
    ) -> Posted:
        """Sends one job; whoever posts one after the other has them computed in that order.

        uploads: payloads whose indices follow those of `views`. They are the job's from now on, whatever happens.
        """
        segments = [upload.take() for upload in uploads]
        try:
            if time.monotonic() >= deadline:
                raise _expired()
            began = time.perf_counter()
            lengths = [len(view) for view in views]
            _, size = place(lengths)
            segment = None if size <= INLINE_LIMIT else await self._write(views, size)
        except BaseException:
            self._discard(segments)
            raise
        call = Posted(job, segment, time.perf_counter() - began, segments)
        self._announce(segments)
        self._send(call, views, lengths, deadline, [upload.size for upload in uploads])
        return call

    async def answer(self, call: Posted) -> LocalReply | messages.Again:
        """Waits for a posted job. Cancelling this abandons the job."""
        try:
            answer = await call.answer
        except asyncio.CancelledError:
            self.abandon(call)
            raise
        if isinstance(answer, Exception):
            raise answer
        return answer

    def abandon(self, call: Posted) -> None:
        """Gives a posted job up that nobody waits for."""
        if not call.answer.done():
            call.answer.cancel()
        if call.answer.cancelled():
            self._channel.send(messages.encode(messages.Cancel(call.number)))
        # The answer came in the very turn in which whoever waited went away.
        elif isinstance(answer := call.answer.result(), LocalReply):
            answer.leave()

    def pass_over(self, call: Posted, member: int) -> None:
        """Nobody waits for a member of a posted batch any more."""
        if not call.answer.done():
            self._channel.send(messages.encode(messages.Cancel(call.number, member)))

    def _computing(self) -> tuple[int, Work] | None:
        """The job that the worker has been at since it answered the one before."""
        number = next(iter(self._sent), None)
        return None if number is None else (number, self._sent[number].job)

    def upload(self, size: int) -> Upload:
        """Memory of this worker's for `size` bytes that come bit by bit. Raises Fault where there is none."""
        if self._over:
            raise self._lost(suspect=False)
        try:
            return Upload(self._arena.take(size), size, lambda segment: self._discard([segment]))
        except OSError as error:
            raise _no_memory(size, error) from error

    def end_session(self, session: int) -> None:
        """Has the worker free everything that a session holds there."""
        self._channel.send(messages.encode(messages.EndSession(session)))

    def _announce(self, segments: Sequence[Segment]) -> None:
        """Sends descriptors ahead of the job that refers to them; a lost connection shows when the job is sent."""
        for first in range(0, len(segments), MAX_FDS):
            some = segments[first : first + MAX_FDS]
            slots = [messages.Slot(segment.id, segment.size) for segment in some]
            self._channel.send(messages.encode(messages.Uploaded(slots)), (), [segment.fd for segment in some])

    def _discard(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            self._arena.discard(segment)

    def _send(
        self,
        call: Posted,
        views: Sequence[memoryview],
        lengths: list[int],
        deadline: float,
        sizes: Sequence[int],
    ) -> None:
        self._count += 1
        number, segment = self._count, call.segment
        uploads = [(segment.id, size) for segment, size in zip(call.uploads, sizes, strict=True)]
        try:
            slot = None
            tail: Sequence[Buffer] = ()
            fds: Sequence[int] = ()
            if segment is None:
                tail = spaced(views)
            elif segment.announced:
                slot = messages.Slot(segment.id)
            else:
                slot = messages.Slot(segment.id, segment.size)
                fds = (segment.fd,)
                segment.announced = True
            run = messages.Run(number, call.job, deadline, lengths, slot, self._take_note(), uploads)
            if (request := call.request) is not None:
                run.request, run.traceparent = request.id, request.traceparent
            message = messages.encode(run)
            if not self._channel.send(message, tail, fds):
                raise self._lost(suspect=False)
        except BaseException:
            self._give_back(segment)
            self._discard(call.uploads)
            raise
        call.number = number
        if not self._sent:
            self._watchdog.begin()
        self._sent[number] = call

    async def _write(self, views: Sequence[memoryview], size: int) -> Segment:
        """A segment with the payloads in it. Raises Fault where there is no memory, and WorkerLost."""
        try:
            segment = self._arena.take(size)
        except OSError as error:
            raise _no_memory(size, error) from error
        self._writing += 1
        try:
            await self._copier.write(segment, views, size, lambda: self._abandoned_write(segment))
        except asyncio.CancelledError:
            # A thread may still be writing: the segment is given back when it has ended.
            raise
        except BaseException as error:
            self._writing -= 1
            self._give_back(segment)
            if isinstance(error, OSError):
                raise _no_memory(size, error) from error
            raise
        self._writing -= 1
        return segment

    def _abandoned_write(self, segment: Segment) -> None:
        self._writing -= 1
        self._give_back(segment)
        self._on_room()

    def take(self, message: messages.ToFront, frame: Frame) -> None:
        """Takes an answer. Raises whatever it raises when the worker broke the rules."""
        match message:
            case messages.Done(id, kept):
                self.proven = True
                if isinstance(message.outcome, BatchOutcome):
                    for index, member in enumerate(message.outcome.members):
                        if isinstance(member, FaultRecord):
                            self._tell(id, member, index)
                self._resolve(id, kept, self._reply(message, self._sent[id], frame))
            case messages.Failed(id, kept, fault):
                self._tell(id, fault)
                self._resolve(id, kept, Fault(Reason[fault.reason], fault.message, fault.field, fault.retry_after))
            case messages.Again(id, kept):
                self._resolve(id, kept, message)
            case messages.Skipped(id):
                self.passed_over += 1
                self._resolve(id, False, _expired())
            case messages.Note(dropped=dropped):
                for number in dropped:
                    self._mappings.drop(number)
            case _:
                raise ValueError(f"a loaded worker does not say {type(message).__name__}")

    def _tell(self, number: int, fault: FaultRecord, member: int = -1) -> None:
        """Logs the traceback that came with a fault, for the request whose job, or member of a batch, has failed."""
        if not fault.traceback:
            return
        request = self._sent[number].request
        if request is not None and member >= 0:
            request = request.member(member)
        with tracking.as_of(request):
            _log.error("worker %s: %s\n%s", self._name, fault.message, fault.traceback, extra={"worker": self._name})

    def end(self, suspect: bool, overdue: float | None = None) -> None:
        """The worker is gone: gives its memory back and tells those who wait.

        suspect: whether the job that the worker was computing may be the cause.
        overdue: the seconds for which it had computed, where the worker was ended for that.
        """
        self._over = True
        self._watchdog.end()
        if self._note_timer is not None:
            self._note_timer.cancel()
        self._arena.close()
        self._mappings.clear()
        for number in list(self._sent):
            self._resolve(number, False, self._lost(suspect) if overdue is None else _too_long(overdue))
            suspect, overdue = False, None

    def _reply(self, done: messages.Done, call: Posted, frame: Frame) -> LocalReply:
        memory: memoryview | Lease = memoryview(frame.tail)
        if done.slot is not None:
            number = done.slot.segment
            if done.slot.size:
                self._mappings.add(number, done.slot.size, frame.fds.pop())
            memory = Lease(self._mappings.view(number), functools.partial(self._left, number))
        self.device_memory = done.outcome.device_memory or self.device_memory
        stages = done.outcome.timings
        timings: Mapping[str, float] = {
            **stages,
            "transfer": call.transfer + stages.get("copy_in", 0.0) + stages.get("copy_out", 0.0),
            "compute": done.compute,
            "began": done.began,
        }
        return LocalReply(done.outcome, done.lengths, memory, timings)

    def _resolve(self, number: int, kept: bool, answer: LocalReply | messages.Again | Fault | WorkerLost) -> None:
        call = self._sent.pop(number)
        if self._sent:
            self._watchdog.begin()
        self._discard(call.uploads)
        if kept and call.segment is not None:
            self._arena.discard(call.segment)
        else:
            self._give_back(call.segment)
        if not call.answer.done():
            call.answer.set_result(answer)
        elif isinstance(answer, LocalReply):
            answer.leave()
        elif isinstance(answer, WorkerLost) and answer.suspect and call.obituary is not None:
            call.obituary(answer)
        self._on_room()

    def _give_back(self, segment: Segment | None) -> None:
        if segment is not None:
            self._arena.free(segment)

    def _left(self, number: int, reusable: bool) -> None:
        if self._over:
            return
        if reusable:
            self._note.released.append(number)
        else:
            _log.error("worker %s: a result was still in use when its reply was left", self._name)
            self._mappings.drop(number)
            self._note.kept.append(number)
        # The next job takes the news along. If there is none, nobody is waiting for the memory either.
        if self._note_timer is None:
            self._note_timer = self._loop.call_later(_NOTE_DELAY, self._send_note)

    def _take_note(self) -> messages.Note | None:
        """What the worker should know; None when there is no news."""
        note = self._note
        if dropped := self._arena.dropped():
            note.dropped += dropped
        if not (note.released or note.kept or note.dropped):
            return None
        self._note = messages.Note()
        return note

    def _send_note(self) -> None:
        self._note_timer = None
        if (note := self._take_note()) is not None:
            self._channel.send(messages.encode(note))

    def _lost(self, suspect: bool) -> WorkerLost:
        return WorkerLost(f"worker {self._name} was lost", suspect)


def as_views(payloads: Sequence[Buffer]) -> list[memoryview]:
    """Payloads as flat views of bytes."""
    views = [memoryview(payload) for payload in payloads]
    return [view if view.format == "B" and view.ndim == 1 else view.cast("B") for view in views]


def _too_long(seconds: float) -> WorkerLost:
    return WorkerLost(f"it computed for {seconds:.1f} s, which is its hard limit", suspect=True, overdue=True)


def _expired() -> Fault:
    return Fault(Reason.DEADLINE_EXCEEDED, "the deadline passed before the call was computed")


def _no_memory(size: int, error: OSError) -> Fault:
    return Fault(Reason.OVERLOADED, f"there is no memory for {size} bytes of tensors: {error}", "", 1.0)
