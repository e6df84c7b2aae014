"""ModelService: what is hosted."""

from __future__ import annotations

from typing import cast

from pullback_server.faults import Fault
from pullback_server.rpc.catalogue import Catalogue
from pullback_server.rpc.unary import Call
from pullback_wire import Method, Reason, decode
from pullback_wire.v1 import model_service_pb2 as pb


class ModelHandler:
    """Answers ModelService's unary calls."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    async def __call__(self, method: Method, data: bytes, call: Call) -> bytes:
        """Raises Fault or WireError."""
        request, _ = decode(method.request, data)
        if method.name == "ListModels":
            found = [self._catalogue.find(name, "").signature for name in self._catalogue.names()]
            described = [self._catalogue.describe(signature, parameters=False) for signature in found]
            return pb.ListModelsResponse(models=described).SerializeToString()
        if method.name == "GetModel":
            named = cast(pb.GetModelRequest, request)
            call.model = named.name
            view = self._catalogue.find(named.name, named.version)
            return pb.GetModelResponse(
                model=self._catalogue.describe(view.signature, parameters=True)
            ).SerializeToString()
        raise Fault(Reason.ADMIN_DISABLED, f"{method.name} is an administrative call, which this server does not offer")
