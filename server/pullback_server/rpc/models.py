"""ModelService: what is hosted, and changing it."""

from __future__ import annotations

from typing import cast

from pullback_server.registry import Curator
from pullback_server.rpc.access import Access, Right
from pullback_server.rpc.catalogue import Catalogue
from pullback_server.rpc.interruptible import Interruptible
from pullback_server.rpc.unary import Call
from pullback_wire import Method, decode
from pullback_wire.v1 import model_service_pb2 as pb


class ModelHandler:
    """Answers ModelService's unary calls."""

    def __init__(self, catalogue: Catalogue, curator: Curator, access: Access) -> None:
        self._catalogue = catalogue
        self._curator = curator
        self._access = access
        self._changes = Interruptible()

    async def __call__(self, method: Method, data: bytes, call: Call) -> bytes:
        """Raises Fault or WireError."""
        request, _ = decode(method.request, data)
        if method.name == "ListModels":
            names = self._catalogue.table.names()
            models = [self._catalogue.describe_any(name, "", parameters=False) for name in names]
            return pb.ListModelsResponse(models=models).SerializeToString()
        named = cast(pb.GetModelRequest | pb.LoadModelRequest | pb.UnloadModelRequest, request)
        call.model = named.name
        if method.name == "GetModel":
            model = self._catalogue.describe_any(named.name, named.version, parameters=True)
            return pb.GetModelResponse(model=model).SerializeToString()
        self._allow(call, "load", named.name)
        if method.name == "LoadModel":
            # Half a change would be of use to nobody: it goes on if its caller leaves.
            version = await self._changes.result(self._curator.load(named.name, named.version), goes_on=True)
            model = self._catalogue.describe_any(named.name, version, parameters=True)
            return pb.LoadModelResponse(model=model).SerializeToString()
        delete = cast(pb.UnloadModelRequest, request).delete_uploads
        if delete:
            self._allow(call, "upload", named.name)
        unloading = self._curator.unload(named.name, named.version, delete=delete)
        await self._changes.result(unloading, goes_on=True)
        return pb.UnloadModelResponse().SerializeToString()

    def _allow(self, call: Call, right: Right, model: str) -> None:
        self._access.check(call.metadata() or (), right, model)

    async def close(self) -> None:
        """Interrupts the changes under way."""
        await self._changes.close()
