"""The committed generated code is what the .proto files generate, and every cause has its place."""

import subprocess
from pathlib import Path

from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from pullback_wire import GRADIENT_METHODS, MODEL_METHODS, Reason
from pullback_wire.inference import INFERENCE_METHODS, INFERENCE_SERVICE, STREAM_INFER
from pullback_wire.inference import open_inference_pb2 as inference
from pullback_wire.v1 import gradient_service_pb2 as gradient
from pullback_wire.v1 import model_service_pb2 as model

PROTOS = Path(__file__).parents[2] / "protos"
GENERATED = (PROTOS / "pullback_wire" / "v1", PROTOS / "pullback_wire" / "inference")


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    (tmp_path / "pullback_wire" / "v1").mkdir(parents=True)
    subprocess.run(["bash", str(PROTOS / "generate.sh"), str(tmp_path)], check=True, timeout=300)
    for folder in GENERATED:
        fresh = sorted((tmp_path / folder.relative_to(PROTOS)).iterdir())
        committed = sorted(folder.glob("*_pb2.py*"))
        assert [file.name for file in fresh] == [file.name for file in committed]
        for new, old in zip(fresh, committed, strict=True):
            assert new.read_text() == old.read_text(), f"{old.name} is stale: run `make proto`"


def test_generated_code_runs_on_protobuf_6() -> None:
    for file in (file for folder in GENERATED for file in folder.glob("*_pb2.py")):
        (line,) = [line for line in file.read_text().splitlines() if "Protobuf Python Version" in line]
        version = tuple(int(part) for part in line.split()[-1].split("."))
        assert (6, 30) <= version < (6, 34), f"{file.name}: {line}"


def test_every_unary_rpc_is_listed() -> None:
    assert set(GRADIENT_METHODS) == {
        method.name for method in gradient.DESCRIPTOR.services_by_name["GradientService"].methods
    }
    assert set(MODEL_METHODS) == {"ListModels", "GetModel", "GetModelGraph", "LoadModel", "UnloadModel"}
    assert GRADIENT_METHODS["ComputeVjp"].path == "/pullback.v1.GradientService/ComputeVjp"
    assert GRADIENT_METHODS["ComputeVjp"].request is gradient.ComputeVjpRequest
    assert MODEL_METHODS["GetModel"].response is model.GetModelResponse


def test_the_open_inference_protocol_is_theirs() -> None:
    service = inference.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert INFERENCE_SERVICE == "inference.GRPCInferenceService"
    assert {*INFERENCE_METHODS, STREAM_INFER.name} == {method.name for method in service.methods}
    # Numbers as published: https://github.com/kserve/open-inference-protocol, and Triton's additions.
    numbers = {
        message.full_name.removeprefix("inference."): {field.name: field.number for field in message.fields}
        for message in (
            inference.ModelInferRequest.DESCRIPTOR, inference.ModelInferResponse.DESCRIPTOR,
            inference.InferTensorContents.DESCRIPTOR, inference.InferParameter.DESCRIPTOR,
            inference.ModelStreamInferResponse.DESCRIPTOR, inference.ModelInferRequest.InferInputTensor.DESCRIPTOR,
        )
    }  # fmt: skip
    assert numbers == {
        "ModelInferRequest": {
            "model_name": 1, "model_version": 2, "id": 3, "parameters": 4, "inputs": 5, "outputs": 6,
            "raw_input_contents": 7,
        },
        "ModelInferResponse": {
            "model_name": 1, "model_version": 2, "id": 3, "parameters": 4, "outputs": 5, "raw_output_contents": 6,
        },
        "InferTensorContents": {
            "bool_contents": 1, "int_contents": 2, "int64_contents": 3, "uint_contents": 4, "uint64_contents": 5,
            "fp32_contents": 6, "fp64_contents": 7, "bytes_contents": 8,
        },
        "InferParameter": {
            "bool_param": 1, "int64_param": 2, "string_param": 3, "double_param": 4, "uint64_param": 5,
        },
        "ModelStreamInferResponse": {"error_message": 1, "infer_response": 2},
        "ModelInferRequest.InferInputTensor": {
            "name": 1, "datatype": 2, "shape": 3, "parameters": 4, "contents": 5,
        },
    }  # fmt: skip


def test_another_client_of_that_protocol_can_be_in_the_same_process() -> None:
    # As tritonclient's generated code does, with other fields than ours.
    other = FileDescriptorProto(name="grpc_service.proto", package="inference", syntax="proto3")
    other.message_type.add(name="ModelInferRequest").field.add(name="theirs", number=1, type="TYPE_STRING")
    descriptor_pool.Default().AddSerializedFile(other.SerializeToString())
    found = descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")
    assert [field.name for field in found.fields] == ["theirs"]
    assert inference.ModelInferRequest(model_name="ours").SerializeToString() == b"\n\x04ours"


def test_reasons_are_named_as_their_values() -> None:
    for reason in Reason:
        assert reason.name == reason.value
