"""What all workers that hold a model must agree on."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pullback_server.fleet.seam import StartError
from pullback_server.job import BatchRecord, OrdersRecord, Signature, SpecRecord

Signatures = dict[str, dict[str, Signature]]


def by_name(signatures: Sequence[Signature]) -> Signatures:
    """Signatures by model name and id."""
    found: Signatures = {}
    for signature in signatures:
        found.setdefault(signature.name, {})[signature.id] = signature
    return found


def check_equal(worker: str, theirs: Signatures, known: Signatures) -> None:
    """Raises StartError when a worker holds another model under a name and version that others hold as well.

    What was found out by probes and timings need not come out the same everywhere; see `weakest`.
    """
    for name, versions in theirs.items():
        for id, signature in versions.items():
            other = known.get(name, {}).get(id)
            if other is not None and _essence(signature) != _essence(other):
                raise StartError(
                    f"model {name!r} version {signature.version} on worker {worker} is not what the others hold; "
                    "does its source give the same model every time, and was it changed meanwhile?"
                )


def weakest(one: Signatures, other: Signatures) -> Signatures:
    """All signatures of both; what both have promises only what both do."""
    merged = {name: dict(versions) for name, versions in one.items()}
    for name, versions in other.items():
        mine = merged.setdefault(name, {})
        for id, signature in versions.items():
            mine[id] = _weaker(mine[id], signature) if id in mine else signature
    return merged


def _essence(signature: Signature) -> Signature:
    return msgspec.structs.replace(
        signature,
        device="",
        outputs=[SpecRecord(output.name) for output in signature.outputs],
        orders=OrdersRecord(0, False, ""),
        batch=BatchRecord(),
        plan="",
        checks=[],
        gradient_seconds=0.0,
    )


def _weaker(one: Signature, other: Signature) -> Signature:
    def reach(orders: OrdersRecord) -> float:
        return float("inf") if orders.reverse < 0 else orders.reverse

    least = min(one.orders, other.orders, key=reach)
    orders = OrdersRecord(least.reverse, one.orders.forward and other.orders.forward, least.evidence)
    batch = min(one.batch, other.batch, key=lambda record: record.max_rows)
    outputs = [_less(mine, theirs) for mine, theirs in zip(one.outputs, other.outputs, strict=True)]
    return msgspec.structs.replace(one, orders=orders, batch=batch, outputs=outputs)


def _less(one: SpecRecord, other: SpecRecord) -> SpecRecord:
    """What both say of an output: how much could be learned of it may depend on the time that it took."""
    return SpecRecord(
        one.name, one.dtype if one.dtype == other.dtype else 0, one.shape if one.shape == other.shape else None
    )
