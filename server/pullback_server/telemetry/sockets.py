"""The HTTP server under the endpoint: a thread for each connection, and bounds on how many, how long and how much."""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

logger = logging.getLogger(__name__)

App = Callable[["WSGIEnvironment", "StartResponse"], Iterable[bytes]]

#: Where an app finds the client's certificate (DER, verified), if it has one.
CERTIFICATE = "pullback.certificate"
#: Seconds that a client may be silent, and that it may take in all from connecting to the end of its answer.
_SILENCE = 10.0
_WHOLE = 30.0
#: Connections at once. A probe must get through whoever holds the others, so the oldest has to go then.
_PLACES = 64
#: Bytes of a request: its line and its headers. Bodies are not read.
_REQUEST_BYTES = 32 << 10


class _Bounded:
    """Lines of a request, until there have been too many bytes of them."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._left = _REQUEST_BYTES

    def readline(self, size: int) -> bytes:
        line: bytes = self._raw.readline(min(size, self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise ConnectionAbortedError("a request of too many bytes")
        return line

    def close(self) -> None:
        self._raw.close()


class _Run(ServerHandler):
    def log_exception(self, exc_info: Any) -> None:
        # A client that left, or was too slow, is no news; anything else is a fault of the server's own.
        if isinstance(exc_info[1], OSError):
            logger.debug("an HTTP client went away: %s", exc_info[1])
        else:
            logger.error("an HTTP request failed", exc_info=exc_info)


class _Handler(WSGIRequestHandler):
    timeout = _SILENCE
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(code)d %(message)s\n"
    server: Server

    def version_string(self) -> str:
        return "pullback"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def address_string(self) -> str:
        # The standard one may ask the DNS.
        return str(self.client_address[0])

    def get_environ(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environ()
        if isinstance(self.connection, ssl.SSLSocket):
            environ[CERTIFICATE] = self.connection.getpeercert(binary_form=True)
        return environ

    def handle(self) -> None:
        self.rfile = _Bounded(self.rfile)  # type: ignore[assignment]
        self.raw_requestline = self.rfile.readline(_REQUEST_BYTES)
        if not self.raw_requestline or not self.parse_request():
            return
        # Bodies are not read, hence never a byte of one.
        run = _Run(io.BytesIO(), self.wfile, self.get_stderr(), self.get_environ(), multithread=True)  # type: ignore[arg-type]
        run.request_handler = self  # type: ignore[attr-defined]
        run.run(self.server.app)


class Server(ThreadingMixIn, WSGIServer):
    """Serves a WSGI app, over TLS where there is a context (whose certificates may change meanwhile).

    Raises OSError from the constructor when the address cannot be bound.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, app: App, tls: ssl.SSLContext | None) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.app = app
        self._tls = tls
        self._places = threading.BoundedSemaphore(_PLACES)
        #: By thread: since when it serves which connection.
        self._open: dict[int, tuple[float, socket.socket]] = {}
        self._lock = threading.Lock()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # As the standard one, which asks the DNS for this machine's name, and may wait for it.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self._cut(oldest=True)
            if not self._places.acquire(timeout=1.0):
                self.shutdown_request(request)
                return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        own = threading.get_ident()
        with self._lock:
            self._open[own] = (time.monotonic(), request)
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                del self._open[own]
            self._places.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self._tls is None:
            super().finish_request(request, client_address)
            return
        # Here, in the connection's own thread: a client that never ends its handshake holds up nobody else.
        request.settimeout(_SILENCE)
        secured = self._tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        with secured:
            own = threading.get_ident()
            with self._lock:
                self._open[own] = (self._open[own][0], secured)
            secured.do_handshake()
            super().finish_request(secured, client_address)

    def service_actions(self) -> None:
        self._cut()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("an HTTP connection ended", exc_info=True)

    def close(self) -> None:
        """Stops serving, frees the port and cuts what is still connected."""
        self.shutdown()
        self.server_close()
        self._cut(everybody=True)

    def _cut(self, *, oldest: bool = False, everybody: bool = False) -> None:
        """Ends the connections that have lasted too long, and where it is asked for the oldest of the others."""
        now = time.monotonic()
        with self._lock:
            found = sorted(self._open.values(), key=lambda one: one[0])
        for index, (since, connection) in enumerate(found):
            if everybody or now - since > _WHOLE or (oldest and index == 0):
                with contextlib.suppress(OSError):
                    # Not SSLSocket's own, which takes the thread's state away from under it.
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
