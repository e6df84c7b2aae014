"""Other languages: the client in JavaScript against a real server, and the request that docs/wire.md has in bytes."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch

from pullback_server import Server, model, spec
from pullback_wire import GRADIENT_METHODS, TensorReader, TensorWriter, decode, encode_message
from pullback_wire.v1 import gradient_service_pb2 as pb

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "node"
_N = {"x": spec("float64", ["n"])}


@model("ramp", inputs={"x": spec("float64", [5])})
def ramp(x: torch.Tensor) -> torch.Tensor:
    """Wider than its input, and not symmetric."""
    return torch.cat([x.sin() * x.cumsum(0), x**3])


@model("reversed", inputs=_N, intended={"gradient": "its weight is a constant"})
def reversed_(x: torch.Tensor) -> torch.Tensor:
    """A gradient that is not the true one."""
    return x.detach() * x


@model("square", inputs=_N)
def square(x: torch.Tensor) -> torch.Tensor:
    """The request in docs/wire.md is about it."""
    return x * x


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(ramp, reversed_, square, threads=1, devices="cpu:1") as server:
        yield server


def node(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("node")
    if program is None:
        pytest.skip("there is no node")
    if not (EXAMPLE / "node_modules").is_dir():
        pytest.skip("examples/node has no node_modules; `npm ci` there makes them")
    command = [program, str(EXAMPLE / "client.js"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_a_client_in_javascript(server: Server) -> None:
    done = node(server.target)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "models: ramp, reversed, square"
    # The very numbers, computed here.
    x = torch.tensor([0.3 + 0.2 * i for i in range(5)], dtype=torch.float64, requires_grad=True)
    cotangent = torch.cos(torch.arange(10, dtype=torch.float64))
    (right,) = torch.autograd.grad(torch.cat([x.sin() * x.cumsum(0), x**3]), x, cotangent)
    found = re.fullmatch(r"ramp: J\^T v = \[(.*)\], as by central differences", lines[1])
    assert found is not None, lines[1]
    np.testing.assert_allclose([float(one) for one in found[1].split(",")], right.numpy(), rtol=1e-12)
    assert lines[2] == "refused: BAD_NAME: nothing to differentiate is called 'nothing'; known: 'x'"
    assert lines[3].startswith("session ") and lines[3].endswith(" on cpu")
    assert lines[4] == "session: the same gradient"


def test_it_notices_a_gradient_that_is_not_the_true_one(server: Server) -> None:
    done = node(server.target, "reversed")
    assert done.returncode == 1
    assert re.fullmatch(r"[\d.e-]+, not [\d.e-]+\n", done.stderr), done.stderr


def documented() -> bytes:
    """The bytes of the request in docs/wire.md: on each line those before the explanation."""
    text = (ROOT / "docs" / "wire.md").read_text()
    (block,) = re.findall(r"<!-- vjp request -->\n```\n(.*?)```", text, re.DOTALL)
    return bytes.fromhex(
        "".join(re.match(r"(\s*(?:[0-9a-f]{2} ?)*)(?:\s{2,}|$)", line)[1] for line in block.splitlines())
    )


def test_the_documented_request_is_ours_and_the_server_takes_it(server: Server) -> None:
    writer = TensorWriter()
    request = pb.ComputeVjpRequest(
        function={"model": "square"},
        inputs=[writer.add("x", np.array([1.0, 2.0, 3.0]))],
        wrt=["x"],
        cotangents=[writer.add("output", np.array([1.0, 0.5, -1.0]))],
    )
    assert documented() == encode_message(request, writer.payloads)
    # What any protobuf library makes of it is the same.
    assert documented() == type(request).FromString(documented()).SerializeToString(deterministic=True)
    with grpc.insecure_channel(server.target) as channel:
        raw = channel.unary_unary(GRADIENT_METHODS["ComputeVjp"].path)(documented(), timeout=60)
    answer, payloads = decode(pb.ComputeVjpResponse, raw)
    reader = TensorReader(payloads)
    assert reader.array(answer.outputs[0], "outputs[0]").tolist() == [1, 4, 9]
    assert reader.array(answer.gradients[0].value, "gradients[0]").tolist() == [2, 2, -6]
