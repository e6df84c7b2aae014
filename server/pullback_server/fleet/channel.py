"""The front's end of a control connection: frames in and out on the event loop, with no thread in between."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

from pullback_server.ipc.frames import Frame, FrameReader, frame_parts, send_some
from pullback_server.ipc.layout import Buffer

_log = logging.getLogger(__name__)


class Channel:
    """Never blocks. What the socket does not take at once is queued and sent when it can be.

    on_frame: called with every frame, in order; descriptors that it leaves in the frame are closed. If it raises, the
    connection is of no more use.
    on_end: called once, when the peer has closed the connection or it has broken; not after `close`.
    """

    def __init__(self, sock: socket.socket, on_frame: Callable[[Frame], None], on_end: Callable[[], None]) -> None:
        self._socket = sock
        self._on_frame = on_frame
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader(sock)
        #: What is still to be sent: bytes, and the descriptors that go with their first byte.
        self._queue: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._finishing = False
        self._open = True
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    def send(self, message: bytes, tail: Sequence[Buffer] = (), fds: Sequence[int] = ()) -> bool:
        """Sends a frame, after those sent before; False when the connection is gone, or `finish` was called.

        The buffers may change as soon as this returns; `fds` have to stay open until the peer has answered.
        """
        if not self._open or self._finishing:
            return False
        parts, size = frame_parts(message, tail, len(fds))
        sent = 0
        if not self._queue:
            try:
                sent = send_some(self._socket, parts, fds)
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                self._broken(error)
                return False
        if sent < size:
            if not self._queue:
                self._loop.add_writer(self._socket, self._writable)
            self._queue.append((memoryview(b"".join(parts))[sent:], () if sent else fds))
        return True

    def finish(self) -> None:
        """Tells the peer, after what is queued, that nothing more will come. Frames are still received."""
        self._finishing = True
        if self._open and not self._queue:
            self._shut_down(socket.SHUT_WR)

    def drain(self) -> None:
        """Hands on what has arrived and was not read yet."""
        while self._open:
            try:
                if not self._receive():
                    return
            except (BlockingIOError, InterruptedError):
                return
            except Exception as error:
                self._broken(error)
                return

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._queue.clear()
        self._reader.close()
        # A fork of this process may hold a copy of the socket; the peer has to see the end all the same.
        self._shut_down(socket.SHUT_RDWR)
        self._socket.close()

    def _receive(self) -> bool:
        alive = self._reader.receive()
        while self._open and (frame := self._reader.next()) is not None:
            try:
                self._on_frame(frame)
            finally:
                for fd in frame.fds:
                    os.close(fd)
        return alive

    def _readable(self) -> None:
        try:
            if not self._receive():
                self._broken(None)
        except (BlockingIOError, InterruptedError):
            pass
        # An exception must not be left to the event loop, which would log it and call again, for ever.
        except Exception as error:
            self._broken(error)

    def _writable(self) -> None:
        while self._queue:
            data, fds = self._queue[0]
            try:
                sent = send_some(self._socket, [data], fds)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._broken(error)
                return
            if sent < len(data):
                self._queue[0] = (data[sent:], ())
                return
            self._queue.popleft()
        self._loop.remove_writer(self._socket)
        if self._finishing:
            self._shut_down(socket.SHUT_WR)

    def _shut_down(self, how: int) -> None:
        try:
            self._socket.shutdown(how)
        except OSError:
            _log.debug("the connection was shut already")

    def _broken(self, error: Exception | None) -> None:
        if not self._open:
            return
        if error is not None and not isinstance(error, (BrokenPipeError, ConnectionResetError)):
            _log.error("the connection to a worker is of no more use", exc_info=error)
        # Not at once: whoever sends must not find himself inside the handling of a death.
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._loop.call_soon(self._ended)

    def _ended(self) -> None:
        if self._open:
            self._on_end()
