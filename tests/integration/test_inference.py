"""Forward passes by the Open Inference Protocol, against a real server: contents, names, refusals.

What it answers is held against our own RPCs bit for bit, and what it is told against the words of this protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.inference_wire import CONTENTS, Caller, arrays, infer

import pullback
from pullback_wire import DTYPES, ERROR_DOMAIN, WireError
from pullback_wire.dtypes import dtype_name
from pullback_wire.inference import DATATYPES, INFERENCE_METHODS, datatype_name
from pullback_wire.inference import open_inference_pb2 as pb

X = np.arange(6.0).reshape(2, 3)


@pytest.fixture(scope="module")
def caller(zoo: str) -> Iterator[Caller]:
    yield Caller(zoo)


@pytest.fixture(scope="module")
def ours(zoo: str) -> Iterator[pullback.Client]:
    with pullback.connect(zoo) as client:
        yield client


def refused(call: Any, code: str, reason: str, *parts: str) -> tuple[str, str]:
    """The message and the field of a refusal, which must be this one."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    message = caught.value.details() or ""
    assert caught.value.code().name == code, message
    details = dict(caught.value.trailing_metadata() or ())["grpc-status-details-bin"]
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status_pb2.Status.FromString(details).details:
        detail.Unpack(info)
        detail.Unpack(bad)
    assert (info.domain, info.reason) == (ERROR_DOMAIN, reason), message
    for part in parts:
        assert part in message, message
    return message, bad.field_violations[0].field if bad.field_violations else ""


# What goes in comes out.


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype(caller: Caller, datatype: str, raw: bool) -> None:
    x = np.array([[0, 1, 0], [1, 1, 0]]).astype(DTYPES[DATATYPES[datatype]])
    if not raw and datatype not in CONTENTS:
        return
    found = caller.infer("identity", {"x": x}, raw=raw)["output"]
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(found, x)


_TYPED = [DTYPES[DATATYPES[name]] for name in CONTENTS]
_ANY = [DTYPES[number] for number in DATATYPES.values()]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), raw=st.booleans())
def test_any_array(caller: Caller, data: st.DataObject, raw: bool) -> None:
    dtype = data.draw(st.sampled_from(_ANY if raw else _TYPED))
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    # Every bit pattern, NaN with payloads included.
    bits = np.dtype(f"u{dtype.itemsize}") if dtype != np.dtype(bool) else dtype
    x = data.draw(hnp.arrays(bits, shape)).view(dtype)
    found = caller.infer("identity", {"x": x}, raw=raw)["output"]
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    if raw:
        assert found.tobytes() == x.tobytes()
    else:
        # On their way through a Python float, NaNs may lose their payload.
        np.testing.assert_array_equal(found, x)


def test_the_same_as_our_own_rpcs_bit_for_bit(caller: Caller, ours: pullback.Client) -> None:
    rng = np.random.default_rng(0)
    small = {"input": rng.normal(size=(4, 3))}
    np.testing.assert_array_equal(caller.infer("small", small)["output"], ours.model("small").evaluate(small))
    mixed = {"y": rng.normal(size=3), "x": rng.normal(size=3)}
    found = caller.infer("mixed", mixed)
    expected = ours.model("mixed").evaluate(mixed)
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    # An optional input.
    found = caller.infer("mixed", mixed | {"scale": np.array(2.0)})
    np.testing.assert_array_equal(found["product"], 2 * np.asarray(expected["product"]))


def test_large_contents_raw_and_typed(caller: Caller) -> None:
    x = np.random.default_rng(0).normal(size=(1 << 20,))
    np.testing.assert_array_equal(caller.infer("identity", {"x": x})["output"], x)
    # Two million small numbers are legitimate as varints: more than what a message may describe otherwise.
    for dtype in (np.int32, np.uint8, np.bool_, np.float32):
        many = (np.random.default_rng(1).integers(-300, 300, 2_000_000) % 256).astype(dtype)
        np.testing.assert_array_equal(caller.infer("identity", {"x": many}, raw=False)["output"], many)


def test_outputs_that_are_asked_for(caller: Caller) -> None:
    mixed = {"x": np.ones(3), "y": np.ones(3)}
    found = caller.infer("mixed", mixed, outputs=["count", "product", "count"])
    assert list(found) == ["count", "product"]
    _, field = refused(
        lambda: caller.infer("mixed", mixed, outputs=["prodct"]), "INVALID_ARGUMENT", "BAD_NAME", "'product'"
    )
    assert field == "outputs"


def test_an_answer_names_model_version_and_id(caller: Caller) -> None:
    answer = caller.call("ModelInfer", infer("cube", {"x": X}, id="7f", model_version="1"))
    assert (answer.model_name, answer.model_version, answer.id) == ("cube", "1", "7f")
    assert not caller.call("ModelInfer", infer("cube", {"x": X})).id


def test_elements_that_are_not_packed_and_contents_in_pieces(caller: Caller) -> None:
    """What protobuf allows and nobody writes."""
    varints = b"\x10\x05\x10\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01\x12\x02\x07\x08"  # 5, -2, then 7 and 8 packed
    contents = [varints[:2], varints[2:]]
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="INT32", shape=[4]).SerializeToString()
    tensor += b"".join(b"\x2a" + bytes([len(one)]) + one for one in contents)
    data = pb.ModelInferRequest(model_name="identity").SerializeToString() + b"\x2a" + bytes([len(tensor)]) + tensor
    assert list(pb.ModelInferRequest.FromString(data).inputs[0].contents.int_contents) == [5, -2, 7, 8]
    answer = pb.ModelInferResponse.FromString(caller.raw("ModelInfer", data))
    np.testing.assert_array_equal(arrays(answer)["output"], np.array([5, -2, 7, 8], np.int32))


def test_parameters_without_a_meaning_are_passed_over(caller: Caller) -> None:
    parameters = {"temperature": 0.5, "binary_data_output": True, "triton_enable_empty_final_response": True}
    np.testing.assert_array_equal(caller.infer("cube", {"x": X}, parameters=parameters)["output"], X**3)


def test_parameters_of_the_schedule(caller: Caller) -> None:
    for priority in (0, 1, 2):
        found = caller.infer("cube", {"x": X}, parameters={"priority": priority, "timeout": 60_000_000})
        np.testing.assert_array_equal(found["output"], X**3)
    refused(lambda: caller.infer("cube", {"x": X}, parameters={"timeout": 1}), "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")


def test_requests_that_differ_in_little_are_not_taken_for_one_another(caller: Caller) -> None:
    """What was asked before is known by its bytes: parameters, outputs, id, datatypes and shapes count."""
    x, v = np.arange(1.0, 7.0).reshape(2, 3), np.full((2, 3), 2.0)
    given = {"x": x, "grad_output:output": v}
    as_one = {"x": x.reshape(3, 2), "grad_output:output": v.reshape(3, 2)}
    as_integers = {"x": x.view(np.int64)}
    for _ in range(2):
        for raw in (True, False):
            assert list(caller.infer("cube", {"x": x}, raw=raw)) == ["output"]
            assert list(caller.infer("cube@vjp", given, raw=raw)) == ["output", "grad:x"]
            assert list(caller.infer("cube@vjp", given, raw=raw, outputs=["grad:x"])) == ["grad:x"]
            clipped = caller.call("ModelInfer", infer("cube@vjp", given, raw=raw, parameters={"max_norm": 1.0}))
            np.testing.assert_allclose(np.linalg.norm(arrays(clipped)["grad:x"]), 1.0, rtol=1e-5)
            np.testing.assert_array_equal(caller.infer("cube@vjp", given, raw=raw)["grad:x"], 3 * x**2 * v)
            assert caller.infer("cube@vjp", as_one, raw=raw)["grad:x"].shape == (3, 2)
            assert caller.infer("identity", as_integers, raw=raw)["output"].dtype == np.int64
            assert caller.infer("identity", {"x": x}, raw=raw)["output"].dtype == np.float64
            for id in ("", "a", "b"):
                assert caller.call("ModelInfer", infer("cube", {"x": x}, raw=raw, id=id)).id == id


def test_callers_are_merged_with_those_of_our_own_rpcs(caller: Caller, ours: pullback.Client) -> None:
    """One road: what is asked at the same time may be computed together, and each gets its own rows."""
    rng = np.random.default_rng(3)
    rows = [rng.normal(size=(1 + index % 3, 3)) for index in range(48)]
    model = ours.model("small")

    def ask(index: int) -> np.ndarray:
        inputs = {"input": rows[index]}
        return caller.infer("small", inputs)["output"] if index % 2 else np.asarray(model.evaluate(inputs))

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(len(rows))))
    for row, found in zip(rows, together, strict=True):
        np.testing.assert_allclose(found, model.evaluate({"input": row}), rtol=1e-12)


# What there is.


def test_metadata(caller: Caller) -> None:
    assert caller.call("ServerLive", pb.ServerLiveRequest()).live
    assert caller.call("ServerReady", pb.ServerReadyRequest()).ready
    server = caller.call("ServerMetadata", pb.ServerMetadataRequest())
    assert server.name == "pullback"
    assert "pullback_vjp" in server.extensions
    for name, version, ready in (("mixed", "", True), ("mixed", "1", True), ("mixed", "2", False), ("x", "", False),
                                 ("mixed@hvp", "", True), ("mixed@grad", "", False)):  # fmt: skip
        assert caller.call("ModelReady", pb.ModelReadyRequest(name=name, version=version)).ready is ready, name
    found = caller.call("ModelMetadata", pb.ModelMetadataRequest(name="words"))
    assert [(one.name, one.datatype, list(one.shape)) for one in found.inputs][:1] == [("ids", "INT64", [-1, -1])]
    assert (found.name, list(found.versions)) == ("words", ["1"])
    found = caller.call("ModelMetadata", pb.ModelMetadataRequest(name="mixed@vjp"))
    assert [one.name for one in found.inputs][:3] == ["x", "y", "scale"]
    assert "grad_output:product" in [one.name for one in found.inputs]
    assert "grad_output:count" not in [one.name for one in found.inputs]
    assert [one.name for one in found.outputs][-3:] == ["grad:x", "grad:y", "grad:scale"]
    shapes = {one.name: list(one.shape) for one in [*found.inputs, *found.outputs]}
    assert (shapes["product"], shapes["parts.1"], shapes["grad:scale"]) == ([-1], [], [])
    assert shapes["grad_output:product"] == shapes["grad:x"] == [-1]
    config = caller.call("ModelConfig", pb.ModelConfigRequest(name="mlp")).config
    assert [list(one.dims) for one in config.output] == [[-1, 10]]
    config = caller.call("ModelConfig", pb.ModelConfigRequest(name="mixed@hvp")).config
    optional = {one.name: one.optional for one in config.input}
    assert (optional["x"], optional["scale"], optional["tangent:x"]) == (False, True, True)
    assert config.input[0].data_type == pb.TYPE_FP64


def test_undeclared_inputs_are_told_as_such(caller: Caller) -> None:
    (x,) = caller.call("ModelMetadata", pb.ModelMetadataRequest(name="cube")).inputs
    assert (x.datatype, list(x.shape)) == ("", [-1])


def test_the_index(caller: Caller, ours: pullback.Client) -> None:
    index = caller.call("RepositoryIndex", pb.RepositoryIndexRequest(ready=True)).models
    assert {model.name for model in index} == {model.name for model in ours.models()}
    assert {model.state for model in index} == {"READY"}
    refused(
        lambda: caller.call("RepositoryIndex", pb.RepositoryIndexRequest(repository_name="other")),
        "INVALID_ARGUMENT", "BAD_OPTION", "'other'",
    )  # fmt: skip


def test_complex_models_are_listed_and_refused_in_words(caller: Caller) -> None:
    assert caller.call("ModelReady", pb.ModelReadyRequest(name="holomorphic")).ready
    refused(
        lambda: caller.call("ModelMetadata", pb.ModelMetadataRequest(name="holomorphic")),
        "FAILED_PRECONDITION", "UNSUPPORTED_BY_MODEL", "'z'", "complex128", "GradientService",
    )  # fmt: skip
    refused(lambda: caller.infer("holomorphic", {"z": X[0]}), "INVALID_ARGUMENT", "BAD_TENSOR", "complex128")
    request = infer("holomorphic", {"z": X[0]})
    request.inputs[0].datatype = "COMPLEX128"
    refused(lambda: caller.call("ModelInfer", request), "INVALID_ARGUMENT", "BAD_TENSOR", "COMPLEX128", "FP64")


@pytest.mark.parametrize(
    "method", ["ModelStatistics", "RepositoryModelLoad", "CudaSharedMemoryRegister", "LogSettings"]
)
def test_what_is_not_offered_says_so(caller: Caller, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        caller.call(method, INFERENCE_METHODS[method].request())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert f"this server has no {method}; " in caught.value.details()


def test_reflection_tells_of_the_service(zoo: str) -> None:
    from google.protobuf.descriptor_pb2 import FileDescriptorProto
    from grpc_reflection.v1alpha import reflection_pb2 as reflection

    with grpc.insecure_channel(zoo) as channel:
        ask = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            reflection.ServerReflectionRequest.SerializeToString, reflection.ServerReflectionResponse.FromString,
        )  # fmt: skip
        symbols = (
            "inference.GRPCInferenceService",
            "pullback.v1.GradientService",
            "inference.ModelInferRequest",
            "x.Y",
        )
        requests = [reflection.ServerReflectionRequest(list_services="")]
        requests += [reflection.ServerReflectionRequest(file_containing_symbol=symbol) for symbol in symbols]
        services, theirs, own, message, none = ask(iter(requests), timeout=30)
    assert symbols[0] in [one.name for one in services.list_services_response.service]
    file = FileDescriptorProto.FromString(theirs.file_descriptor_response.file_descriptor_proto[0])
    assert (file.package, file.service[0].name, len(file.service[0].method)) == (
        "inference",
        "GRPCInferenceService",
        20,
    )
    assert message.file_descriptor_response == theirs.file_descriptor_response
    assert b"pullback.v1" in own.file_descriptor_response.file_descriptor_proto[0]
    assert none.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


# What is wrong with a request.


def _with(request: pb.ModelInferRequest, **changes: Any) -> pb.ModelInferRequest:
    """With another first input."""
    for name, value in changes.items():
        if name == "shape":
            del request.inputs[0].shape[:]
            request.inputs[0].shape.extend(value)
        else:
            setattr(request.inputs[0], name, value)
    return request


_WRONG = {
    "too few bytes": (_with(infer("cube", {"x": X}), shape=[3, 3]), "BAD_TENSOR", "raw_input_contents[0]", "72 bytes"),
    "too many bytes": (_with(infer("cube", {"x": X}), shape=[2]), "BAD_TENSOR", "raw_input_contents[0]", "has 48"),
    "another width": (_with(infer("cube", {"x": X}), datatype="FP32"), "BAD_TENSOR", "raw_input_contents[0]", "24"),
    "a negative extent": (_with(infer("cube", {"x": X}), shape=[-1, 3]), "BAD_TENSOR", "inputs[0].shape", "-1"),
    "huge extents": (_with(infer("cube", {"x": X}), shape=[2**62, 4]), "BAD_TENSOR", "inputs[0].shape", "addressed"),
    "a huge typed shape": (
        _with(infer("cube", {"x": X}, raw=False), shape=[2**40]), "BAD_TENSOR", "inputs[0]", "larger",
    ),
    "too many axes": (_with(infer("cube", {"x": X}), shape=[1] * 65), "BAD_TENSOR", "inputs[0].shape", "65 axes"),
    "strings": (_with(infer("cube", {"x": X}), datatype="BYTES"), "BAD_TENSOR", "inputs[0].datatype", "no strings"),
    "no datatype": (_with(infer("cube", {"x": X}), datatype=""), "BAD_TENSOR", "inputs[0].datatype", "expected one of"),
    "typed, too few": (
        _with(infer("cube", {"x": X}, raw=False), shape=[7]), "BAD_TENSOR", "fp64_contents", "6 elements", "needs 7",
    ),
    "typed, in another field": (
        _with(infer("cube", {"x": X}, raw=False), datatype="FP32"), "BAD_TENSOR", "fp32_contents", "fp64_contents",
    ),
    "typed 16 bits": (
        pb.ModelInferRequest(model_name="cube", inputs=[{"name": "x", "datatype": "FP16", "shape": [1]}]),
        "BAD_TENSOR", "inputs[0]", "raw_input_contents",
    ),
    "no room for a number": (
        pb.ModelInferRequest(model_name="cube", inputs=[
            {"name": "x", "datatype": "INT8", "shape": [2], "contents": {"int_contents": [1, 300]}}
        ]),
        "BAD_TENSOR", "int_contents[1]", "300", "-128 to 127",
    ),
    "no contents": (
        pb.ModelInferRequest(model_name="cube", inputs=[{"name": "x", "datatype": "FP32", "shape": [2]}]),
        "BAD_TENSOR", "inputs[0]", "0 elements",
    ),
    "both": (
        pb.ModelInferRequest(model_name="cube", raw_input_contents=[bytes(8)], inputs=[
            {"name": "x", "datatype": "FP64", "shape": [1], "contents": {"fp64_contents": [1]}}
        ]),
        "BAD_TENSOR", "inputs[0].contents", "raw_input_contents",
    ),
    "raw contents of nothing": (
        pb.ModelInferRequest(model_name="cube", raw_input_contents=[b""]),
        "BAD_TENSOR", "raw_input_contents", "0 inputs",
    ),
    "shared memory": (
        pb.ModelInferRequest(model_name="cube", inputs=[
            {"name": "x", "datatype": "FP32", "shape": [2],
             "parameters": {"shared_memory_region": pb.InferParameter(string_param="r")}}
        ]),
        "BAD_TENSOR", "inputs[0]", "shared memory",
    ),
    "another name": (infer("cube", {"y": X}), "BAD_NAME", "inputs[0].name", "'y'", "'x'"),
    "missing": (infer("mixed", {"x": X[0]}), "BAD_NAME", "inputs", "'y'"),
    "twice": (
        pb.ModelInferRequest(model_name="cube", raw_input_contents=[bytes(8)] * 2, inputs=[
            {"name": "x", "datatype": "FP64", "shape": [1]}] * 2),
        "BAD_NAME", "inputs[1].name", "twice",
    ),
    "another dtype than declared": (infer("small", {"input": X.astype("f4")}), "BAD_TENSOR", "inputs[0].datatype"),
    "another shape than declared": (infer("small", {"input": X[:, :2]}), "BAD_TENSOR", "inputs[0].shape", "[2, 2]"),
    "a cotangent": (infer("cube", {"x": X, "grad_output:output": X}), "BAD_NAME", "inputs[1].name", "cube@vjp"),
    "a tangent": (infer("cube@vjp", {"x": X, "tangent:x": X}), "BAD_NAME", "inputs[1].name", "cube@hvp"),
    "an option of derivatives": (infer("cube", {"x": X}, parameters={"wrt": "x"}), "BAD_OPTION", "parameters[wrt]"),
    "a sequence": (infer("cube", {"x": X}, parameters={"sequence_id": 4}), "BAD_OPTION", "parameters[sequence_id]"),
    "no timeout": (infer("cube", {"x": X}, parameters={"timeout": -4}), "BAD_OPTION", "parameters[timeout]"),
    "reserved": (infer("cube", {"x": X}, parameters={"triton_x": 4}), "BAD_OPTION", "parameters[triton_x]"),
    "ours, misspelt": (infer("cube", {"x": X}, parameters={"pullback_vjpp": True}), "BAD_OPTION", "'pullback_vjp'"),
}  # fmt: skip


@pytest.mark.parametrize("name", _WRONG)
def test_what_is_wrong_is_said_in_their_words(caller: Caller, name: str) -> None:
    request, reason, *parts = _WRONG[name]
    message, field = refused(lambda: caller.call("ModelInfer", request), "INVALID_ARGUMENT", reason, *parts)
    assert field.partition("[")[0] in {"inputs", "parameters", "raw_input_contents"}, field
    assert field.partition(".")[0] in message or reason == "BAD_NAME"


@pytest.mark.parametrize(("name", "version", "reason"), [("cub", "", "MODEL_NOT_FOUND"), ("", "", "MODEL_NOT_FOUND"),
    ("cube@", "", "MODEL_NOT_FOUND"), ("cube@jvp", "", "MODEL_NOT_FOUND"), ("cube@vjp@vjp", "", "MODEL_NOT_FOUND"),
    ("cube", "2", "VERSION_NOT_FOUND"), ("cube@vjp", "x", "VERSION_NOT_FOUND")])  # fmt: skip
def test_models_that_there_are_not(caller: Caller, name: str, version: str, reason: str) -> None:
    refused(lambda: caller.infer(name, {"x": X}, model_version=version), "NOT_FOUND", reason)
    request = pb.ModelMetadataRequest(name=name, version=version)
    refused(lambda: caller.call("ModelMetadata", request), "NOT_FOUND", reason)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200), cut=st.integers(0, 200), method=st.sampled_from(["ModelInfer", "ModelMetadata"]))
def test_garbage_is_refused(caller: Caller, data: bytes, cut: int, method: str) -> None:
    whole = infer("small", {"input": X}, raw=bool(cut % 2)).SerializeToString()
    for garbage in (data, whole[:cut] + data, whole + data):
        try:
            caller.raw(method, garbage)
        except grpc.RpcError as error:
            assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), error.details()


def test_very_many_fields_are_not_walked_through(caller: Caller) -> None:
    header = pb.ModelInferRequest(model_name="cube").SerializeToString()
    for data, part in (
        (header + b"\x3a\x00" * 200_000, "fields"),
        (header + b"\x2a\x00" * 100_000, "fields"),
        (header + b"\x2a\x00" * 10_000, "inputs"),
        # Each of these took seconds, in which nobody else was answered.
        (header + (_field(5, _field(2, b"BOOL") + _field(3, b"\x01")) + _field(7, b"\x01")) * 60_000, "fields"),
        (header + _field(4, b"\x0a\x01p") * 60_000, "fields"),
        (header + _field(5, b"\x18\x01" * 1000), "fields"),
        (header + _field(5, _field(2, b"FP32") + _field(3, b"\x01") + _field(5, b"\x32\x00" * 5000)), "fields"),
        (header + b"\x1a" + _varint(5 << 20) + bytes(5 << 20), "besides contents"),
        (header + _field(5, _field(1, b"x" * (5 << 20))), "besides contents"),
    ):
        refused(lambda data=data: caller.raw("ModelInfer", data), "INVALID_ARGUMENT", *_reason(part), part)


def test_small_numbers_that_become_large_are_bounded(caller: Caller) -> None:
    """A byte for each of very many numbers of eight."""
    count = 20 << 20
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="INT64", shape=[count]).SerializeToString()
    contents = _field(5, _field(3, bytes(count)))
    data = pb.ModelInferRequest(model_name="identity").SerializeToString() + _field(5, tensor + contents)
    refused(lambda: caller.raw("ModelInfer", data), "INVALID_ARGUMENT", "BAD_TENSOR", "larger than a message may be")


def test_what_protobuf_reads_is_what_is_read() -> None:
    """Varints by whole arrays, against protobuf's own."""
    from pullback_server.rpc.inference.contents import read, take_apart

    rng = np.random.default_rng(0)
    for datatype, low, high in (
        ("INT32", -(2**31), 2**31), ("INT64", -(2**63), 2**63), ("UINT64", 0, 2**64), ("INT8", -128, 128),
        ("UINT16", 0, 2**16), ("UINT32", 0, 2**32),
    ):  # fmt: skip
        dtype = DTYPES[DATATYPES[datatype]]
        # Of every length, and more than what is read at once.
        shifts = rng.integers(0, 8 * dtype.itemsize, 100_000).astype(dtype)
        x = rng.integers(low, high, 100_000, dtype=dtype) >> shifts
        request = infer("identity", {"x": x}, raw=False)
        _, (data,) = read(take_apart(request.SerializeToString()), 1 << 30)
        np.testing.assert_array_equal(np.frombuffer(data, dtype), x)
    # Too many bits fall away, and what is not 0 is true.
    for field, dtype, bits in ((2, "INT32", b"\xff\xff\xff\xff\x7f"), (1, "BOOL", b"\x80\x01")):
        tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype=dtype, shape=[1]).SerializeToString()
        data = _field(5, tensor + _field(5, _field(field, bits)))
        contents = pb.ModelInferRequest.FromString(data).inputs[0].contents
        expected = contents.int_contents[0] if field == 2 else contents.bool_contents[0]
        _, (found,) = read(take_apart(data), 1 << 30)
        assert np.frombuffer(found, DTYPES[DATATYPES[dtype]])[0] == expected
    for wrong in (b"\x80", b"\x80" * 10 + b"\x01", b"\x80" * 11):
        tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="INT32", shape=[1]).SerializeToString()
        with pytest.raises(WireError):
            read(take_apart(_field(5, tensor + _field(5, _field(2, wrong)))), 1 << 30)


def _reason(part: str) -> tuple[str]:
    return ("BAD_TENSOR",) if part == "inputs" else ("MALFORMED_REQUEST",)


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _field(number: int, body: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(body)) + body


def test_names_of_datatypes() -> None:
    assert datatype_name(DATATYPES["BF16"]) == "BF16"
    assert DTYPES[DATATYPES["BF16"]] == np.dtype(ml_dtypes.bfloat16)
    assert all(dtype_name(number)[-2:] == name[-2:] or name == "BOOL" or name[-1] == "8" for name, number in
               DATATYPES.items())  # fmt: skip
    for number in set(DTYPES) - set(DATATYPES.values()):
        with pytest.raises(ValueError, match="no datatype"):
            datatype_name(number)
