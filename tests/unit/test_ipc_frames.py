"""Frames arrive whole, in order, with their descriptors, however the socket cuts them up."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pullback_server.ipc.frames import (
    DO_NOT_WAIT,
    MAX_FDS,
    Frame,
    FrameError,
    FrameReader,
    frame_parts,
    send_frame,
    send_some,
)

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def read(reader: FrameReader, count: int) -> list[Frame]:
    frames: list[Frame] = []
    while len(frames) < count:
        assert reader.receive()
        while (frame := reader.next()) is not None:
            frames.append(frame)
    return frames


def test_frames_of_all_sizes_arrive_in_order(pair: Pair) -> None:
    # Around the reader's room of 256 KiB, and far beyond; each content is its own.
    sizes = [0, 1, 100, 65536, 262120, 262144, 262145, 3 << 20, 5, 300_000, 0, 7]
    sent = [(os.urandom(size // 2), os.urandom(size - size // 2)) for size in sizes]

    def send() -> None:
        for message, tail in sent:
            send_frame(pair[0], message, [tail[:10], tail[10:]])

    sender = threading.Thread(target=send)
    sender.start()
    received = read(FrameReader(pair[1]), len(sent))
    sender.join()
    assert [(frame.message, bytes(frame.tail)) for frame in received] == sent


def test_frames_cut_anywhere(pair: Pair) -> None:
    parts, size = frame_parts(b"message", [b"tail"], 0)
    whole = b"".join(parts)
    assert len(whole) == size
    reader = FrameReader(pair[1])
    for cut in range(1, 2 * size):
        twice = whole + whole
        frames = []
        for piece in (twice[:cut], twice[cut:]):
            pair[0].sendall(piece)
            reader.receive()
            while (frame := reader.next()) is not None:
                frames.append((frame.message, bytes(frame.tail)))
        assert frames == [(b"message", b"tail")] * 2


def test_many_small_frames_pass_through_one_reader(pair: Pair) -> None:
    reader = FrameReader(pair[1])
    for number in range(5000):
        send_frame(pair[0], b"%d" % number, [b"x" * 100])
        assert [frame.message for frame in read(reader, 1)] == [b"%d" % number]


def test_receiving_before_everything_was_read(pair: Pair) -> None:
    # As a worker does with its first message, which may well fill the reader's room to the last byte.
    reader = FrameReader(pair[1])
    for size in (1 << 20, 10, 262144 - 12, 300_000):
        sender = threading.Thread(target=send_frame, args=(pair[0], b"x" * size))
        sender.start()
        while (frame := reader.next()) is None:
            assert reader.receive()
        sender.join()
        assert len(frame.message) == size
    for content in (b"a" * 200_000, b"b" * 150_000, b"c" * 150_000):
        send_frame(pair[0], content)
        with contextlib.suppress(BlockingIOError):
            while True:
                assert reader.receive(DO_NOT_WAIT)
    frames = [reader.next() for _ in range(4)]
    assert [frame and frame.message[:1] for frame in frames] == [b"a", b"b", b"c", None]


def test_a_tail_of_very_many_parts(pair: Pair) -> None:
    tail = [b"%04d" % number for number in range(3000)]
    send_frame(pair[0], b"m", tail)
    assert bytes(read(FrameReader(pair[1]), 1)[0].tail) == b"".join(tail)


def test_the_end_of_the_stream(pair: Pair) -> None:
    send_frame(pair[0], b"last")
    pair[0].close()
    reader = FrameReader(pair[1])
    assert [frame.message for frame in read(reader, 1)] == [b"last"]
    assert not reader.receive()


def test_descriptors_arrive_with_their_frame_and_do_not_survive_exec(pair: Pair) -> None:
    files = [os.memfd_create(name) for name in ("a", "b", "c")]
    send_frame(pair[0], b"one", [], files[:1])
    send_frame(pair[0], b"none", [b"x" * 50_000])
    send_frame(pair[0], b"two", [b"x" * 50_000], files[1:])
    received = read(FrameReader(pair[1]), 3)
    assert [len(frame.fds) for frame in received] == [1, 0, 2]
    arrived = [fd for frame in received for fd in frame.fds]
    for fd, original in zip(arrived, files, strict=True):
        assert os.path.sameopenfile(fd, original)
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        os.close(fd)
        os.close(original)


def test_a_frame_without_the_descriptors_it_claims_is_refused(pair: Pair) -> None:
    parts, _ = frame_parts(b"m", [], 1)
    send_some(pair[0], parts, ())
    reader = FrameReader(pair[1])
    reader.receive()
    with pytest.raises(FrameError, match="instead of 1"):
        reader.next()


def test_lost_descriptors_are_noticed(pair: Pair) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    files = [os.memfd_create("x") for _ in range(MAX_FDS + 1)]
    parts, _ = frame_parts(b"m", [], len(files))
    send_some(pair[0], parts, files)
    reader = FrameReader(pair[1])
    with pytest.raises(FrameError, match="lost"):
        reader.receive()
    # Those that did arrive belong to no frame; they must not leak.
    reader.close()
    for fd in files:
        os.close(fd)
    # Fewer: what earlier tests of this process left to be closed is closed by now.
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
