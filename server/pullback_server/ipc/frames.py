"""Frames on a Unix stream socket: a message, the bytes that go with it, and file descriptors.

A frame is a prefix of three numbers (length of the message, length of the tail, count of descriptors), the message,
and the tail: payloads too small to be worth a segment. Descriptors ride on the frame's first bytes, so they have
always arrived when a frame is complete.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from pullback_server.ipc.layout import Buffer

# Plain numbers: the enum's own operators take longer than the system call.
_NO_SIGNAL = int(socket.MSG_NOSIGNAL)
_CLOSE_ON_EXEC = int(socket.MSG_CMSG_CLOEXEC)
_TRUNCATED = int(socket.MSG_CTRUNC)
#: For `FrameReader.receive`: raise BlockingIOError when nothing has arrived.
DO_NOT_WAIT = int(socket.MSG_DONTWAIT)

_PREFIX = struct.Struct("<III")
#: Room for frames of the usual size; a larger one gets its own room while it lasts.
_ROOM = 256 << 10
#: Descriptors that one frame may carry.
MAX_FDS = 16
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
#: Fewer buffers than the kernel takes in one call (IOV_MAX is 1024).
_MAX_PARTS = 256


class FrameError(Exception):
    """The peer's bytes are no frames, or descriptors were lost on the way. The connection is of no more use."""


class Frame(NamedTuple):
    """What arrived. The receiver owns `fds` and has to close them."""

    message: bytes
    tail: bytearray
    fds: list[int]


def frame_parts(message: bytes, tail: Sequence[Buffer], fd_count: int) -> tuple[list[Buffer], int]:
    """The buffers of a frame, in order, and their length; the tail is not copied unless it has very many parts."""
    if len(tail) > _MAX_PARTS:
        tail = [b"".join(tail)]
    size = 0
    for part in tail:
        size += len(part)
    return [_PREFIX.pack(len(message), size, fd_count) + message, *tail], _PREFIX.size + len(message) + size


def send_some(sock: socket.socket, parts: Sequence[Buffer], fds: Sequence[int], flags: int = 0) -> int:
    """Sends what the socket takes, at least one byte, and with it all descriptors. Raises OSError as `sendmsg` does."""
    if fds:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        return sock.sendmsg(parts, rights, flags | _NO_SIGNAL)
    return sock.sendmsg(parts, (), flags | _NO_SIGNAL)


def send_frame(sock: socket.socket, message: bytes, tail: Sequence[Buffer] = (), fds: Sequence[int] = ()) -> None:
    """Sends a whole frame on a blocking socket. Raises OSError when the peer is gone."""
    parts, size = frame_parts(message, tail, len(fds))
    sent = send_some(sock, parts, fds)
    if sent < size:
        sock.sendall(memoryview(b"".join(parts))[sent:])


class FrameReader:
    """Reads frames from a socket, blocking or not."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._fds: deque[int] = deque()
        #: What has been received and not handed out lies from `_start` to `_end`; the next frame needs `_wanted` bytes.
        self._start = self._end = 0
        self._wanted = _PREFIX.size
        self._hold(bytearray(_ROOM))

    def _hold(self, buffer: bytearray) -> None:
        self._buffer = buffer
        self._view = memoryview(buffer)

    def receive(self, flags: int = 0) -> bool:
        """Takes what has arrived, with one call to the socket; False at the end of the stream.

        Raises BlockingIOError where that would block and must not, FrameError, and OSError as `recvmsg` does.
        """
        self._make_room()
        count, ancillary, state, _ = self._sock.recvmsg_into(
            [self._view[self._end :]], _ANCILLARY, flags | _CLOSE_ON_EXEC
        )
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds.extend(fds)
        if state & _TRUNCATED:
            raise FrameError("file descriptors were lost on the way; is the limit on open files reached?")
        self._end += count
        return count > 0

    def next(self) -> Frame | None:
        """The next complete frame; None when more has to be received first. Raises FrameError."""
        start, available = self._start, self._end - self._start
        if available < _PREFIX.size:
            self._wanted = _PREFIX.size
            return None
        message_size, tail_size, fd_count = _PREFIX.unpack_from(self._buffer, start)
        size = _PREFIX.size + message_size + tail_size
        if available < size:
            self._wanted = size
            return None
        if fd_count > len(self._fds):
            raise FrameError(f"a frame came with {len(self._fds)} file descriptors instead of {fd_count}")
        middle = start + _PREFIX.size + message_size
        frame = Frame(
            bytes(self._view[start + _PREFIX.size : middle]),
            bytearray(self._view[middle : start + size]),
            [self._fds.popleft() for _ in range(fd_count)],
        )
        self._start += size
        self._wanted = _PREFIX.size
        return frame

    def _make_room(self) -> None:
        """Makes sure that the buffer holds the frame that begins at `_start`, as far as its size is known."""
        rest = self._end - self._start
        if rest == 0 and len(self._buffer) == _ROOM:
            self._start = self._end = 0
        if self._start + self._wanted > len(self._buffer) or self._end == len(self._buffer):
            buffer = bytearray(max(self._wanted, _ROOM if rest < _ROOM // 2 else rest + _ROOM))
            buffer[:rest] = self._view[self._start : self._end]
            self._hold(buffer)
            self._start, self._end = 0, rest

    def close(self) -> None:
        """Closes descriptors that came with frames nobody has read. Does not close the socket."""
        while self._fds:
            with contextlib.suppress(OSError):
                os.close(self._fds.popleft())
