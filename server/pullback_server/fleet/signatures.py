"""What all workers must agree on."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pullback_server.fleet.seam import StartError
from pullback_server.job import OrdersRecord, Signature

Signatures = dict[str, dict[str, Signature]]


def by_name(signatures: Sequence[Signature]) -> Signatures:
    """Signatures by model name and version."""
    found: Signatures = {}
    for signature in signatures:
        found.setdefault(signature.name, {})[signature.version] = signature
    return found


def check_equal(worker: str, theirs: Signatures, known: Signatures) -> None:
    """Raises StartError when a worker's models differ from what is known in more than device and promised orders.

    The orders are found by numerical probes, which need not come out the same everywhere; see `weakest`.
    """
    for name in sorted(known.keys() | theirs.keys()):
        if {v: _essence(s) for v, s in known.get(name, {}).items()} != {
            v: _essence(s) for v, s in theirs.get(name, {}).items()
        }:
            raise StartError(
                f"model {name!r} on worker {worker} is not what the others hold; "
                "does its source give the same model every time, and was it changed meanwhile?"
            )


def weakest(one: Signatures, other: Signatures) -> Signatures:
    """Signatures that promise only what both do."""
    return {
        name: {
            version: msgspec.structs.replace(signature, orders=_weaker(signature.orders, other[name][version].orders))
            for version, signature in versions.items()
        }
        for name, versions in one.items()
    }


def _essence(signature: Signature) -> Signature:
    return msgspec.structs.replace(signature, device="", orders=OrdersRecord(0, False, ""))


def _weaker(one: OrdersRecord, other: OrdersRecord) -> OrdersRecord:
    def reach(orders: OrdersRecord) -> float:
        return float("inf") if orders.reverse < 0 else orders.reverse

    least = min(one, other, key=reach)
    return OrdersRecord(least.reverse, one.forward and other.forward, least.evidence)
