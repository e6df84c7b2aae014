"""ModelService: what is hosted, and changing it."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar, cast

from pullback_server.faults import Fault
from pullback_server.registry import Curator
from pullback_server.rpc.catalogue import Catalogue
from pullback_server.rpc.graphs import Graphs
from pullback_server.rpc.interruptible import Interruptible
from pullback_server.rpc.security import caller
from pullback_server.rpc.unary import Call
from pullback_wire import Method, Reason, decode
from pullback_wire.v1 import model_service_pb2 as pb

T = TypeVar("T")


class ModelHandler:
    """Answers ModelService's unary calls."""

    def __init__(self, catalogue: Catalogue, curator: Curator, graphs: Graphs) -> None:
        self._catalogue = catalogue
        self._graphs = graphs
        self._curator = curator
        self._changes = Interruptible()

    async def __call__(self, method: Method, data: bytes, call: Call) -> bytes:
        """Raises Fault or WireError."""
        request, _ = decode(method.request, data, bounded=True)
        if method.name == "ListModels":
            names = filter(caller().sees, self._catalogue.table.names())
            models = [self._catalogue.describe_any(name, "", parameters=False) for name in names]
            return pb.ListModelsResponse(models=models).SerializeToString()
        named = cast(pb.GetModelRequest | pb.LoadModelRequest | pb.UnloadModelRequest, request)
        call.model = named.name
        caller().need_model(named.name, "name")
        if method.name == "GetModel":
            model = self._catalogue.describe_any(named.name, named.version, parameters=True)
            return pb.GetModelResponse(model=model).SerializeToString()
        if method.name == "GetModelGraph":
            return await self._graphs(cast(pb.GetModelGraphRequest, request), call)
        if method.name not in ("LoadModel", "UnloadModel"):
            # What is new in the contract must never be taken for another change.
            raise Fault(Reason.INTERNAL, f"{method.path} is not served")
        if method.name == "LoadModel":
            # Half a change would be of use to nobody: it goes on if its caller leaves.
            version = await self._changed(self._curator.load(named.name, named.version))
            model = self._catalogue.describe_any(named.name, version, parameters=True)
            return pb.LoadModelResponse(model=model).SerializeToString()
        delete = cast(pb.UnloadModelRequest, request).delete_uploads
        if delete:
            caller().need("upload")
        await self._changed(self._curator.unload(named.name, named.version, delete=delete))
        return pb.UnloadModelResponse().SerializeToString()

    async def _changed(self, change: Coroutine[Any, Any, T]) -> T:
        try:
            return await self._changes.result(change, goes_on=True)
        except Fault as fault:
            if fault.reason is Reason.MODEL_NOT_FOUND and not caller().sees_all:
                # It may tell names that are not the caller's.
                raise Fault(fault.reason, "there is no such model", fault.field) from None
            raise

    async def close(self) -> None:
        """Interrupts the changes under way."""
        await self._changes.close()
