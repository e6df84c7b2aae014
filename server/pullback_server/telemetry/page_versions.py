"""Models and their versions as the page shows them."""

from __future__ import annotations

from pullback_server.fleet.seam import Fleet
from pullback_server.registry import Table, Version, VersionState
from pullback_server.scheduling import Scheduler
from pullback_server.telemetry.page_shapes import ModelRow, VersionRow


def model_rows(fleet: Fleet, scheduler: Scheduler, table: Table) -> list[ModelRow]:
    """By name, versions oldest first. To be called on the event loop."""
    return [
        ModelRow(
            name, table.faults.get(name, ""), [_row(fleet, scheduler, table, name, one) for one in table.versions(name)]
        )
        for name in table.names()
    ]


def _row(fleet: Fleet, scheduler: Scheduler, table: Table, name: str, version: Version) -> VersionRow:
    state, reason = version.state, version.reason
    if table.lost(name, version):
        changing = any(worker.changing(name, version.id) for worker in fleet.workers)
        state = VersionState.LOADING if changing else VersionState.FAILED
        reason = "its workers have lost it, and load it again" if changing else "no worker holds it any more"
    row = VersionRow(
        version=version.number,
        revision=version.revision,
        state=state.value,
        reason=reason,
        origin=version.origin,
        sessions=table.holders(name, version.id),
        calls_in_flight=scheduler.in_flight(name, version.id),
    )
    signature = table.held(name, version.id)
    if signature is None:
        return row
    refused = scheduler.unmerged(signature)
    return VersionRow(
        version=row.version,
        revision=row.revision,
        state=row.state,
        reason=row.reason,
        origin=row.origin,
        sessions=row.sessions,
        calls_in_flight=row.calls_in_flight,
        workers=[worker.name for worker in fleet.workers if worker.holds(name, version.id)],
        description=signature.description,
        source=signature.source,
        order=signature.orders.reverse,
        forward_mode=signature.orders.forward,
        max_batch_rows=0 if refused else signature.batch.max_rows,
        batching=f"not any more: {refused}" if refused else signature.batch.evidence,
        parameters=signature.parameter_count,
        memory_bytes=signature.memory,
    )
