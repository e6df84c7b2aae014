"""HTTP: metrics, probes and the page for people. Runs in threads of its own, so that it answers whatever the event loop
does."""

from __future__ import annotations

import base64
import ssl
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from prometheus_client import make_wsgi_app

from pullback_server.faults import Fault
from pullback_server.telemetry import page
from pullback_server.telemetry.page_status import Status
from pullback_server.telemetry.sockets import CERTIFICATE, Server
from pullback_server.telemetry.vitals import STUCK_AFTER, Vitals
from pullback_wire import Reason

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    from prometheus_client import CollectorRegistry

#: Lets whoever asks see metrics and the page, by the Authorization header and the client certificate (DER, verified by
#: TLS; None: there was none), or raises Fault UNAUTHENTICATED (401) or PERMISSION_DENIED (403). Called in any thread.
Admit = Callable[[str | None, bytes | None], None]

_TEXT = "text/plain; charset=utf-8"
_HEADERS = (
    ("Server", "pullback"),
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
_WANTED = 'Basic realm="pullback: any name, and a token as the password", charset="UTF-8"'
_CODES = {
    200: "200 OK",
    401: "401 Unauthorized",
    403: "403 Forbidden",
    404: "404 Not Found",
    405: "405 Method Not Allowed",
    503: "503 Service Unavailable",
}


@dataclass(frozen=True)
class _Answer:
    code: int
    type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Endpoint:
    """Serves the registry, the probes, and the page where there is a `status` to show.

    admit: who may see more than the probes; None: everybody may.
    tls: with it the port speaks HTTPS. Its certificates may be replaced at any time.

    Raises OSError from the constructor when the address cannot be bound.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        vitals: Vitals,
        status: Status | None = None,
        admit: Admit | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._vitals = vitals
        self._status = status
        self._admit = admit
        self._metrics: Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]] = make_wsgi_app(registry)
        self._assets = _assets() if status is not None else {}
        try:
            self._server = Server(host, port, self._answer, tls)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="pullback-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops serving and frees the port."""
        self._server.close()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        answer = self._routed(environ)
        headers = {"Content-Type": answer.type, "Cache-Control": "no-store", **dict(_HEADERS), **answer.headers}
        headers["Content-Length"] = str(len(answer.body))
        start_response(_CODES[answer.code], list(headers.items()))
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [answer.body]

    def _routed(self, environ: dict[str, Any]) -> _Answer:
        path = environ.get("PATH_INFO", "")
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _Answer(405, _TEXT, b"only GET and HEAD are answered here\n", {"Allow": "GET, HEAD"})
        if path == "/livez":
            silence = self._vitals.silence
            alive = silence < STUCK_AFTER
            return _probe(alive, "ok" if alive else f"event loop silent for {silence:.0f} s")
        if path == "/readyz":
            return _probe(self._vitals.ready, "ok" if self._vitals.ready else self._vitals.hindrance)
        if path in self._assets:
            return self._assets[path]
        if path == "/metrics":
            return self._refused(environ) or self._scrape(environ)
        if self._status is not None and path in ("/", "/tables", "/status.json"):
            return self._refused(environ) or self._shown(self._status, path, environ)
        known = "/metrics, /livez and /readyz" if self._status is None else "/, /status.json, /metrics, /livez, /readyz"
        return _Answer(404, _TEXT, f"not found; there are {known}\n".encode())

    def _refused(self, environ: dict[str, Any]) -> _Answer | None:
        """What whoever may not see this is told; None: they may."""
        if self._admit is None:
            return None
        try:
            self._admit(_bearer(environ.get("HTTP_AUTHORIZATION")), environ.get(CERTIFICATE))
        except Fault as fault:
            # Not with its message, which speaks of gRPC's metadata.
            if fault.reason is Reason.PERMISSION_DENIED:
                return _Answer(403, _TEXT, b"these credentials do not give the right 'metrics'\n")
            body = (
                b"this needs a token that gives the right 'metrics', as a bearer token or as the password, or a client "
                b"certificate where the server takes them\n"
            )
            return _Answer(401, _TEXT, body, {"WWW-Authenticate": _WANTED})
        return None

    def _scrape(self, environ: dict[str, Any]) -> _Answer:
        said: list[tuple[str, str]] = []

        def start_response(status: str, headers: list[tuple[str, str]], _: Any = None) -> Any:
            said.extend(headers)

        body = b"".join(self._metrics({**environ, "REQUEST_METHOD": "GET"}, start_response))
        headers = dict(said)
        return _Answer(200, headers.pop("Content-Type"), body, headers)

    def _shown(self, status: Status, path: str, environ: dict[str, Any]) -> _Answer:
        if path == "/status.json":
            asked = parse_qs(environ.get("QUERY_STRING", "")).get("since", ["0"])[0]
            try:
                since = float(asked)
            except ValueError:
                since = 0.0
            return _Answer(200, "application/json", status.json(since))
        made = page.tables if path == "/tables" else page.page
        return _Answer(200, "text/html; charset=utf-8", made(status.now()).encode())


def _bearer(authorization: str | None) -> str | None:
    """The header as a bearer's: what a browser asks people for comes as a name and a password, which is the token."""
    if authorization is None or authorization[:6].lower() != "basic ":
        return authorization
    try:
        _, _, token = base64.b64decode(authorization[6:].strip(), validate=True).decode().partition(":")
    # Also binascii.Error and UnicodeDecodeError: letters that are no base64, bytes that are no text.
    except ValueError:
        return ""
    return f"Bearer {token}"


def _assets() -> dict[str, _Answer]:
    """By path; nothing else is served under /assets/. The page asks for them by their digest, so they may be kept."""
    kept = {"Cache-Control": "public, max-age=31536000, immutable"}
    return {f"/assets/{one.name}": _Answer(200, one.type, one.body, kept) for one in page.ASSETS}


def _probe(good: bool, body: str) -> _Answer:
    return _Answer(200 if good else 503, _TEXT, body.encode() + b"\n")
