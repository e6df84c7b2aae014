"""Which metrics and labels a PromQL query speaks of: enough of its grammar for what deploy/ holds."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pullback_server.telemetry import declared

#: What Prometheus and Kubernetes add to every series.
ADDED = {"job", "instance", "namespace", "pod"}

_NAME = r"\b(?:pullback|process)_[a-z0-9_]+\b"
_RECORDED = r"\bpullback:[a-z0-9_:]+\b"
_SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)?\s*\{([^{}]*)\}")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')
_BY = re.compile(r"\bby\s*\(([^)]*)\)")


@dataclass(frozen=True)
class Spoken:
    """metrics: as a scrape shows them, recorded: names of recording rules, labels: what is grouped or matched by."""

    metrics: frozenset[str]
    recorded: frozenset[str]
    labels: frozenset[str]


def series() -> dict[str, tuple[str, ...]]:
    """Every name of a series that a scrape can show -> its labels."""
    found: dict[str, tuple[str, ...]] = {}
    for one in declared():
        if one.kind == "histogram":
            found |= {f"{one.name}_bucket": (*one.labels, "le"), f"{one.name}_sum": one.labels}
            found[f"{one.name}_count"] = one.labels
        else:
            found[one.name] = one.labels
    return found


def family(name: str) -> str:
    """A series' metric: a histogram's without _bucket, _sum and _count."""
    histograms = {one.name for one in declared() if one.kind == "histogram"}
    base = re.sub(r"_(bucket|sum|count)$", "", name)
    return base if base in histograms else name


def spoken(query: str) -> Spoken:
    matchers = [match for selector in _SELECTOR.finditer(query) for match in _MATCHER.findall(selector[2])]
    labels = {name for name, _ in matchers if name != "__name__"}
    labels |= {name.strip() for group in _BY.findall(query) for name in group.split(",")}
    return Spoken(
        frozenset(re.findall(_NAME, query)), frozenset(re.findall(_RECORDED, query)), frozenset(labels - {""})
    )


def wrong(query: str, recorded: set[str]) -> list[str]:
    """What in a query no server shows and no rule records."""
    known = series()
    found = spoken(query)
    problems = [f"no metric {name}" for name in found.metrics if name not in known]
    problems += [f"no recording rule {name}" for name in found.recorded - recorded]
    labels = {label for name in found.metrics for label in known.get(name, ())} | ADDED
    problems += [f"no label {label}" for label in found.labels - labels]
    # Each selector by itself: a label of one metric is not another's.
    for name, inside in _SELECTOR.findall(query):
        if name in known:
            asked = {label for label, _ in _MATCHER.findall(inside)}
            problems += [f"{name} has no label {label}" for label in asked - {*known[name], *ADDED}]
    return problems
