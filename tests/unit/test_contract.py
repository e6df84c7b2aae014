"""The committed generated code is what the .proto files generate, and every cause has its place."""

import subprocess
from pathlib import Path

from pullback_wire import GRADIENT_METHODS, MODEL_METHODS, Reason
from pullback_wire.v1 import gradient_service_pb2 as gradient
from pullback_wire.v1 import model_service_pb2 as model

PROTOS = Path(__file__).parents[2] / "protos"


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    (tmp_path / "pullback_wire" / "v1").mkdir(parents=True)
    subprocess.run(["bash", str(PROTOS / "generate.sh"), str(tmp_path)], check=True, timeout=300)
    fresh = sorted((tmp_path / "pullback_wire" / "v1").iterdir())
    committed = sorted((PROTOS / "pullback_wire" / "v1").glob("*_pb2.py*"))
    assert [file.name for file in fresh] == [file.name for file in committed]
    for new, old in zip(fresh, committed, strict=True):
        assert new.read_text() == old.read_text(), f"{old.name} is stale: run `make proto`"


def test_generated_code_runs_on_protobuf_6() -> None:
    for file in (PROTOS / "pullback_wire" / "v1").glob("*_pb2.py"):
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


def test_reasons_are_named_as_their_values() -> None:
    for reason in Reason:
        assert reason.name == reason.value
