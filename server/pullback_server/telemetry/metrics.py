"""`Metrics`: the metrics of one server, and how the rest of the house counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

from pullback_server.job import Health, HealthRecord
from pullback_server.telemetry import declarations as names
from pullback_server.telemetry.collectors import Expiry, Reading, Watched
from pullback_wire import Reason

#: Labels of the counters of what is no finite number.
_WHERE_AND_KIND = (("outputs", "nan"), ("outputs", "inf"), ("gradients", "nan"), ("gradients", "inf"))


class _OfModel:
    """The series of one model's health. Looking them up by label takes longer than all the rest of counting."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.norm = metrics.gradient_norm.labels(model)
        self.zeros = metrics.gradient_zero_ratio.labels(model)
        self.bad = [metrics.nonfinite.labels(model, *labels) for labels in _WHERE_AND_KIND]
        self.vanishing = metrics.vanishing.labels(model)
        self.exploding = metrics.exploding.labels(model)


class Metrics:
    """The metrics of one server, in a registry of their own, so that two embedded servers do not mix.

    Where a method takes a trace_id, it becomes the exemplar of what is observed; empty: none.
    """

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._of_ops: dict[tuple[str, str], tuple[Counter, Histogram]] = {}
        self._of_calls: dict[tuple[str, str, str], tuple[Counter, Histogram]] = {}
        self._of_stages: dict[tuple[str, str], Histogram] = {}
        self._of_models: dict[str, _OfModel] = {}
        self.requests = names.REQUESTS.counter(registry)
        self.request_seconds = names.REQUEST_SECONDS.histogram(registry)
        self.stage_seconds = names.STAGE_SECONDS.histogram(registry)
        self.in_flight = names.IN_FLIGHT.gauge(registry)
        self.received_bytes = names.RECEIVED_BYTES.counter(registry)
        self.sent_bytes = names.SENT_BYTES.counter(registry)
        self.gradient_norm = names.GRADIENT_NORM.histogram(registry)
        self.gradient_zero_ratio = names.GRADIENT_ZERO_RATIO.histogram(registry)
        self.nonfinite = names.NONFINITE_VALUES.counter(registry)
        self.vanishing = names.GRADIENTS_VANISHING.counter(registry)
        self.exploding = names.GRADIENTS_EXPLODING.counter(registry)
        self.sessions_ended = names.SESSIONS_ENDED.counter(registry)
        self.session_ops = names.SESSION_OPS.counter(registry)
        self.session_op_seconds = names.SESSION_OP_SECONDS.histogram(registry)
        self.batch_rows = names.BATCH_ROWS.histogram(registry)
        self.merged_calls = names.MERGED_CALLS.counter(registry)
        self.unmerged_calls = names.UNMERGED_CALLS.counter(registry)
        self.memory_splits = names.MEMORY_SPLITS.counter(registry)
        self.dropped_calls = names.DROPPED_CALLS.counter(registry)
        self.worker_deaths = names.WORKER_DEATHS.counter(registry)
        self.model_loads = names.MODEL_LOADS.counter(registry)
        self.model_load_seconds = names.MODEL_LOAD_SECONDS.histogram(registry)
        #: Label reason: a `Reason`'s value.
        self.auth_failures = names.AUTH_FAILURES.counter(registry)
        #: Label quota: "calls", "bytes", "sessions", "retained".
        self.quota_refusals = names.QUOTA_REFUSALS.counter(registry)
        # Series begin at zero where it is known which there will be: an increase from nothing is none to whoever asks.
        for quota in ("calls", "bytes", "sessions", "retained"):
            self.quota_refusals.labels(quota)
        for reason in (reason for reason in Reason if reason.code.name in ("UNAUTHENTICATED", "PERMISSION_DENIED")):
            self.auth_failures.labels(reason.value)
        for where in ("queue", "worker"):
            self.dropped_calls.labels(where)
        #: set(seconds since 1970); absent until then.
        self.certificate_expiry = Expiry()
        registry.register(self.certificate_expiry)
        self.draining = names.DRAINING.gauge(registry)
        self.build_info = names.BUILD_INFO.gauge(registry)
        self.build_info.labels(own_version()).set(1)
        ProcessCollector(registry=registry)

    def call(self, method: str, model: str, code: str, seconds: float, trace_id: str = "") -> None:
        """A unary call was answered. model: a hosted one's name, or empty."""
        found = self._of_calls.get((method, model, code))
        if found is None:
            self._begin(model)
            found = self._of_calls[method, model, code] = (
                self.requests.labels(method, model, code),
                self.request_seconds.labels(method, model),
            )
        found[0].inc()
        found[1].observe(seconds, _exemplar(trace_id))

    def stages(self, model: str, seconds: Mapping[str, float], trace_id: str = "") -> None:
        """Where the time of a successful call for a hosted model went, by stage."""
        exemplar = _exemplar(trace_id)
        for stage, spent in seconds.items():
            found = self._of_stages.get((stage, model))
            if found is None:
                found = self._of_stages[stage, model] = self.stage_seconds.labels(stage, model)
            found.observe(spent, exemplar)

    def _begin(self, model: str) -> None:
        """Has the series of a model's rare events begin at zero."""
        if model:
            for counter in (self.merged_calls, self.unmerged_calls, self.memory_splits):
                counter.labels(model)
            for why in ("died", "timeout"):
                self.worker_deaths.labels(model, why)

    def session_op(self, op: str, code: str, seconds: float, trace_id: str = "") -> None:
        """An op of a session was answered."""
        found = self._of_ops.get((op, code))
        if found is None:
            found = self._of_ops[op, code] = (self.session_ops.labels(op, code), self.session_op_seconds.labels(op))
        found[0].inc()
        found[1].observe(seconds, _exemplar(trace_id))

    def health(self, model: str, found: Health, limits: HealthRecord | None = None, trace_id: str = "") -> None:
        """How the numbers of a call were. model: a hosted one's name, or empty. limits: its thresholds."""
        one = self._of_models.get(model)
        if one is None:
            one = self._of_models[model] = _OfModel(self, model)
        if found.norm is not None:
            exemplar = _exemplar(trace_id)
            # A sum of NaN is of no use any more; neither is one of infinity, but it says so.
            one.norm.observe(found.norm if found.norm == found.norm else float("inf"), exemplar)
            if found.elements:
                one.zeros.observe(found.zeros / found.elements, exemplar)
            below, above = (None, None) if limits is None else (limits.vanishing_below, limits.exploding_above)
            if below is not None and found.norm < below:
                one.vanishing.inc()
            if above is not None and not found.norm <= above:
                one.exploding.inc()
        # In the order of _WHERE_AND_KIND.
        bad = (found.output_nans, found.output_infs, found.gradient_nans, found.gradient_infs)
        if any(bad):
            for counter, number in zip(one.bad, bad, strict=True):
                counter.inc(number)

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
        graphs: Callable[[], float],
        retained: Callable[[], float],
        versions: Callable[[], Mapping[tuple[str, str], int]],
        devices: Callable[[], Sequence[Reading]],
    ) -> None:
        """Reads these at each scrape, in the scrape's own thread."""
        single = {
            names.SESSIONS: sessions,
            names.SESSION_HANDLES: handles,
            names.SESSION_GRAPHS: graphs,
            names.SESSION_BYTES: retained,
            names.QUEUED: queued,
            names.QUEUE_AGE: oldest,
            names.BYTES_IN_FLIGHT: bytes_in_flight,
            names.WORKER_RESTARTS: restarts,
            names.PASSED_OVER: passed_over,
        }
        self.registry.register(Watched(single, workers, versions, devices))


def _exemplar(trace_id: str) -> dict[str, str] | None:
    return {"trace_id": trace_id} if trace_id else None


def own_version() -> str:
    """Of this package; empty where it was never installed."""
    try:
        return version("pullback")
    # Run from a checkout that was never installed.
    except PackageNotFoundError:
        return ""
