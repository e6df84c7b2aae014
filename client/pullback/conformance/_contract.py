"""Checks of what answers look like: methods, lists, names, shapes, dtypes, options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pullback.conformance._arrays import Way, like, rng
from pullback.conformance._arrays import inputs as drawn_inputs
from pullback.conformance._check import Mismatch, Skip, expect, expect_equal, of_model, of_server
from pullback.conformance._numbers import described, is_differentiable, is_floating, same, told
from pullback.conformance._refusal import check_refusal
from pullback.conformance._stream import Session
from pullback.conformance._subject import House, Subject
from pullback.conformance._wire import Refused
from pullback_wire import DTYPES, GRADIENT_METHODS, MODEL_METHODS, Reason, numpy_dtype
from pullback_wire.v1 import model_service_pb2 as pb
from pullback_wire.v1 import tensor_pb2

#: What both say of a model, as long as it is the same one.
_LISTED = ("version", "versions", "inputs", "outputs", "batch_axis", "orders", "parameter_count", "description")
#: Of these a server may do without.
_OPTIONAL = ("GetModelGraph", "LoadModel", "UnloadModel")


@of_server("contract.methods", "Every RPC of GradientService is there, and so are ListModels and GetModel.")
def methods(house: House) -> None:
    for method in (*GRADIENT_METHODS.values(), *MODEL_METHODS.values()):
        try:
            # Of a model that does not exist, so that whatever it is changes nothing.
            request = method.request()
            _name_nothing(request)
            house.wire.call(method.path, request.SerializeToString(), f"{method.name} of a model that is not hosted")
        except Refused as refused:
            if method.name not in _OPTIONAL:
                expect(refused.code != "UNIMPLEMENTED", f"{method.path} to be there", refused.words)


def _name_nothing(request: Any) -> None:
    name = "no such model: conformance"
    if "function" in request.DESCRIPTOR.fields_by_name:
        request.function.model = name
    elif "name" in request.DESCRIPTOR.fields_by_name:
        request.name = name


@of_server(
    "contract.sessions",
    "SessionService.Session is there, and wants a first frame (a server of stateless calls alone may lack it).",
)
def sessions(house: House) -> None:
    with Session(house.wire, bare=True) as session:
        house.wire.say("a session whose client ends it before the first frame")
        session.half_close()
        ended = session.ends()
        if ended is None:
            raise Mismatch("MALFORMED_REQUEST", "a session that ended well")
        check_refusal(ended, Reason.MALFORMED_REQUEST)


@of_server("contract.list", "ListModels lists each model once, sorted by name, without parameters.")
def listing(house: House) -> None:
    house.wire.say("ListModels()")
    names = [model.name for model in house.listed]
    expect_equal(names, sorted(set(names)), "names")
    for model in house.listed:
        expect(not model.parameters, f"no parameters of {model.name!r} in the list", f"{len(model.parameters)}")
        expect(model.state != pb.MODEL_STATE_UNSPECIFIED, f"a state of {model.name!r}", "MODEL_STATE_UNSPECIFIED")


@of_model("contract.get", "GetModel says of a model what ListModels says of it, and each version that can be named.")
def get(subject: Subject) -> None:
    model = subject.wire.model("GetModel", pb.GetModelRequest(name=subject.name)).model
    expect_equal(model.name, subject.name, "the name")
    listed = subject.listed
    if listed is not None and (listed.state, listed.revision) == (model.state, model.revision):
        for told_field in _LISTED:
            one, other = getattr(model, told_field), getattr(listed, told_field)
            expect(one == other, f"{told_field} as ListModels has it: {other!r}", repr(one))
    expect(model.version in model.versions, f"version {model.version!r} among versions", list(model.versions))
    for version in model.versions:
        found = subject.wire.model("GetModel", pb.GetModelRequest(name=subject.name, version=version)).model
        expect_equal(found.version, version, "the version that was asked for,")
    for field in ("inputs", "outputs", "parameters"):
        names = [spec.name for spec in getattr(model, field)]
        expect_equal(sorted(names), sorted(set(names)), f"{field}, each named once,")


@of_model(
    "contract.version", "An answer names the version that computed it, and naming that version asks for the same."
)
def version(subject: Subject) -> None:
    subject.computes()
    answer = subject.wire.ask(subject.draft("Evaluate"))
    told_version = answer.message.model_version
    expect(told_version in subject.model.versions, f"model_version among {list(subject.model.versions)}", told_version)
    again = subject.wire.ask(subject.draft("Evaluate", version=told_version))
    expect_equal(again.message.model_version, told_version, "model_version")
    same(again.outputs(), answer.outputs(), subject.tolerance, "output")
    if subject.wrt:
        more: dict[str, Any] = {"cotangents": subject.cotangents, "wrt": subject.wrt}
        found = subject.wire.ask(subject.draft("ComputeVjp", **more)).message.model_version
        expect_equal(found, told_version, "model_version of ComputeVjp")


@of_model("contract.outputs", "Outputs have the names, order, dtypes and shapes of the model's signature.")
def outputs(subject: Subject) -> None:
    subject.computes()
    specs = list(subject.model.outputs)
    if not specs:
        raise Skip("its signature declares no outputs")
    answer = subject.wire.ask(subject.draft("Evaluate"))
    expect_equal([tensor.name for tensor in answer.message.outputs], [spec.name for spec in specs], "outputs named")
    _fit(subject, subject.inputs, answer.outputs())
    free = any(dim.WhichOneof("extent") == "symbol" for spec in subject.model.inputs for dim in spec.shape)
    if subject.given or not free or all(spec.any_shape for spec in specs):
        return
    optional = any(spec.optional and spec.name in subject.inputs for spec in subject.model.inputs)
    way = Way((4, 6, 9), (4,), tensor_pb2.DTYPE_FLOAT64, True)
    try:
        # Of other extents: those of the first call may agree by chance.
        others = drawn_inputs(subject.model.inputs, way, "other", optional)
        found = subject.evaluate(others)
    except (Refused, ValueError):
        return
    _fit(subject, others, found)


def _fit(subject: Subject, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
    extents: dict[str, int] = {}
    for spec in subject.model.inputs:
        if spec.name in inputs:
            _fits(spec, inputs[spec.name], extents, "input")
    for spec in subject.model.outputs:
        expect(spec.name in outputs, f"an output {spec.name!r}", list(outputs))
        _fits(spec, outputs[spec.name], extents, "output")


def _fits(spec: tensor_pb2.TensorSpec, array: np.ndarray, extents: dict[str, int], what: str) -> None:
    if spec.dtype:
        expect_equal(array.dtype, numpy_dtype(spec.dtype), f"{what} {spec.name!r} as")
    if spec.any_shape:
        return
    expect_equal(array.ndim, len(spec.shape), f"axes of {what} {spec.name!r}:")
    for axis, (dim, extent) in enumerate(zip(spec.shape, array.shape, strict=True)):
        if kind := dim.WhichOneof("extent"):
            fixed = dim.size if kind == "size" else extents.setdefault(dim.symbol, extent)
            expect_equal(extent, fixed, f"extent of axis {axis} of {what} {spec.name!r}:")


@of_model(
    "contract.gradients",
    "There is one gradient for each wrt, in order, of the shape and dtype of what it differentiates.",
)
def gradients(subject: Subject) -> None:
    subject.differentiates()
    for wrt in (subject.wrt, subject.wrt[::-1]):
        found = subject.vjp(wrt=wrt)
        expect_equal(list(found), wrt, "gradients of")
        for name, array in found.items():
            right = subject.inputs[name]
            if array is None:
                raise Mismatch(f"a gradient of {name!r}", "unused, which it was not before")
            expect_equal(described(array), described(right), f"gradient of {name!r} as")


@of_model(
    "contract.dtypes", "What comes in goes out: the gradient of a float32 input is float32, of a float64 input float64."
)
def dtypes(subject: Subject) -> None:
    subject.differentiates()
    free = {spec.name for spec in subject.model.inputs if not spec.dtype} & set(subject.wrt)
    free = {name for name in free if is_floating(subject.inputs[name].dtype)}
    if not free:
        raise Skip("its signature fixes the dtypes of its inputs")
    for number in (tensor_pb2.DTYPE_FLOAT32, tensor_pb2.DTYPE_FLOAT64, tensor_pb2.DTYPE_BFLOAT16):
        dtype = DTYPES[number]
        inputs = {name: array.astype(dtype) if name in free else array for name, array in subject.inputs.items()}
        try:
            outputs = subject.evaluate(inputs)
            cotangents = like(rng(subject.name), {name: outputs[name] for name in subject.cotangents})
            found = subject.vjp(inputs, cotangents=cotangents)
        except Refused as refused:
            if refused.reason == "MODEL_ERROR":
                continue
            raise
        for name in free:
            expect(found[name] is not None, f"a gradient of {name!r}", "unused")
            array = found[name]
            assert array is not None
            expect_equal(array.dtype, dtype, f"gradient of {name!r} as")


@of_model("contract.wrt_default", "An empty wrt means every floating-point or complex input.")
def wrt_default(subject: Subject) -> None:
    subject.differentiates()
    found = subject.vjp(wrt=[], allow_unused=True)
    expect_equal(list(found), list(subject.differentiable), "gradients of")


@of_model("contract.wrt_globs", "wrt takes globs over inputs and parameters, and the prefixes input: and param:.")
def wrt_globs(subject: Subject) -> None:
    subject.differentiates()
    right = subject.vjp()
    for wrt in (["input:*"], [f"input:{subject.wrt[0]}"], [f"[{subject.wrt[0][0]}]{subject.wrt[0][1:]}"]):
        found = subject.vjp(wrt=wrt, allow_unused=True)
        expect(subject.wrt[0] in _bare(found), f"{subject.wrt[0]!r} among the gradients of wrt {wrt}", list(found))
        same({"": _bare(found)[subject.wrt[0]]}, {"": right[subject.wrt[0]]}, subject.tolerance, "gradient")
    parameters = [
        spec.name for spec in subject.model.parameters if spec.dtype and is_differentiable(DTYPES[spec.dtype])
    ]
    if parameters and subject.model.parameter_count < 1 << 18:
        found = subject.vjp(wrt=["param:*"], allow_unused=True)
        expect_equal(sorted(_bare(found)), sorted(parameters), "gradients by param:* of")


def _bare(found: dict[str, Any]) -> dict[str, Any]:
    """Without the prefixes that tell ambiguous names apart."""
    return {name.removeprefix("input:").removeprefix("param:"): array for name, array in found.items()}


@of_model(
    "contract.omit_outputs", "With omit_outputs no output travels back, without it all do; the gradients are the same."
)
def omit_outputs(subject: Subject) -> None:
    subject.differentiates()
    more: dict[str, Any] = {"cotangents": subject.cotangents, "wrt": subject.wrt}
    whole = subject.wire.ask(subject.draft("ComputeVjp", **more))
    less = subject.wire.ask(subject.draft("ComputeVjp", omit_outputs=True, **more))
    expect_equal(list(whole.outputs()), list(subject.outputs), "outputs")
    same(whole.outputs(), subject.outputs, subject.tolerance, "output")
    expect_equal(list(less.outputs()), [], "outputs")
    same(less.gradients(), whole.gradients(), subject.tolerance, "gradient")


@of_model(
    "contract.result_dtype",
    "results.dtype asks for real floating results in another dtype; all others stay as computed.",
)
def result_dtype(subject: Subject) -> None:
    subject.computes()
    for number in (tensor_pb2.DTYPE_FLOAT32, tensor_pb2.DTYPE_FLOAT64, tensor_pb2.DTYPE_BFLOAT16):
        found = subject.evaluate(result_dtype=number)
        right = {name: _cast(array, DTYPES[number]) for name, array in subject.outputs.items()}
        same(found, right, max(subject.tolerance, 0.01 if number == tensor_pb2.DTYPE_BFLOAT16 else 1e-5), "output")
    if subject.wrt:
        number = tensor_pb2.DTYPE_FLOAT32
        found_gradients = subject.vjp(result_dtype=number)
        wanted = {
            name: None if array is None else _cast(array, DTYPES[number]) for name, array in subject.vjp().items()
        }
        same(found_gradients, wanted, max(subject.tolerance, 1e-5), "gradient")


def _cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return array.astype(dtype) if is_floating(array.dtype) else array


@of_model("contract.repeat", "A call with a seed is pure: asked again, it answers the same.")
def repeat(subject: Subject) -> None:
    subject.computes()
    for _ in range(2):
        same(subject.evaluate(), subject.outputs, 20 * subject.eps, "output")
    if subject.wrt:
        same(subject.vjp(), subject.vjp(), 20 * subject.eps, "gradient")


@of_model(
    "contract.unused", "An input that no output depends on is `unused`, which is not zeros; unasked for, UNUSED_INPUT."
)
def unused(subject: Subject) -> None:
    subject.computes()
    if not subject.differentiable or not subject.cotangents:
        raise Skip("it has no VJP")
    apart = set(_unreached(subject)) & set(subject.differentiable)
    if not (apart or subject.unused):
        raise Skip("its outputs depend on every input")
    found = subject.vjp(wrt=list(subject.differentiable), allow_unused=True)
    for name in apart:
        expect(found[name] is None, f"{name!r} unused, for no path of its graph leads to an output", told(found[name]))
    for name in subject.unused:
        try:
            subject.vjp(wrt=[name])
        except Refused as refused:
            expect_equal(refused.reason, "UNUSED_INPUT", "reason")
        else:
            raise Mismatch("UNUSED_INPUT, for allow_unused is false", "an answer")


def _unreached(subject: Subject) -> list[str]:
    """Inputs from which the model's own graph has no path to an output; none where there is no graph."""
    try:
        graph = subject.wire.model("GetModelGraph", pb.GetModelGraphRequest(name=subject.name))
    except Refused:
        return []
    if graph.truncated:
        return []
    reached = {node.id for node in graph.nodes if node.kind == pb.GRAPH_NODE_KIND_OUTPUT}
    for edge in sorted(graph.edges, key=lambda edge: -edge.source):
        if edge.target in reached:
            reached.add(edge.source)
    return [node.name for node in graph.nodes if node.kind == pb.GRAPH_NODE_KIND_INPUT and node.id not in reached]
