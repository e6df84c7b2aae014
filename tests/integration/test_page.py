"""The page for people: what it shows, to whom, and how it looks in a browser."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.asking import ask

import pullback as pb
from pullback_server import Server
from pullback_server.job import Health
from pullback_server.telemetry import Endpoint, Metrics, Status, Vitals

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
    with (
        Server(folder / "models.py", threads=1, devices="cpu:2", gradient_health_cost=0) as server,
        pb.connect(server.target) as client,
    ):
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


def test_it_answers_while_the_event_loop_is_stuck(server: Server) -> None:
    server._loop.call_soon_threadsafe(time.sleep, 6.0)
    time.sleep(4.0)
    code, _, body = ask(server.metrics_port, "/")
    assert code == 200
    assert "event loop silent for" in body
    # As it was when the loop last told.
    assert "cpu-1" in {row[0] for row in Tables(body).found["Workers"]}
    until = time.monotonic() + 60
    while "event loop silent" in ask(server.metrics_port, "/")[2]:
        assert time.monotonic() < until
        time.sleep(0.2)


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
def test_console_shows_what_the_policy_forbids(tmp_path: Path) -> None:
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
