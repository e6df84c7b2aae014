"""The autograd graph of a model: its nodes, who made them, and a model that is afterwards as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.engine_jobs import WIRE, Host, host_factory, host_function, make_job, refused
from torch import nn

from pullback_server.engine.exported import load_exported
from pullback_server.engine.scripted import load_scripted
from pullback_server.hosting import Options, TensorSpec
from pullback_server.job import GraphRecord
from pullback_wire import Reason

torch.set_num_threads(1)
F64 = torch.float64
X = {"x": TensorSpec("float64", ("batch", 4))}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=F64)
        self.act = nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.first(x)) + x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, dtype=F64))
        self.idle = nn.Parameter(torch.ones(2, dtype=F64))
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.BatchNorm1d(4, dtype=F64)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x * self.scale
        for layer in self.layers:
            x = layer(x)
        return {"y": self.drop(self.norm(x)), "same": x}


def graph_of(host: Host, most: int = 2000, **more: Any) -> GraphRecord:
    job, _ = make_job("graph", "f", {}, max_nodes=most, **more)
    found = host.engine.run(job, []).outcome.graph
    assert found is not None
    return found


def names(found: GraphRecord, kind: str) -> list[str]:
    return [node.name for node in found.nodes if node.kind == kind]


def modules(found: GraphRecord) -> dict[str, set[str]]:
    made: dict[str, set[str]] = {}
    for node in found.nodes:
        if node.kind == "operation":
            made.setdefault(node.module, set()).add(node.name)
    return made


def check(found: GraphRecord) -> None:
    """Whether it is in order: what the contract says of nodes and edges."""
    order = ["input", "parameter", "operation", "output"]
    places = [order.index(node.kind) for node in found.nodes]
    assert places == sorted(places)
    assert len(found.edges) == len(set(found.edges))
    for source, target in found.edges:
        assert 0 <= source < target < len(found.nodes)
        assert found.nodes[target].kind in ("operation", "output") and found.nodes[source].kind != "output"


def test_nodes_edges_and_modules() -> None:
    found = graph_of(host_factory(Net, inputs=X))
    check(found)
    assert not found.truncated
    assert names(found, "input") == ["x"]
    assert names(found, "parameter") == [name for name, _ in Net().named_parameters()]
    assert names(found, "output") == ["y", "same"]
    made = modules(found)
    assert made["layers.0.first"] == made["layers.1.first"] == {"AddmmBackward0", "TBackward0"}
    assert made["layers.0.act"] == {"TanhBackward0"}
    assert made["layers.0"] == {"AddBackward0"}
    assert made[""] == {"MulBackward0"}
    assert made["norm"] == {"NativeBatchNormBackward0"}
    number = {(node.kind, node.name): index for index, node in enumerate(found.nodes)}
    into = {source for source, target in found.edges if found.nodes[target].name == "MulBackward0"}
    assert into == {number["input", "x"], number["parameter", "scale"]}
    idle = number["parameter", "idle"]
    assert not any(idle in edge for edge in found.edges)
    # A sample of two rows: every node says what it made.
    assert all(node.dtype == WIRE[F64] for node in found.nodes)
    assert {node.shape for node in found.nodes if node.name in ("x", "y", "TanhBackward0")} == {(2, 4)}
    assert found.nodes[number["parameter", "layers.0.first.weight"]].module == "layers.0.first"


def test_the_graph_is_that_of_torch() -> None:
    """As many operations as a walk over a local graph finds."""
    module = Net().eval()
    outputs = module(torch.ones(2, 4, dtype=F64, requires_grad=True))
    seen: set[Any] = set()
    waiting: list[Any] = [outputs["y"].grad_fn]
    while waiting:
        node = waiting.pop()
        if node not in seen and node.name() != "torch::autograd::AccumulateGrad":
            seen.add(node)
            waiting.extend(one for one, _ in node.next_functions if one is not None)
    found = graph_of(host_factory(Net, inputs=X))
    assert sorted(names(found, "operation")) == sorted(node.name() for node in seen)


def test_it_is_the_same_each_time_and_in_train_mode_another() -> None:
    host = host_factory(Net, inputs=X)
    first = graph_of(host)
    assert graph_of(host) == first
    train = graph_of(host, train=True)
    check(train)
    assert "drop" in modules(train) and "drop" not in modules(first)


def test_the_model_and_the_generators_are_as_before() -> None:
    host = host_factory(Net, inputs=X)
    hosted = host.engine.find("f", "1")
    assert hosted.module is not None
    x = {"x": torch.full((3, 4), 0.3, dtype=F64)}
    before = host("evaluate", "f", x).outputs
    state = {name: tensor.clone() for name, tensor in hosted.module.state_dict().items()}
    torch.manual_seed(5)
    generators = torch.get_rng_state()
    graph_of(host, train=True)
    assert torch.equal(torch.get_rng_state(), generators)
    assert all(torch.equal(tensor, state[name]) for name, tensor in hosted.module.state_dict().items())
    assert all(not one.requires_grad and one.grad is None for one in hosted.module.parameters())
    assert not hosted.module.training
    after = host("evaluate", "f", x).outputs
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_many_nodes_are_cut_off() -> None:
    host = host_factory(Net, inputs=X)
    whole = graph_of(host)
    for most in range(1, len(whole.nodes) + 3):
        found = graph_of(host, most)
        assert len(found.nodes) <= most
        assert found.truncated == (most < len(whole.nodes))
        check(found)
        if most >= 5:
            assert names(found, "output") == ["y", "same"] and names(found, "input") == ["x"]
    assert graph_of(host, len(whole.nodes)) == whole


def test_what_takes_no_part() -> None:
    def code(x: torch.Tensor, index: torch.Tensor) -> dict[str, Any]:
        return {"picked": x[index].sin(), "index": index + 1, "input": x, "cut": x.detach() * 2}

    inputs = {"x": TensorSpec("float32", (4,)), "index": TensorSpec("int64", ("n",), low=0, high=3)}
    found = graph_of(host_function(code, inputs=inputs))
    check(found)
    assert names(found, "input") == ["x", "index"]
    assert names(found, "output") == ["picked", "index", "input", "cut"]
    assert names(found, "operation") == ["IndexBackward0", "SinBackward0"]
    ends = {found.nodes[target].name: found.nodes[source].name for source, target in found.edges}
    assert ends == {"IndexBackward0": "x", "SinBackward0": "IndexBackward0", "picked": "SinBackward0", "input": "x"}


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return 2 * g


def in_place(x: torch.Tensor) -> torch.Tensor:
    x.mul_(3.0)
    return Doubled.apply(x)  # type: ignore[no-any-return]


def test_models_that_write_into_inputs_and_have_functions_of_their_own() -> None:
    found = graph_of(host_function(in_place, inputs=X))
    check(found)
    assert names(found, "operation") == ["MulBackward0", "DoubledBackward"]
    assert found.nodes[found.edges[0][0]].name == "x"


def test_checkpointed_scripted_and_exported_models(tmp_path: Path) -> None:
    found = graph_of(host_factory(Net, inputs=X, options=Options(checkpoint=["layers.*"])))
    assert modules(found)["layers.0.act"] == {"TanhBackward0"}
    example = torch.ones(2, 4, dtype=F64)
    net = nn.Sequential(nn.Linear(4, 4, dtype=F64), nn.Tanh())
    torch.jit.script(net).save(tmp_path / "model.pt")
    torch.export.save(torch.export.export(net, (example,)), tmp_path / "model.pt2")
    cpu = torch.device("cpu")
    found = graph_of(Host(load_exported("f", tmp_path / "model.pt2", "model 'f'", cpu)))
    check(found)
    assert "TanhBackward0" in names(found, "operation") and names(found, "parameter") == ["0.weight", "0.bias"]
    with refused(Reason.UNSUPPORTED_BY_MODEL, "declares no shape of its input"):
        graph_of(Host(load_scripted("f", tmp_path / "model.pt", "model 'f'", cpu)))


def test_models_without_a_sample_say_which_input_is_to_blame() -> None:
    def code(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return x @ weights

    host = host_function(code, inputs={"x": TensorSpec("float64", (3, 4))})
    with refused(Reason.UNSUPPORTED_BY_MODEL, "declares no shape of its input 'weights'", "inputs={...}"):
        graph_of(host)
    host = host_function(code, inputs={"x": TensorSpec("float64", (3, 4)), "weights": TensorSpec("float64", (5,))})
    with refused(Reason.UNSUPPORTED_BY_MODEL, "no sample made of its declared inputs makes it run", "raised Runtime"):
        graph_of(host)


def test_a_model_that_draws_from_numpy() -> None:
    host = host_function(lambda x: x * float(np.random.rand()), inputs=X)
    assert names(graph_of(host), "operation") == ["MulBackward0"]


@pytest.mark.parametrize("name", ["transformer", "lstm", "conv", "tied", "words"])
def test_models_of_the_zoo(name: str) -> None:
    from tests.unit.tape_jobs import ZOO

    registration = ZOO[name]
    host = Host(registration)
    job, _ = make_job("graph", name, {}, max_nodes=2000)
    found = host.engine.run(job, []).outcome.graph
    assert found is not None
    check(found)
    parameters = set(host.engine.find(name, "1").parameters)
    assert set(names(found, "parameter")) == parameters
    connected = {found.nodes[source].name for source, _ in found.edges if found.nodes[source].kind == "parameter"}
    assert connected == parameters
