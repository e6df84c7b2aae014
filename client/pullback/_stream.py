"""One session's stream: frames out in order, answers in to whoever waits for them.

Nobody reads while nobody waits. Of the threads that wait, one reads and hands on what comes (the leader); when its own
answer is there, another takes over. That saves a thread switch for each answer, and a thread for each session.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from pullback import errors
from pullback._errand import Errand, GivenUp, errand
from pullback._fork import gate
from pullback._memory import Memory
from pullback._ticker import ticker
from pullback._transfers import CHUNK_BYTES, WINDOW, Credit, Downloads, chunk_frame
from pullback._translate import from_rpc_error, from_status
from pullback._transport import Transport
from pullback_wire import WireError, decode, encode_message
from pullback_wire.framing import Buffer
from pullback_wire.v1 import session_service_pb2 as pb

PATH = "/pullback.v1.SessionService/Session"
#: Seconds that the server has for its goodbye.
_GOODBYE = 5.0
#: What a stream assumes until the server has said it, in seconds.
_HEARTBEAT_TIMEOUT = 30.0

#: Calls that run, and in a forked child also its parent's, which must never be touched there, nor collected.
_calls: dict[int, Any] = {}
_keys = itertools.count()


class Reply:
    """The answer to one op, once it is there. what: names the op in errors. epoch: see `Stream.epoch`."""

    __slots__ = ("buffers", "done", "epoch", "error", "message", "op", "payloads", "released", "what")

    def __init__(self, what: str) -> None:
        self.what = what
        self.op = 0
        self.epoch = 0
        self.done = False
        self.error: errors.PullbackError | None = None
        self.message: pb.SessionResponse = _NOTHING
        self.payloads: Sequence[memoryview] = ()
        self.buffers: dict[int, Any] = {}
        self.released: Sequence[int] = ()

    def is_done(self) -> bool:
        return self.done


_NOTHING = pb.SessionResponse()


def _hang_up(frames: SimpleQueue[bytes | None], key: int, generation: int) -> None:
    """What is done when a stream is collected: nothing that could block, and in a forked child nothing at all."""
    if generation == gate.generation:
        frames.put(pb.SessionRequest(close=pb.CloseSession()).SerializeToString())
        frames.put(None)
        ticker().later(functools.partial(_calls.pop, key, None))


class Stream:
    """An open stream. Safe to use from many threads; of no use in a forked child, where everything raises SessionLost.

    Making one sends nothing that is waited for; `open` waits for the server's answer.

    request_id: what the server's log calls the session.
    epoch: how many ops changed tensors in place; values read in an earlier epoch may be out of date.
    released: handles to let go with the next frame; anything may append to it at any time.
    memory: which handles share memory.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.target = transport.address.target
        self.released: deque[int] = deque()
        self.memory = Memory()
        self.epoch = 0
        self.go_away = ""
        self.opened = pb.SessionOpened()
        self.downloads = Downloads()
        self._generation = gate.generation
        self._frames: SimpleQueue[bytes | None] = SimpleQueue()
        self._sending = threading.Lock()
        self._state = threading.Condition()
        self._replies: dict[int, Reply] = {}
        self._credit = Credit()
        self._consumed = 0
        self._op = self._transfer = 0
        self._leading = False
        self._followers = 0
        self._lead_since = self._lead_until = 0.0
        self._lead_for: Errand | None = None
        self._failure: errors.PullbackError | None = None
        self._closing = False
        self._silence = _HEARTBEAT_TIMEOUT
        self._sent = self._heard = time.monotonic()
        authorization = transport.run(transport.authorization())
        with gate:
            call, self.request_id = transport.stream(PATH, iter(self._frames.get, None), authorization)
        self._call = call
        self._key = next(_keys)
        _calls[self._key] = call
        weakref.finalize(self, _hang_up, self._frames, self._key, self._generation).atexit = False

    # ---- sending

    def open(self, message: pb.OpenSession, deadline: float) -> None:
        """Opens the session. Raises PullbackError."""
        ticker().watch(self)
        reply = Reply("session")
        message.credit_bytes = WINDOW
        self.send(pb.SessionRequest(open=message), (), reply)
        self.wait(reply.is_done, reply.what, deadline)
        if reply.error is not None:
            self.fail(reply.error)
            raise reply.error
        self.opened = reply.message.opened
        self._credit.left += self.opened.credit_bytes
        self._silence = self.opened.heartbeat_timeout.ToTimedelta().total_seconds() or _HEARTBEAT_TIMEOUT
        ticker().by(self._sent + self._silence / 3)

    def send(
        self, frame: pb.SessionRequest, payloads: Sequence[Buffer], reply: Reply | None = None, changes: bool = False
    ) -> None:
        """Sends a frame; with a reply it is an op that will be answered. changes: it changes a tensor in place.

        Raises MessageTooLarge, and SessionLost where the session is no more.
        """
        self.check("" if reply is None else reply.what)
        with self._sending:
            taken: list[int] = []
            if reply is not None:
                frame.op = self._op + 1
                # Only ops carry them: what is not answered has no place in the order.
                taken = self._take_released()
                frame.release.extend(taken)
            elif frame.HasField("chunk") and not frame.chunk.transfer:
                # Not before: transfers have to begin in the order of their numbers.
                self._transfer += 1
                frame.chunk.transfer = self._transfer
            data = encode_message(frame, payloads)
            if len(data) > self.limit:
                self.released.extend(taken)
                what = "session" if reply is None else reply.what
                raise errors.MessageTooLarge(f"{what}: the frame has {len(data):,} bytes, the limit is {self.limit:,}")
            if reply is not None:
                self._op = reply.op = frame.op
                self.epoch += changes
                reply.epoch = self.epoch
                reply.released = taken
                self._replies[reply.op] = reply
            self._sent = time.monotonic()
            self._frames.put(data)

    def _take_released(self) -> list[int]:
        taken = []
        try:
            while True:
                taken.append(self.released.popleft())
        except IndexError:
            return taken

    def upload(self, data: memoryview, what: str, deadline: float) -> int:
        """Sends bytes in chunks, as fast as the server grants them, and returns the transfer's number.

        Other threads' frames go in between. An upload that fails half-way is given up.
        """
        mine = errand.get()
        transfer = 0
        size, offset = len(data), 0
        part = max(min(CHUNK_BYTES, self.opened.credit_bytes, self.limit // 2), 1)
        try:
            while offset < size:
                if mine is not None and mine.given_up:
                    raise GivenUp
                end = min(offset + part, size)
                self.wait(functools.partial(self._take_credit, end - offset), what, deadline)
                frame = chunk_frame(transfer, offset, size)
                self.send(frame, (data[offset:end],))
                transfer, offset = frame.chunk.transfer, end
        except BaseException:
            if self._failure is None and transfer:
                self.send(chunk_frame(transfer, offset, 0), ())
            raise
        return transfer

    def _take_credit(self, amount: int) -> bool:
        with self._state:
            return self._credit.take(amount)

    @property
    def limit(self) -> int:
        """Most bytes that a frame may have."""
        return min(self.opened.max_message_bytes or 1 << 62, self.transport.address.max_message_bytes)

    @property
    def in_flight(self) -> int:
        """Ops that were sent and are not answered yet."""
        return len(self._replies)

    @property
    def takes_chunks(self) -> bool:
        """Whether the server does."""
        return self.opened.credit_bytes > 0

    # ---- waiting

    def wait(self, done: Callable[[], bool], what: str, deadline: float) -> None:
        """Waits until `done`, which is asked after each frame. deadline: on the time.monotonic clock.

        Raises DeadlineExceeded, after which the session is lost, or what ended the session.
        """
        mine = errand.get()
        if mine is None:
            self._wait(done, what, deadline, None)
        else:
            with mine.ending(functools.partial(self._relax, mine) if mine.gentle else self.hang_up):
                self._wait(done, what, deadline, mine)

    def _relax(self, mine: Errand) -> None:
        """Nobody wants what this errand waits for any more, so that its being late must not end the session."""
        with self._state:
            if self._lead_for is mine:
                self._lead_until = math.inf

    def _wait(self, done: Callable[[], bool], what: str, deadline: float, mine: Errand | None) -> None:
        while True:
            late = False
            with self._state:
                # Counted before `done` is asked: the leader looks at the count after it has set what `done` sees.
                self._followers += 1
                try:
                    while True:
                        if done():
                            return
                        if self._failure is not None:
                            raise self._reason_for(what, deadline)
                        self.check(what)
                        if mine is not None and mine.given_up:
                            deadline = math.inf
                        now = time.monotonic()
                        late = now >= deadline
                        if late:
                            break
                        if not self._leading:
                            self._leading = True
                            self._lead_since, self._lead_until, self._lead_for = now, deadline, mine
                            break
                        # Wakes by itself now and then, should a leader end without a word.
                        self._state.wait(min(deadline - now, 5.0))
                finally:
                    self._followers -= 1
            if late:
                self._expire(what)
                continue
            ticker().by(deadline)
            if self._lead(done):
                return

    def _lead(self, done: Callable[[], bool]) -> bool:
        """Reads until `done`, or the stream's end (False)."""
        try:
            while True:
                if not self._read():
                    return False
                if self._followers:
                    with self._state:
                        self._state.notify_all()
                if done():
                    return True
        except BaseException as error:
            # gRPC cannot take a read back, so an interrupted one ends the session.
            self.fail(errors.SessionLost(f"the session with {self.target} ended: {type(error).__name__} while reading"))
            raise
        finally:
            with self._state:
                self._leading, self._lead_for = False, None
                if self._followers:
                    self._state.notify_all()

    def _read(self) -> bool:
        """Reads one frame; False at the stream's end."""
        failure: errors.PullbackError | None = None
        data = b""
        with gate:
            import grpc

            try:
                data = next(self._call)
            except StopIteration:
                failure = self._ended()
            except grpc.RpcError as error:
                failure = self._broken(error)
        if failure is not None:
            self.fail(failure)
            return False
        self._heard = time.monotonic()
        try:
            self._dispatch(data)
        except WireError as error:
            self.fail(errors.ProtocolError(f"session: {self.target} sent what contradicts itself: {error}"))
            return False
        return True

    def _dispatch(self, data: bytes) -> None:
        message, payloads = decode(pb.SessionResponse, data)
        if message.op:
            reply = self._replies.pop(message.op, None)
            if reply is None:
                raise WireError(f"op {message.op} is answered, which was not asked", "op")
            self.memory.forget(reply.released)
            status = message.status
            if status.code:
                reply.error = from_status(status.code, status.message, status.details)
            elif self.downloads and message.WhichOneof("frame") == "result":
                for info in message.result.handles:
                    if info.tensor.transfer:
                        reply.buffers[info.tensor.transfer] = self.downloads.take(info.tensor.transfer)
            self.memory.note(message.result.handles)
            reply.message, reply.payloads = message, payloads
            reply.done = True
            return
        kind = message.WhichOneof("frame")
        if kind == "chunk":
            if len(payloads) > 1:
                raise WireError(f"a chunk has {len(payloads)} payloads", "payloads")
            self.downloads.add(message.chunk, payloads[0] if payloads else memoryview(b""))
            self._consumed += sum(map(len, payloads))
            if self._consumed >= WINDOW // 4:
                credit, self._consumed = self._consumed, 0
                if self._failure is None and not self._closing:
                    self.send(pb.SessionRequest(credit=pb.Credit(bytes=credit)), ())
        elif kind == "credit":
            with self._state:
                self._credit.left += message.credit.bytes
        elif kind == "go_away":
            self.go_away = message.go_away.reason or "the server is going away"

    # ---- the end

    def check(self, what: str) -> None:
        """Raises SessionLost where the session is of no use any more."""
        if self._generation != gate.generation:
            raise errors.SessionLost(
                f"{what or 'session'}: the session was opened before this process was forked; open one here"
            )
        if self._failure is not None:
            raise errors.SessionLost(f"{what or 'session'}: the session is over: {self._failure}") from self._failure

    @property
    def usable(self) -> bool:
        """Whether the session lives, as far as is known."""
        return self._failure is None and not self._closing and self._generation == gate.generation

    @property
    def unheard_for(self) -> float:
        """Seconds since anything was read. Nobody reads while nobody waits, so it may have ended meanwhile."""
        return time.monotonic() - self._heard

    def is_over(self) -> bool:
        """Whether it is known to have ended."""
        return self._failure is not None

    def fail(self, error: errors.PullbackError) -> None:
        """Ends the session; the first reason counts."""
        with self._state:
            if self._failure is None:
                self._failure = error
            self._replies.clear()
            self._state.notify_all()
        self._frames.put(None)
        _calls.pop(self._key, None)
        with gate:
            self._call.cancel()

    def hang_up(self) -> None:
        """Ends the session without a goodbye. Waits for nobody."""
        self.fail(errors.SessionLost("it was closed"))

    def _expire(self, what: str) -> None:
        self.fail(errors.SessionLost(f"no answer from {self.target} came in time ({what}), so its state is unknown"))

    def _reason_for(self, what: str, deadline: float) -> errors.PullbackError:
        assert self._failure is not None
        if time.monotonic() >= deadline and not self._closing:
            return errors.DeadlineExceeded(
                f"{what}: no answer from {self.target} in time; timeout= sets how long an op may take"
            )
        error = copy.copy(self._failure)
        error.__cause__ = self._failure.__cause__
        return error

    def _ended(self) -> errors.PullbackError:
        if self._closing:
            return errors.SessionLost("it was closed")
        why = f": {self.go_away}" if self.go_away else ""
        return errors.SessionLost(f"{self.target} ended the session{why}")

    def _broken(self, error: Any) -> errors.PullbackError:
        if self._failure is not None:
            return self._failure
        if self.transport.closed:
            return errors.ClientClosed(f"session: the client of {self.target} is closed")
        if self._closing:
            return errors.SessionLost("it was closed")
        translated = from_rpc_error(error, "session", self.target, None, self.request_id)
        # Before the session was open it is a call like any other. Afterwards what counts is that the tensors are gone.
        plain = not translated.reason and not isinstance(translated, errors.Unimplemented | errors.PermissionDenied)
        if self.opened.session_id and plain:
            # Where the server had said that it goes, its connection's last words only hide why.
            said = f"the session with {self.target} is lost: {self.go_away or translated}"
            lost = errors.SessionLost(said, request_id=translated.request_id)
            lost.__cause__ = translated
            return lost
        return translated

    def close(self) -> None:
        """Says goodbye and waits, but not long, for the server to have freed everything."""
        if not self.usable:
            return
        self.send(pb.SessionRequest(close=pb.CloseSession()), ())
        self._closing = True
        self._frames.put(None)
        try:
            self.wait(self.is_over, "close", time.monotonic() + _GOODBYE)
        except errors.PullbackError:
            self.hang_up()

    # ---- the ticker

    def tick(self, now: float) -> float | None:
        """Sends a heartbeat when one is due; ends the session for silence, and for a leader whose time is up."""
        if self._failure is not None:
            return None
        third = self._silence / 3
        if now - self._sent >= third and not self._closing:
            try:
                if self.released:
                    self.send(pb.SessionRequest(release_only=pb.ReleaseOp()), (), Reply("release"))
                else:
                    self.send(pb.SessionRequest(heartbeat=pb.Heartbeat()), ())
            except errors.PullbackError:
                return None
        due = max(self._sent, now) + third if self._closing else self._sent + third
        with self._state:
            leading, since, until = self._leading, self._lead_since, self._lead_until
        if leading:
            if now >= until:
                self._expire("its time was up")
                return None
            heard = max(self._heard, since) + self._silence
            if now >= heard:
                self.fail(
                    errors.SessionLost(f"nothing was heard of {self.target} for {self._silence:g} s: taken for gone")
                )
                return None
            due = min(due, until, heard)
        return due
