"""Every metric, declared here and nowhere else.

Labels are bounded: method names, names of hosted models ("" where a request names none that is hosted), status codes,
stages, worker states. Never ids, keys or addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

#: Upper bounds in seconds, from a small model on a quiet machine to minutes of simulation.
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)


#: Upper bounds of the rows of a batch.
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class _Models(Collector):
    """Read from the registry at each scrape."""

    def __init__(self, states: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        self._states = states

    def collect(self) -> Iterator[Metric]:
        versions = GaugeMetricFamily(
            "pullback_model_versions", "Versions of each model by state.", labels=["model", "state"]
        )
        for labels, number in self._states().items():
            versions.add_metric(labels, number)
        yield versions


class _Workers(Collector):
    """Read from the fleet at each scrape, not counted twice."""

    def __init__(
        self, states: Callable[[], Mapping[str, int]], restarts: Callable[[], int], passed_over: Callable[[], int]
    ) -> None:
        self._states = states
        self._restarts = restarts
        self._passed_over = passed_over

    def collect(self) -> Iterator[Metric]:
        workers = GaugeMetricFamily("pullback_workers", "Worker processes by state.", labels=["state"])
        for state, number in self._states().items():
            workers.add_metric([state], number)
        yield workers
        yield CounterMetricFamily(
            "pullback_worker_restarts", "Workers replaced since the server started.", value=self._restarts()
        )
        yield CounterMetricFamily(
            "pullback_worker_passed_over",
            "Jobs that a worker had and did not begin, since their deadline had passed or their caller had left.",
            value=self._passed_over(),
        )


class Metrics:
    """The metrics of one server, in a registry of their own, so that two embedded servers do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # Looking children up by label takes longer than all the rest of counting.
        self._of_ops: dict[tuple[str, str], tuple[Counter, Histogram]] = {}
        self._of_calls: dict[tuple[str, str, str], tuple[Counter, Histogram]] = {}
        self._of_stages: dict[str, tuple[Histogram, Histogram, Histogram]] = {}
        self.requests = Counter(
            "pullback_requests",
            "Calls answered, by RPC, hosted model and gRPC status code.",
            ["method", "model", "code"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "pullback_request_duration_seconds",
            "Time from the request's arrival to its answer, by RPC and hosted model.",
            ["method", "model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "pullback_stage_duration_seconds",
            "Time of a successful call by stage: queue (waiting for a worker), transfer (tensors to the worker and "
            "back), compute (forward and backward).",
            ["stage", "model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "pullback_requests_in_flight", "Calls being answered, by RPC.", ["method"], registry=self.registry
        )
        self.received_bytes = Counter(
            "pullback_request_bytes", "Bytes of request messages, by RPC.", ["method"], registry=self.registry
        )
        self.sent_bytes = Counter(
            "pullback_response_bytes", "Bytes of response messages, by RPC.", ["method"], registry=self.registry
        )
        self.sessions = Gauge("pullback_sessions", "Open sessions.", registry=self.registry)
        self.sessions_ended = Counter(
            "pullback_sessions_ended",
            "Sessions that have ended, by gRPC status code.",
            ["code"],
            registry=self.registry,
        )
        self.session_handles = Gauge(
            "pullback_session_handles", "Tensors that open sessions hold on workers.", registry=self.registry
        )
        self.session_bytes = Gauge(
            "pullback_session_retained_bytes",
            "Bytes of the tensors and graphs that open sessions hold on workers.",
            registry=self.registry,
        )
        self.session_ops = Counter(
            "pullback_session_ops",
            "Ops of sessions answered, by kind and gRPC status code.",
            ["op", "code"],
            registry=self.registry,
        )
        self.session_op_seconds = Histogram(
            "pullback_session_op_duration_seconds",
            "Time from an op's arrival until its answer was written, by kind.",
            ["op"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_rows = Histogram(
            "pullback_batch_rows",
            "Rows of computations that were merged of several calls, by model.",
            ["model"],
            buckets=_ROWS,
            registry=self.registry,
        )
        self.merged_calls = Counter(
            "pullback_merged_calls", "Calls computed together with others.", ["model"], registry=self.registry
        )
        self.unmerged_calls = Counter(
            "pullback_unmerged_calls",
            "Calls that were to be merged and were computed alone after all, since the merged computation failed.",
            ["model"],
            registry=self.registry,
        )
        self.memory_splits = Counter(
            "pullback_memory_splits",
            "How often rows were split because memory ran out.",
            ["model"],
            registry=self.registry,
        )
        self.dropped_calls = Counter(
            "pullback_dropped_calls",
            "Calls whose deadline passed, or whose caller left, before they were computed: in the queue, or as a part "
            "of a batch that a worker had (see also pullback_worker_passed_over_total).",
            ["where"],
            registry=self.registry,
        )
        self.worker_deaths = Counter(
            "pullback_worker_deaths",
            "Workers that a call has cost, by model: it died under the call, or was ended at the hard limit (timeout).",
            ["model", "why"],
            registry=self.registry,
        )
        self.model_loads = Counter(
            "pullback_model_loads",
            "Versions that were loaded from a repository or an upload, by model and outcome: ready or failed.",
            ["model", "outcome"],
            registry=self.registry,
        )
        self.model_load_seconds = Histogram(
            "pullback_model_load_duration_seconds",
            "Time that loading a version took: copying, checking in a process apart, loading on the workers.",
            ["model"],
            buckets=(0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600),
            registry=self.registry,
        )
        self.oldest = Gauge(
            "pullback_queue_age_seconds",
            "How long the call has waited for a worker that has waited longest.",
            registry=self.registry,
        )
        self.queued = Gauge("pullback_queue_length", "Calls that wait for a worker.", registry=self.registry)
        self.bytes_in_flight = Gauge(
            "pullback_bytes_in_flight", "Bytes of tensors of the calls being computed.", registry=self.registry
        )

    def session_op(self, op: str, code: str, seconds: float) -> None:
        """An op of a session was answered."""
        found = self._of_ops.get((op, code))
        if found is None:
            found = self._of_ops[op, code] = (self.session_ops.labels(op, code), self.session_op_seconds.labels(op))
        found[0].inc()
        found[1].observe(seconds)

    def call(self, method: str, model: str, code: str, seconds: float) -> None:
        """A unary call was answered. model: a hosted one's name, or empty."""
        found = self._of_calls.get((method, model, code))
        if found is None:
            found = self._of_calls[method, model, code] = (
                self.requests.labels(method, model, code),
                self.request_seconds.labels(method, model),
            )
        found[0].inc()
        found[1].observe(seconds)

    def stages(self, model: str, queue: float, transfer: float, compute: float) -> None:
        """Where the time of a successful call for a hosted model went, in seconds."""
        found = self._of_stages.get(model)
        if found is None:
            queues, transfers, computes = (
                self.stage_seconds.labels(stage, model) for stage in ("queue", "transfer", "compute")
            )
            found = self._of_stages[model] = (queues, transfers, computes)
        found[0].observe(queue)
        found[1].observe(transfer)
        found[2].observe(compute)

    def watch(
        self,
        *,
        queued: Callable[[], float],
        oldest: Callable[[], float],
        bytes_in_flight: Callable[[], float],
        restarts: Callable[[], int],
        passed_over: Callable[[], int],
        workers: Callable[[], Mapping[str, int]],
        sessions: Callable[[], float],
        handles: Callable[[], float],
        retained: Callable[[], float],
        versions: Callable[[], Mapping[tuple[str, str], int]],
    ) -> None:
        """Reads these at each scrape."""
        self.sessions.set_function(sessions)
        self.session_handles.set_function(handles)
        self.session_bytes.set_function(retained)
        self.queued.set_function(queued)
        self.oldest.set_function(oldest)
        self.bytes_in_flight.set_function(bytes_in_flight)
        self.registry.register(_Workers(workers, restarts, passed_over))
        self.registry.register(_Models(versions))
