"""The HTTP endpoint on the metrics port: what it answers, with which headers, and how it bears its clients."""

import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.asking import ask

from pullback_server.faults import Fault
from pullback_server.telemetry import Endpoint, Metrics, Status, Vitals, sockets
from pullback_wire import Reason


@contextlib.contextmanager
def alone(**options: Any) -> Iterator[Endpoint]:
    metrics, vitals = Metrics(), Vitals()
    endpoint = Endpoint("127.0.0.1", 0, metrics.registry, vitals, Status(metrics, vitals), **options)
    try:
        yield endpoint
    finally:
        endpoint.close()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with alone() as endpoint:
        yield endpoint


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"])
@pytest.mark.parametrize("path", ["/", "/metrics", "/status.json", "/readyz", "/assets/page.js", "/nothing"])
def test_methods(endpoint: Endpoint, method: str, path: str) -> None:
    code, headers, _ = ask(endpoint.port, path, method)
    assert (code, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/", "/metrics", "/status.json", "/livez", "/assets/page.css"])
def test_head(endpoint: Endpoint, path: str) -> None:
    code, headers, body = ask(endpoint.port, path, "HEAD")
    assert code == 200
    assert int(headers["Content-Length"]) > 0
    assert body == ""


@pytest.mark.parametrize(
    "path",
    [
        "/assets/",
        "/assets/page.py",
        "/assets/../page.py",
        "/assets/..%2fpage.py",
        "/assets/%2e%2e/endpoint.py",
        "/../../../../etc/passwd",
        "/assets/page.js/",
        "/assets/page.js%00",
        "/assets\\page.js",
        "/status.json/",
        "/%",
    ],
)
def test_nothing_else_is_served(endpoint: Endpoint, path: str) -> None:
    with connected(endpoint.port) as connection:
        # By hand: clients tidy paths up.
        connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.0 404 "), answer
    assert b"root:" not in answer


def test_security_headers(endpoint: Endpoint) -> None:
    for path in ("/", "/status.json", "/metrics", "/readyz", "/assets/page.js", "/nothing"):
        _, headers, _ = ask(endpoint.port, path)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"]
        assert headers["Server"] == "pullback"
    _, _, body = ask(endpoint.port, "/")
    # Which the policy would not let work.
    assert not re.search(r"<style|<[^>]+\s(style|on\w+)=|<script(?! src)", body)
    (script,) = re.findall(r'<script src="([^"]+)"', body)
    (style,) = re.findall(r'<link rel="stylesheet" href="([^"]+)"', body)
    assert ask(endpoint.port, script)[1]["Content-Type"] == "text/javascript; charset=utf-8"
    assert "immutable" in ask(endpoint.port, style)[1]["Cache-Control"]


def test_unready_and_refused() -> None:
    def admit(authorization: str | None, certificate: bytes | None) -> None:
        raise Fault(Reason.UNAUTHENTICATED, "a secret of gRPC's")

    with alone(admit=admit) as endpoint:
        assert ask(endpoint.port, "/readyz")[::2] == (503, "starting\n")
        assert ask(endpoint.port, "/livez")[0] == 200
        code, _, body = ask(endpoint.port, "/")
        assert code == 401
        assert "secret" not in body


def test_requests_of_too_many_bytes(endpoint: Endpoint) -> None:
    for request in (
        b"GET /" + b"x" * 100_000 + b" HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.0\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
        b"GET / HTTP/1.0\r\nA: " + b"b" * 100_000 + b"\r\n\r\n",
    ):
        with connected(endpoint.port) as connection:
            answer = b""
            with contextlib.suppress(ConnectionError):
                connection.sendall(request)
                answer = connection.recv(65536)
        assert not answer.startswith(b"HTTP/1.0 200"), answer
    for request in (
        b"\r\n",
        b"GET\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"\xff" * 64 + b"\r\n\r\n",
    ):
        with connected(endpoint.port) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda c=connection: c.recv(65536), b""))  # type: ignore[misc]
        assert b" 200 " not in answer[:20], answer
    assert ask(endpoint.port, "/livez")[0] == 200


def test_slow_clients_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_WHOLE", 2.0)
    with alone() as endpoint, connected(endpoint.port) as connection:
        # Never silent for long, and never done.
        began = time.monotonic()
        with pytest.raises(OSError, match=r"."):
            while time.monotonic() - began < 60:
                connection.sendall(b"G")
                time.sleep(0.05)
                assert ask(endpoint.port, "/livez")[0] == 200


def test_silent_clients_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets._Handler, "timeout", 1.0)
    with alone() as endpoint, connected(endpoint.port) as connection:
        connection.sendall(b"GET / HT")
        assert connection.recv(1) == b""


def test_whoever_holds_all_places_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_PLACES", 4)
    with alone() as endpoint, contextlib.ExitStack() as stack:
        held = []
        for number in range(4):
            held.append(stack.enter_context(connected(endpoint.port)))
            until = time.monotonic() + 30
            while len(endpoint._server._open) <= number:
                assert time.monotonic() < until
                time.sleep(0.01)
        assert ask(endpoint.port, "/livez")[0] == 200
        # The oldest has gone, the others have not.
        assert held[0].recv(1) == b""
        held[3].sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        assert held[3].recv(65536).startswith(b"HTTP/1.0 200")
        threads = [thread for thread in threading.enumerate() if "process_request_thread" in thread.name]
        assert len(threads) <= 4


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    with alone() as endpoint, connected(endpoint.port), connected(endpoint.port):
        assert ask(endpoint.port, "/")[0] == 200
    until = time.monotonic() + 30
    while threading.active_count() > before:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_tls(tmp_path: Path) -> None:
    server, client = certificate(tmp_path)
    with alone(tls=server) as endpoint, connected(endpoint.port), connected(endpoint.port) as plain:
        # The first says nothing at all, and holds up nobody.
        code, _, body = ask(endpoint.port, "/", context=client)
        assert code == 200
        assert "Pullback" in body
        plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"HTTP" not in plain.recv(100)
        assert ask(endpoint.port, "/readyz", context=client)[0] == 503


def test_client_certificates(tmp_path: Path) -> None:
    seen: list[bytes | None] = []

    def admit(authorization: str | None, certificate: bytes | None) -> None:
        seen.append(certificate)

    server, client = certificate(tmp_path)
    server.verify_mode = ssl.CERT_OPTIONAL
    server.load_verify_locations(tmp_path / "cert.pem")
    with alone(tls=server, admit=admit) as endpoint:
        assert ask(endpoint.port, "/status.json", context=client)[0] == 200
        client.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        assert ask(endpoint.port, "/status.json", context=client)[0] == 200
    assert seen == [None, ssl.PEM_cert_to_DER_cert((tmp_path / "cert.pem").read_text())]


def certificate(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's context."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "page")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(made.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return server, ssl.create_default_context(cafile=str(folder / "cert.pem"))
