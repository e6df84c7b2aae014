"""Models of one process: what the code of one does to torch must not reach another."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit import engine_jobs as jobs
from tests.unit import source_items as items

from pullback_server.engine import Engine
from pullback_server.engine.shelf import Shelf
from pullback_server.engine.surroundings import Surroundings
from pullback_server.hosting import Item
from pullback_server.ipc.messages import Installed, NotInstalled

torch.set_num_threads(1)
X = torch.tensor([1.0, 2.0], dtype=torch.float64)
#: What begins the file of a model that is a function of x.
HEAD = """
import torch
import torch.nn.functional as F
from torch import nn
from pullback_server import model, spec
"""
SERVED = '\n@model("m", inputs={"x": spec("float64", ["n"])})\ndef m(x):\n    return '


class Worker:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = Engine(torch.device("cpu"))
        self.shelf = Shelf(self.engine, {}, None, True)

    def load(self, version: str, text: str, returned: str = "2 * x", revision: int = 0) -> str:
        """What is wrong with it; empty: nothing."""
        folder = self.folder / f"{version}+{revision}"
        items.write(folder, model=HEAD + text + SERVED + returned)
        item = items.make_item(folder, {"file": "model.py"}, version=version, revision=revision)
        found = self.shelf.load(0, item, None)
        return found.message if isinstance(found, NotInstalled) else ""

    def grad(self, version: str) -> list[float]:
        job, tensors = jobs.make_job(
            "vjp", "m", {"x": X}, wrt=["x"], cotangents={"output": torch.ones_like(X)}, version=version
        )
        found: list[float] = jobs.unpack(self.engine.run(job, tensors)).grads["x"].tolist()
        return found


@pytest.fixture
def worker(tmp_path: Path) -> Any:
    made = Worker(tmp_path)
    yield made
    for signature in made.engine.signatures():
        made.shelf.unload(signature.name, f"{signature.version}{f'+{signature.revision}' * bool(signature.revision)}")


CUSTOM = """
@torch.library.custom_op("{space}::f", mutates_args=())
def f(x: torch.Tensor) -> torch.Tensor:
    return x**{power}
@f.register_fake
def _(x):
    return torch.empty_like(x)
f.register_autograd(
    lambda ctx, g: g * {power} * ctx.saved_tensors[0] ** ({power} - 1),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)
"""
FRAGMENT = """
lib = torch.library.Library("{space}", "FRAGMENT")
lib.define("f(Tensor x) -> Tensor")
lib.impl("f", lambda x: x**{power}, "CompositeImplicitAutograd")
"""
DEFINED = """
torch.library.define("{space}::f", "(Tensor x) -> Tensor")
@torch.library.impl("{space}::f", "CompositeImplicitAutograd")
def f(x):
    return x**{power}
"""
SWALLOWED = """
try:
    lib = torch.library.Library("{space}", "FRAGMENT")
    lib.define("f(Tensor x) -> Tensor")
    lib.impl("f", lambda x: x**{power}, "CompositeImplicitAutograd")
except Exception:
    pass
"""


@pytest.mark.parametrize(
    ("space", "text", "second"),
    [
        ("acme1", CUSTOM, CUSTOM),
        ("acme2", FRAGMENT, FRAGMENT),
        ("acme3", DEFINED, DEFINED),
        ("acme4", CUSTOM, SWALLOWED),
        ("acme5", FRAGMENT, CUSTOM),
    ],
)
def test_an_operator_belongs_to_one_item(worker: Worker, space: str, text: str, second: str) -> None:
    call = f"torch.ops.{space}.f(x)"
    assert worker.load("1", text.format(space=space, power=2), call) == ""
    assert worker.grad("1") == [2, 4]
    for version, revision in (("2", 0), ("1", 1)):
        problem = worker.load(version, second.format(space=space, power=3), call, revision)
        for part in (f"{space}::f", "model 'm' version 1 has defined", "with the version in it", "installed package"):
            assert part in problem
        assert worker.grad("1") == [2, 4]
    assert worker.load("2", second.format(space=f"{space}_v2", power=3), f"torch.ops.{space}_v2.f(x)") == ""
    assert (worker.grad("1"), worker.grad("2")) == ([2, 4], [3, 12])
    worker.shelf.unload("m", "1")
    assert worker.grad("2") == [3, 12]
    assert worker.load("1", second.format(space=space, power=3), call, 2) == ""
    assert worker.grad("1+2") == [3, 12]


def test_code_that_outlives_its_operator_meets_an_error(worker: Worker) -> None:
    assert worker.load("1", CUSTOM.format(space="acme6", power=2), "f(x)") == ""
    kept = worker.engine.find("m", "1").registration.target
    overload = torch.ops.acme6.f.default
    worker.shelf.unload("m", "1")
    for call in (kept, overload):
        with pytest.raises(RuntimeError, match="acme6::f is gone"):
            call(X)
    with pytest.raises(AttributeError):
        torch.ops.acme6.f  # noqa: B018


@pytest.mark.parametrize(
    "text",
    [
        'lib = torch.library.Library("aten", "IMPL")\nlib.impl("relu", lambda x: 3 * x, "CPU")',
        'torch.library.register_autograd("elsewhere::f", lambda ctx, g: 7 * g)',
        'torch.library.register_kernel("elsewhere::f", "cpu", lambda x: 7 * x)',
    ],
)
def test_the_operators_of_others_stay_as_they_are(worker: Worker, text: str) -> None:
    @torch.library.custom_op("elsewhere::f", mutates_args=())
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    assert "which is torch's or an installed package's" in worker.load("1", text)
    assert torch.relu(X).tolist() == [1, 2]
    assert f(X).tolist() == [1, 2]


def test_an_installed_package_may_define_operators_for_several(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items.write(tmp_path, acme_installed="import torch\n" + CUSTOM.format(space="acme7", power=2))
    monkeypatch.syspath_prepend(str(tmp_path))
    for version in ("1", "2"):
        assert worker.load(version, "import acme_installed", "acme_installed.f(x)") == ""
    worker.shelf.unload("m", "1")
    assert worker.grad("2") == [2, 4]


OTHER = "F.gelu(F.relu(x)) + nn.ReLU()(x)"
PATCHES = [
    "F.relu = lambda x, inplace=False: 3 * x",
    "F.relu = F.gelu",
    "nn.ReLU.forward = lambda self, x: 3 * x",
    "nn.ReLU.__call__ = lambda self, x: 3 * x",
    "torch.Tensor.__add__ = lambda self, other: self - other",
    "import functools\nF.gelu = functools.wraps(F.gelu)(lambda x, *more: 3 * x)",
    "torch.relu = None",
    "del F.relu",
    "nn.modules.module.register_module_forward_hook(lambda module, inputs, output: 3 * output)",
    "torch.set_default_dtype(torch.float64)",
    "torch.set_default_device('meta')",
]


@pytest.mark.parametrize("where", ["import", "factory"])
@pytest.mark.parametrize("text", PATCHES)
def test_what_would_change_other_models_is_refused_and_put_back(worker: Worker, text: str, where: str) -> None:
    assert worker.load("1", "", OTHER) == ""
    before, grads = Surroundings(), worker.grad("1")
    if where == "factory":
        lines = "".join(f"\n    {line}" for line in text.splitlines())
        text = f"def factory():{lines}\n    return nn.Identity().double()\n"
        folder = worker.folder / "2"
        items.write(folder, model=HEAD + text)
        found = worker.shelf.load(0, items.make_item(folder, {"object": "factory"}, version="2"), None)
        # Ambience has put back the dtype that the factory set.
        if "set_default_dtype" not in text:
            assert isinstance(found, NotInstalled)
            assert "every other model" in found.message, found.message
    else:
        assert "for every other model in the process as well" in worker.load("2", text)
    assert worker.grad("1") == grads
    assert before.restore() == [] and before.unpatch(all=True) == []


def test_settings_are_put_back(worker: Worker, tmp_path: Path) -> None:
    threads, path, here = torch.get_num_threads(), list(sys.path), Path.cwd()
    filters, handler = list(warnings.filters), signal.getsignal(signal.SIGUSR1)
    state, before, tf32 = random.getstate(), Surroundings(), torch.backends.cudnn.allow_tf32
    text = f"""
import os, random, signal, sys, threading, warnings
import numpy as np
torch.set_num_threads(2)
torch.set_grad_enabled(False)
torch.use_deterministic_algorithms(True)
torch.set_float32_matmul_precision("medium")
torch.backends.cuda.matmul.fp32_precision = "tf32"
torch.backends.cudnn.conv.fp32_precision = "tf32"
torch.backends.mkldnn.set_flags(False)
torch.backends.cudnn.enabled = False
np.seterr(all="raise")
random.seed(0)
os.environ["PULLBACK_LEAK"] = "1"
os.chdir({str(tmp_path)!r})
sys.path.insert(0, {str(tmp_path)!r})
warnings.simplefilter("error")
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
threading.excepthook = None
"""
    assert worker.load("1", text) == ""
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, True)
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.enabled
    assert torch.get_float32_matmul_precision() == "highest" and torch.backends.mkldnn.enabled
    assert (before.restore(), torch.backends.cudnn.allow_tf32) == ([], tf32)
    assert "PULLBACK_LEAK" not in os.environ and Path.cwd() == here
    assert sys.path == [*path, str(tmp_path)]
    sys.path.remove(str(tmp_path))
    assert [one for one in warnings.filters if one not in filters and one[0] == "error" and not one[1]] == []
    assert signal.getsignal(signal.SIGUSR1) is handler
    assert random.getstate() == state


@pytest.mark.parametrize("benign", [True, False])
def test_a_package_may_replace_what_leaves_others_as_they_are(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, benign: bool
) -> None:
    name = f"acme_patches_{benign}".lower()
    text = "import torch.nn.functional as F\nbefore = F.relu\n"
    text += f"def relu(x, inplace=False):\n    return before(x) * {1 if benign else 3}\nF.relu = relu\n"
    items.write(tmp_path, **{name: text})
    monkeypatch.syspath_prepend(str(tmp_path))
    relu = torch.nn.functional.relu
    assert worker.load("1", "", OTHER) == ""
    grads = worker.grad("1")
    try:
        problem = worker.load("2", f"import {name}")
        if benign:
            assert problem == ""
        else:
            assert "model 'm' version 1 computes something else" in problem
            assert "torch.nn.functional.relu" in problem
            assert torch.nn.functional.relu is relu
        assert worker.grad("1") == grads
    finally:
        torch.nn.functional.relu = relu


@pytest.mark.parametrize("second", [CUSTOM, SWALLOWED])
def test_files_of_the_start_have_operators_of_their_own(tmp_path: Path, second: str) -> None:
    for number, text in enumerate((CUSTOM, second)):
        items.write(tmp_path, **{f"start{number}": HEAD + text.format(space="acme8", power=2 + number) + SERVED + "x"})
    program = f"""
import torch
paths = [{str(tmp_path / "start0.py")!r}, {str(tmp_path / "start1.py")!r}]
from pullback_server.engine import operators
from pullback_server.hosting.loading import load_source
operators.watch()
load_source(paths[0])
try:
    load_source(paths[1])
    operators.check()
except Exception as error:
    print(type(error).__name__, error)
print(torch.ops.acme8.f(torch.tensor([2.0])).tolist())
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    for part in ("LoadError", "acme8::f", "start0.py has defined", "[4.0]"):
        assert part in found


def test_a_model_that_is_never_the_same_keeps_nobody_out(worker: Worker) -> None:
    worker.shelf = Shelf(worker.engine, {}, None, False)
    assert worker.load("1", "import itertools\ncount = itertools.count()", "x * next(count)") == ""
    for version in ("2", "3"):
        assert worker.load(version, "") == ""


def test_items_with_like_names_are_apart(tmp_path: Path) -> None:
    shelf = Shelf(Engine(torch.device("cpu")), {}, None, True)
    names = ("a.b", "a-b", "a_b")
    loaded: list[Item] = []
    for number, name in enumerate(names):
        text = HEAD + SERVED.replace('"m"', f'"{name}"') + "late() * x\ndef late():\n    import helper\n"
        items.write(tmp_path / name, model=text + "    return helper.number", helper=f"number = {number}.0")
        made = items.make_item(tmp_path / name, {"file": "model.py"})
        loaded.append(Item(name, made.version, 0, made.directory, made.manifest, "same"))
        assert isinstance(shelf.load(0, loaded[-1], None), Installed)
    shelf.unload("a-b", "3")
    for number, name in enumerate(names):
        if name != "a-b":
            target = shelf._engine.find(name, "3").registration.target
            assert target(X).tolist() == [number, 2 * number]
