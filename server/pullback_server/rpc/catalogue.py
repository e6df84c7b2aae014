"""The hosted models as callers see them."""

from __future__ import annotations

from collections.abc import Callable

from pullback_server.faults import Fault, nearest
from pullback_server.fleet.seam import Fleet, WorkerState
from pullback_server.job import CheckRecord, Signature, SpecRecord, version_id
from pullback_server.registry import Table, Version, VersionState
from pullback_server.rpc.security import sees
from pullback_server.rpc.signature import SignatureView
from pullback_wire import Reason
from pullback_wire.v1 import model_service_pb2 as pb
from pullback_wire.v1 import tensor_pb2

_STATES = {
    VersionState.LOADING: pb.MODEL_STATE_LOADING,
    VersionState.READY: pb.MODEL_STATE_READY,
    VersionState.FAILED: pb.MODEL_STATE_FAILED,
    VersionState.UNLOADING: pb.MODEL_STATE_UNLOADING,
}
_SAID = {
    VersionState.LOADING: "is being loaded",
    VersionState.FAILED: "could not be loaded",
    VersionState.UNLOADING: "was taken out of service",
    VersionState.READY: "is ready",
}
_OUTCOMES = {
    "passed": pb.CHECK_OUTCOME_PASSED,
    "declared": pb.CHECK_OUTCOME_DECLARED,
    "noted": pb.CHECK_OUTCOME_NOTED,
    "skipped": pb.CHECK_OUTCOME_SKIPPED,
}
#: Seconds after which a call for a model that is being loaded may be tried again.
_LOADING_AGAIN = 1.0


class Catalogue:
    """Finds a model by name and version.

    unmerged: why requests for a model are not merged, whatever its signature says; empty: they are.
    """

    def __init__(self, fleet: Fleet, table: Table, unmerged: Callable[[Signature], str]) -> None:
        self._fleet = fleet
        self.table = table
        self._unmerged = unmerged
        #: What `find` found, until anything changes.
        self._views: dict[tuple[str, str], SignatureView] = {}

    def changed(self) -> None:
        """To be called when what can be called has changed."""
        self._views.clear()

    def find(self, name: str, version: str, field: str = "") -> SignatureView:
        """The view of a model; an empty version means the latest that can be called.

        Raises Fault MODEL_NOT_FOUND or VERSION_NOT_FOUND; NOT_READY for one that is being loaded.
        """
        view = self._views.get((name, version))
        # Signatures are made anew when a worker is replaced.
        if view is not None and self.held(view.signature) is view.signature:
            return view
        number = version or next(reversed(self.table.callable(name)), "")
        signature = self.table.signature(name, number)
        if signature is None:
            raise self._not_found(name, number, field)
        view = self._views[name, version] = SignatureView(signature)
        return view

    def held(self, signature: Signature) -> Signature | None:
        """What workers hold now of a version that was found before, be it in service or not."""
        return self._fleet.signatures.get(signature.name, {}).get(signature.id)

    def _not_found(self, name: str, number: str, field: str) -> Fault:
        named = f"{field}model" if field else "name"
        known = {one.number: one for one in self.table.versions(name)}
        if not known and name in self.table.faults:
            return Fault(
                Reason.MODEL_NOT_FOUND, f"no version of model {name!r} is in service: {self.table.faults[name]}", named
            )
        if not known:
            text = "it is empty" if not name else nearest(name, filter(sees, self.names()))
            return Fault(Reason.MODEL_NOT_FOUND, f"no model is called {name!r}; {text}", named)
        found = known.get(number) if number else next(reversed(known.values()))
        if found is not None and self._shown(name, found)[0] is VersionState.LOADING:
            return Fault(
                Reason.NOT_READY,
                f"model {name!r} version {found.number} is being loaded",
                f"{field}version" if number else named,
                _LOADING_AGAIN,
            )
        if not number and found is not None:
            told = self._told(name, found)
            return Fault(Reason.MODEL_NOT_FOUND, f"no version of model {name!r} is in service: {told}", named)
        callable = self.table.callable(name)
        text = f"known: {', '.join(callable)}" if callable else "none is in service"
        if found is not None:
            text = f"{self._told(name, found)}; {text}"
        return Fault(Reason.VERSION_NOT_FOUND, f"model {name!r} has no version {number!r}; {text}", f"{field}version")

    def label(self, name: str) -> str:
        """`name` if it is hosted, else "": callers must not be able to invent metric labels."""
        return name if name in self._fleet.signatures else ""

    def names(self) -> list[str]:
        """Names of the models of which a version can be called, sorted."""
        return [name for name in self.table.names() if self.table.callable(name)]

    def describe_any(self, name: str, version: str, *, parameters: bool) -> pb.Model:
        """The contract's message about a version in whatever state; no version: the latest that can be called, else
        the latest.

        Raises Fault MODEL_NOT_FOUND or VERSION_NOT_FOUND.
        """
        number = version or next(reversed(self.table.callable(name)), "")
        if not number and (known := self.table.versions(name)):
            number = known[-1].number
        found = self.table.find(name, number)
        if found is None and not version and name in self.table.faults:
            return pb.Model(name=name, state=pb.MODEL_STATE_FAILED, state_reason=self.table.faults[name])
        if found is None:
            raise self._not_found(name, number, "")
        signature = self.table.held(name, found.id)
        if signature is None or found.state is not VersionState.READY:
            message = pb.Model(name=name, version=number)
            self._status(message, found)
            coming = version_id(number, self.table.next_revision(name, number))
            message.placements.extend(
                pb.Placement(worker=worker.name, device=worker.device, state=pb.MODEL_STATE_LOADING)
                for worker in self._fleet.workers
                if worker.changing(name, coming)
            )
            return message
        return self.describe(signature, parameters=parameters)

    def describe(self, signature: Signature, *, parameters: bool) -> pb.Model:
        """The contract's message about a model that can be called."""
        batch_axis = signature.batch_axis
        message = pb.Model(
            name=signature.name,
            version=signature.version,
            description=signature.description,
            inputs=[_spec(spec) for spec in signature.inputs],
            outputs=[_spec(spec) for spec in signature.outputs],
            parameters=[_spec(spec) for spec in signature.parameters] if parameters else [],
            batch_axis=batch_axis,
            losses=[
                pb.LossSignature(
                    name=loss.name,
                    tensors=loss.tensors,
                    optional_tensors=loss.optional_tensors,
                    options=loss.options,
                )
                for loss in signature.losses
            ],
            orders=pb.Orders(
                reverse=signature.orders.reverse, forward=signature.orders.forward, evidence=signature.orders.evidence
            ),
            devices=[worker.device for worker in self._fleet.workers if worker.holds(signature.name, signature.id)],
            parameter_count=signature.parameter_count,
            batching=self._batching(signature),
            plan=signature.plan,
            hard_timeout_seconds=signature.hard_timeout,
            source=signature.source,
            checks=[_check(check) for check in signature.checks],
            limits=signature.limits,
            memory_bytes=signature.memory,
            gradient_seconds=signature.gradient_seconds,
            placements=self._placements(signature),
        )
        found = self.table.find(signature.name, signature.version)
        if found is not None:
            self._status(message, found)
        return message

    def _status(self, message: pb.Model, found: Version) -> None:
        """The states of a model's versions, and of this one."""
        name = message.name
        state, message.state_reason = self._shown(name, found)
        message.state = _STATES[state]
        message.revision = found.revision
        message.digest = found.digest
        message.versions.extend(self.table.callable(name))
        for one in self.table.versions(name):
            state, reason = self._shown(name, one)
            message.version_statuses.add(
                version=one.number,
                state=_STATES[state],
                reason=reason,
                revision=one.revision,
                digest=one.digest,
            )

    def _shown(self, name: str, version: Version) -> tuple[VersionState, str]:
        """The state of a version, and the reason, as callers are told."""
        if not self.table.lost(name, version):
            return version.state, version.reason
        if any(worker.changing(name, version.id) for worker in self._fleet.workers):
            return VersionState.LOADING, "its workers have lost it, and load it again"
        return VersionState.FAILED, "no worker holds it any more; the server's log says why"

    def _told(self, name: str, version: Version) -> str:
        state, reason = self._shown(name, version)
        return f"version {version.number} {_SAID[state]}" + (f" ({reason})" if reason else "")

    def _placements(self, signature: Signature) -> list[pb.Placement]:
        found = []
        for worker in self._fleet.workers:
            if worker.holds(signature.name, signature.id):
                ready = worker.state is WorkerState.READY
                state = pb.MODEL_STATE_READY if ready else pb.MODEL_STATE_LOADING
                found.append(pb.Placement(worker=worker.name, device=worker.device, state=state))
        return found

    def _batching(self, signature: Signature) -> pb.Batching:
        batch = signature.batch
        refused = self._unmerged(signature)
        if refused:
            return pb.Batching(evidence=f"requests are not merged any more: {refused}")
        return pb.Batching(max_rows=batch.max_rows, max_delay_seconds=batch.max_delay, evidence=batch.evidence)


def _check(check: CheckRecord) -> pb.Check:
    return pb.Check(name=check.name, outcome=_OUTCOMES[check.outcome], detail=check.detail)


def _spec(spec: SpecRecord) -> tensor_pb2.TensorSpec:
    return tensor_pb2.TensorSpec(
        name=spec.name,
        dtype=spec.dtype,  # type: ignore[arg-type]
        shape=[_dim(extent) for extent in spec.shape or ()],
        any_shape=spec.shape is None,
        optional=spec.optional,
        minimum=spec.minimum,
        maximum=spec.maximum,
    )


def _dim(extent: int | str) -> tensor_pb2.Dim:
    if isinstance(extent, int):
        return tensor_pb2.Dim(size=extent)
    return tensor_pb2.Dim(symbol=extent) if extent else tensor_pb2.Dim()
