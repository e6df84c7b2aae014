"""A gRPC server in numpy for the client's tests: real sockets, real serialisation, small models, failures on demand."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

from pullback_wire import (
    ERROR_DOMAIN,
    GRADIENT_METHODS,
    MODEL_METHODS,
    Method,
    Reason,
    TensorReader,
    TensorWriter,
    decode,
    encode_message,
)
from pullback_wire.v1 import gradient_service_pb2 as pb
from pullback_wire.v1 import model_service_pb2, tensor_pb2

Arrays = dict[str, np.ndarray[Any, Any]]
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_FIELDS = ("inputs", "targets", "parameters", "cotangents", "tangents")


@dataclass
class Failure:
    """How a call fails: a status with or without details."""

    code: int
    message: str = "as asked"
    reason: str | None = None
    retry_after: float | None = None
    field: str | None = None
    domain: str = ERROR_DOMAIN

    @classmethod
    def of(cls, reason: Reason, **more: Any) -> Failure:
        return cls(int(reason.code), reason=reason.value, **more)

    def details(self) -> bytes:
        packed = []
        if self.reason is not None:
            packed.append(error_details_pb2.ErrorInfo(reason=self.reason, domain=self.domain))
        if self.field is not None:
            violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.message)
            packed.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry_after is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(int(self.retry_after * 1000))
            packed.append(retry)
        anys = []
        for detail in packed:
            holder = AnyMessage()
            holder.Pack(detail)
            anys.append(holder)
        return status_pb2.Status(code=self.code, message=self.message, details=anys).SerializeToString()

    def abort(self, context: grpc.ServicerContext) -> None:
        bare = self.reason is None and self.field is None and self.retry_after is None
        if not bare:
            context.set_trailing_metadata((("grpc-status-details-bin", self.details()),))
        context.abort(_CODES[self.code], self.message)


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    message: Any
    metadata: dict[str, Any]
    tensors: dict[str, Arrays] = field(default_factory=dict)


class Fake:
    """Answers by model name; see `_MODELS`. `failures` are used up, one a call; `raw` is answered instead, when set."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.failures: list[Failure] = []
        self.raw: bytes | None = None
        self.health = b"\x08\x01"
        self.delay = 0.0
        self.outputs_known = True
        #: What is told of each model beside its signature; and what answers say of themselves.
        self.told: dict[str, Any] = {}
        self.answers_as = ("2", 0)
        self.cancelled = threading.Event()
        #: An upload's stream is over, however it ended.
        self.upload_over = threading.Event()
        self.target = ""

    def calls(self, method: str) -> int:
        return sum(seen.method == method for seen in self.seen)

    def handle(self, method: Method, data: bytes, context: grpc.ServicerContext) -> bytes:
        message, payloads = decode(method.request, data)
        reader = TensorReader(payloads)
        seen = Seen(method.name, message, dict(context.invocation_metadata()))
        for name in _FIELDS:
            tensors = getattr(message, name, ())
            seen.tensors[name] = {one.name: reader.array(one, name) for one in tensors}
        reader.finish()
        self.seen.append(seen)
        if self.failures:
            self.failures.pop(0).abort(context)
        end = time.monotonic() + self.delay
        while time.monotonic() < end:
            if not context.is_active():
                self.cancelled.set()
                break
            time.sleep(0.02)
        if self.raw is not None:
            return self.raw
        if method.name == "ListModels":
            models = [self.model(name) for name in sorted(_SIGNATURES)]
            return model_service_pb2.ListModelsResponse(models=models).SerializeToString()
        if method.name == "GetModel":
            return model_service_pb2.GetModelResponse(model=self.model(message.name)).SerializeToString()
        if method.name in ("LoadModel", "UnloadModel"):
            answer = method.response()
            if method.name == "LoadModel":
                answer.model.CopyFrom(self.model(message.name))
            return answer.SerializeToString()
        writer = TensorWriter()
        answer = _MODELS[message.function.model](seen, writer)
        answer.model_version, answer.model_revision = self.answers_as
        return encode_message(answer, writer.payloads)

    def model(self, name: str) -> model_service_pb2.Model:
        inputs, outputs = _SIGNATURES[name]
        spec = tensor_pb2.TensorSpec
        model = model_service_pb2.Model(
            name=name,
            version="2",
            versions=["1", "2"],
            state=model_service_pb2.MODEL_STATE_READY,
            description=f"the {name} function",
            inputs=[spec(name=one.rstrip("?"), any_shape=True, optional=one.endswith("?")) for one in inputs],
            outputs=[spec(name=one, any_shape=True) for one in outputs] if self.outputs_known else [],
            parameters=[spec(name="w", dtype=tensor_pb2.DTYPE_FLOAT32, shape=[tensor_pb2.Dim(size=3)])],
            losses=[
                model_service_pb2.LossSignature(
                    name="mse_loss", tensors=["input", "target"], optional_tensors=["weight"], options=["reduction"]
                )
            ],
            orders=model_service_pb2.Orders(reverse=-1, forward=True, evidence="known by construction"),
            devices=["cpu"],
            parameter_count=3,
        )
        model.inputs[0].dtype = tensor_pb2.DTYPE_FLOAT64
        model.inputs[0].any_shape = False
        model.inputs[0].shape.add(symbol="n")
        for told, value in self.told.items():
            if isinstance(value, list):
                model.ClearField(told)
                getattr(model, told).extend(value)
            else:
                setattr(model, told, value)
        return model

    def take(self, parts: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """UploadWeights."""
        context.add_callback(self.upload_over.set)
        received = [model_service_pb2.UploadWeightsRequest.FromString(next(parts))]
        seen = Seen("UploadWeights", received, dict(context.invocation_metadata()))
        self.seen.append(seen)
        if self.failures:
            self.failures.pop(0).abort(context)
        received += map(model_service_pb2.UploadWeightsRequest.FromString, parts)
        answer = model_service_pb2.UploadWeightsResponse(model=self.model(received[0].header.model))
        return answer.SerializeToString()


def _gradients(writer: TensorWriter, arrays: dict[str, np.ndarray[Any, Any] | None]) -> list[pb.Gradient]:
    return [
        pb.Gradient(name=name, unused=True) if array is None else pb.Gradient(name=name, value=writer.add(name, array))
        for name, array in arrays.items()
    ]


def _outputs(seen: Seen, writer: TensorWriter, arrays: Arrays) -> list[tensor_pb2.Tensor]:
    omitted = seen.message.results.omit_outputs
    return [] if omitted else [writer.add(name, array) for name, array in arrays.items()]


def _square(seen: Seen, writer: TensorWriter) -> Any:
    """y = x**2, elementwise; with a loss: sum((x**2 - target)**2), called "loss"."""
    inputs, message = seen.tensors["inputs"], seen.message
    x = inputs["x"]
    if message.function.HasField("loss"):
        target = seen.tensors["targets"]["target"]
        outputs = {"loss": np.asarray(((x**2 - target) ** 2).sum())}
        gradients = {"x": 4 * x * (x**2 - target)}
        return pb.ComputeVjpResponse(outputs=_outputs(seen, writer, outputs), gradients=_gradients(writer, gradients))
    outputs = {"output": x**2}
    v = seen.tensors["cotangents"].get("output", np.ones_like(x))
    t = {name.removeprefix("input:"): t for name, t in seen.tensors["tangents"].items()}.get("x", np.zeros_like(x))
    if seen.method == "Evaluate":
        return pb.EvaluateResponse(outputs=_outputs(seen, writer, outputs))
    if seen.method == "ComputeVjp":
        gradient = 2 * x * v
        norms = []
        if message.HasField("max_norm"):
            rows = gradient.reshape(len(gradient), -1) if message.cotangents_batched else gradient.reshape(1, -1)
            norms = np.linalg.norm(rows, axis=1).tolist()
        return pb.ComputeVjpResponse(
            outputs=_outputs(seen, writer, outputs), gradients=_gradients(writer, {"x": gradient}), norms=norms
        )
    if seen.method == "ComputeJvp":
        return pb.ComputeJvpResponse(
            outputs=_outputs(seen, writer, outputs), tangents=_gradients(writer, {"output": 2 * x * t})
        )
    if seen.method == "ComputeHvp":
        derivatives = {"output": 2 * x * t} if message.return_cotangent_derivatives else {}
        names = [name.removeprefix("input:") for name in message.wrt] or ["x"]
        return pb.ComputeHvpResponse(
            outputs=_outputs(seen, writer, outputs),
            gradients=_gradients(writer, dict.fromkeys(names, 2 * x * v)),
            hvps=_gradients(writer, dict.fromkeys(names, 2 * v * t)),
            cotangent_derivatives=_gradients(writer, derivatives),
        )
    if seen.method == "ComputeJacobian":
        block = pb.Block(row="output", column="x", value=writer.add("", np.diag(2 * x)))
        return pb.ComputeJacobianResponse(outputs=_outputs(seen, writer, outputs), blocks=[block])
    block = pb.Block(row="x", column="x", value=writer.add("", 2 * np.eye(len(x))))
    return pb.ComputeHessianResponse(
        outputs=_outputs(seen, writer, {"output": np.asarray((x**2).sum())}),
        gradients=_gradients(writer, {"x": 2 * x}),
        blocks=[block],
    )


def _pair(seen: Seen, writer: TensorWriter) -> Any:
    """double = 2 x, total = sum(x); index is an integer input; z may be left out and is not used."""
    inputs = seen.tensors["inputs"]
    x = inputs["x"]
    outputs = {"double": 2 * x, "total": np.asarray(x.sum())}
    gradients: dict[str, np.ndarray[Any, Any] | None] = {"x": np.full_like(x, 3.0)}
    if "z" in inputs:
        gradients["z"] = None
    if seen.method == "Evaluate":
        return pb.EvaluateResponse(outputs=_outputs(seen, writer, outputs))
    if seen.method == "ComputeJvp":
        return pb.ComputeJvpResponse(
            outputs=_outputs(seen, writer, outputs),
            tangents=_gradients(writer, {"double": 2 * seen.tensors["tangents"]["x"], "total": None}),
        )
    if seen.method == "ComputeJacobian":
        blocks = [pb.Block(row=row, column="x", unused=True) for row in outputs]
        return pb.ComputeJacobianResponse(outputs=_outputs(seen, writer, outputs), blocks=blocks)
    wrt = seen.message.wrt
    if wrt:
        gradients = {name: np.asarray(1.0) for name in (["w.0", "w.1"] if "w.*" in wrt else wrt)}
    return pb.ComputeVjpResponse(outputs=_outputs(seen, writer, outputs), gradients=_gradients(writer, gradients))


def _echo(seen: Seen, writer: TensorWriter) -> Any:
    """The inputs, as they came."""
    return pb.EvaluateResponse(outputs=_outputs(seen, writer, seen.tensors["inputs"]))


_SIGNATURES: dict[str, tuple[list[str], list[str]]] = {
    "echo": (["x"], ["x"]),
    "pair": (["x", "index", "z?"], ["double", "total"]),
    "square": (["x"], ["output"]),
}
_MODELS: dict[str, Callable[[Seen, TensorWriter], Any]] = {"square": _square, "pair": _pair, "echo": _echo}


@contextlib.contextmanager
def serving(fake: Fake, *, credentials: Any = None, address: str = "127.0.0.1:0", **options: Any) -> Iterator[Fake]:
    """Serves `fake`; options are gRPC's, with __ for dots."""

    def handler(method: Method) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda data, context: fake.handle(method, data, context))

    def check(data: bytes, context: grpc.ServicerContext) -> bytes:
        fake.seen.append(Seen("Check", data, dict(context.invocation_metadata())))
        if fake.failures:
            fake.failures.pop(0).abort(context)
        return fake.health

    server = grpc.server(
        ThreadPoolExecutor(8), options=[(name.replace("__", "."), value) for name, value in options.items()]
    )
    for methods in (GRADIENT_METHODS, MODEL_METHODS):
        service = next(iter(methods.values())).service
        handlers = {name: handler(method) for name, method in methods.items()}
        if methods is MODEL_METHODS:
            handlers["UploadWeights"] = grpc.stream_unary_rpc_method_handler(fake.take)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    checks = {"Check": grpc.unary_unary_rpc_method_handler(check)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", checks),))
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    fake.target = address if address.startswith("unix:") else f"127.0.0.1:{port}"
    server.start()
    try:
        yield fake
    finally:
        server.stop(0).wait()
