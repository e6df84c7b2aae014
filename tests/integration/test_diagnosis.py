"""Finding NaN and drawing graphs, over the wire: messages, client, RemoteModule, sessions and the command line."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from torch import nn

import pullback as pb
from pullback import errors
from pullback._cli import main
from pullback.torch import RemoteModule
from pullback_server import Server, model, spec
from pullback_wire import MODEL_METHODS
from pullback_wire.v1 import function_pb2
from pullback_wire.v1 import model_service_pb2 as wire

ONES = np.ones((3, 4))
ZEROS = ONES.copy()
ZEROS[0, 1] = ZEROS[2, 2] = 0
SVG = "{http://www.w3.org/2000/svg}"


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sqrt()


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Root()
        self.lin = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.norm(x * 2.0))  # type: ignore[no-any-return]


@model("rooted", inputs={"x": spec("float64", ["batch", 4])}, batch_axis=0)
class Rooted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = Head()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.head(x))  # type: ignore[no-any-return]


@model("shapeless", kind="function")
def shapeless(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(Rooted, shapeless, threads=1, devices="cpu") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[pb.Client]:
    with pb.connect(server.target, timeout=60) as client:
        yield client


MADE = "in module 'head.norm' made inf of finite numbers (gradient 0, shape (3, 4), 2 of 12 elements)"
ROOT = f"model 'rooted' version 1: the backward of SqrtBackward0 {MADE}"

Call = Callable[[Any, np.ndarray[Any, Any], bool], Any]
CALLS: dict[str, Call] = {
    "vjp": lambda m, x, detect: m.vjp(x, ONES, detect_anomaly=detect),
    "batched": lambda m, x, detect: m.vjp(x, np.stack([ONES, ONES]), batched=True, detect_anomaly=detect),
    "value_and_grad": lambda m, x, detect: m.value_and_grad(
        x, loss="mse_loss", target=ONES, wrt=["x", "head.*"], detect_anomaly=detect
    ),
    "jvp": lambda m, x, detect: m.jvp(x, ONES, detect_anomaly=detect),
    "hvp": lambda m, x, detect: m.hvp(x, ONES, ONES, detect_anomaly=detect),
    "jacobian": lambda m, x, detect: m.jacobian(x, detect_anomaly=detect),
    "hessian": lambda m, x, detect: m.hessian(x, loss="mse_loss", target=ONES, detect_anomaly=detect),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_method_can_be_told_to_look(client: pb.Client, name: str) -> None:
    rooted, call = client.model("rooted"), CALLS[name]
    with pytest.raises(errors.NonFinite, match=r"module 'head\.norm' made (nan|inf) of finite numbers") as caught:
        call(rooted, ZEROS, True)
    assert isinstance(caught.value, ArithmeticError)
    with pytest.raises(errors.NonFinite, match="head"), pb.autograd.detect_anomaly():
        call(rooted, ZEROS, False)
    assert not pb.autograd.is_anomaly_enabled()
    call(rooted, ZEROS, False)
    flat: list[Any] = []
    for detect in (False, True):
        found = call(rooted, ONES * 0.3, detect)
        flat.append([np.asarray(one) for one in _arrays(found)])
    assert all(np.array_equal(a, b) for a, b in zip(*flat, strict=True)) and flat[0]


def _arrays(found: Any) -> Iterator[Any]:
    if isinstance(found, dict):
        found = tuple(found.values())
    if isinstance(found, tuple):
        for one in found:
            yield from _arrays(one)
    elif found is not None:
        yield found


def test_messages_and_fields(client: pb.Client) -> None:
    rooted = client.model("rooted")
    with pytest.raises(errors.NonFinite, match=re.escape(ROOT)):
        rooted.vjp(ZEROS, ONES, detect_anomaly=True)
    with pytest.raises(errors.NonFinite, match=r"the operation aten::sqrt in module 'head\.norm' made nan"):
        rooted.evaluate(-ONES, detect_anomaly=True)
    with pytest.raises(errors.NonFinite, match=r"inputs\[x\] holds nan already"):
        rooted.evaluate(ONES * np.nan, detect_anomaly=True)
    with pytest.raises(errors.NonFinite, match=r"parameters\[head\.lin\.bias\] holds inf already"):
        rooted.evaluate(ONES, parameters={"head.lin.bias": np.full(4, np.inf)}, detect_anomaly=True)
    assert np.isnan(rooted.evaluate(-ONES)).all()


def test_it_is_not_merged_with_other_calls(client: pb.Client) -> None:
    rooted = client.model("rooted")

    def one(number: int) -> str:
        x = ZEROS if number % 4 == 0 else ONES
        try:
            rooted.vjp(x, ONES, detect_anomaly=number % 2 == 0)
        except errors.NonFinite:
            return "refused"
        return "fine"

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one, range(64)))
    assert found == ["refused" if number % 4 == 0 else "fine" for number in range(64)]


def test_in_a_session_as_torch_has_it(client: pb.Client) -> None:
    rooted = client.model("rooted")
    with client.session():
        x = pb.tensor(ZEROS, requires_grad=True)
        with pb.autograd.detect_anomaly():
            y = rooted(x).sum()
            with pytest.raises(errors.NonFinite, match=re.escape(ROOT)):
                y.backward()
        assert x.grad is None
        rooted(x).sum().backward()
        assert np.isinf(x.grad.numpy()).any()

        x = pb.tensor(ZEROS, requires_grad=True)
        y = rooted(x, detect_anomaly=True)
        with pb.autograd.detect_anomaly(), pytest.raises(errors.NonFinite, match=re.escape(ROOT)):
            pb.autograd.grad(y, x, ONES)
        with pytest.raises(errors.NonFinite, match="aten::sqrt"):
            rooted(pb.tensor(-ONES), detect_anomaly=True)
        # It goes on, and what is well is as ever.
        found = []
        for enabled in (False, True):
            with pb.autograd.detect_anomaly(enabled):
                x = pb.tensor(ONES * 0.7, requires_grad=True)
                (g,) = pb.autograd.grad(rooted(x, train=True, seed=3).sum(), x, create_graph=True)
                (h,) = pb.autograd.grad((g * g).sum(), x)
                found.append((g.numpy(), h.numpy()))
        assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_the_switch_is_of_one_thread_and_a_decorator(client: pb.Client) -> None:
    seen: list[bool] = []

    @pb.autograd.detect_anomaly()
    def inside(deep: int = 2) -> bool:
        if deep:
            inside(deep - 1)
        return pb.autograd.is_anomaly_enabled()

    with pb.autograd.detect_anomaly():
        thread = threading.Thread(target=lambda: seen.append(pb.autograd.is_anomaly_enabled()))
        thread.start()
        thread.join()
        with pb.autograd.detect_anomaly(False):
            assert not pb.autograd.is_anomaly_enabled() and inside()
        assert pb.autograd.is_anomaly_enabled()
    assert seen == [False]
    assert not pb.autograd.is_anomaly_enabled()


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
def test_a_remote_module_inside_torchs_own_detect_anomaly(client: pb.Client) -> None:
    module = RemoteModule(client.model("rooted")).eval()
    x = torch.tensor(ZEROS, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=False):
        y = module(x)
        with pytest.raises(errors.NonFinite, match=re.escape(ROOT)):
            y.sum().backward()
        with pytest.raises(errors.NonFinite, match="aten::sqrt in module"):
            module(-torch.ones(3, 4, dtype=torch.float64))
    module(x).sum().backward()
    assert x.grad is not None and x.grad.isinf().any()


# Graphs.


def ask(server: Server, **fields: Any) -> wire.GetModelGraphResponse:
    method = MODEL_METHODS["GetModelGraph"]
    with grpc.insecure_channel(server.target) as channel:
        call = channel.unary_unary(
            method.path,
            wire.GetModelGraphRequest.SerializeToString,
            wire.GetModelGraphResponse.FromString,
        )
        found: wire.GetModelGraphResponse = call(wire.GetModelGraphRequest(**fields), timeout=60)
    return found


def test_the_message(server: Server) -> None:
    found = ask(server, name="rooted")
    assert found.version == "1" and not found.truncated
    assert [node.id for node in found.nodes] == list(range(len(found.nodes)))
    made = {(node.kind, node.name): node for node in found.nodes}
    root = made[wire.GRAPH_NODE_KIND_OPERATION, "SqrtBackward0"]
    assert root.module == "head.norm" and list(root.shape) == [2, 4]
    assert (wire.GRAPH_NODE_KIND_INPUT, "x") in made and (wire.GRAPH_NODE_KIND_OUTPUT, "output") in made
    assert (wire.GRAPH_NODE_KIND_PARAMETER, "head.lin.weight") in made
    assert all(edge.source < edge.target for edge in found.edges)
    train = ask(server, name="rooted", version="1", mode=function_pb2.MODE_TRAIN)
    assert {node.module for node in train.nodes} - {node.module for node in found.nodes} == {"drop"}
    few = ask(server, name="rooted", max_nodes=4)
    assert few.truncated and len(few.nodes) == 4


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"name": "nobody"}, grpc.StatusCode.NOT_FOUND, "nobody"),
        ({"name": "rooted", "version": "9"}, grpc.StatusCode.NOT_FOUND, "'9'"),
        ({"name": "rooted", "max_nodes": -1}, grpc.StatusCode.INVALID_ARGUMENT, "max_nodes is -1"),
        ({"name": "rooted", "mode": 7}, grpc.StatusCode.INVALID_ARGUMENT, "mode is 7"),
        ({"name": "shapeless"}, grpc.StatusCode.FAILED_PRECONDITION, "declares no shape of its input 'x'"),
    ],
)
def test_what_makes_no_graph(server: Server, fields: dict[str, Any], code: grpc.StatusCode, said: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(server, **fields)
    assert caught.value.code() is code
    assert said in caught.value.details()


def test_asking_for_a_graph_changes_nothing(server: Server, client: pb.Client) -> None:
    rooted = client.model("rooted")
    before = rooted.vjp(ONES, ONES)
    rooted.graph(train=True)
    after = rooted.vjp(ONES, ONES)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    # The version is still in service: no unknown method is taken for another.
    assert [info.state for info in client.models()] == ["ready", "ready"]


def test_the_clients_graph_and_its_text(client: pb.Client) -> None:
    graph = client.model("rooted").graph()
    assert graph.model == "rooted" and graph.version == "1"
    assert [node.name for node in graph.nodes if node.kind == "input"] == ["x"]
    text = graph.dot()
    assert text.startswith("digraph") and '"cluster_head.norm"' in text and "SqrtBackward0" in text
    assert text.count("->") == len(graph.edges)
    assert graph.dot() == text
    with pytest.raises(errors.UnsupportedByModel, match="declares no shape of its input 'x'"):
        client.model("shapeless").graph()
    with pytest.raises(ValueError, match="max_nodes"):
        client.model("rooted").graph(max_nodes=0)
    assert "truncated" in repr(client.model("rooted").graph(max_nodes=3))


needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@needs_dot
def test_a_picture(client: pb.Client) -> None:
    graph = client.model("rooted").graph()
    svg = graph.svg()
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    kinds = [element.get("class") for element in root.iter(f"{SVG}g")]
    assert kinds.count("node") == len(graph.nodes) and kinds.count("edge") == len(graph.edges)
    # head, head.norm and head.lin.
    assert kinds.count("cluster") == 3
    shown = texts(svg)
    assert {"head.norm", "SqrtBackward0", "x", "head.lin.weight", "rooted version 1"} <= set(shown)
    assert graph._repr_svg_() == svg


@needs_dot
def test_names_are_shown_as_they_are() -> None:
    name = 'odd "name" <b>\\N & {x|y}'
    nodes = [
        pb.GraphNode(0, "input", name, "", "float32", (2,)),
        pb.GraphNode(1, "operation", "Sin\nBackward0", 'a"b.<c>', None, ()),
        pb.GraphNode(2, "output", "<i>output</i>", "", "float32", (2,)),
    ]
    svg = pb.ModelGraph("<&>", "1", tuple(nodes), ((0, 1), (1, 2)), True).svg()
    shown = texts(svg)
    assert {name, "<i>output</i>", 'a"b.<c>', "<&> version 1 (cut off)"} <= {one.replace("\xa0", " ") for one in shown}


def run(capsys: pytest.CaptureFixture[str], server: Server, *arguments: str) -> tuple[int, str, str]:
    status = main([*arguments, "--target", server.target])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command(server: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(capsys, server, "graph", "rooted")
    assert (status, err) == (0, "") and out.startswith("digraph") and "NativeDropout" not in out
    status, out, _ = run(capsys, server, "graph", "rooted", "--json", "--mode", "train", "--version", "1")
    found = json.loads(out)
    assert status == 0 and found["version"] == "1" and not found["truncated"]
    assert {"id", "kind", "name", "module", "dtype", "shape"} == set(found["nodes"][0])
    assert any(node["module"] == "drop" for node in found["nodes"]) and found["edges"]
    target = tmp_path / "graph.dot"
    status, out, err = run(capsys, server, "graph", "rooted", "--output", str(target), "--max-nodes", "5")
    assert (status, out) == (0, "") and "more nodes" in err and target.read_text().startswith("digraph")
    status, _, err = run(capsys, server, "graph", "rooted", "--output", str(tmp_path / "graph.txt"))
    assert status == 1 and "suffix" in err and not (tmp_path / "graph.txt").exists()
    status, _, err = run(capsys, server, "graph", "shapeless")
    assert status == 1 and "declares no shape" in err


@needs_dot
@pytest.mark.parametrize(("suffix", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_the_command_writes_pictures(server: Server, tmp_path: Path, suffix: str, begins: bytes) -> None:
    target = tmp_path / f"graph.{suffix}"
    assert main(["graph", "rooted", "-o", str(target), "--target", server.target]) == 0
    assert target.read_bytes().startswith(begins)


def test_without_graphviz(
    server: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "graph.svg"
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        status, _, err = run(capsys, server, "graph", "rooted", "--output", str(target))
        assert status == 1 and "`dot` of Graphviz is not on the PATH" in err and not target.exists()
        with pb.connect(server.target) as client:
            assert client.model("rooted").graph()._repr_svg_() is None
    monkeypatch.setitem(sys.modules, "graphviz", None)
    status, _, err = run(capsys, server, "graph", "rooted")
    assert status == 1 and "pip install 'pullback[graph]'" in err
    status, out, _ = run(capsys, server, "graph", "rooted", "--json")
    assert status == 0 and json.loads(out)["nodes"]
