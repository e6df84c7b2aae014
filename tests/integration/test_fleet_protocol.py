"""The front's end of the road against a peer that says exactly what the test wants, over a real socket."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pullback_server.faults import Fault
from pullback_server.fleet import WorkerLost, devices
from pullback_server.fleet.channel import Channel
from pullback_server.fleet.copying import Copier
from pullback_server.fleet.jobs import Jobs, as_views
from pullback_server.fleet.seam import StartError
from pullback_server.ipc import messages
from pullback_server.ipc.frames import Frame, FrameReader, send_frame
from pullback_server.ipc.segments import Arena, Mappings
from pullback_server.job import FaultRecord, Job, Outcome, TensorRef
from pullback_wire import Reason

JOB = Job(
    "evaluate", "m", "1", None, False, None, [TensorRef("x", 2, (4,), 0)], [], [], [], [],
    False, [], False, True, False, 0, None, 1 << 40, 64,
)  # fmt: skip
BIG = bytes(range(256)) * 8192  # 2 MiB: in a segment, written by a thread
FOREVER = float("inf")


class Peer:
    """A worker's end, spoken by hand."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.reader = FrameReader(sock)
        self.mappings = Mappings(writable=True)

    async def hear(self) -> tuple[Any, Frame]:
        while (frame := self.reader.next()) is None:
            assert await asyncio.to_thread(self.reader.receive)
        message = messages.decode_to_worker(frame.message)
        if isinstance(message, messages.Run) and message.slot is not None and message.slot.size:
            self.mappings.add(message.slot.segment, message.slot.size, frame.fds.pop())
        return message, frame

    def say(self, message: messages.ToFront, *tail: bytes, fds: tuple[int, ...] = ()) -> None:
        send_frame(self.socket, messages.encode(message), tail, fds)


class Front:
    def __init__(self, sock: socket.socket, copier: Copier) -> None:
        self.ended = asyncio.Event()
        self.room = 0
        self.channel = Channel(sock, self._take, self.ended.set)
        self.jobs = Jobs("w", self.channel, copier, 8 << 20, self._on_room, lambda _: 600.0, lambda _: None)

    def _take(self, frame: Frame) -> None:
        self.jobs.take(messages.decode_to_front(frame.message), frame)

    def _on_room(self) -> None:
        self.room += 1

    def run(self, payload: bytes = b"1234") -> asyncio.Task[Any]:
        return asyncio.create_task(self.jobs.run(JOB, as_views([payload]), FOREVER))


@asynccontextmanager
async def talk() -> AsyncIterator[tuple[Front, Peer]]:
    ours, theirs = socket.socketpair()
    copier = Copier(2)
    front = Front(ours, copier)
    with theirs:
        yield front, Peer(theirs)
    front.channel.close()
    front.jobs.end(suspect=False)
    copier.close()


def done(number: int, *lengths: int, slot: messages.Slot | None = None, kept: bool = False) -> messages.Done:
    return messages.Done(number, kept, Outcome(), 0.0, list(lengths), slot)


def scene(play: Callable[[Front, Peer], Any]) -> None:
    """Runs a test's coroutine, and sees that it leaves no descriptor open."""

    async def work() -> None:
        async with asyncio.timeout(30), talk() as (front, peer):
            await play(front, peer)

    before = len(list(Path("/proc/self/fd").iterdir()))
    asyncio.run(work())
    # Fewer: what earlier tests of this process left to be closed is closed by now.
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_payloads_go_inline_or_in_a_segment_whose_descriptor_goes_once() -> None:
    async def play(front: Front, peer: Peer) -> None:
        for payload in (b"1234", BIG, BIG):
            task = front.run(payload)
            message, frame = await peer.hear()
            if message.slot is None:
                assert bytes(frame.tail) == payload
            else:
                assert bytes(peer.mappings.view(message.slot.segment)[: len(payload)]) == payload
                assert message.slot.segment == 1
                assert bool(message.slot.size) == (message.id == 2)
            peer.say(done(message.id, 3), b"abc")
            with await task as reply:
                assert bytes(reply.payloads[0]) == b"abc"

    scene(play)


def test_a_segment_that_the_model_kept_is_not_used_again() -> None:
    async def play(front: Front, peer: Peer) -> None:
        used = []
        for kept in (True, False, False):
            task = front.run(BIG)
            message, _ = await peer.hear()
            used.append(message.slot.segment)
            peer.say(done(message.id, kept=kept))
            await task
        assert used == [1, 2, 2]

    scene(play)


def test_results_in_a_segment_are_released_when_the_reply_is_left_and_kept_when_still_looked_at() -> None:
    async def play(front: Front, peer: Peer) -> None:
        arena = Arena(8 << 20)
        for held in (False, True):
            task = front.run()
            message, _ = await peer.hear()
            segment = arena.take(1 << 20)
            segment.mapping()[:4] = b"abcd"
            new = not segment.announced
            slot = messages.Slot(segment.id, segment.size if new else 0)
            peer.say(done(message.id, 4, slot=slot), fds=(segment.fd,) if new else ())
            segment.announced = True
            with await task as reply:
                part = reply.payloads[0][1:] if held else None
                assert bytes(reply.payloads[0]) == b"abcd"
            note, _ = await peer.hear()
            assert note == (messages.Note(kept=[1]) if held else messages.Note(released=[1]))
            arena.free(segment)
            if part is not None:
                assert bytes(part) == b"bcd"
            with pytest.raises((IndexError, ValueError)):
                bytes(reply.payloads[0])
        arena.close()

    scene(play)


def test_the_oldest_unanswered_job_is_the_suspect() -> None:
    async def play(front: Front, peer: Peer) -> None:
        tasks = [front.run() for _ in range(3)]
        heard = [(await peer.hear())[0] for _ in tasks]
        peer.say(done(heard[0].id, 0))
        peer.socket.close()
        await front.ended.wait()
        front.jobs.end(suspect=True)
        first, *lost = await asyncio.gather(*tasks, return_exceptions=True)
        assert not isinstance(first, BaseException)
        assert [type(error) for error in lost] == [WorkerLost, WorkerLost]
        assert [error.suspect for error in lost] == [True, False]
        assert front.jobs.outstanding == 0

    scene(play)


def test_a_job_sent_to_a_worker_that_has_gone_suspects_nobody() -> None:
    async def play(front: Front, peer: Peer) -> None:
        peer.socket.close()
        with pytest.raises(WorkerLost) as lost:
            await front.jobs.run(JOB, as_views([BIG]), FOREVER)
        assert not lost.value.suspect
        await front.ended.wait()
        assert front.jobs.outstanding == 0

    scene(play)


@pytest.mark.parametrize("payload", [b"1234", BIG])
def test_cancelling_at_any_turn_leaks_nothing(payload: bytes) -> None:
    async def play(front: Front, peer: Peer) -> None:
        async def answer_all() -> None:
            while True:
                message, _ = await peer.hear()
                if isinstance(message, messages.Run):
                    peer.say(done(message.id, 4), b"abcd")

        answering = asyncio.create_task(answer_all())
        for turns in range(40):
            task = front.run(payload)
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() or task.result().payloads
            while front.jobs.outstanding:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        with await front.jobs.run(JOB, as_views([payload]), FOREVER) as reply:
            assert bytes(reply.payloads[0]) == b"abcd"
        # One segment was enough for all: none was lost.
        if payload is BIG:
            assert front.jobs._arena.bytes == len(BIG)
        peer.socket.shutdown(socket.SHUT_RDWR)
        await asyncio.wait([answering])
        assert isinstance(answering.exception(), AssertionError)

    scene(play)


def test_a_worker_lost_while_bytes_are_written_for_it() -> None:
    async def play(front: Front, peer: Peer) -> None:
        task = front.run(BIG * 8)
        while not front.jobs.outstanding:  # noqa: ASYNC110
            await asyncio.sleep(0)
        front.channel.close()
        front.jobs.end(suspect=True)
        with pytest.raises(WorkerLost) as lost:
            await task
        assert not lost.value.suspect
        assert front.jobs.outstanding == 0

    scene(play)


def test_faults_cross_without_their_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def play(front: Front, peer: Peer) -> None:
        task = front.run()
        message, _ = await peer.hear()
        record = FaultRecord("MODEL_ERROR", "it raised", "function.model", None, "Traceback: secret.py line 3")
        peer.say(messages.Failed(message.id, False, record))
        with pytest.raises(Fault) as fault:
            await task
        assert fault.value.reason is Reason.MODEL_ERROR
        assert (fault.value.message, fault.value.field) == ("it raised", "function.model")

    scene(play)
    assert "secret.py line 3" in caplog.text


@pytest.mark.parametrize(
    "nonsense",
    [b"\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00x", b"\x01\x00\x00\x00\x00\x00\x00\x00\x05\x00\x00\x00x"],
)
def test_nonsense_from_a_worker_ends_the_connection_and_not_the_front(nonsense: bytes) -> None:
    async def play(front: Front, peer: Peer) -> None:
        peer.socket.sendall(nonsense)
        await front.ended.wait()

    scene(play)


def test_an_answer_to_a_job_that_is_not_there_ends_the_connection() -> None:
    async def play(front: Front, peer: Peer) -> None:
        fd = os.memfd_create("x")
        peer.say(done(77), fds=(fd,))
        os.close(fd)
        await front.ended.wait()

    scene(play)


def test_more_than_the_socket_takes_is_sent_when_there_is_room() -> None:
    async def play(front: Front, peer: Peer) -> None:
        payloads = [bytes([number]) * 60_000 for number in range(20)]
        tasks = [front.run(payload) for payload in payloads]
        await asyncio.sleep(0)
        assert front.jobs.outstanding == len(payloads)
        big = front.run(BIG)
        for payload in payloads:
            message, frame = await peer.hear()
            assert bytes(frame.tail) == payload
            peer.say(done(message.id, 1), payload[:1])
        message, _ = await peer.hear()
        assert bytes(peer.mappings.view(message.slot.segment)[: len(BIG)]) == BIG
        peer.say(done(message.id))
        await big
        for task, payload in zip(tasks, payloads, strict=True):
            assert bytes((await task).payloads[0]) == payload[:1]

    scene(play)


@pytest.mark.parametrize(
    ("text", "found", "names"),
    [
        ("cpu", ["cpu"], ["cpu-0"]),
        ("cpu:3", ["cpu"] * 3, ["cpu-0", "cpu-1", "cpu-2"]),
        (" cuda:1 , cuda:0,cpu", ["cuda:1", "cuda:0", "cpu"], ["cuda-1", "cuda-0", "cpu-0"]),
    ],
)
def test_devices_by_name(text: str, found: list[str], names: list[str]) -> None:
    assert devices.resolve(text) == found
    assert devices.worker_names(found) == names


@pytest.mark.parametrize(("count", "auto"), [(0, ["cpu"]), (2, ["cuda:0", "cuda:1"])])
def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch, count: int, auto: list[str]) -> None:
    monkeypatch.setattr(devices, "cuda_device_count", lambda: count)
    assert devices.resolve("auto") == auto
    if count:
        assert devices.resolve("cuda") == auto
    else:
        with pytest.raises(StartError, match="no CUDA device"):
            devices.resolve("cuda")


def test_threads_are_shared_out_unless_the_operator_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices, "cores", lambda: 8)
    assert [devices.threads_per_worker(count) for count in (1, 3, 20)] == [8, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert devices.threads_per_worker(4) == 5
