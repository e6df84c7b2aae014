"""What docs/wire.md says of the wire is what the contract and the code say; what is published can be compiled."""

from __future__ import annotations

import json
import re
from pathlib import Path

from google.protobuf.descriptor import FileDescriptor

from pullback_server.rpc import transfers
from pullback_server.rpc.request import LARGEST_OPTIONS
from pullback_wire import CALLER_KEY, DTYPES, PAYLOADS_FIELD, PRIORITY_KEY, REQUEST_ID_KEY, TIMINGS_KEY, codec, framing
from pullback_wire.v1 import function_pb2, gradient_service_pb2, model_service_pb2, session_service_pb2, tensor_pb2

ROOT = Path(__file__).parents[2]
WIRE = (ROOT / "docs" / "wire.md").read_text()
FILES: list[FileDescriptor] = [
    module.DESCRIPTOR
    for module in (function_pb2, gradient_service_pb2, model_service_pb2, session_service_pb2, tensor_pb2)
]


def test_every_method_is_named() -> None:
    table = WIRE.partition("## Services")[2].partition("## Tensors")[0]
    for file in FILES:
        for service in file.services_by_name.values():
            assert f"`{service.name}`" in table
            for method in service.methods:
                assert f"`{method.name}`" in table


def test_the_table_of_dtypes() -> None:
    found = {}
    for number, name, size in re.findall(r"\| (\d+) \| ([a-z]+\w*)(?: \([^)]*\))? \| (\d+) ", WIRE):
        found[int(number)] = (name, int(size))
    assert found == {number: (dtype.name, dtype.itemsize) for number, dtype in DTYPES.items()}


def test_numbers_and_keys() -> None:
    assert f"field {PAYLOADS_FIELD} of" in WIRE
    assert "`a2 06`" in WIRE and framing._PAYLOADS_TAG == b"\xa2\x06"
    for key in (CALLER_KEY, PRIORITY_KEY, REQUEST_ID_KEY, TIMINGS_KEY):
        assert f"| `{key}` |" in WIRE
    assert f"at most {codec.MAX_AXES} axes" in WIRE
    limits = WIRE.partition("## Limits")[2]
    assert framing.MAX_DESCRIPTION == 4 << 20 and "4 MiB" in limits
    assert f"{framing.MAX_FIELDS:,}".replace(",", " ") in limits
    assert LARGEST_OPTIONS == 64 << 10 and "64 KiB" in limits
    assert transfers.LARGEST_CHUNK == 4 << 20 and "1 byte to 4 MiB" in WIRE


def test_fields_that_it_names_are_in_the_contract() -> None:
    known = {
        name for file in FILES for message in file.message_types_by_name.values() for name in message.fields_by_name
    }
    sessions = WIRE.partition("## Sessions")[2].partition("## Limits")[0]
    table = [line for line in sessions.splitlines() if line.startswith("|")]
    named = {
        word
        for line in table
        for word in re.findall(r"(\w+)(?=: )|(?<=[{,] )(\w+)(?=[,}])", line)
        for word in word
        if word
    }
    assert {"requires_grad", "fetch_below", "budget_bytes", "has_value"} <= named | set(re.findall(r"\w+", sessions))
    assert not {word for line in table for word in re.findall(r"(\w+): ", line)} - known - {"tensor"}


def test_the_protos_need_nothing_but_protobuf_and_are_in_the_wheel() -> None:
    for file in FILES:
        text = (ROOT / "protos" / file.name).read_text()
        for imported in re.findall(r'^import "(.*)";', text, re.MULTILINE):
            assert imported.startswith("pullback_wire/v1/") or imported in {
                f"google/protobuf/{name}.proto" for name in ("any", "duration", "struct")
            }
    # The wheel takes the folder as it is.
    project = (ROOT / "pyproject.toml").read_text()
    assert '"protos/pullback_wire"]' in project.partition("[tool.hatch.build.targets.wheel]")[2].partition("[tool.")[0]


def test_the_example_in_javascript_names_no_registry() -> None:
    folder = ROOT / "examples" / "node"
    lock = json.loads((folder / "package-lock.json").read_text())
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    # Exact versions, and no word of where they were fetched from.
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values())
    packages = {name: package for name, package in lock["packages"].items() if name}
    for name, version in wanted.items():
        assert packages[f"node_modules/{name}"]["version"] == version
    for package in packages.values():
        assert "resolved" not in package and package["integrity"].startswith("sha512-")
