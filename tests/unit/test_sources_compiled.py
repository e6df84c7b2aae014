"""Exported programs and TorchScript in the engine: the derivatives of what was saved, or the reason why not."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.unit import engine_jobs as jobs
from tests.unit import source_items as items
from tests.unit import tape_jobs as tape
from torch import nn
from torch.utils.checkpoint import checkpoint

from pullback_server.engine import exported
from pullback_server.engine.sources import registration_of
from pullback_server.hosting import Registration
from pullback_server.hosting.loading import LoadError
from pullback_wire import Reason

real = items.real
torch.set_num_threads(1)
warnings.filterwarnings("ignore", message=".*torch.jit.*")
Tensor = torch.Tensor


class Model(nn.Module):
    """Everything that a file must keep: ties, buffers, constants, cuts, modules that know two modes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("shift", torch.ones(3), persistent=False)
        self.constant = torch.full((3,), 0.5, dtype=torch.float64)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x).tanh() * self.scale + self.shift
        with torch.no_grad():
            k = torch.sin(self.b(y))
        h = self.drop(self.norm(h)) * k + h.detach() * h
        return self.b(torch.nn.functional.gelu(h)) * self.constant, torch.sigmoid(h) * y


X, Y = real(4, 3), real(4, 3)


def original(train: bool = False) -> Model:
    torch.manual_seed(0)
    return Model().double().train(train)


def save(kind: str, module: nn.Module, folder: Path, *examples: Tensor, **more: Any) -> Any:
    """The item, of a module saved in one of the ways."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "pt2":
            batch = torch.export.Dim("batch")
            dynamic = [{0: batch} for _ in examples]
            torch.export.save(
                torch.export.export(module, examples, dynamic_shapes=tuple(dynamic)), folder / "model.pt2"
            )
        else:
            made = (
                torch.jit.script(module) if kind == "script" else torch.jit.trace(module, examples, check_trace=False)
            )
            torch.jit.save(made, folder / "model.pt")
    return items.make_item(folder, {"kind": "pt2" if kind == "pt2" else "torchscript"}, **more)


def serve(item: Any) -> Any:
    return jobs.Host(registration_of(item, {}))


V = {"output_0": real(4, 3), "output_1": real(4, 3)}
INPUTS = {"x": {"dtype": "float64", "shape": ["n", 3]}, "y": {"dtype": "float64", "shape": ["n", 3]}}
WRT = ["x", "y", "param:a.weight", "param:a.bias", "param:norm.weight"]


def local(
    module: nn.Module, parameters: Mapping[str, Tensor] | None = None, seed: int | None = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs, J^H v, and the derivatives of <J^H v, t>, with t all ones."""
    if seed is not None:
        torch.manual_seed(seed)
    own = dict(module.named_parameters()) | {k: v.clone().requires_grad_() for k, v in (parameters or {}).items()}
    leaves = [X.clone().requires_grad_(), Y.clone().requires_grad_()]
    outputs = torch.func.functional_call(module, own, tuple(leaves), tie_weights=True)
    leaves += [own[name.removeprefix("param:")] for name in WRT[2:]]
    grads = torch.autograd.grad(outputs, leaves, list(V.values()), create_graph=True)
    seconds = torch.autograd.grad(sum(grad.sum() for grad in grads), leaves)
    return list(outputs), list(grads), list(seconds)


KINDS = ["pt2", "script"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [False, True])
def test_every_derivative_is_that_of_the_original_however_often(kind: str, given: bool, tmp_path: Path) -> None:
    host = serve(save(kind, original(), tmp_path, X, Y, inputs=INPUTS))
    (signature,) = host.engine.signatures()
    assert signature.orders.reverse == -1 and signature.orders.forward
    assert [p.name for p in signature.parameters] == [name for name, _ in original().named_parameters()]
    parameters = {"a.weight": real(3, 3), "norm.weight": real(3)} if given else {}
    outputs, grads, seconds = local(original(), parameters)
    ones = {name: torch.ones_like(grad) for name, grad in zip(WRT, grads, strict=True)}
    fixed: dict[str, Any] = {"version": "3", "wrt": WRT, "parameters": parameters}
    for _ in range(4):
        # What comes between must not change what follows.
        host("evaluate", "m", {"x": X, "y": Y}, version="3")
        host("vjp", "m", {"x": X, "y": Y}, version="3", wrt=["y"], cotangents=V)
        reply = host("vjp", "m", {"x": X, "y": Y}, cotangents=V, **fixed)
        for a, b in zip([*reply.outputs.values(), *reply.grads.values()], [*outputs, *grads], strict=True):
            torch.testing.assert_close(a, b.detach())
        reply = host("hvp", "m", {"x": X, "y": Y}, cotangents=V, tangents=ones, **fixed)
        for a, b in zip(reply.hvps.values(), seconds, strict=True):
            torch.testing.assert_close(a, b)
        # <v, J t> = <J^H v, t>
        reply = host("jvp", "m", {"x": X, "y": Y}, tangents=ones, **fixed)
        pushed = sum((V[name] * reply.grads[name]).sum() for name in V)
        torch.testing.assert_close(pushed, sum(grad.sum() for grad in grads).detach())


@pytest.mark.parametrize("kind", KINDS)
def test_many_cotangents_jacobians_and_hessians(kind: str, tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sin()

    module = Small().eval()
    host = serve(save(kind, module, tmp_path, X, inputs={"x": INPUTS["x"]}))
    expected = torch.autograd.functional.jacobian(module, X)
    v = torch.eye(8, dtype=torch.float64).reshape(8, 4, 2)
    reply = host("vjp", "m", {"x": X}, version="3", wrt=["x"], cotangents={"output": v}, batched=True)
    torch.testing.assert_close(reply.grads["x"], expected.reshape(8, 4, 3))
    blocks = host("jacobian", "m", {"x": X}, version="3", wrt=["x"]).blocks
    torch.testing.assert_close(next(iter(blocks.values())), expected)
    hessian = torch.autograd.functional.hessian(lambda x: torch.nn.functional.mse_loss(module(x), X[:, :2]), X)
    given: dict[str, Any] = {"loss": "mse_loss", "targets": {"target": X[:, :2].contiguous()}}
    blocks = host("hessian", "m", {"x": X}, version="3", wrt=["x"], **given).blocks
    torch.testing.assert_close(next(iter(blocks.values())), hessian)


def test_torchscript_in_train_mode_leaves_no_trace(tmp_path: Path) -> None:
    host = serve(save("script", original(), tmp_path, inputs=INPUTS))
    before, _, _ = local(original())
    for seed in (3, 4, 3):
        outputs, grads, _ = local(original(train=True), seed=seed)
        reply = host("vjp", "m", {"x": X, "y": Y}, version="3", wrt=WRT, cotangents=V, train=True, seed=seed)
        for a, b in zip([*reply.outputs.values(), *reply.grads.values()], [*outputs, *grads], strict=True):
            torch.testing.assert_close(a, b.detach())
        reply = host("evaluate", "m", {"x": X, "y": Y}, version="3")
        for a, b in zip(reply.outputs.values(), before, strict=True):
            torch.testing.assert_close(a, b.detach())


def test_an_exported_mode_is_fixed(tmp_path: Path) -> None:
    item = save("pt2", original(), tmp_path, X, Y)
    found = registration_of(item, {})
    assert found.abilities.train == "its mode is fixed: it was exported in eval mode"
    assert "custom backwards" in found.abilities.notes[0] and found.source == "pt2"
    with jobs.refused(Reason.UNSUPPORTED_BY_MODEL, "train mode", "exported in eval mode", field="train"):
        jobs.Host(found)("evaluate", "m", {"x": X, "y": Y}, version="3", train=True)
    item = save("pt2", original(train=True), tmp_path, X, Y)
    found = registration_of(item, {})
    assert "exported in train mode" in found.abilities.train
    host = jobs.Host(found)
    outputs, grads, _ = local(original(train=True), seed=5)
    for _ in range(3):
        # Its buffers are written in every call, and each begins with what they were.
        reply = host("vjp", "m", {"x": X, "y": Y}, version="3", wrt=WRT, cotangents=V, seed=5)
        for a, b in zip([*reply.outputs.values(), *reply.grads.values()], [*outputs, *grads], strict=True):
            torch.testing.assert_close(a, b.detach())


@pytest.mark.parametrize("strict", [False, True])
def test_tied_parameters_of_an_export_are_one(strict: bool, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double().eval()
    module[2].weight = module[0].weight
    torch.export.save(torch.export.export(module, (X,), strict=strict), tmp_path / "model.pt2")
    host = serve(items.make_item(tmp_path, {"kind": "pt2"}))
    hosted = host.engine.find("m", "")
    assert hosted.aliases == {"2.weight": "0.weight"}
    (expected,) = torch.autograd.grad(module(X).sum(), module[0].weight)
    (name,) = hosted.binding.names
    given: dict[str, Any] = {"version": "3", "wrt": ["param:0.weight"], "cotangents": {"output": torch.ones_like(X)}}
    torch.testing.assert_close(host("vjp", "m", {name: X}, **given).grads["param:0.weight"], expected)
    with jobs.refused(Reason.BAD_NAME, "the same parameter as '0.weight'"):
        host("vjp", "m", {name: X}, parameters={"2.weight": real(3, 3)}, **given)


def test_ties_outlast_a_move_to_another_device(tmp_path: Path) -> None:
    save("pt2", original(), tmp_path, X, Y)
    program, ties, _ = exported._load(tmp_path / "model.pt2", "model 'm'", torch.device("meta"))
    module = exported._module(program, ties)
    assert module.a.weight is module.b.weight  # type: ignore[union-attr]
    assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"meta"}


def test_shapes_of_an_export_are_declared_for_it(tmp_path: Path) -> None:
    found = registration_of(save("pt2", original(), tmp_path, X, Y), {})
    (name, width), (other, _) = found.inputs["x"].shape, found.inputs["y"].shape  # type: ignore[misc]
    assert isinstance(name, str) and name == other and width == 3
    assert found.inputs["x"].dtype == "float64"
    torch.export.save(torch.export.export(original(), (X, Y)), tmp_path / "model.pt2")
    assert registration_of(items.make_item(tmp_path, {"kind": "pt2"}), {}).inputs["x"].shape == (4, 3)


class Nested(nn.Module):
    def forward(self, x: Tensor, pair: list[Tensor]) -> Tensor:
        return x * pair[0]


class Flagged(nn.Module):
    def forward(self, x: Tensor, flag: bool) -> Tensor:
        return x * 2 if flag else x


@pytest.mark.parametrize(
    ("module", "arguments", "parts"),
    [
        (Nested(), (X, [Y]), ["list, tuple, dict"]),
        (Flagged(), (X, True), ["'flag'", "no tensor", "True"]),
    ],
)
def test_exports_with_arguments_that_are_no_tensors(
    module: nn.Module, arguments: Any, parts: list[str], tmp_path: Path
) -> None:
    torch.export.save(torch.export.export(module, arguments), tmp_path / "model.pt2")
    refuses(tmp_path, "pt2", *parts)


def refuses(folder: Path, kind: str, *parts: str) -> None:
    with pytest.raises(LoadError) as caught:
        registration_of(items.make_item(folder, {"kind": kind}), {})
    for part in ("model 'm' version 3: model.pt", *parts):
        assert part in str(caught.value), caught.value


def test_graphs_rewritten_for_inference_are_refused(tmp_path: Path) -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach() * x

    program = torch.export.export(Cut(), (X,))
    decomposed = program.run_decompositions()
    # The reason: it computes another gradient, without a word.
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(decomposed.module()(x).sum(), x)
    assert torch.equal(grad, 2 * X)
    torch.export.save(decomposed, tmp_path / "model.pt2")
    refuses(tmp_path, "pt2", "rewritten for inference", "detach()")


@pytest.mark.parametrize(("kind", "name"), [("pt2", "model.pt2"), ("torchscript", "model.pt")])
def test_files_that_are_something_else(kind: str, name: str, tmp_path: Path) -> None:
    refuses(tmp_path, kind, "no such file")
    for content in (b"", b"PK\x03\x04 no archive"):
        (tmp_path / name).write_bytes(content)
        refuses(tmp_path, kind, "cannot load it")


class Forks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.jit.wait(torch.jit.fork(torch.sin, x))  # type: ignore[no-any-return]


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = torch.zeros(3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.count = self.count + 1
        self.before = self.before + x
        return x * self.before * self.count


def test_torchscript_that_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.script(Forks()), path)
    refuses(tmp_path, "torchscript", "torch.jit.fork")
    torch.jit.save(torch.jit.script(Remembers()), path)
    refuses(tmp_path, "torchscript", "changes its 'before',")
    torch.jit.save(torch.jit.script(Flagged()), path)
    refuses(tmp_path, "torchscript", "'flag'", "bool")


def test_frozen_modules_are_refused(tmp_path: Path) -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach() * x

    frozen = torch.jit.freeze(torch.jit.script(Cut().eval()))
    # The reason: it computes another gradient, without a word.
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(frozen(x).sum(), x)
    assert torch.equal(grad, 2 * X)
    torch.jit.save(frozen, tmp_path / "model.pt")
    refuses(tmp_path, "torchscript", "frozen", "detach()")


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()
        self.kept = [self.layer.weight.detach()]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.mm(x, self.kept[0])


def test_torchscript_that_keeps_a_parameter_twice_can_be_given_none(tmp_path: Path) -> None:
    found = registration_of(save("script", Keeps(), tmp_path, inputs={"x": INPUTS["x"]}), {})
    assert "'layer.weight' in 'kept'" in found.abilities.parameters
    host = jobs.Host(found)
    given = {"parameters": {"layer.weight": real(3, 3)}, "cotangents": {"output": X}, "version": "3"}
    with jobs.refused(Reason.UNSUPPORTED_BY_MODEL, "'layer.weight'", "'kept'", field="parameters[layer.weight]"):
        host("vjp", "m", {"x": X}, wrt=["x"], **given)
    reply = host("vjp", "m", {"x": X}, wrt=["param:layer.weight"], cotangents={"output": X}, version="3")
    torch.testing.assert_close(reply.grads["param:layer.weight"], X.T @ X)
    values = {"layer.weight": real(3, 3), "layer.bias": real(3)}
    save_file(values, tmp_path / "uploaded")
    host = serve(items.make_item(tmp_path, {"kind": "torchscript"}, weights=str(tmp_path / "uploaded")))
    local = X @ values["layer.weight"].T + values["layer.bias"] + X @ values["layer.weight"]
    torch.testing.assert_close(host("evaluate", "m", {"x": X}, version="3").outputs["output"], local)


def test_a_traced_module(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double().eval()
    item = save("trace", module, tmp_path, X)
    found = registration_of(item, {})
    assert "traced" in found.abilities.notes[0]
    host = jobs.Host(found)
    (name,) = [record.name for record in host.engine.signatures()[0].inputs]
    x = X.clone().requires_grad_()
    reply = host("vjp", "m", {name: X}, version="3", wrt=[name], cotangents={"output": X[:, :2].contiguous()})
    torch.testing.assert_close(reply.grads[name], torch.autograd.grad(module(x), x, X[:, :2])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_into_what_was_saved(kind: str, tmp_path: Path) -> None:
    item = save(kind, original(), tmp_path, X, Y, inputs=INPUTS)
    other = Model().double().eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    state = {name: tensor.clone() for name, tensor in other.state_dict().items() if name != "b.weight"}
    if kind == "script":
        # A buffer that is not persistent is a buffer like any other there.
        state["shift"] = other.shift.clone()
    save_file(state, tmp_path / "uploaded")
    source = {"kind": "pt2" if kind == "pt2" else "torchscript"}
    item = items.make_item(tmp_path, source, inputs=INPUTS, weights=str(tmp_path / "uploaded"))
    host = serve(item)
    outputs, grads, _ = local(other)
    reply = host("vjp", "m", {"x": X, "y": Y}, version="3", wrt=WRT, cotangents=V)
    for a, b in zip([*reply.outputs.values(), *reply.grads.values()], [*outputs, *grads], strict=True):
        torch.testing.assert_close(a, b.detach())


def test_rows_are_merged_where_they_are_independent(tmp_path: Path) -> None:
    for kind in KINDS:
        host = serve(save(kind, original(), tmp_path, X, Y, inputs=INPUTS, batch_axis=0))
        (signature,) = host.engine.signatures()
        assert signature.batch.max_rows > 1, signature.batch


@pytest.mark.parametrize("kind", KINDS)
def test_in_sessions(kind: str, tmp_path: Path) -> None:
    session = tape.Session(registration_of(save(kind, original(), tmp_path, X, Y, inputs=INPUTS), {}))
    given = {"a.weight": real(3, 3), "norm.weight": real(3)}
    outputs, grads, _ = local(original(), given)
    x, y = session.leaf(X), session.leaf(Y)
    handles = {name: session.leaf(tensor) for name, tensor in given.items()}
    for _ in range(3):
        session.model("m", {"x": x, "y": y}, outputs=2)
        first, second = session.model("m", {"x": x, "y": y}, outputs=2, parameters=handles)
        torch.testing.assert_close(session.get(first), outputs[0].detach())
        pulled = session.grads(
            [first, second], [x, handles["a.weight"]], [session.put(v) for v in V.values()], create_graph=True
        )
        for handle, expected in zip(pulled, (grads[0], grads[2]), strict=True):
            torch.testing.assert_close(session.get(handle), expected.detach())


def test_what_cannot_be_done_is_refused_in_sessions(tmp_path: Path) -> None:
    session = tape.Session(registration_of(save("pt2", original(), tmp_path, X, Y), {}))
    x, y = session.leaf(X), session.leaf(Y)
    with tape.refused(Reason.UNSUPPORTED_BY_MODEL, "train mode", "exported in eval mode"):
        session.model("m", {"x": x, "y": y}, outputs=2, train=True)
    session = tape.Session(registration_of(save("script", Keeps(), tmp_path), {}))
    with tape.refused(Reason.UNSUPPORTED_BY_MODEL, "'layer.weight'", "'kept'"):
        session.model("m", {"x": session.leaf(X)}, parameters={"layer.weight": session.leaf(real(3, 3))})


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3).double()
        self.two = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.sin(self.one(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_one_module_at_two_places(kind: str, tmp_path: Path) -> None:
    module = Twice().eval()
    weight, local = real(3, 3).requires_grad_(), module(X).detach()
    host = serve(save(kind, module, tmp_path, X, inputs={"x": INPUTS["x"]}))
    x = torch.nn.functional.linear(torch.sin(torch.nn.functional.linear(X, weight, module.one.bias)), weight)
    (expected,) = torch.autograd.grad(x.sum(), weight)
    for _ in range(2):
        reply = host(
            "vjp",
            "m",
            {"x": X},
            version="3",
            wrt=["param:one.weight"],
            parameters={"one.weight": weight},
            cotangents={"output": torch.ones_like(X)},
        )
        torch.testing.assert_close(reply.grads["param:one.weight"], expected)
        # Of what was given nothing stays.
        torch.testing.assert_close(host("evaluate", "m", {"x": X}, version="3").outputs["output"], local)


class Part(nn.Module):
    """Python around TorchScript, whose copies would silently keep the original's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.jit.script(nn.Linear(3, 3).double())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_no_copy_of_torchscript_runs_with_given_parameters() -> None:
    session = tape.Session(Registration("m", Part))
    weight = real(3, 3)
    with tape.refused(Reason.UNSUPPORTED_BY_MODEL, "TorchScript in part"):
        session.model("m", {"x": session.leaf(X)}, parameters={"inner.weight": session.leaf(weight)})


class Dropping(nn.Module):
    def __init__(self, chance: float = 0.5, tracked: bool = True) -> None:
        super().__init__()
        self.drop = nn.Dropout(chance)
        self.norm = nn.BatchNorm1d(3, track_running_stats=tracked)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(x)).tanh()


class Mixed(nn.Module):
    def __init__(self, traced: nn.Module) -> None:
        super().__init__()
        self.traced = traced
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.traced(x))


def traced(module: nn.Module, train: bool = False) -> Any:
    return torch.jit.trace(module.double().train(train), (real(4, 3),), check_trace=False)


@pytest.mark.parametrize(
    ("make", "fixed"),
    [
        (lambda: traced(Dropping()), "'batch_norm', 'dropout'"),
        (lambda: traced(nn.GRU(3, 3, 2, dropout=0.5)), "'gru'"),
        (lambda: torch.jit.script(Mixed(traced(Dropping()))), "'batch_norm', 'dropout'"),
        (lambda: traced(Dropping(0.0, tracked=False)), ""),
        (lambda: traced(nn.GRU(3, 3)), ""),
        (lambda: traced(nn.Linear(3, 3)), ""),
        (lambda: torch.jit.script(Dropping().double()), ""),
        (lambda: torch.jit.script(Mixed(traced(nn.Linear(3, 3)))), ""),
    ],
)
def test_a_trace_in_eval_mode_has_no_train_mode(tmp_path: Path, make: Any, fixed: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make().save(str(tmp_path / "model.pt"))
    found = registration_of(items.make_item(tmp_path, {"kind": "torchscript", "file": "model.pt"}), {})
    assert found.abilities.train == (f"it was traced in eval mode, in which its {fixed} stay" if fixed else "")
    assert len(found.abilities.notes) == 1


def test_a_trace_in_train_mode_says_so(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced(Dropping(), train=True).save(str(tmp_path / "model.pt"))
    found = registration_of(items.make_item(tmp_path, {"kind": "torchscript", "file": "model.pt"}), {})
    assert found.abilities.train == "" and "'batch_norm', 'dropout' run in train mode" in found.abilities.notes[1]
