"""What a server can get wrong, each with the check that is meant to find it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2
from tests.conformance.proxy import Body, Fault, Refusal, edit

from pullback_wire import GRADIENT_METHODS, Reason
from pullback_wire.v1 import gradient_service_pb2

F32 = 12
#: That the suite tries first where an axis is free.
FIRST_EXTENT = 3


@dataclass(frozen=True)
class Broken:
    """name: what is wrong. check: finds it. models: that are asked, all if none. fault: made anew for each run."""

    name: str
    check: str
    models: tuple[str, ...]
    fault: Callable[[], Fault]


BROKEN: list[Broken] = []


def broken(name: str, check: str, *models: str, fault: Callable[[], Fault] | None = None, **hooks: Any) -> None:
    BROKEN.append(Broken(name, check, models, fault or (lambda: Fault(**hooks))))


def of(*methods: str) -> Callable[[Callable[[Body], None]], Callable[[str, Body], None]]:
    """A hook of some methods only."""

    def only(hook: Callable[[Body], None]) -> Callable[[str, Body], None]:
        def run(name: str, body: Body) -> None:
            if name in methods:
                hook(body)

        return run

    return only


VJP, JVP, HVP = of("ComputeVjp"), of("ComputeJvp"), of("ComputeHvp")


def times(factor: float, field: str = "gradients", first: bool = False) -> Callable[[Body], None]:
    """Scales gradients (or hvps, tangents, ...); first: only the first of them."""

    def hook(body: Body) -> None:
        for entry in getattr(body.message, field)[: 1 if first else None]:
            if not entry.unused:
                values = body.array(entry.value)
                values[...] = values * factor

    return hook


def each(change: Callable[[np.ndarray], np.ndarray], field: str = "gradients") -> Callable[[Body], None]:
    """Overwrites every gradient by a function of it."""

    def hook(body: Body) -> None:
        for entry in getattr(body.message, field):
            if not entry.unused:
                values = body.array(entry.value)
                values[...] = change(values.copy())

    return hook


def exchange(field: str) -> Callable[[Body], None]:
    """Two values of equal shape change places."""

    def hook(body: Body) -> None:
        entries = [entry for entry in getattr(body.message, field) if not entry.unused]
        if len(entries) > 1:
            one, other = entries[0].value, entries[1].value
            one.payload, other.payload = other.payload, one.payload

    return hook


# ---- first derivatives

broken("the sign of a VJP is wrong", "vjp.differences", "small", response=VJP(times(-1)))
broken("float32 inside, float64 outside", "vjp.differences", "mixed", response=VJP(times(1.001)))
broken("gradients of two inputs are exchanged", "vjp.each", "mixed", response=VJP(exchange("gradients")))
broken("a gradient is infinite", "vjp.differences", "small", response=VJP(each(lambda g: _infinite(g))))
broken("a VJP is not conjugated", "vjp.complex", "holomorphic", response=VJP(each(np.conj)))
broken("gradients are clipped unasked", "vjp.linear", "small", response=VJP(each(lambda g: np.clip(g, -0.1, 0.1))))
broken("K cotangents come back in another order", "vjp.batched", "small", fault=lambda: Fault(response=_rolled()))
broken("a missing cotangent counts as one", "vjp.partial", "pair", fault=lambda: Fault(request=VJP(_filled)))
broken("a missing cotangent of a scalar is not 1", "vjp.scalar", "coupled", fault=lambda: Fault(request=VJP(_two)))
broken("max_norm is ignored", "vjp.max_norm", "small", request=VJP(lambda body: body.message.ClearField("max_norm")))
broken("norms are those after clipping", "vjp.max_norm", "small", response=VJP(lambda body: _clipped(body)))
broken("differentiable models have no VJP", "vjp.answers", "small", fault=lambda: Fault(request=VJP(_unavailable)))
broken("a JVP is scaled", "jvp.adjoint", "small", response=JVP(times(1.0001, "tangents")))
broken("a JVP looks at the first tangent only", "jvp.subset", "mixed", fault=lambda: Fault(request=JVP(_first_tangent)))
broken("rows are mixed up", "rows.independent", "small", response=VJP(each(lambda g: np.roll(g, 1, 0))))


def _infinite(g: np.ndarray) -> np.ndarray:
    g.reshape(-1)[0] = np.inf
    return g


def _rolled() -> Callable[[str, Body], None]:
    return VJP(each(lambda g: np.roll(g, 1, 0) if g.ndim == 3 else g))


def _filled(body: Body) -> None:
    if len(body.message.cotangents) == 1 and body.message.function.model == "pair":
        given = body.message.cotangents[0]
        other = {"wide": "narrow", "narrow": "wide"}[given.name]
        (x,) = body.message.inputs
        extent = 1 if other == "narrow" else 2 * x.shape[0]
        body.add(body.message.cotangents.add(), np.ones((extent, *x.shape[1:])), other)


def _two(body: Body) -> None:
    if not body.message.cotangents:
        body.add(body.message.cotangents.add(), np.array(2.0), "output")


def _clipped(body: Body) -> None:
    if body.message.norms:
        body.message.norms[0] *= 0.5


def _unavailable(body: Body) -> None:
    raise Refusal(grpc.StatusCode.INTERNAL, "no gradients today")


def _first_tangent(body: Body) -> None:
    for tangent in body.message.tangents[1:]:
        body.array(tangent)[...] = 0


# ---- second derivatives, dense ones

broken("an HVP is the gradient", "hvp.differences", "small", response=HVP(lambda body: _gradient_as_hvp(body)))
broken("an HVP is doubled", "hvp.differences", "coupled", response=HVP(times(2, "hvps")))
broken("mixed terms are left out", "hvp.mixed", "coupled", fault=lambda: _no_mixed_terms())
broken("an HVP is not symmetric", "hvp.symmetric", "coupled", response=HVP(times(1.5, "hvps", first=True)))
broken("an HVP's gradients are another's", "hvp.gradients", "small", response=HVP(times(1.01)))
broken("J t is scaled", "hvp.cotangents", "small", response=HVP(times(0.5, "cotangent_derivatives")))
broken("a promised order is refused", "orders.kept", "small", fault=lambda: Fault(request=HVP(_no_order)))
broken("zeros where there is no second order", "orders.beyond", "once", fault=lambda: Fault(error=_zeros))
broken("a Jacobian is transposed", "jacobian.rows", "turned", response=of("ComputeJacobian")(lambda body: _turn(body)))
broken("H is transposed", "hessian.rows", "swirl", response=of("ComputeHessian")(lambda body: _turn(body)))
broken("blocks of a Hessian are exchanged", "hessian.rows", "coupled", fault=lambda: Fault(response=_blocks))
broken("a loss's Hessian has half its value", "loss.hessian", "small", fault=lambda: Fault(response=_halved))


def _gradient_as_hvp(body: Body) -> None:
    for hvp, gradient in zip(body.message.hvps, body.message.gradients, strict=True):
        body.array(hvp.value)[...] = body.array(gradient.value)


def _no_mixed_terms() -> Fault:
    names: set[str] = set()

    def request(body: Body) -> None:
        names.clear()
        names.update(tangent.name for tangent in body.message.tangents)

    def response(body: Body) -> None:
        for hvp in body.message.hvps:
            if hvp.name not in names:
                body.array(hvp.value)[...] = 0

    return Fault(request=HVP(request), response=HVP(response))


def _no_order(body: Body) -> None:
    status = _status(Reason.ORDER_UNAVAILABLE, "no second derivative today")
    raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "no second derivative today", status)


def _status(reason: Reason, message: str) -> bytes:
    from google.rpc import status_pb2

    status = status_pb2.Status(code=int(reason.code), message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason.value, domain="pullback.v1"))
    return bytes(status.SerializeToString())


def _zeros(name: str, status: Any, data: bytes) -> bytes | None:
    if name != "ComputeHvp":
        return None
    asked = Body(gradient_service_pb2.ComputeHvpRequest, data)
    answer = Body(gradient_service_pb2.ComputeHvpResponse, b"")
    shapes = {tensor.name: tuple(tensor.shape) for tensor in asked.message.inputs}
    for wrt in asked.message.wrt:
        for field in (answer.message.gradients, answer.message.hvps):
            entry = field.add(name=wrt)
            answer.add(entry.value, np.zeros(shapes[wrt]))
    answer.message.model_version = "1"
    return answer.encode()


def _turn(body: Body) -> None:
    for block in body.message.blocks:
        values = body.array(block.value)
        values[...] = values.T.copy()


def _blocks(name: str, body: Body) -> None:
    if name == "ComputeHessian":
        first, *_, last = body.message.blocks
        first.value.payload, last.value.payload = last.value.payload, first.value.payload


def _halved(name: str, body: Body) -> None:
    if name == "ComputeHessian":
        for block in body.message.blocks:
            values = body.array(block.value)
            values *= 0.5


# ---- what answers look like

EVERY = ("Evaluate", *(name for name in GRADIENT_METHODS if name != "Evaluate"))


def _drop_last(body: Body) -> None:
    # The payload belongs to nobody then, so it goes too.
    del body.payloads[body.message.outputs[-1].payload :]
    del body.message.outputs[-1]


def _as_float32(body: Body) -> None:
    for entry in body.message.gradients:
        body.set(entry.value, body.array(entry.value).astype(np.float32), F32)


def _zeros_for_unused(body: Body) -> None:
    for entry in body.message.gradients:
        if entry.unused:
            entry.unused = False
            body.add(entry.value, np.zeros(3), entry.name)


def _no_version(name: str, body: Body) -> None:
    if name in EVERY:
        body.message.model_version = ""


def _models(change: Callable[[Any], None]) -> Callable[[str, Body], None]:
    return of("ListModels")(lambda body: change(body.message.models))


def _turned(models: Any) -> None:
    found = list(models)[::-1]
    del models[:]
    models.extend(found)


def _evaluate(name: str, body: Body) -> None:
    if name == "Evaluate":
        del body.message.outputs[:]


broken("an output is dropped", "contract.outputs", "mixed", response=of("Evaluate")(_drop_last))
broken("outputs change their names", "contract.outputs", "pair", fault=lambda: Fault(response=of("Evaluate")(_renamed)))
broken(
    "another shape is told", "contract.outputs", "small", fault=lambda: Fault(response=of("GetModel")(_turned_shape))
)
broken(
    "an extent is told that happens to be so",
    "contract.outputs",
    "small",
    fault=lambda: Fault(response=of("GetModel")(_fixed_shape)),
)
broken("gradients come in another order", "contract.gradients", "mixed", fault=lambda: Fault(response=VJP(_reversed)))
broken("float32 instead of float64", "contract.gradients", "small", response=VJP(_as_float32))
broken("float32 of what came as float64", "contract.dtypes", "cube", response=VJP(_as_float32))
broken("zeros for unused", "contract.unused", "spare", response=VJP(_zeros_for_unused))
broken(
    "unused is no error",
    "contract.unused",
    "half_used",
    request=VJP(lambda b: setattr(b.message, "allow_unused", True)),
)
broken("a payload is left over", "contract.gradients", "small", fault=lambda: Fault(response=VJP(_orphaned)))
broken("no version is told", "contract.version", "small", response=_no_version)
broken("seeds are ignored", "contract.repeat", "noisy", fault=lambda: Fault(request=_no_seed))
broken("an empty wrt is the first input", "contract.wrt_default", "mixed", fault=lambda: Fault(request=VJP(_first_wrt)))
broken("globs match the first only", "contract.wrt_globs", "small", fault=lambda: Fault(request=VJP(_first_glob)))
broken("omit_outputs is ignored", "contract.omit_outputs", "small", request=VJP(lambda b: b.message.results.Clear()))
broken("results.dtype is ignored", "contract.result_dtype", "small", fault=lambda: Fault(request=_no_dtype))
broken("the list is not sorted", "contract.list", "small", response=_models(_turned))
broken("GetModel ignores the version", "contract.get", "small", fault=lambda: Fault(response=of("GetModel")(_other)))
broken("GetModel and ListModels disagree", "contract.get", "small", fault=lambda: Fault(response=_models(_less)))
broken("a dtype that there is not", "contract.version", "small", fault=lambda: Fault(response=_strange()))
broken("a session needs no frame", "contract.sessions", "small", ends=lambda error: error is None)
broken("an RPC is missing", "contract.methods", "small", fault=lambda: Fault(bytes_=_unimplemented))


def _renamed(body: Body) -> None:
    for index, tensor in enumerate(body.message.outputs):
        tensor.name = f"output_{index}"


def _turned_shape(body: Body) -> None:
    (output,) = body.message.model.outputs
    rows, columns = output.shape
    del output.shape[:]
    output.shape.extend([columns, rows])


def _fixed_shape(body: Body) -> None:
    (output,) = body.message.model.outputs
    output.shape[0].size = FIRST_EXTENT


def _less(models: Any) -> None:
    for one in models:
        one.description += ", or so"


def _strange() -> Callable[[str, Body], None]:
    return of("GetModel")(lambda body: setattr(body.message.model.inputs[0], "dtype", 77))


def _reversed(body: Body) -> None:
    found = list(body.message.gradients)[::-1]
    del body.message.gradients[:]
    body.message.gradients.extend(found)


def _orphaned(body: Body) -> None:
    body.payloads.append(bytearray(8))


def _no_seed(name: str, body: Body) -> None:
    if name in EVERY:
        body.message.function.ClearField("seed")


def _first_wrt(body: Body) -> None:
    if not body.message.wrt:
        body.message.wrt.append(body.message.inputs[0].name)


def _first_glob(body: Body) -> None:
    if list(body.message.wrt) == ["param:*"]:
        body.message.wrt[0] = "param:0.bias"


def _no_dtype(name: str, body: Body) -> None:
    if name in EVERY:
        body.message.results.ClearField("dtype")


def _other(body: Body) -> None:
    body.message.model.version = "7"


def _unimplemented(name: str, data: bytes) -> bytes | None:
    if name == "ComputeHessian":
        raise Refusal(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    return None


# ---- losses and parameters


def _reduction(body: Body) -> None:
    if body.message.function.HasField("loss"):
        body.message.function.loss.options.Clear()


def _no_parameters(name: str, body: Body) -> None:
    # Evaluated without them; the gradient is still by the given ones.
    if name == "Evaluate":
        for tensor in list(body.message.parameters):
            values = body.array(tensor)
            values[...] = 0.25


broken("a loss's options are ignored", "loss.mse", "small", request=VJP(_reduction))
broken("label smoothing is ignored", "loss.cross_entropy", "small", request=VJP(_reduction))
broken("given parameters are others", "parameters.given", "small", request=_no_parameters)


# ---- bytes


def _refuses(message: str) -> Refusal:
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, message, _status(Reason.MALFORMED_REQUEST, message))


def _knows_all(name: str, data: bytes) -> bytes | None:
    if name == "ComputeVjp" and b"from a later version" in data:
        raise _refuses("an unknown field")
    return None


def _payloads_last(name: str, data: bytes) -> bytes | None:
    if name == "ComputeVjp" and data[:2] == b"\xa2\x06":
        raise _refuses("a payload before the header")
    return None


def _ascending(name: str, data: bytes) -> bytes | None:
    body = data.find(b"\x0a")
    if name == "ComputeVjp" and body != 0:
        raise _refuses("field 1 is not the first")
    return None


def _index_ignored(body: Body) -> None:
    count = 0
    for field in (body.message.inputs, body.message.cotangents):
        for tensor in field:
            tensor.payload = count
            count += 1


def _by_place(body: Body) -> None:
    if body.message.function.model == "mixed":
        for tensor, name in zip(body.message.inputs, ("x", "y", "scale"), strict=False):
            tensor.name = name


def _no_scalars(name: str, body: Body) -> None:
    if name == "ComputeVjp":
        for entry in body.message.gradients:
            if not entry.value.shape:
                entry.value.shape.append(1)


broken("an unknown field is refused", "wire.unknown_fields", "small", bytes_=_knows_all)
broken("payloads must come last", "wire.payload_order", "small", bytes_=_payloads_last)
broken("fields must ascend", "wire.field_order", "small", bytes_=_ascending)
broken("the payload index is ignored", "wire.payload_index", "small", request=VJP(_index_ignored))
broken("inputs are taken by place", "wire.tensor_order", "mixed", request=VJP(_by_place))
broken("0-d tensors become 1-d", "wire.shapes", "cube", response=_no_scalars)


# ---- errors


def reason(wanted: str, instead: str) -> Callable[[str, Any, bytes], None]:
    """One reason for another, with its own code."""

    def hook(name: str, status: Any, data: bytes) -> None:
        def change(info: Any) -> None:
            if info.reason == wanted:
                info.reason = instead

        edit(status, change)

    return hook


def _code(name: str, status: Any, data: bytes) -> None:
    status.code = 2


def _no_field(name: str, status: Any, data: bytes) -> None:
    edit(status, lambda bad: bad.Clear(), error_details_pb2.BadRequest)


def _vague(name: str, status: Any, data: bytes) -> None:
    status.message = "invalid argument"
    edit(status, lambda bad: [v.ClearField("description") for v in bad.field_violations], error_details_pb2.BadRequest)


def _long(name: str, status: Any, data: bytes) -> None:
    edit(status, lambda info: info.metadata.update({"traceback": "x" * 5000}))


def _domain(name: str, status: Any, data: bytes) -> None:
    edit(status, lambda info: setattr(info, "domain", "example.org"))


def _let_pass(*fields: str) -> Callable[[str, Body], None]:
    """Clears fields of a request, so that what is wrong with them is not seen."""

    def hook(name: str, body: Body) -> None:
        for field in fields:
            if field in body.message.DESCRIPTOR.fields_by_name:
                body.message.ClearField(field)

    return hook


broken("garbage is INTERNAL", "errors.malformed", "small", error=reason("MALFORMED_REQUEST", "INTERNAL"))
broken("a bad tensor is a bad name", "errors.tensors", "small", error=reason("BAD_TENSOR", "BAD_NAME"))
broken("a bad tensor's field is not named", "errors.tensors", "small", error=_no_field)
broken("every error is UNKNOWN", "errors.tensors", "small", error=_code)
broken("shared payloads are copied", "errors.shared_payload", "small", fault=lambda: Fault(request=VJP(_unshared)))
broken("a shape that does not fit is a bad name", "errors.signature", "small", error=reason("BAD_TENSOR", "BAD_NAME"))
broken("a message does not say what came", "errors.signature", "small", error=_vague)
broken("unequal extents are the model's error", "errors.symbols", "mixed", error=reason("BAD_TENSOR", "MODEL_ERROR"))
broken("ids out of range are the model's", "errors.range", "words", error=reason("VALUE_OUT_OF_RANGE", "MODEL_ERROR"))
broken("classes out of range are wrapped", "errors.classes", "small", fault=lambda: Fault(request=VJP(_wrapped)))
broken("options are ignored", "errors.options", "small", request=_let_pass("results", "max_norm"))
broken(
    "integers are differentiated", "errors.not_differentiable", "words", error=reason("NOT_DIFFERENTIABLE", "BAD_NAME")
)
broken("complex Jacobians fail late", "errors.complex", "holomorphic", error=reason("COMPLEX_UNSUPPORTED", "INTERNAL"))
broken("K is unbounded", "errors.too_many_cotangents", "cube", error=reason("RESULT_TOO_LARGE", "INTERNAL"))
broken("detect_anomaly is ignored", "errors.not_finite", "small", fault=lambda: Fault(request=VJP(_no_anomaly)))
broken("a model's error is the server's", "errors.model", "raises", error=reason("MODEL_ERROR", "INTERNAL"))
broken("loading is INTERNAL", "errors.administrative", "small", fault=lambda: Fault(error=_internal))
broken("any token will do", "errors.credentials", "small", fault=lambda: Fault(error=_let_in))
broken("any priority will do", "errors.metadata", "small", error=reason("BAD_OPTION", "INTERNAL"))
broken(
    "an unknown version is an unknown model",
    "errors.models",
    "small",
    error=reason("VERSION_NOT_FOUND", "MODEL_NOT_FOUND"),
)
broken("errors are of another domain", "errors.models", "small", error=_domain)
broken("details are long", "errors.long_names", "small", error=_long)
broken("a message names nothing", "errors.inputs", "small", error=_vague)
broken("an unknown wrt is passed over", "errors.wrt", "small", request=VJP(lambda body: body.message.ClearField("wrt")))
broken("spare targets are passed over", "errors.targets", "small", fault=lambda: Fault(request=VJP(_no_targets)))
broken("cotangents are broadcast", "errors.cotangents", "small", fault=lambda: Fault(request=VJP(_broadcast)))
broken("no cotangent means ones", "errors.missing_cotangent", "small", fault=lambda: Fault(request=VJP(_ones)))
broken("a tangent's shape is not looked at", "errors.tangents", "mixed", error=reason("BAD_COTANGENT", "MODEL_ERROR"))


def _unshared(body: Body) -> None:
    cotangent = body.message.cotangents[0]
    if cotangent.payload == body.message.inputs[0].payload:
        cotangent.payload = 1
        del cotangent.shape[:]
        cotangent.shape.extend([body.message.inputs[0].shape[0], 2])


def _wrapped(body: Body) -> None:
    for target in body.message.targets:
        if target.dtype == 9:
            body.array(target)[...] %= 2


def _no_anomaly(body: Body) -> None:
    body.message.function.detect_anomaly = False


def _internal(name: str, status: Any, data: bytes) -> None:
    if name == "LoadModel":
        edit(status, lambda info: setattr(info, "reason", "INTERNAL"))


def _let_in(name: str, status: Any, data: bytes) -> bytes | None:
    return b"" if name == "ListModels" else None


def _no_targets(body: Body) -> None:
    if not body.message.function.HasField("loss"):
        del body.payloads[len(body.message.inputs) : len(body.message.inputs) + len(body.message.targets)]
        del body.message.targets[:]
        body.message.cotangents[0].payload = len(body.payloads) - 1


def _broadcast(body: Body) -> None:
    for cotangent in body.message.cotangents:
        if not cotangent.shape and cotangent.name == "output":
            rows = body.message.inputs[0].shape[0]
            values = np.broadcast_to(body.array(cotangent), (rows, 2)).copy()
            cotangent.shape.extend([rows, 2])
            body.payloads[cotangent.payload] = bytearray(values.tobytes())


def _ones(body: Body) -> None:
    if not body.message.cotangents and not body.message.function.HasField("loss"):
        body.add(body.message.cotangents.add(), np.ones((body.message.inputs[0].shape[0], 2)), "output")


# ---- sessions


def frame(kind: str, change: Callable[[Any], None]) -> Callable[[Body], None]:
    """A hook of the client's frames of one kind."""

    def hook(body: Body) -> None:
        if body.message.WhichOneof("frame") == kind:
            change(getattr(body.message, kind))

    return hook


def answer(kind: str, change: Callable[[Body], None]) -> Callable[[Body], None]:
    """A hook of the server's frames of one kind."""

    def hook(body: Body) -> None:
        if body.message.WhichOneof("frame") == kind:
            change(body)

    return hook


def _values(change: Callable[[np.ndarray], Any]) -> Callable[[Body], None]:
    def hook(body: Body) -> None:
        for info in body.message.result.handles:
            if info.has_value and not info.tensor.transfer:
                change(body.array(info.tensor))

    return answer("result", hook)


def _doubled(values: np.ndarray) -> None:
    if values.dtype.kind == "f":
        values *= 2


def _flipped(values: np.ndarray) -> None:
    if values.dtype.name == "float8_e8m0fnu" and values.size:
        values.reshape(-1).view(np.uint8)[0] ^= 1


def op_reason(wanted: str, instead: str) -> Callable[[Body], None]:
    def hook(body: Body) -> None:
        def change(info: Any) -> None:
            if info.reason == wanted:
                info.reason = instead

        edit(body.message.status, change)

    return hook


def _swapped() -> Fault:
    """Every other answer waits for the next."""
    held: list[Body] = []

    def hook(body: Body) -> list[Body] | None:
        if not body.message.op or body.message.op == 1:
            return None
        if not held and body.message.op == 2:
            held.append(body)
            return []
        return [body, *[held.pop() for _ in held]]

    return Fault(answer=hook)


def _forgiving(*forgiven: str) -> Callable[[Body], None]:
    """An op that fails for a reason is said to have gone well."""

    def hook(body: Body) -> None:
        info = error_details_pb2.ErrorInfo()
        for detail in body.message.status.details:
            if detail.Unpack(info) and info.reason in forgiven:
                body.message.ClearField("status")
                body.message.result.SetInParent()
                return

    return hook


def _unused_zeros(body: Body) -> None:
    for info in body.message.result.handles:
        info.unused = False


def _retained(op: Any) -> None:
    op.retain_graph = True


def _no_graph(op: Any) -> None:
    op.create_graph = False


def _generous(op: Any) -> None:
    op.credit_bytes = 1 << 30


def _no_models(op: Any) -> None:
    del op.models[:]


def _nothing_fetched(op: Any) -> None:
    op.fetch_below = 0


def _flip_chunk(body: Body) -> None:
    if body.message.chunk.offset:
        body.payloads[0][0] ^= 1


def _no_credit(body: Body) -> None:
    body.message.opened.credit_bytes = 0


def _silent(body: Body) -> list[Body] | None:
    return [] if body.message.WhichOneof("frame") == "heartbeat" else None


def _kept(body: Body) -> None:
    del body.message.release[:]


def _bare(body: Body) -> None:
    del body.message.status.details[:]


def _stateless(body: Body) -> None:
    for entry in body.message.stateless.vjp.gradients:
        values = body.array(entry.value)
        values *= 2


broken("the credit of a session is 0", "session.open", "small", answer=answer("opened", _no_credit))
broken("a bit of a float8 is lost", "session.tensors", "small", answer=_values(_flipped))
broken("values in a session are doubled", "session.grad", "small", answer=_values(_doubled))
broken("create_graph is ignored", "session.create_graph", "small", frame=frame("grad", _no_graph))
broken("there is no third order", "session.third_order", "small", frame=frame("grad", _no_graph))
broken("unused is not told", "session.unused", "small", answer=answer("result", _unused_zeros))
broken("answers come in another order", "session.pipelining", "small", fault=_swapped)
broken("values do not come along", "session.fetch", "small", frame=frame("call", _nothing_fetched))
broken("a stateless op is another call", "session.stateless", "small", answer=answer("stateless", _stateless))
broken("a byte of a chunk is lost", "session.chunks", "small", answer=answer("chunk", _flip_chunk))
broken("credit is not heeded", "session.credit", "small", frame=frame("open", _generous))
broken("parameters in a session are others", "session.parameters", "small", answer=_values(_doubled))
broken("a closed session is an error", "session.close", "small", ends=lambda error: error is not None)
broken("a silent server sends no heartbeat", "session.heartbeat", "small", fault=lambda: Fault(answer=_silent))
broken("a failed op has no details", "session.errors", "small", answer=_bare)
broken("an unknown handle is nothing", "session.handles", "small", answer=_forgiving("BAD_HANDLE"))
broken("what is released is kept", "session.release", "small", frame=_kept)
broken("graphs are never freed", "session.graph_freed", "small", frame=frame("grad", _retained))
broken("what was changed in place is used", "session.modified", "small", answer=_forgiving("MODIFIED_IN_PLACE"))
broken(
    "a dependency is a bad handle", "session.dependency", "small", answer=op_reason("DEPENDENCY_FAILED", "BAD_HANDLE")
)
broken("another session's handle is answered", "session.isolation", "small", answer=_forgiving("BAD_HANDLE"))
broken("there is no budget", "session.budget", "small", answer=op_reason("SESSION_BUDGET", "INTERNAL"))
broken("half a tensor is enough", "session.half_sent", "small", answer=_forgiving("BAD_TENSOR"))
broken("a broken protocol ends well", "session.protocol", "small", ends=lambda error: error is None)
broken("any model will do for a session", "session.models", "small", frame=frame("open", _no_models))


# ---- around the calls


def _not_serving(name: str, data: bytes) -> bytes:
    return b"\x08\x02" if name == "Check" else data


def _no_reflection(name: str, data: bytes) -> bytes:
    return data.replace(b"pullback.v1.SessionService", b"pullback.v1.SessionServant") if name == "reflection" else data


def _mixed_up() -> Fault:
    """Whoever comes while another is answered may get that one's answer."""
    lock = threading.Lock()
    busy = 0
    last = b""

    def bytes_(name: str, data: bytes) -> bytes | None:
        nonlocal busy
        with lock:
            busy += 1
        time.sleep(0.01)
        return None

    def raw(name: str, data: bytes) -> bytes:
        nonlocal busy, last
        with lock:
            crowded, busy = busy > 1, busy - 1
            if name != "ComputeVjp":
                return data
            data, last = (last if crowded and last else data), data
            return data

    return Fault(bytes_=bytes_, raw=raw)


def _another_id(trailers: dict[str, Any]) -> None:
    trailers["pullback-request-id"] = "another"


def _no_stages(trailers: dict[str, Any]) -> None:
    if "pullback-timings" in trailers:
        trailers["pullback-timings"] = json.dumps({"seconds": 0, "stages": {}})


def _cut(name: str, data: bytes) -> bytes | None:
    return data[: 1 << 10] if len(data) > 1 << 20 else None


def _too_large_internal(name: str, status: Any, data: bytes) -> None:
    edit(status, lambda info: setattr(info, "reason", "INTERNAL"))


broken("health says no", "health.serving", "small", raw=_not_serving)
broken("reflection lacks a service", "reflection.services", "small", raw=_no_reflection)
broken("callers get others' answers", "service.concurrency", "small", fault=_mixed_up)
broken("request ids are others", "service.request_id", "small", trailers=_another_id)
broken("timings tell nothing", "service.timings", "small", trailers=_no_stages)
broken("large messages are cut", "service.too_large", "small", bytes_=_cut)
broken("a result is found too large too late", "service.result_too_large", "small", error=_too_large_internal)
