"""The hosted models as the front knows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pullback_server.faults import Fault, nearest
from pullback_server.fleet.seam import Fleet
from pullback_server.job import Signature, SpecRecord
from pullback_server.rpc.signature import SignatureView
from pullback_wire import Reason
from pullback_wire.v1 import model_service_pb2 as pb
from pullback_wire.v1 import tensor_pb2


class Catalogue:
    """Finds a model by name and version.

    unmerged: why requests for a model are not merged, whatever its signature says; empty: they are.
    """

    def __init__(self, fleet: Fleet, unmerged: Callable[[Signature], str]) -> None:
        self._fleet = fleet
        self._unmerged = unmerged
        self._views: dict[tuple[str, str], SignatureView] = {}

    def find(self, name: str, version: str, field: str = "") -> SignatureView:
        """The view of a model; an empty version means the latest.

        Raises Fault MODEL_NOT_FOUND or VERSION_NOT_FOUND.
        """
        versions = self._fleet.signatures.get(name)
        if not versions:
            text = "it is empty" if not name else nearest(name, self._fleet.signatures)
            raise Fault(
                Reason.MODEL_NOT_FOUND, f"no model is called {name!r}; {text}", f"{field}model" if field else "name"
            )
        signature = versions.get(version or max(versions, key=int))
        if signature is None:
            raise Fault(
                Reason.VERSION_NOT_FOUND,
                f"model {name!r} has no version {version!r}; known: {', '.join(sorted(versions, key=int))}",
                f"{field}version",
            )
        view = self._views.get((name, signature.version))
        if view is None or view.signature is not signature:
            view = self._views[name, signature.version] = SignatureView(signature)
        return view

    def label(self, name: str) -> str:
        """`name` if it is hosted, else "": callers must not be able to invent metric labels."""
        return name if name in self._fleet.signatures else ""

    def names(self) -> list[str]:
        """Names of the hosted models, sorted."""
        return sorted(self._fleet.signatures)

    def describe(self, signature: Signature, *, parameters: bool) -> pb.Model:
        """The contract's message about a model."""
        versions: Mapping[str, Signature] = self._fleet.signatures[signature.name]
        return pb.Model(
            name=signature.name,
            version=signature.version,
            versions=sorted(versions, key=int),
            state=pb.MODEL_STATE_READY,
            description=signature.description,
            inputs=[_spec(spec) for spec in signature.inputs],
            outputs=[_spec(spec) for spec in signature.outputs],
            parameters=[_spec(spec) for spec in signature.parameters] if parameters else [],
            batch_axis=signature.batch_axis,
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
            devices=[
                worker.device for worker in self._fleet.workers if worker.holds(signature.name, signature.version)
            ],
            parameter_count=signature.parameter_count,
            batching=self._batching(signature),
            plan=signature.plan,
            hard_timeout_seconds=signature.hard_timeout,
        )

    def _batching(self, signature: Signature) -> pb.Batching:
        batch = signature.batch
        refused = self._unmerged(signature)
        if refused:
            return pb.Batching(evidence=f"requests are not merged any more: {refused}")
        return pb.Batching(max_rows=batch.max_rows, max_delay_seconds=batch.max_delay, evidence=batch.evidence)


def _spec(spec: SpecRecord) -> tensor_pb2.TensorSpec:
    dims = [
        tensor_pb2.Dim(symbol=extent) if isinstance(extent, str) else tensor_pb2.Dim(size=extent)
        for extent in spec.shape or ()
    ]
    return tensor_pb2.TensorSpec(
        name=spec.name,
        dtype=spec.dtype,  # type: ignore[arg-type]
        shape=dims,
        any_shape=spec.shape is None,
        optional=spec.optional,
        minimum=spec.minimum,
        maximum=spec.maximum,
    )
