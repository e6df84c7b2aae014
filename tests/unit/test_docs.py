"""What README claims about names is what the code declares."""

import re
from pathlib import Path

from pullback_server.telemetry import declared
from pullback_wire import Reason

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_error_table() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \|", README, re.MULTILINE)
    assert rows == [(reason.value, reason.code.name) for reason in Reason]


def test_metrics_table() -> None:
    documented = {}
    for names, kind, labels in re.findall(r"^\| (`pullback_.+?`) \| (\w+) \|([^|]*)\|", README, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            # In brackets there may be an explanation of any of them.
            documented[name] = (kind, tuple(re.findall(r"\w+", re.sub(r"\(.*?\)", "", labels))))
    assert documented == {one.name: (one.kind, one.labels) for one in declared() if not one.name.startswith("process_")}


def test_client_methods_of_the_semantics_table_exist() -> None:
    import pullback

    table = README.partition("## What each call returns")[2].partition("## Registering")[0]
    methods = re.findall(r"^\| `(\w+)` \| \w+ \|", table, re.MULTILINE)
    assert len(methods) == 7
    for method in methods:
        assert callable(getattr(pullback.RemoteModel, method))
