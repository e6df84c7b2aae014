"""What one process found out about a model, another need not; and a model that is unloaded leaves nothing behind."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pullback_server import Gate, spec
from pullback_server.engine import Engine, verdicts
from pullback_server.faults import Fault
from pullback_server.hosting import Registration
from pullback_server.hosting.loading import load_source
from pullback_server.hosting.options import Compile, Options
from pullback_server.job import Batch, Verdict
from pullback_wire import Reason

HERE = Path(__file__).parent


def helper(name: str) -> Any:
    found = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert found is not None and found.loader is not None
    if name not in sys.modules:
        sys.modules[name] = importlib.util.module_from_spec(found)
        found.loader.exec_module(sys.modules[name])
    return sys.modules[name]


jobs, tapes = helper("engine_jobs"), helper("tape_jobs")
torch.set_num_threads(1)
Tensor = torch.Tensor
F64 = torch.float64
ZOO = {registration.name: registration for registration in load_source(str(HERE.parent / "zoo.py"))}
CPU = torch.device("cpu")
INPUTS = {"input": spec("float64", ["n", 3])}


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def registration(target: Any = network, **more: Any) -> Registration:
    fields: dict[str, Any] = {"kind": "factory", "inputs": INPUTS, "batch_axis": 0}
    return Registration("f", target, **(fields | more))


def carried(verdict: Verdict) -> Verdict:
    """As from another process."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(verdict), type=Verdict)


# Verdicts.


@pytest.mark.parametrize(
    "name", ["small", "conv", "custom_right", "once", "straight_through", "words", "custom_unprobed"]
)
def test_adopted_is_found_out(name: str) -> None:
    one, other = Engine(CPU), Engine(CPU)
    found = one.load(ZOO[name])
    verdict = carried(one.verdict(name, "1"))
    adopted = other.load(ZOO[name], verdict)
    assert msgspec.structs.asdict(adopted) == msgspec.structs.asdict(found)
    a, b = one.find(name, ""), other.find(name, "")
    for field in ("honest", "forward_mode", "no_jvp", "batched_inputs", "additive", "proven", "needs_natural"):
        assert getattr(a, field) == getattr(b, field), field
    assert carried(other.verdict(name, "1")) == verdict


def test_only_what_cannot_travel_is_found_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Engine(CPU)
    names = ["small", "custom_right", "custom_unprobed"]
    for name in names:
        one.load(ZOO[name])
    probed: list[str] = []
    probe = verdicts.probe
    monkeypatch.setattr(
        verdicts, "probe", lambda hosted, compute: probed.append(hosted.registration.name) or probe(hosted, compute)
    )
    for what in ("pass_gate", "pass_rows"):
        monkeypatch.setattr(f"pullback_server.engine.core.{what}", None)
    other = Engine(CPU)
    for name in names:
        assert other.load(ZOO[name], carried(one.verdict(name, "1"))).orders == one.find(name, "").orders
    assert probed == ["custom_right"]


def test_learned_before_the_first_call() -> None:
    one = jobs.Host(ZOO["in_place"], ZOO["force"])
    one("vjp", "in_place", {"x": real(3)}, wrt=["x"], cotangents={"output": real(3)})
    verdict = carried(one.engine.verdict("in_place", "1"))
    assert verdict.writes_inputs and not verdict.writes_buffers
    other = Engine(CPU)
    other.load(ZOO["in_place"], verdict)
    assert other.find("in_place", "").writes_inputs


def test_where_it_may_be() -> None:
    engine = Engine(CPU)
    engine.load(registration(options=Options(devices=("cpu-*",), replicas=2)))
    verdict = engine.verdict("f", "1")
    assert (verdict.devices, verdict.replicas) == (["cpu-*"], 2)
    with pytest.raises(KeyError):
        engine.verdict("f", "2")


# Revisions.


def test_revisions() -> None:
    engine = Engine(CPU)
    for version, revision in (("2", 0), ("10", 0), ("10", 2), ("10", 11), ("9", 40)):
        engine.load(registration(version=version, revision=revision))
    assert engine.find("f", "").registration.id == "10+11"
    assert engine.find("f", "10").registration.revision == 0
    engine.unload("f", "10+11")
    engine.unload("f", "10+11")
    engine.unload("g", "1")
    assert engine.find("f", "").registration.id == "10+2"
    with jobs.refused(Reason.VERSION_NOT_FOUND, "10+11"):
        engine.find("f", "10+11")
    for version in ("2", "10", "10+2", "9+40"):
        engine.unload("f", version)
    with jobs.refused(Reason.MODEL_NOT_FOUND, "'f'"):
        engine.find("f", "")
    assert engine.signatures() == []


# Nothing is left behind.


class Everything(nn.Module):
    """What may keep a module alive: buffers, caches, hooks, closures, checkpoints, Functions, circles."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.me = [self]
        self.first.weight.register_hook(lambda g: g + 0 * self.first.weight.detach())
        self.cache: dict[int, Tensor] = {}

    def middle(self, x: Tensor) -> Tensor:
        found: Tensor = torch.tanh(self.norm(self.first(x)))
        return found

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        self.cache[len(input)] = input.detach()
        found: Tensor = self.second(checkpoint(self.middle, input, use_reentrant=False))
        return found


class Watch:
    """Whether a hosted model is still there: the object, its modules, the memory of its parameters."""

    def __init__(self, engine: Engine, id: str = "1") -> None:
        hosted = engine.find("f", id)
        assert hosted.module is not None
        self._refs = {"hosted": weakref.ref(hosted)}
        self._refs |= {f"module {name}": weakref.ref(module) for name, module in hosted.module.named_modules()}
        self._refs |= {f"parameter {name}": weakref.ref(own) for name, own in hosted.parameters.items()}
        self._refs |= {f"storage {i}": weakref.ref(storage) for i, storage in enumerate(hosted.storages())}

    def alive(self) -> list[str]:
        gc.collect()
        return [name for name, ref in self._refs.items() if ref() is not None]


def every_call(engine: Engine) -> None:
    """Calls of all kinds, alone and merged, and some that fail."""
    x, v, t = {"input": real(2, 3)}, {"output": real(2, 2)}, {"input": real(2, 3)}
    given = {"first.weight": real(4, 3)}
    wrt = ["input", "param:first.weight"]
    calls: list[tuple[str, dict[str, Any]]] = [
        ("evaluate", {}),
        ("vjp", {"cotangents": v, "wrt": wrt}),
        ("vjp", {"cotangents": v, "wrt": wrt, "parameters": given, "train": True, "seed": 3}),
        ("vjp", {"cotangents": {"output": real(3, 2, 2)}, "wrt": wrt, "batched": True}),
        ("jvp", {"tangents": t, "wrt": ["input"]}),
        ("hvp", {"cotangents": v, "tangents": t, "wrt": ["input"]}),
        ("jacobian", {"wrt": ["input"]}),
        ("hessian", {"wrt": ["input"], "loss": "mse_loss", "targets": {"target": real(2, 2)}}),
        ("vjp", {"cotangents": {"output": real(7, 7)}, "wrt": wrt}),
        ("vjp", {"cotangents": v, "wrt": ["input"], "train": True, "parameters": {"nothing": real(1)}}),
    ]
    for kind, more in calls:
        job, tensors = jobs.make_job(kind, "f", x, **more)
        job.copy_inputs = True
        try:
            engine.run(job, tensors)
        except Fault as fault:
            # The exception holds frames.
            fault.__traceback__ = None
    wrong, tensors = jobs.make_job("evaluate", "f", {"input": real(2, 5)})
    with pytest.raises(Fault):
        engine.run(wrong, tensors)
    members = [jobs.make_job("vjp", "f", x, cotangents=v, wrt=["input"]) for _ in range(3)]
    for shadow in (-1, 1):
        counts = [len(tensors) for _, tensors in members]
        batch = Batch([job for job, _ in members], counts, [1e18] * 3, shadow)
        engine.run_batch(batch, [[tensor.clone() for tensor in tensors] for _, tensors in members])


@pytest.mark.parametrize("target", [Everything, network], ids=lambda target: target.__name__)
@pytest.mark.parametrize("off", [False, True])
def test_unloaded_is_gone(target: Callable[[], nn.Module], off: bool) -> None:
    engine = Engine(CPU)
    inputs = {"input": spec("float32", ["n", 3])} if target is Everything else INPUTS
    made = registration(lambda: target().double(), inputs=inputs, gate=Gate(enabled=False if off else None))
    engine.load(made)
    every_call(engine)
    watch = Watch(engine)
    engine.unload("f", "1")
    assert watch.alive() == []


def test_one_of_two_revisions_is_gone() -> None:
    engine = Engine(CPU)
    engine.load(registration())
    old = Watch(engine)
    engine.load(registration(revision=1))
    new = Watch(engine, "1+1")
    every_call(engine)
    engine.unload("f", "1")
    assert old.alive() == [] and len(new.alive()) > 8


@pytest.mark.slow
def test_a_compiled_plan_is_gone() -> None:
    engine = Engine(CPU)
    engine.load(registration(options=Options(compile=Compile(rows=(2,)))))
    assert engine.find("f", "").plans is not None, engine.find("f", "").plan
    every_call(engine)
    watch = Watch(engine)
    engine.unload("f", "1")
    assert watch.alive() == []


def test_compiled_by_its_author_is_gone() -> None:
    # In a process of its own: dynamo knows the code of nn.Sequential from other tests, and logs what it cannot make of
    # it any more, with exceptions that pytest keeps.
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]


def compiled_by_its_author() -> None:
    engine = Engine(CPU)
    engine.load(registration(lambda: torch.compile(network(), backend="aot_eager")))
    every_call(engine)
    watch = Watch(engine)
    engine.unload("f", "1")
    assert watch.alive() == []


def test_a_refused_model_is_gone() -> None:
    refs: list[weakref.ref[nn.Module]] = []

    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, dtype=F64))
            refs.append(weakref.ref(self))

        def forward(self, input: Tensor) -> Tensor:
            return input * self.weight.detach() * self.weight

    with pytest.raises(Exception, match="not the derivative"):
        Engine(CPU).load(registration(Wrong))
    gc.collect()
    assert [ref() for ref in refs] == [None]


# Sessions.


def test_a_session_goes_on_with_what_it_has() -> None:
    """Its graph is the old revision's, and what it runs anew is the new one's."""
    session = tapes.Session(registration())
    engine = session.engine
    x = session.leaf(real(2, 3))
    y = session.model("f", {"input": x})
    squares = session.op("sum", session.op("square", y))
    first = session.grad(squares, x, retain_graph=True)
    expected, watch = session.get(first), Watch(engine)
    engine.load(registration(lambda: network().requires_grad_(False), revision=1))
    engine.unload("f", "1")
    assert engine.find("f", "").registration.id == "1+1"
    torch.testing.assert_close(session.get(session.grad(squares, x, create_graph=True)), expected)
    torch.testing.assert_close(
        session.get(session.model("f", {"input": x})), engine.find("f", "").module(session.get(x))
    )
    assert watch.alive()
    session.tape.close()
    assert watch.alive() == []


def test_a_session_that_ran_a_model_lets_it_go() -> None:
    session = tapes.Session(
        registration(Everything, inputs={"input": spec("float32", ["n", 3])}, gate=Gate(enabled=False))
    )
    engine = session.engine
    x = session.leaf(torch.randn(2, 3))
    for train in (False, True):
        y = session.model("f", {"input": x}, train=train)
        session.grad(session.op("sum", y), x)
    session.parameters("f", "first.weight")
    watch = Watch(engine)
    engine.unload("f", "1")
    assert watch.alive()
    session.tape.close()
    assert watch.alive() == []


if __name__ == "__main__":
    compiled_by_its_author()
