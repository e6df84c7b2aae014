"""The page for people: HTML that says everything without JavaScript, but for the charts."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from importlib import resources

from pullback_server.telemetry import page_words as words
from pullback_server.telemetry.page_html import Html, html, joined
from pullback_server.telemetry.page_shapes import Now
from pullback_server.telemetry.page_tables import tables as _tables


@dataclass(frozen=True)
class Asset:
    """What the page needs besides itself. path: by which the page asks for it, so that it may be kept for ever."""

    name: str
    type: str
    body: bytes

    @property
    def path(self) -> str:
        return f"/assets/{self.name}?{hashlib.sha256(self.body).hexdigest()[:12]}"


def _asset(name: str, type: str) -> Asset:
    return Asset(name, type, resources.files(__package__).joinpath("assets", name).read_bytes())


_STYLE = _asset("page.css", "text/css; charset=utf-8")
_SCRIPT = _asset("page.js", "text/javascript; charset=utf-8")
ASSETS = (_STYLE, _SCRIPT)

_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Cpath d='M1 2h14L8 15z' fill='%232f6fb0'/%3E%3C/svg%3E"
)
#: Key, title and subtitle of each chart; assets/page.js knows by the key what to draw.
_CHARTS = (
    ("calls", "Calls answered", "by method"),
    ("latency", "Time a call takes", "quantiles over 10 s"),
    ("queue", "Calls in the server", "at a moment"),
    ("age", "Longest wait", "for a worker"),
    ("norms", "Norm of gradients", "median over 10 s"),
    ("errors", "Errors", "answers that were not OK"),
    ("sessions", "Open sessions", "at a moment"),
    ("bytes", "Memory", "tensors and graphs held"),
)


def page(now: Now) -> str:
    """The whole page."""
    charts = joined(
        html(
            '<figure data-chart="{}"><figcaption><b>{}</b> <span>{}</span></figcaption>'
            '<svg role="img" tabindex="0" aria-label="{}: no data yet"></svg><ul></ul></figure>',
            key,
            title,
            what,
            title,
        )
        for key, title, what in _CHARTS
    )
    return html(
        """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Pullback – {}</title>
<link rel="icon" href="{}">
<link rel="stylesheet" href="{}">
<script src="{}" defer></script>
<noscript><meta http-equiv="refresh" content="10"></noscript>
</head>
<body>
<header>
<h1><svg viewBox="0 0 16 16" aria-hidden="true"><path d="M1 2h14L8 15z"/></svg>Pullback</h1>
<p>Gradients as a service: what this server hosts, and how it is.</p>
<nav aria-label="For machines"><a href="/metrics">metrics</a> <a href="/status.json">status.json</a>
<a href="/readyz">readyz</a> <a href="/livez">livez</a></nav>
</header>
<main>
<div id="live">{}</div>
<section aria-labelledby="charts-title" id="charts" hidden>
<h2 id="charts-title">The last minutes</h2>
<div class="charts">{}</div>
</section>
<noscript><p class="note">The charts need JavaScript. The tables do not: they are loaded anew every 10 s.</p></noscript>
<div id="tables">{}</div>
</main>
<footer>
<p>Rates and quantiles are of the last minute, where nothing else is said. Quantiles are estimated from histograms,
so they are as fine as their buckets. Nothing on this page changes anything.</p>
<p id="stale" role="status"></p>
</footer>
</body>
</html>
""",
        now.server.state,
        _ICON,
        _STYLE.path,
        _SCRIPT.path,
        summary(now),
        charts,
        _tables(now),
    )


def tables(now: Now) -> str:
    """What of the page changes, for its script."""
    return html('<div id="live">{}</div><div id="tables">{}</div>', summary(now), _tables(now))


def summary(now: Now) -> Html:
    """How it is, in a line and some figures."""
    server, gauges, calls = now.server, now.gauges, now.traffic.calls
    ready = sum(worker.state == "ready" for worker in now.workers)
    silent = "" if server.silent_seconds < 3 else f"; event loop silent for {words.duration(server.silent_seconds)}"
    at = time.gmtime(server.time)
    figures = (
        ("Calls", words.rate(calls.per_second), f"{words.count(calls.total)} in all"),
        ("Session ops", words.rate(now.traffic.ops.per_second), f"{words.count(now.traffic.ops.total)} in all"),
        (
            "Errors",
            words.rate(calls.errors_per_second + now.traffic.ops.errors_per_second),
            f"{words.count(calls.errors + now.traffic.ops.errors)} in all",
        ),
        ("Time, p95", words.seconds(calls.p95), f"median {words.seconds(calls.p50)}"),
        (
            "Waiting",
            words.count(gauges.queued),
            f"longest {words.seconds(gauges.oldest_seconds)}" if gauges.queued else "no queue",
        ),
        ("In flight", words.count(gauges.in_flight), words.size(gauges.bytes_in_flight)),
        ("Sessions", words.count(gauges.sessions), f"hold {words.size(gauges.retained_bytes)}"),
        ("Workers", f"{ready} of {len(now.workers)}", "ready"),
    )
    return html(
        '<p class="state"><strong class="is {}">{}</strong> version {}, up for {}; '
        '<time datetime="{}">{} UTC</time>{}</p><dl class="figures">{}</dl>',
        "good" if server.ready else "warn",
        server.state,
        server.version or "unknown",
        words.duration(server.uptime_seconds),
        time.strftime("%Y-%m-%dT%H:%M:%SZ", at),
        time.strftime("%Y-%m-%d %H:%M:%S", at),
        silent,
        joined(html("<div><dt>{}</dt><dd>{}</dd><dd>{}</dd></div>", *figure) for figure in figures),
    )
