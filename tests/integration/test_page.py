"""The page for people, and the HTTP endpoint that serves it: what it shows, to whom, and how it bears its clients."""

import base64
import contextlib
import hashlib
import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pullback as pb
from pullback_server import Server
from pullback_server.faults import Fault
from pullback_server.job import Health
from pullback_server.telemetry import Endpoint, Metrics, Status, Vitals, sockets
from pullback_wire import Reason

MODELS = """
import torch
from pullback_server import model, spec

@model("square", inputs={"x": spec("float64", ["n"])})
def square(x):
    "<script>alert('described')</script> & <b>bold</b>"
    return x * x

@model("logarithm", inputs={"x": spec("float64", ["n"], low=0.0)}, gate=False)
def logarithm(x):
    "Logarithms."
    return x.log()
"""
ATTACK = "<script>alert('named')</script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It has answered calls, some of them with errors, and a session is open, when the tests begin."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "models.py").write_text(MODELS)
    with Server(folder / "models.py", threads=1, devices="cpu:2") as server, pb.connect(server.target) as client:
        for _ in range(20):
            client.model("square").vjp(np.array([1.0, 2.0]), np.ones(2))
        client.model("logarithm").vjp(np.array([0.0, 1.0]), np.ones(2))
        with pytest.raises(pb.errors.InvalidArgument):
            client.model("square").evaluate(np.ones((2, 2)))
        with client.session() as session:
            held = client.model("square")(session.tensor(np.arange(3.0), requires_grad=True))
            assert held.numpy().shape == (3,)
            until = time.monotonic() + 60
            while {"ComputeVjp": 21, "Evaluate": 1}.items() - {
                row["name"]: row["total"] for row in status(server)["now"]["traffic"]["methods"]
            }.items():
                assert time.monotonic() < until
                time.sleep(0.2)
            yield server


def ask(
    port: int, path: str, method: str = "GET", headers: dict[str, str] | None = None, context: Any = None
) -> tuple[int, dict[str, str], str]:
    """Code, headers and body."""
    connection = (
        http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        if context is None
        else http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=context)
    )
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()


def status(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ask(server.metrics_port, "/status.json")[2])
    return found


class Tables(HTMLParser):
    """Texts of each table's cells, by its caption."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self.scopes: list[str | None] = []
        self.tags: list[str] = []
        self._caption: str | None = None
        self._cell: list[str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "caption":
            self._caption = ""
        elif tag == "tr":
            assert self._caption is not None, "a table without a caption"
            self.found.setdefault(self._caption, []).append([])
        elif tag in ("td", "th"):
            self._cell = []
            if tag == "th":
                self.scopes.append(dict(attrs).get("scope"))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None and self._caption is not None:
            self.found[self._caption][-1].append(" ".join(self._cell))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)
        elif self._caption == "":
            self._caption = data


# What it shows.


def test_tables_without_javascript(server: Server) -> None:
    code, headers, body = ask(server.metrics_port, "/")
    assert code == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    page = Tables(body)
    assert set(page.scopes) == {"col", "row"}
    heads, *models = page.found["Models"]
    assert heads[:4] == ["Model", "Version", "State", "Derivatives"]
    assert [row[1:4] for row in models] == [["1", "ready", "any order, forward"]] * 2
    assert models[0][0].startswith("logarithm")
    assert models[0][5] == "cpu-0, cpu-1"
    assert [row[:3] for row in page.found["Workers"][1:]] == [["cpu-0", "cpu", "ready"], ["cpu-1", "cpu", "ready"]]
    methods = {row[0]: row for row in page.found["Calls by method"][1:]}
    assert methods["ComputeVjp"][6] == "21"
    assert [row[0] for row in page.found["Calls by model"][1:]] == ["square", "logarithm"]
    norms = {row[0]: row for row in page.found["Gradients"][1:]}
    heads = page.found["Gradients"][0]
    assert norms["square"][heads.index("NaN")] == norms["square"][heads.index("Inf")] == "0"
    assert norms["logarithm"][heads.index("Inf")] == norms["logarithm"][heads.index("Inf in outputs")] == "1"
    assert ["Evaluate", "INVALID_ARGUMENT", "1", "1"] in page.found["Errors"]
    (session,) = page.found["Open sessions"][1:]
    assert session[0] in ("cpu-0", "cpu-1")
    # The leaf and what was made of it.
    assert session[2] == "2"
    assert [row[0] for row in page.found["Where the time of calls goes"][1:]][-1] == "encode"
    assert '<noscript><meta http-equiv="refresh"' in body
    # Charts are not there before the script has shown them.
    assert re.search(r'<section [^>]*id="charts" hidden>', body)
    for link in ("/metrics", "/readyz", "/status.json"):
        assert f'href="{link}"' in body


def test_nothing_of_a_description_is_markup(server: Server) -> None:
    _, _, body = ask(server.metrics_port, "/")
    assert "&lt;script&gt;alert(&#x27;described&#x27;)&lt;/script&gt; &amp; &lt;b&gt;bold&lt;/b&gt;" in body
    assert "alert(" not in re.sub(r"&lt;.*?&gt;alert\(", "", body)
    # Its own, and no other.
    assert Tables(body).tags.count("script") == 1


def test_status_json(server: Server) -> None:
    found = status(server)
    now = found["now"]
    assert now["server"]["ready"] is True
    assert now["server"]["state"] == "ready"
    assert now["server"]["uptime_seconds"] > 0
    assert abs(now["server"]["time"] - time.time()) < 60
    assert [model["name"] for model in now["models"]] == ["logarithm", "square"]
    (version,) = now["models"][1]["versions"]
    assert version["state"] == "ready"
    assert version["order"] == -1
    assert version["workers"] == ["cpu-0", "cpu-1"]
    assert version["sessions"] == 1
    assert now["gauges"]["sessions"] == len(now["sessions"]) == 1
    assert now["gauges"]["retained_bytes"] == now["sessions"][0]["retained_bytes"] > 0
    assert sum(worker["sessions"] for worker in now["workers"]) == 1
    assert all(worker["memory_bytes"] > 1 << 20 for worker in now["workers"])
    calls = {row["name"]: row for row in now["traffic"]["methods"]}
    assert calls["ComputeVjp"]["total"] == 21
    assert calls["Evaluate"]["errors"] == 1
    square = now["traffic"]["models"][0]
    assert square["name"] == "square"
    # A norm of sqrt(2**2 + 4**2), in the decade from 1 to 10.
    assert 1 <= square["norm_p50"] <= 10
    assert [10.0, 20] in square["norm_counts"]
    # Since the start, for the server had been called before it had a reading.
    assert sum(point["calls"].get("ComputeVjp", 0.0) for point in found["points"]) > 0
    assert any(point["gradient_norms"].get("square", 0) > 1 for point in found["points"])
    assert any(point["p50"] for point in found["points"])
    assert any(point["errors"] for point in found["points"])


def test_status_json_since(server: Server) -> None:
    first = status(server)["points"]
    since = first[-1]["time"]
    later: list[dict[str, Any]] = []
    until = time.monotonic() + 60
    while not later:
        assert time.monotonic() < until
        later = json.loads(ask(server.metrics_port, f"/status.json?since={since}")[2])["points"]
        time.sleep(0.1)
    assert later[0]["time"] > since
    for nonsense in ("nan", "x", "-1e400", "%00"):
        assert ask(server.metrics_port, f"/status.json?since={nonsense}")[0] == 200


def test_the_page_can_be_turned_off(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    with Server(tmp_path / "models.py", threads=1, page=False) as server:
        for path in ("/", "/status.json", "/tables", "/assets/page.js"):
            assert ask(server.metrics_port, path)[0] == 404
        assert ask(server.metrics_port, "/metrics")[0] == 200


# To whom.


def test_rights(tmp_path: Path) -> None:
    def principal(name: str, right: str) -> str:
        digest = hashlib.sha256(f"token of {name}".encode()).hexdigest()
        return f'[[principal]]\nname = "{name}"\nsha256 = ["{digest}"]\nrights = ["{right}"]\n'

    def basic(token: str) -> str:
        return "Basic " + base64.b64encode(f"anybody:{token}".encode()).decode()

    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "principals.toml").write_text(principal("viewer", "metrics") + principal("caller", "call"))
    with Server(
        tmp_path / "models.py", threads=1, principals=str(tmp_path / "principals.toml"), metrics_port=0
    ) as server:
        for path in ("/", "/status.json", "/metrics", "/tables"):
            code, headers, _ = ask(server.metrics_port, path)
            assert code == 401
            assert headers["WWW-Authenticate"].startswith('Basic realm="')
            for authorization, expected in (
                ("Bearer token of viewer", 200),
                (basic("token of viewer"), 200),
                ("Bearer token of caller", 403),
                (basic("token of caller"), 403),
                ("Bearer nobody's", 401),
                (basic("nobody's"), 401),
                ("Basic ????", 401),
                ("Basic " + base64.b64encode(b"\xff\xfe").decode(), 401),
                ("Basic", 401),
                ("", 401),
                ("Digest x", 401),
            ):
                code, _, body = ask(server.metrics_port, path, headers={"Authorization": authorization})
                assert code == expected, (path, authorization, body)
                assert "token of" not in body
        for path in ("/livez", "/readyz"):
            assert ask(server.metrics_port, path)[0] == 200


# How it bears its clients. These need an endpoint alone.


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


def test_a_model_may_not_name_markup_either() -> None:
    metrics, vitals = Metrics(), Vitals()
    status = Status(metrics, vitals)
    metrics.call("ComputeVjp", ATTACK, "OK", 0.1)
    metrics.health(ATTACK, Health(norm=1.0, elements=1))
    endpoint = Endpoint("127.0.0.1", 0, metrics.registry, vitals, status)
    try:
        until = time.monotonic() + 60
        while "named" not in (body := ask(endpoint.port, "/")[2]):
            assert time.monotonic() < until
            status.beat()
            time.sleep(0.2)
    finally:
        endpoint.close()
    assert ATTACK not in body
    assert "&lt;script&gt;alert(&#x27;named&#x27;)&lt;/script&gt;" in body


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


# In a browser.


def browse(folder: Path, url: str, *options: str) -> tuple[str, list[str]]:
    """The document after its script has run for some seconds, and what stood on the console."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={folder / 'chromium'}", "--enable-logging=stderr", "--virtual-time-budget=6000",
               "--window-size=1240,1600", *options, url]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@browser
def test_charts_in_a_browser(server: Server, tmp_path: Path) -> None:
    document, console = browse(tmp_path, f"http://127.0.0.1:{server.metrics_port}/", "--dump-dom")
    assert console == []
    charts = dict(re.findall(r'<figure data-chart="(\w+)">(.*?)</figure>', document, re.DOTALL))
    assert set(charts) == {"calls", "latency", "queue", "age", "norms", "errors", "sessions", "bytes"}
    for key, chart in charts.items():
        paths = re.findall(r'<path class="line s\d" d="([^"]+)"', chart.split("<ul>")[0])
        assert any("L" in path for path in paths), (key, chart)
        assert "NaN" not in chart
        assert re.search(r"<text[^>]*>[^<]*\d", chart), key
    assert ">Vjp</span>" in charts["calls"]
    assert ">square</span>" in charts["norms"]
    assert re.search(r'aria-label="Open sessions, now: open 1"', charts["sessions"])
    assert "alert(" in document
    assert "<script>alert" not in document
    # The tables were put in anew, and are as they were.
    assert [row[0] for row in Tables(document).found["Workers"]] == ["Worker", "cpu-0", "cpu-1"]


@browser
def test_console_shows_what_the_policy_forbids(tmp_path: Path, endpoint: Endpoint) -> None:
    # Else the test before would not see it either.
    page = tmp_path / "page.html"
    page.write_text(
        '<meta http-equiv="Content-Security-Policy" content="script-src \'none\'"><script>console.log(1)</script>'
    )
    _, console = browse(tmp_path, page.as_uri(), "--dump-dom")
    assert any("Content Security Policy" in line for line in console)


@browser
def test_light_and_dark(server: Server, tmp_path: Path) -> None:
    from PIL import Image

    grounds = []
    for scheme in ("1", "0"):
        picture = tmp_path / f"{scheme}.png"
        options = (f"--screenshot={picture}", f"--blink-settings=preferredColorScheme={scheme}")
        _, console = browse(tmp_path, f"http://127.0.0.1:{server.metrics_port}/", *options)
        assert console == []
        with Image.open(picture) as image:
            grounds.append(image.convert("L").resize((1, 1)).getextrema()[0])
    assert grounds[0] > 200
    assert grounds[1] < 60
