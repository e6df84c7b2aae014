"""The Grafana dashboard: what is measured, from the outside of the service to the inside.

generate.py writes dashboard.json of it. Each query selects by job and by the variables namespace, pod and model, so
that it also answers where Prometheus knows no namespaces.
"""

from __future__ import annotations

from itertools import count
from typing import Any

Panel = dict[str, Any]

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH = 24


def dashboard() -> dict[str, Any]:
    """The whole of it, as Grafana imports it."""
    ids = count(1)
    panels: list[Panel] = []
    y = 0
    for title, row in _rows():
        panels.append({**_placed(next(ids), 0, y, _WIDTH, 1), "type": "row", "title": title, "collapsed": False})
        y += 1
        width = _WIDTH // len(row)
        for index, panel in enumerate(row):
            panels.append({**_placed(next(ids), index * width, y, width, 8), **panel})
        y += 8
    return {
        "title": "Pullback",
        "uid": "pullback",
        "tags": ["pullback"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "",
        # Draws when pods start and when they drain, over everything.
        "annotations": {"list": [_mark("start", "changes(process_start_time_seconds{%s}[2m]) > 0"),
                                 _mark("draining", "pullback_draining{%s} == 1")]},
        "templating": {"list": [
            {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
            _variable("namespace", 'label_values(pullback_build_info{job="pullback"}, namespace)'),
            _variable("pod", 'label_values(pullback_build_info{job="pullback", namespace=~"$namespace"}, pod)'),
            _variable("model", 'label_values(pullback_model_versions{job="pullback", namespace=~"$namespace"}, model)'),
        ]},
        "panels": panels,
    }  # fmt: skip


def _rows() -> list[tuple[str, list[Panel]]]:
    return [
        ("At a glance", [
            _stat("Servers", "count(pullback_build_info{%s})"),
            _stat("Workers ready", 'sum(pullback_workers{%s, state="ready"})'),
            _stat("Answers a second", "sum(rate(pullback_requests_total{%s}[$__rate_interval]))", "reqps"),
            _stat("Failed by our fault, 1 h", f"({_faults('1h')}) / ({_answers('1h')})", "percentunit"),
            _stat("Oldest waiting", "max(pullback_queue_age_seconds{%s})", "s"),
            _stat("Sessions", "sum(pullback_sessions{%s})"),
        ]),
        ("Traffic and errors", [
            _lines("Calls by method", "reqps",
                   ("sum by (method) (rate(pullback_requests_total{%m}[$__rate_interval]))", "{{method}}")),
            _lines("Answers by code", "reqps",
                   ("sum by (code) (rate(pullback_requests_total{%m}[$__rate_interval]))", "{{code}}")),
            _lines("Bytes", "Bps",
                   ("sum by (method) (rate(pullback_request_bytes_total{%s}[$__rate_interval]))", "in {{method}}"),
                   ("-sum by (method) (rate(pullback_response_bytes_total{%s}[$__rate_interval]))", "out {{method}}")),
            _lines("Refused: who, and how much", "reqps",
                   ("sum by (reason) (rate(pullback_auth_failures_total{%s}[$__rate_interval]))", "{{reason}}"),
                   ("sum by (quota) (rate(pullback_quota_refusals_total{%s}[$__rate_interval]))", "quota {{quota}}")),
        ]),
        ("Latency", [
            _lines("Calls, p50, p95 and p99", "s",
                   *((_quantile(q, "pullback_request_duration_seconds", "method"), f"p{100 * q:g} {{{{method}}}}")
                     for q in (0.5, 0.95, 0.99))),
            _lines("p95 by stage", "s", (_quantile(0.95, "pullback_stage_duration_seconds", "stage"), "{{stage}}")),
            _lines("Where the time goes, seconds a second", "s",
                   ("sum by (stage) (rate(pullback_stage_duration_seconds_sum{%m}[$__rate_interval]))", "{{stage}}"),
                   stacked=True),
        ]),
        ("Queue and batches", [
            _lines("In flight", "short",
                   ("sum by (method) (pullback_requests_in_flight{%s})", "{{method}}"),
                   ("sum(pullback_queue_length{%s})", "waiting")),
            _lines("Oldest waiting, by pod", "s", ("max by (pod) (pullback_queue_age_seconds{%s})", "{{pod}}")),
            _lines("Rows of a merged computation", "short",
                   ("sum by (model) (rate(pullback_batch_rows_sum{%m}[$__rate_interval]))"
                    " / sum by (model) (rate(pullback_batch_rows_count{%m}[$__rate_interval]))", "mean {{model}}"),
                   (_quantile(0.9, "pullback_batch_rows", "model"), "p90 {{model}}")),
            _lines("Merged, unmerged, split, dropped", "reqps",
                   ("sum(rate(pullback_merged_calls_total{%m}[$__rate_interval]))", "merged"),
                   ("sum(rate(pullback_unmerged_calls_total{%m}[$__rate_interval]))", "computed alone after all"),
                   ("sum(rate(pullback_memory_splits_total{%m}[$__rate_interval]))", "split for memory"),
                   ("sum by (where) (rate(pullback_dropped_calls_total{%s}[$__rate_interval]))", "dropped: {{where}}"),
                   ("sum(rate(pullback_worker_passed_over_total{%s}[$__rate_interval]))", "passed over")),
        ]),
        ("Gradient health", [
            _heat("Norm of gradients", "sum by (le) (increase(pullback_gradient_norm_bucket{%m}[$__rate_interval]))"),
            _heat("Share of exact zeros",
                  "sum by (le) (increase(pullback_gradient_zero_ratio_bucket{%m}[$__rate_interval]))"),
            _lines("NaN and infinity", "cps",
                   ("sum by (model, where, kind) (rate(pullback_nonfinite_values_total{%m}[$__rate_interval]))",
                    "{{model}} {{where}} {{kind}}")),
            _lines("Beyond a model's thresholds", "reqps",
                   ("sum by (model) (rate(pullback_gradients_exploding_total{%m}[$__rate_interval]))",
                    "exploding {{model}}"),
                   ("sum by (model) (rate(pullback_gradients_vanishing_total{%m}[$__rate_interval]))",
                    "vanishing {{model}}")),
        ]),
        ("Sessions", [
            _lines("Open, tensors, graphs", "short",
                   ("sum(pullback_sessions{%s})", "sessions"),
                   ("sum(pullback_session_handles{%s})", "tensors"),
                   ("sum(pullback_session_graphs{%s})", "with a graph")),
            _lines("Retained", "bytes", ("sum by (pod) (pullback_session_retained_bytes{%s})", "{{pod}}")),
            _lines("Ops", "ops",
                   ("sum by (op, code) (rate(pullback_session_ops_total{%s}[$__rate_interval]))", "{{op}} {{code}}")),
            _lines("p95 of an op", "s",
                   (_quantile(0.95, "pullback_session_op_duration_seconds", "op", "%s"), "{{op}}")),
            _lines("Ended", "ops",
                   ("sum by (code) (rate(pullback_sessions_ended_total{%s}[$__rate_interval]))", "{{code}}")),
        ]),
        ("Memory and devices", [
            _lines("Device memory", "bytes",
                   ("sum by (pod, device) (pullback_device_memory_used_bytes{%s})", "{{pod}} {{device}}"),
                   ("sum by (pod, device) (pullback_device_memory_total_bytes{%s})", "{{pod}} {{device}} total")),
            _lines("Device utilisation", "percentunit",
                   ("avg by (pod, device) (pullback_device_utilization_ratio{%s})", "{{pod}} {{device}}")),
            _lines("Processes", "bytes",
                   ("sum by (pod, worker) (pullback_worker_memory_bytes{%s})", "{{pod}} {{worker}}"),
                   ("sum by (pod) (process_resident_memory_bytes{%s})", "{{pod}} front"),
                   ("sum by (pod) (pullback_bytes_in_flight{%s})", "{{pod}} in flight")),
            _lines("Front: cores", "short",
                   ("sum by (pod) (rate(process_cpu_seconds_total{%s}[$__rate_interval]))", "{{pod}}")),
            _lines("Front: descriptors", "short", ("sum by (pod) (process_open_fds{%s})", "{{pod}}")),
        ]),
        ("Workers and models", [
            _lines("Workers by state", "short", ("sum by (state) (pullback_workers{%s})", "{{state}}")),
            _lines("Restarts, and what they cost", "short",
                   ("sum by (pod) (increase(pullback_worker_restarts_total{%s}[$__rate_interval]))", "{{pod}}"),
                   ("sum by (model, why) (increase(pullback_worker_deaths_total{%m}[$__rate_interval]))",
                    "{{model}} {{why}}")),
            _lines("Versions", "short",
                   ("sum by (model, state) (pullback_model_versions{%m})", "{{model}} {{state}}")),
            _lines("Loads", "short",
                   ("sum by (model, outcome) (increase(pullback_model_loads_total{%m}[$__rate_interval]))",
                    "{{model}} {{outcome}}")),
            _lines("Mean time of a load", "s",
                   ("sum by (model) (increase(pullback_model_load_duration_seconds_sum{%m}[1h]))"
                    " / sum by (model) (increase(pullback_model_load_duration_seconds_count{%m}[1h]))", "{{model}}")),
        ]),
        ("Service", [
            _lines("Draining", "short", ("sum by (pod) (pullback_draining{%s})", "{{pod}}")),
            _lines("Certificate ends in", "s",
                   ("min by (pod) (pullback_certificate_expiry_timestamp_seconds{%s}) - time()", "{{pod}}")),
            _lines("Versions of the server", "short", ("count by (version) (pullback_build_info{%s})", "{{version}}")),
        ]),
    ]  # fmt: skip


#: %s in a query: these. %m: with the model as well.
_SELECTED = 'job="pullback", namespace=~"$namespace", pod=~"$pod"'
_OF_MODEL = f'{_SELECTED}, model=~"$model"'
_NAMES = '__name__=~"pullback_requests_total|pullback_session_ops_total"'


def _query(text: str) -> str:
    return text.replace("%s", _SELECTED).replace("%m", _OF_MODEL)


def _answers(window: str) -> str:
    return f"sum(rate({{{_NAMES}, %s}}[{window}]))"


def _faults(window: str) -> str:
    # None of them is no series; a stat should then say 0.
    return f'sum(rate({{{_NAMES}, code=~"INTERNAL|UNAVAILABLE|UNKNOWN", %s}}[{window}])) or vector(0)'


def _quantile(q: float, metric: str, label: str, selector: str = "%m") -> str:
    return f"histogram_quantile({q}, sum by (le, {label}) (rate({metric}_bucket{{{selector}}}[$__rate_interval])))"


def _placed(number: int, x: int, y: int, width: int, height: int) -> Panel:
    return {"id": number, "gridPos": {"x": x, "y": y, "w": width, "h": height}}


def _targets(*queries: tuple[str, str], form: str = "time_series") -> list[dict[str, Any]]:
    return [
        {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": _query(text), "legendFormat": legend,
         "format": form, "range": True}
        for index, (text, legend) in enumerate(queries)
    ]  # fmt: skip


def _lines(title: str, unit: str, *queries: tuple[str, str], stacked: bool = False) -> Panel:
    custom = {"fillOpacity": 20 if stacked else 0, "stacking": {"mode": "normal" if stacked else "none"}}
    return {
        "type": "timeseries",
        "title": title,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": _targets(*queries),
    }


def _stat(title: str, query: str, unit: str = "short") -> Panel:
    return {
        "type": "stat",
        "title": title,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none"},
        "targets": _targets((query, "")),
    }


def _heat(title: str, query: str) -> Panel:
    return {
        "type": "heatmap",
        "title": title,
        "datasource": _SOURCE,
        # The buckets are those of the histogram; Grafana needs not find any.
        "options": {"calculate": False, "yAxis": {"unit": "short"}, "color": {"scheme": "Viridis", "mode": "scheme"}},
        "targets": _targets((query, "{{le}}"), form="heatmap"),
    }


def _mark(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "enable": True,
        "datasource": _SOURCE,
        "expr": _query(query),
        "titleFormat": f"{name} {{{{pod}}}}",
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name, "type": "query", "datasource": _SOURCE, "query": query, "refresh": 2, "multi": True,
        # .* and not the list of all: it also matches series without the label.
        "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"},
    }  # fmt: skip
