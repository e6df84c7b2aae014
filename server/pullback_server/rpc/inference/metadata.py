"""What there is: the server, its models, their inputs and outputs, those of derivatives included."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import cast

from pullback_server.faults import Fault
from pullback_server.job import Signature, SpecRecord
from pullback_server.rpc.catalogue import Catalogue
from pullback_server.rpc.inference.parameters import TRANSFORMS, Transform, split_name, transform_of
from pullback_server.rpc.inference.translating import GRAD, HVP
from pullback_server.rpc.security import caller
from pullback_server.rpc.unary import Call
from pullback_wire import Method, Reason, decode, dtype_name
from pullback_wire.dtypes import COMPLEX, FLOATING
from pullback_wire.inference import datatype_name
from pullback_wire.inference import open_inference_pb2 as pb
from pullback_wire.v1 import model_service_pb2 as models

PLATFORM, BACKEND = "pullback_pytorch", "pullback"
#: Of Triton's, which its clients look for; and of ours.
EXTENSIONS = ("model_configuration", "model_repository", "schedule_policy", "parameters", "binary_tensor_data",
              *(f"pullback_{transform}" for transform in TRANSFORMS))  # fmt: skip
_STATES = {
    models.MODEL_STATE_READY: "READY",
    models.MODEL_STATE_LOADING: "LOADING",
    models.MODEL_STATE_UNLOADING: "UNLOADING",
}


class MetadataHandler:
    """Answers what asks about models."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._version = version("pullback")

    async def __call__(self, method: Method, data: bytes, call: Call) -> bytes:
        """Raises Fault or WireError."""
        request, _ = decode(method.request, data, bounded=True)
        if method.name == "ServerMetadata":
            metadata = pb.ServerMetadataResponse(name="pullback", version=self._version, extensions=EXTENSIONS)
            return metadata.SerializeToString()
        if method.name == "RepositoryIndex":
            return self._index(cast(pb.RepositoryIndexRequest, request)).SerializeToString()
        named = cast(pb.ModelReadyRequest | pb.ModelMetadataRequest | pb.ModelConfigRequest, request)
        call.model = split_name(named.name)[0]
        caller().need_model(call.model, "name")
        if method.name == "ModelReady":
            return pb.ModelReadyResponse(ready=self._ready(named.name, named.version)).SerializeToString()
        transform = transform_of(named.name, "name")
        signature = self._catalogue.find(call.model, named.version).signature
        if method.name == "ModelMetadata":
            return self._metadata(named.name, signature, transform).SerializeToString()
        return pb.ModelConfigResponse(config=_config(named.name, signature, transform)).SerializeToString()

    def _ready(self, name: str, number: str) -> bool:
        try:
            transform_of(name, "name")
            self._catalogue.find(split_name(name)[0], number)
        except Fault as fault:
            if fault.reason in (Reason.MODEL_NOT_FOUND, Reason.VERSION_NOT_FOUND, Reason.NOT_READY):
                return False
            raise
        return True

    def _index(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        if request.repository_name:
            raise Fault(
                Reason.BAD_OPTION,
                f"repository_name is {request.repository_name[:100]!r}; there is one index, without a name",
                "repository_name",
            )
        found = pb.RepositoryIndexResponse()
        for name in filter(caller().sees, self._catalogue.table.names()):
            model = self._catalogue.describe_any(name, "", parameters=False)
            for one in model.version_statuses:
                state = _STATES.get(one.state, "UNAVAILABLE")
                if state == "READY" or not request.ready:
                    found.models.add(name=name, version=one.version, state=state, reason=one.reason)
            if not model.version_statuses and not request.ready:
                found.models.add(name=name, state="UNAVAILABLE", reason=model.state_reason)
        return found

    def _metadata(self, name: str, signature: Signature, transform: Transform) -> pb.ModelMetadataResponse:
        kind = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=name,
            versions=self._catalogue.table.callable(signature.name),
            platform=PLATFORM,
            inputs=[
                kind(name=called, datatype=_datatype(spec, called, signature), shape=_shape(spec))
                for called, spec in inputs(signature, transform)
            ],
            outputs=[
                kind(name=called, datatype=_datatype(spec, called, signature), shape=_shape(spec))
                for called, spec in outputs(signature, transform)
            ],
        )


def inputs(signature: Signature, transform: Transform) -> Iterator[tuple[str, SpecRecord]]:
    """What a model, or its derivative, can be given, by the names that requests use."""
    for spec in signature.inputs:
        yield spec.name, spec
    for spec in signature.outputs if transform else ():
        if _differentiable(spec):
            yield f"grad_output:{spec.name}", spec
    for spec in signature.inputs if transform == "hvp" else ():
        if _differentiable(spec):
            yield f"tangent:{spec.name}", spec


def outputs(signature: Signature, transform: Transform) -> Iterator[tuple[str, SpecRecord]]:
    """What it returns where nothing else is said."""
    for spec in signature.outputs:
        yield spec.name, spec
    prefixes = {"": (), "vjp": (GRAD,), "hvp": (GRAD, HVP)}[transform]
    for prefix in prefixes:
        for spec in signature.inputs:
            if _differentiable(spec):
                yield f"{prefix}{spec.name}", spec


def _differentiable(spec: SpecRecord) -> bool:
    return spec.dtype == 0 or spec.dtype in FLOATING or spec.dtype in COMPLEX


def _config(name: str, signature: Signature, transform: Transform) -> pb.ModelConfig:
    return pb.ModelConfig(
        name=name,
        platform=PLATFORM,
        backend=BACKEND,
        input=[
            pb.ModelInput(
                name=called,
                data_type=_data_type(spec, called, signature),
                dims=_shape(spec),
                optional=spec.optional or called != spec.name,
            )
            for called, spec in inputs(signature, transform)
        ],
        output=[
            pb.ModelOutput(name=called, data_type=_data_type(spec, called, signature), dims=_shape(spec))
            for called, spec in outputs(signature, transform)
        ],
    )


def _shape(spec: SpecRecord) -> list[int]:
    if spec.shape is None:
        return [-1]
    return [-1 if isinstance(extent, str) else extent for extent in spec.shape]


def _datatype(spec: SpecRecord, called: str, signature: Signature) -> str:
    """Raises Fault (UNSUPPORTED_BY_MODEL) for what the protocol cannot say."""
    if not spec.dtype:
        return ""
    try:
        return datatype_name(spec.dtype)
    except ValueError:
        raise Fault(
            Reason.UNSUPPORTED_BY_MODEL,
            f"{called!r} of model {signature.name!r} is {dtype_name(spec.dtype)}, for which this protocol has no "
            "datatype; GradientService takes it",
            "name",
        ) from None


def _data_type(spec: SpecRecord, called: str, signature: Signature) -> pb.DataType.ValueType:
    name = _datatype(spec, called, signature)
    return pb.DataType.Value(f"TYPE_{name}" if name else "TYPE_INVALID")
