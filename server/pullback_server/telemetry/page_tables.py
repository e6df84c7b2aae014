"""The tables of the page."""

from __future__ import annotations

from pullback_server.telemetry import page_words as words
from pullback_server.telemetry.page_html import Cell, Html, html, joined, table
from pullback_server.telemetry.page_shapes import MethodRow, ModelTraffic, Now, VersionRow, WorkerRow

#: Class of a state beside its word.
_GOOD, _BAD, _WARN = "good", "bad", "warn"
_STATES = {"ready": _GOOD, "failed": _BAD, "dead": _BAD}
_QUANTILES = ("#p50", "#p95", "#p99")
_CALLS = ("#Rate", "#Errors", *_QUANTILES, "#In all", "#Errors in all")


def tables(now: Now) -> Html:
    """All of them."""
    return joined(
        (
            _models(now),
            _model_traffic(now),
            _gradients(now),
            _workers(now),
            _methods(now),
            _stages(now),
            _sessions(now),
            _errors(now),
        )
    )


def _models(now: Now) -> Html:
    rows: list[list[Cell]] = []
    for model in now.models:
        if model.fault:
            rows.append([model.name, "", _state("failed", model.fault), *[""] * 7])
        rows += [_version(model.name, version) for version in model.versions]
    columns = ("Model", "#Version", "State", "Derivatives", "Batching", "Workers", "#Parameters", "#Memory",
               "#In flight", "#Sessions")  # fmt: skip
    return table("Models", columns, rows, "No model yet.")


def _version(name: str, row: VersionRow) -> list[Cell]:
    described: Cell = html("{}<small>{}</small>", name, row.description) if row.description else name
    number = f"{row.version}+{row.revision}" if row.revision else row.version
    known = row.order is not None
    order = "any order" if row.order == -1 else f"order {row.order}"
    batching = html(
        '<span title="{}">{}</span>', row.batching, f"{row.max_batch_rows} rows" if row.max_batch_rows else "none"
    )
    return [
        described,
        number,
        _state(row.state, row.reason),
        (order + (", forward" if row.forward_mode else "")) if known else "–",
        batching if known else "–",
        ", ".join(row.workers) or "–",
        words.count(row.parameters),
        words.size(row.memory_bytes),
        words.count(row.calls_in_flight),
        words.count(row.sessions),
    ]


def _model_traffic(now: Now) -> Html:
    rows = [[row.name, *_called(row)] for row in now.traffic.models if row.total]
    return table("Calls by model", ("Model", *_CALLS), rows, "No model has been called yet.")


def _gradients(now: Now) -> Html:
    rows = [
        [row.name, words.norm(row.norm_p05), words.norm(row.norm_p50), words.norm(row.norm_p95), _bars(row)]
        + [_alarming(number) for number in (row.vanishing, row.exploding, *_nonfinite(row))]
        for row in now.traffic.models
        if any(number for _, number in row.norm_counts) or any(_nonfinite(row))
    ]
    columns = ("Model", "#Norm p5", "#Median", "#p95", "Norms by decade, since the start", "#Vanishing", "#Exploding",
               "#NaN", "#Inf", "#NaN in outputs", "#Inf in outputs")  # fmt: skip
    return table("Gradients", columns, rows, "No gradients yet, or their health is not looked at.")


def _nonfinite(row: ModelTraffic) -> tuple[int, int, int, int]:
    return row.gradient_nans, row.gradient_infs, row.output_nans, row.output_infs


def _bars(row: ModelTraffic) -> Html:
    """A histogram in a line; its label says it in words."""
    most = max((number for _, number in row.norm_counts), default=0)
    if not most:
        return Html("–")
    told, parts, lower = [], [], "0"
    for index, (bound, number) in enumerate(row.norm_counts):
        upper = "more" if bound is None else words.norm(bound)
        if number:
            told.append(f"{lower} to {upper}: {words.count(number)}" if index else f"0: {words.count(number)}")
            height = max(2.0, 18.0 * number / most)
            parts.append(html('<rect x="{}" y="{}" width="5" height="{}"/>', 6 * index, f"{20 - height:.1f}",
                              f"{height:.1f}"))  # fmt: skip
        lower = upper
    width = 6 * len(row.norm_counts)
    return html(
        '<svg class="bars" viewBox="0 0 {} 21" width="{}" height="21" role="img" aria-label="{}"><title>{}</title>'
        '<path d="M0 20.5H{}"/>{}</svg>',
        width,
        width,
        "; ".join(told),
        "\n".join(told),
        width,
        joined(parts),
    )


def _methods(now: Now) -> Html:
    rows = [[row.name, *_called(row)] for row in now.traffic.methods]
    rows += [[html("{} <small>op of sessions</small>", row.name), *_called(row)] for row in now.traffic.op_kinds]
    return table("Calls by method", ("Method", *_CALLS), rows, "No call yet.")


def _called(row: MethodRow | ModelTraffic) -> list[Cell]:
    return [
        words.rate(row.per_second),
        words.rate(row.errors_per_second),
        words.seconds(row.p50),
        words.seconds(row.p95),
        words.seconds(row.p99),
        words.count(row.total),
        words.count(row.errors),
    ]


def _stages(now: Now) -> Html:
    rows = [[row.name, *(words.seconds(one) for one in (row.p50, row.p95, row.p99))] for row in now.traffic.stages]
    return table("Where the time of calls goes", ("Stage", *_QUANTILES), rows, "No call yet.", third=True)


def _workers(now: Now) -> Html:
    rows: list[list[Cell]] = [
        [
            row.name,
            row.device,
            _state(row.state),
            words.count(row.restarts),
            words.count(row.outstanding),
            words.count(row.sessions),
            words.size(row.retained_bytes),
            words.size(row.memory_bytes),
            _device(row),
            words.share(row.device_utilization),
        ]
        for row in now.workers
    ]
    columns = ("Worker", "Device", "State", "#Restarts", "#Calls", "#Sessions", "#They hold", "#Its memory",
               "#Device memory", "#Device busy")  # fmt: skip
    return table("Workers", columns, rows, "No worker yet.")


def _device(row: WorkerRow) -> str:
    if row.device_used_bytes is None and row.device_total_bytes is None:
        return "–"
    return f"{words.size(row.device_used_bytes)} of {words.size(row.device_total_bytes)}"


def _sessions(now: Now) -> Html:
    number = now.gauges.sessions
    title = "Open sessions" if number <= len(now.sessions) else f"Open sessions: {len(now.sessions)} of {number}"
    rows = [
        [row.worker, words.duration(row.age_seconds), words.count(row.handles), words.count(row.graphs),
         words.size(row.retained_bytes)]
        for row in now.sessions
    ]  # fmt: skip
    return table(
        title, ("On worker", "#Open for", "#Tensors", "#With graph", "#Holds"), rows, "No session is open.", third=True
    )


def _errors(now: Now) -> Html:
    rows = [[row.name, row.code, words.count(row.last_minute), words.count(row.total)] for row in now.traffic.errors]
    return table("Errors", ("Method", "Code", "#Last minute", "#In all"), rows, "None so far.", third=True)


def _state(state: str, reason: str = "") -> Html:
    word = html('<span class="is {}">{}</span>', _STATES.get(state, _WARN), state)
    return html("{}<small>{}</small>", word, reason) if reason else word


def _alarming(number: int) -> Html:
    """A count that should be 0."""
    return html('<strong class="bad">{}</strong>', words.count(number)) if number else Html("0")
