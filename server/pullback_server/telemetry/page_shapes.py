"""The shape of /status.json, which docs/page.md describes. Fields may be added, none changes its meaning."""

from __future__ import annotations

from msgspec import Struct


class Gauges(Struct, frozen=True):
    """What has a value at any moment.

    queued: calls that wait for a worker; oldest_seconds: for how long the first of them has.
    in_flight, bytes_in_flight: calls being answered that workers have or will have, and bytes of their tensors.
    sessions, handles, retained_bytes: open sessions, tensors they hold, and bytes of these and their graphs.
    """

    queued: int = 0
    oldest_seconds: float = 0.0
    in_flight: int = 0
    bytes_in_flight: int = 0
    sessions: int = 0
    handles: int = 0
    retained_bytes: int = 0


class Point(Struct, frozen=True):
    """One moment of the charts.

    time: seconds since 1970.
    calls: answered per second since the point before, by method; "session ops" are those of all sessions.
    errors: of these, per second, those that were not answered OK.
    p50, p95, p99: seconds that calls of the last ten seconds took; null: there were none.
    gradient_norms: medians of the last ten seconds, by model.
    gauges: at that moment.
    """

    time: float
    calls: dict[str, float]
    errors: float
    p50: float | None
    p95: float | None
    p99: float | None
    gradient_norms: dict[str, float]
    gauges: Gauges


class ServerRow(Struct, frozen=True):
    """state: "ready", or why it is not. silent_seconds: since the event loop last said that it runs (about 1)."""

    version: str
    time: float
    started: float
    uptime_seconds: float
    ready: bool
    state: str
    silent_seconds: float


class VersionRow(Struct, frozen=True):
    """A version of a model.

    state: loading, ready, failed or unloading; reason: why, or for a ready one why newer contents were not loaded.
    origin: start, repository or upload.
    order: of derivatives, -1: any; null (as the other fields): nothing is known of it, since no worker holds it.
    """

    version: str
    revision: int
    state: str
    reason: str
    origin: str
    sessions: int
    calls_in_flight: int
    workers: list[str] = []
    description: str = ""
    source: str = ""
    order: int | None = None
    forward_mode: bool | None = None
    max_batch_rows: int | None = None
    batching: str = ""
    parameters: int | None = None
    memory_bytes: int | None = None


class ModelRow(Struct, frozen=True):
    """fault: what is wrong with the model as a whole in the repository."""

    name: str
    fault: str
    versions: list[VersionRow]


class WorkerRow(Struct):
    """state: starting, ready, dead or "changing models". outstanding: jobs that it has. Null: it does not say."""

    name: str
    device: str
    state: str
    restarts: int
    outstanding: int
    sessions: int
    retained_bytes: int
    memory_bytes: int | None = None
    device_used_bytes: int | None = None
    device_total_bytes: int | None = None
    device_utilization: float | None = None


class SessionRow(Struct, frozen=True):
    """An open session. handles, graphs: tensors that it holds, and how many of them have a graph behind them."""

    worker: str
    age_seconds: float
    handles: int
    graphs: int
    retained_bytes: int


class MethodRow(Struct, frozen=True):
    """Calls of a method, or ops of sessions of a kind.

    total, errors: since the start. The others are of the last minute; quantiles in seconds, null: there were none.
    """

    name: str
    total: int
    errors: int
    per_second: float
    errors_per_second: float
    p50: float | None
    p95: float | None
    p99: float | None


class ModelTraffic(Struct, frozen=True):
    """Calls of a model, as `MethodRow`.

    norm_p05, norm_p50, norm_p95: of its gradients' norms in the last minute.
    norm_counts: pairs of a bucket's upper bound (null: none) and the number of norms in it, since the start.
    nans, infs: values since the start that were no finite numbers, of outputs and of gradients.
    vanishing, exploding: calls since the start whose norm was beyond the thresholds of the model.
    """

    name: str
    total: int
    errors: int
    per_second: float
    errors_per_second: float
    p50: float | None
    p95: float | None
    p99: float | None
    norm_p05: float | None
    norm_p50: float | None
    norm_p95: float | None
    norm_counts: list[tuple[float | None, int]]
    output_nans: int
    output_infs: int
    gradient_nans: int
    gradient_infs: int
    vanishing: int
    exploding: int


class StageRow(Struct, frozen=True):
    """Seconds that a stage of calls took in the last minute; null: there were none."""

    name: str
    p50: float | None
    p95: float | None
    p99: float | None


class ErrorRow(Struct, frozen=True):
    """Calls, or ops of a kind, that were not answered OK, by status code."""

    name: str
    code: str
    total: int
    last_minute: int


class Traffic(Struct, frozen=True):
    """All calls; seconds: over which what is said of "the last minute" goes, less after a start."""

    seconds: float
    calls: MethodRow
    ops: MethodRow
    methods: list[MethodRow]
    op_kinds: list[MethodRow]
    models: list[ModelTraffic]
    stages: list[StageRow]
    errors: list[ErrorRow]


class Now(Struct, frozen=True):
    """How the server is. sessions: those that hold most, at most 50; gauges.sessions says how many there are."""

    server: ServerRow
    gauges: Gauges
    models: list[ModelRow]
    workers: list[WorkerRow]
    sessions: list[SessionRow]
    traffic: Traffic


class Document(Struct, frozen=True):
    """/status.json. points: of the last ten minutes, oldest first, or those after the time in the query's `since`."""

    now: Now
    interval_seconds: float
    points: list[Point]
