"""HTTP: /metrics, /livez, /readyz. Runs in a thread of its own, so that it answers whatever the event loop does."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import make_wsgi_app

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    from prometheus_client import CollectorRegistry

#: Seconds without a beat of the event loop after which the front counts as stuck.
STUCK_AFTER = 10.0


class Vitals:
    """What the probes read. `beat` is called by the event loop; `ready` is set and unset by the application."""

    def __init__(self) -> None:
        self.ready = False
        self.reason = "starting"
        self._beaten = time.monotonic()

    def beat(self) -> None:
        self._beaten = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since the event loop last said that it runs."""
        return time.monotonic() - self._beaten


class _QuietHandler(WSGIRequestHandler):
    # A client that connects and says nothing must not hold its thread for ever.
    timeout = 10

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _QuietHandler)


class Endpoint:
    """Serves the registry and the probes.

    Raises OSError from the constructor when the address cannot be bound.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry, vitals: Vitals) -> None:
        self._vitals = vitals
        self._metrics: Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]] = make_wsgi_app(registry)
        try:
            self._server = _Server(host, port)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
        self._server.set_app(self._answer)
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="pullback-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops serving and frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return self._metrics(environ, start_response)
        if path == "/livez":
            silence = self._vitals.silence
            alive = silence < STUCK_AFTER
            return _text(start_response, alive, "ok" if alive else f"event loop silent for {silence:.0f} s")
        if path == "/readyz":
            return _text(start_response, self._vitals.ready, "ok" if self._vitals.ready else self._vitals.reason)
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"not found; there are /metrics, /livez and /readyz\n"]


def _text(start_response: StartResponse, good: bool, body: str) -> Iterable[bytes]:
    start_response(
        "200 OK" if good else "503 Service Unavailable",
        [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")],
    )
    return [body.encode() + b"\n"]
