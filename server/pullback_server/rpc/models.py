"""ModelService: what is hosted, and changing it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

from pullback_server.registry import Curator
from pullback_server.rpc.access import Access, Right
from pullback_server.rpc.catalogue import Catalogue
from pullback_server.rpc.unary import Call
from pullback_wire import Method, decode
from pullback_wire.v1 import model_service_pb2 as pb

T = TypeVar("T")


class ModelHandler:
    """Answers ModelService's unary calls."""

    def __init__(self, catalogue: Catalogue, curator: Curator, access: Access) -> None:
        self._catalogue = catalogue
        self._curator = curator
        self._access = access
        self._changes: set[asyncio.Task[Any]] = set()

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
            version = await self._done(self._curator.load(named.name, named.version))
            model = self._catalogue.describe_any(named.name, version, parameters=True)
            return pb.LoadModelResponse(model=model).SerializeToString()
        delete = cast(pb.UnloadModelRequest, request).delete_uploads
        if delete:
            self._allow(call, "upload", named.name)
        await self._done(self._curator.unload(named.name, named.version, delete=delete))
        return pb.UnloadModelResponse().SerializeToString()

    def _allow(self, call: Call, right: Right, model: str) -> None:
        self._access.check(call.metadata() or (), right, model)

    async def _done(self, change: Coroutine[Any, Any, T]) -> T:
        """What a change comes to. It goes on if the caller leaves: half a change would be of use to nobody."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            # Where the caller has left nobody else asks; the registry has logged it.
            task.exception()

    async def close(self) -> None:
        """Interrupts the changes under way."""
        for task in self._changes:
            task.cancel()
        await asyncio.gather(*self._changes, return_exceptions=True)
