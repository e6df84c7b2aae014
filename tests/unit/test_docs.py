"""What README claims about names is what the code declares."""

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from pullback_server.telemetry import Metrics
from pullback_wire import Reason

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_error_table() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \|", README, re.MULTILINE)
    assert rows == [(reason.value, reason.code.name) for reason in Reason]


def declared(registry: CollectorRegistry) -> dict[str, str]:
    """Name -> type, as a scrape shows it."""
    return {family.name + ("_total" if family.type == "counter" else ""): family.type for family in registry.collect()}


def test_metrics_table() -> None:
    metrics = Metrics()
    metrics.watch(
        queued=lambda: 0,
        oldest=lambda: 0,
        bytes_in_flight=lambda: 0,
        restarts=lambda: 0,
        passed_over=lambda: 0,
        workers=dict,
        sessions=lambda: 0,
        handles=lambda: 0,
        retained=lambda: 0,
        versions=dict,
    )
    documented = {}
    for names, kind in re.findall(r"^\| (`pullback_.+?`) \| (\w+) \|", README, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            documented[name] = kind
    assert documented == declared(metrics.registry)


def test_client_methods_of_the_semantics_table_exist() -> None:
    import pullback

    table = README.partition("## What each call returns")[2].partition("## Registering")[0]
    methods = re.findall(r"^\| `(\w+)` \| \w+ \|", table, re.MULTILINE)
    assert len(methods) == 7
    for method in methods:
        assert callable(getattr(pullback.RemoteModel, method))
