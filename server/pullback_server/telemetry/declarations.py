"""Every metric, declared here and nowhere else: what a scrape can show, for the code, the docs and the dashboards.

Labels are bounded: method names, names of hosted models ("" where a request names none that is hosted), status codes,
reasons, stages, workers, devices. Never ids, keys, principals or addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

#: Upper bounds in seconds, from a small model on a quiet machine to minutes of simulation.
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
_LOAD_SECONDS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
#: Upper bounds of the rows of a batch.
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
#: Upper bounds of a norm: a decade each, for what matters is when it leaves the one that it was in. 0 is one of them,
#: since a gradient that has vanished altogether is another matter than a small one.
_NORMS = (0.0, *(float(f"1e{exponent}") for exponent in range(-8, 9)))
#: Upper bounds of a share, close together near none and near all.
_SHARES = (0.0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)


@dataclass(frozen=True)
class Declared:
    """One metric. name: as a scrape shows it, a histogram's without _bucket, _sum and _count."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def counter(self, registry: CollectorRegistry) -> Counter:
        return Counter(self.name, self.help, self.labels, registry=registry)

    def gauge(self, registry: CollectorRegistry) -> Gauge:
        return Gauge(self.name, self.help, self.labels, registry=registry)

    def histogram(self, registry: CollectorRegistry) -> Histogram:
        return Histogram(self.name, self.help, self.labels, registry=registry, buckets=self.buckets)

    def gauges(self) -> GaugeMetricFamily:
        """Empty, to be filled at a scrape."""
        return GaugeMetricFamily(self.name, self.help, labels=self.labels)

    def counters(self) -> CounterMetricFamily:
        """Empty, to be filled at a scrape."""
        return CounterMetricFamily(self.name, self.help, labels=self.labels)


_ALL: list[Declared] = []


def declared() -> tuple[Declared, ...]:
    """All of them, in the order of the docs; those of the process itself last."""
    return tuple(_ALL)


def _counter(name: str, labels: str, help: str) -> Declared:
    return _noted(Declared(name, "counter", help, tuple(labels.split())))


def _gauge(name: str, labels: str, help: str) -> Declared:
    return _noted(Declared(name, "gauge", help, tuple(labels.split())))


def _histogram(name: str, labels: str, help: str, buckets: tuple[float, ...]) -> Declared:
    return _noted(Declared(name, "histogram", help, tuple(labels.split()), buckets))


def _noted(one: Declared) -> Declared:
    _ALL.append(one)
    return one


# Calls.

REQUESTS = _counter(
    "pullback_requests_total", "method model code", "Calls answered, by RPC, hosted model and gRPC status code."
)
REQUEST_SECONDS = _histogram(
    "pullback_request_duration_seconds",
    "method model",
    "Time from the request's arrival to its answer, by RPC and hosted model.",
    _SECONDS,
)
STAGE_SECONDS = _histogram(
    "pullback_stage_duration_seconds",
    "stage model",
    "Time of a successful call by stage: decode, queue (waiting for a worker), transfer (tensors to the worker and "
    "back), forward, backward (derivatives; only for calls that have some), encode.",
    _SECONDS,
)
IN_FLIGHT = _gauge("pullback_requests_in_flight", "method", "Calls being answered, by RPC.")
RECEIVED_BYTES = _counter("pullback_request_bytes_total", "method", "Bytes of request messages, by RPC.")
SENT_BYTES = _counter("pullback_response_bytes_total", "method", "Bytes of response messages, by RPC.")

# Health of gradients.

GRADIENT_NORM = _histogram(
    "pullback_gradient_norm",
    "model",
    "2-norm over all gradients of a call, by model. Norms that are no finite numbers are in the last bucket.",
    _NORMS,
)
GRADIENT_ZERO_RATIO = _histogram(
    "pullback_gradient_zero_ratio", "model", "Share of a call's gradient elements that are exactly zero.", _SHARES
)
NONFINITE_VALUES = _counter(
    "pullback_nonfinite_values_total",
    "model where kind",
    "Elements of results that are no finite numbers, by model, where (outputs, gradients) and kind (nan, inf).",
)
GRADIENTS_VANISHING = _counter(
    "pullback_gradients_vanishing_total", "model", "Calls whose gradient norm was below the threshold of their model."
)
GRADIENTS_EXPLODING = _counter(
    "pullback_gradients_exploding_total",
    "model",
    "Calls whose gradient norm was above the threshold of their model, or no finite number.",
)

# Sessions.

SESSIONS = _gauge("pullback_sessions", "", "Open sessions.")
SESSIONS_ENDED = _counter("pullback_sessions_ended_total", "code", "Sessions that have ended, by gRPC status code.")
SESSION_HANDLES = _gauge("pullback_session_handles", "", "Tensors that open sessions hold on workers.")
SESSION_GRAPHS = _gauge(
    "pullback_session_graphs", "", "Tensors with a graph behind them among those that open sessions hold on workers."
)
SESSION_BYTES = _gauge(
    "pullback_session_retained_bytes", "", "Bytes of the tensors and graphs that open sessions hold on workers."
)
SESSION_OPS = _counter(
    "pullback_session_ops_total", "op code", "Ops of sessions answered, by kind and gRPC status code."
)
SESSION_OP_SECONDS = _histogram(
    "pullback_session_op_duration_seconds",
    "op",
    "Time from an op's arrival until its answer was written, by kind.",
    _SECONDS,
)

# The queue, and merging.

QUEUED = _gauge("pullback_queue_length", "", "Calls that wait for a worker.")
QUEUE_AGE = _gauge(
    "pullback_queue_age_seconds", "", "How long the call has waited for a worker that has waited longest."
)
BYTES_IN_FLIGHT = _gauge("pullback_bytes_in_flight", "", "Bytes of tensors of the calls being computed.")
BATCH_ROWS = _histogram(
    "pullback_batch_rows", "model", "Rows of computations that were merged of several calls, by model.", _ROWS
)
MERGED_CALLS = _counter("pullback_merged_calls_total", "model", "Calls computed together with others.")
UNMERGED_CALLS = _counter(
    "pullback_unmerged_calls_total",
    "model",
    "Calls that were to be merged and were computed alone after all, since the merged computation failed.",
)
MEMORY_SPLITS = _counter("pullback_memory_splits_total", "model", "How often rows were split because memory ran out.")
DROPPED_CALLS = _counter(
    "pullback_dropped_calls_total",
    "where",
    "Calls whose deadline passed, or whose caller left, before they were computed: in the queue, or as a part of a "
    "batch that a worker had (see also pullback_worker_passed_over_total).",
)
PASSED_OVER = _counter(
    "pullback_worker_passed_over_total",
    "",
    "Jobs that a worker had and did not begin, since their deadline had passed or their caller had left.",
)

# Workers and their devices.

WORKERS = _gauge("pullback_workers", "state", "Worker processes by state.")
WORKER_RESTARTS = _counter("pullback_worker_restarts_total", "", "Workers replaced since the server started.")
WORKER_DEATHS = _counter(
    "pullback_worker_deaths_total",
    "model why",
    "Workers that a call has cost, by model: it died under the call, or was ended at the hard limit (timeout).",
)
WORKER_MEMORY = _gauge(
    "pullback_worker_memory_bytes",
    "worker",
    "What a worker holds: resident memory of its process, on CUDA memory of its allocator on the device.",
)
DEVICE_USED = _gauge("pullback_device_memory_used_bytes", "device", "Memory in use on a device, by whatever process.")
DEVICE_TOTAL = _gauge("pullback_device_memory_total_bytes", "device", "Memory of a device.")
DEVICE_UTILIZATION = _gauge(
    "pullback_device_utilization_ratio",
    "device",
    "Share of the time in which a device computed, of late; of a CPU, of the cores that this server may use.",
)

# Models.

MODEL_VERSIONS = _gauge("pullback_model_versions", "model state", "Versions of each model by state.")
MODEL_LOADS = _counter(
    "pullback_model_loads_total",
    "model outcome",
    "Versions that were loaded from a repository or an upload, by model and outcome: ready or failed.",
)
MODEL_LOAD_SECONDS = _histogram(
    "pullback_model_load_duration_seconds",
    "model",
    "Time that loading a version took: copying, checking in a process apart, loading on the workers.",
    _LOAD_SECONDS,
)

# Who may, and whether this server stays.

AUTH_FAILURES = _counter("pullback_auth_failures_total", "reason", "Calls refused because of who made them, by reason.")
QUOTA_REFUSALS = _counter(
    "pullback_quota_refusals_total",
    "quota",
    "Calls and ops refused because their principal had used up a quota: calls, bytes, sessions or retained.",
)
CERTIFICATE_EXPIRY = _gauge(
    "pullback_certificate_expiry_timestamp_seconds", "", "When the server's certificate ends; absent without TLS."
)
DRAINING = _gauge("pullback_draining", "", "Whether the server is shutting down.")
BUILD_INFO = _gauge("pullback_build_info", "version", "1, with the server's version.")

# What prometheus_client tells of the front's process.

PROCESS = (
    _gauge("process_virtual_memory_bytes", "", "Virtual memory size in bytes."),
    _gauge("process_resident_memory_bytes", "", "Resident memory size in bytes."),
    _gauge("process_start_time_seconds", "", "Start time of the process since unix epoch in seconds."),
    _counter("process_cpu_seconds_total", "", "Total user and system CPU time spent in seconds."),
    _gauge("process_open_fds", "", "Number of open file descriptors."),
    _gauge("process_max_fds", "", "Maximum number of open file descriptors."),
)
