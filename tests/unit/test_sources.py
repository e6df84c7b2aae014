"""What a model may be made from: Python files, entry points, weights, exported programs, TorchScript."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.unit import engine_jobs as jobs
from tests.unit import source_items as items
from torch import nn

from pullback_server.engine.sources import forget, registration_of
from pullback_server.hosting import Item, Registration, TensorSpec
from pullback_server.hosting.loading import LoadError, load_source

make_item, real, write = items.make_item, items.real, items.write
torch.set_num_threads(1)
Tensor = torch.Tensor

X = {"x": {"dtype": "float64", "shape": ["batch", 3]}}


def served(item: Item, **known: Any) -> Any:
    return jobs.Host(registration_of(item, known))


def evaluate(item: Item, x: Tensor) -> Tensor:
    host = served(item)
    output: Tensor = host("evaluate", "m", {"x": x}, version="3").outputs["output"]
    return output


def fails(item: Item, *parts: str, build: bool = False, known: Any = None) -> str:
    with pytest.raises(LoadError) as caught:
        found = registration_of(item, known or {})
        if build:
            jobs.Host(found)
    text = str(caught.value)
    assert "model 'm'" in text
    for part in parts:
        assert part in text, text
    return text


# Python files.

PLAIN = """
    import torch
    from torch import nn
    from pullback_server import model, spec

    class Net(nn.Module):
        "A layer."
        def __init__(self, width=3, bias=True):
            super().__init__()
            self.layer = nn.Linear(3, width, bias).double()
        def forward(self, x):
            return self.layer(x).tanh()

    def function(x, scale: float = 1.0):
        return x * scale

    LOW = {"x": spec("float32", ["b", 3], low=-9)}

    @model("registered", inputs=LOW, batch_axis=0, checkpoint=["layer"], micro_batch=2)
    class Registered(Net):
        "Registered, and told of."
"""


@pytest.mark.parametrize(
    ("source", "inputs", "outputs"),
    [
        ({"object": "Net"}, ["x"], (2, 3)),
        ({"object": "Net", "arguments": {"width": 5, "bias": False}}, ["x"], (2, 5)),
        ({"object": "function"}, ["x"], (2, 3)),
        ({"object": "function", "arguments": {"scale": 3.0}}, ["x"], (2, 3)),
        ({}, ["x"], (2, 3)),
        ({"object": "Registered", "arguments": {"width": 2}}, ["x"], (2, 2)),
    ],
)
def test_python(tmp_path: Path, source: Any, inputs: list[str], outputs: tuple[int, ...]) -> None:
    write(tmp_path, model=PLAIN)
    item = make_item(tmp_path, source, inputs={"x": {"dtype": "float64"}}, revision=2)
    found = registration_of(item, {})
    host = jobs.Host(found)
    (signature,) = host.engine.signatures()
    assert (signature.name, signature.version, found.revision, found.digest) == ("m", "3", 2, "abc")
    assert [record.name for record in signature.inputs] == inputs
    x = real(2, 3)
    version = "3" if signature.revision == 0 else ""
    reply = host("vjp", "m", {"x": x}, wrt=["x"], cotangents={"output": torch.ones(outputs).double()}, version=version)
    assert reply.outputs["output"].shape == outputs
    if "function" in source.values():
        assert torch.equal(reply.outputs["output"], x * source.get("arguments", {}).get("scale", 1.0))


def test_the_manifest_goes_before_the_decorator_key_by_key(tmp_path: Path) -> None:
    write(tmp_path, model=PLAIN)
    found = registration_of(make_item(tmp_path, inputs={"x": {"dtype": "float64"}}, options={"hard_timeout": 7.0}), {})
    assert found.inputs == {"x": TensorSpec("float64", ("b", 3), -9)}
    assert (found.options.hard_timeout, found.options.micro_batch, found.options.checkpoint) == (7.0, 2, ("layer",))
    assert found.batch_axis == 0
    assert (found.name, found.version, found.description) == ("m", "3", "Registered, and told of.")
    said = registration_of(make_item(tmp_path, description="Of the manifest.", batch_axis=1), {})
    assert (said.description, said.batch_axis, said.inputs["x"].dtype) == ("Of the manifest.", 1, "float32")


@pytest.mark.parametrize(
    ("source", "text", "parts"),
    [
        ({"file": "other.py"}, PLAIN, ["other.py", "no such file"]),
        ({"object": "Nothing"}, PLAIN, ["no 'Nothing'", "Net", "function"]),
        ({"object": "torch.pi"}, PLAIN, ["a float", "expected a factory"]),
        ({"object": "Net", "arguments": {"wide": 1}}, PLAIN, ["'wide'", "do not fit Net"]),
        ({}, "x = 1", ["no model is registered", "object"]),
        (
            {},
            PLAIN + "\n    registered = model('second')(Net)",
            ["several models", "registered (Registered)", "second"],
        ),
        ({}, "1 / 0", ["import failed: ZeroDivisionError"]),
        ({}, "import sys; sys.exit(3)", ["called exit(3)"]),
        ({}, "x = = 1", ["SyntaxError"]),
        ({"module": "no.such.module", "file": None}, PLAIN, ["no.such.module", "ModuleNotFoundError"]),
    ],
)
def test_python_that_cannot_be_loaded(tmp_path: Path, source: Any, text: str, parts: list[str]) -> None:
    write(tmp_path, model=text)
    before = set(sys.modules)
    fails(make_item(tmp_path, source), *parts)
    assert not [name for name in set(sys.modules) - before if "_pullback_items" in name]


NEIGHBOURS = """
    import math
    import helper
    from helper import number as also
    from package.inner import number as deep
    from . import helper as relative
    import package.inner as leaf

    def function(x):
        import lazy, json, os.path
        from package import inner
        assert json.loads("1") == 1 and relative is helper and leaf is inner and math.pi > 3
        return x * (helper.number + also + deep + inner.number + lazy.number() + {own})
"""


def neighbours(folder: Path, number: int) -> None:
    write(
        folder,
        model=NEIGHBOURS.replace("{own}", str(number)),
        helper=f"number = {number}",
        lazy="def number():\n    import helper, random\n    return helper.number + 0 * random.own",
        random="own = 1",
    )
    write(
        folder / "package",
        __init__="",
        inner=f"from helper import number\nfrom .other import one\nassert one == {number}",
        other=f"one = {number}",
    )


def test_each_item_has_its_own_neighbours_also_when_they_are_imported_late(tmp_path: Path) -> None:
    made = []
    for number in (1, 2, 3):
        folder = tmp_path / str(number)
        neighbours(folder, number)
        made.append(make_item(folder, {"object": "function"}, revision=number))
    path, meta = list(sys.path), len(sys.meta_path)
    targets = [registration_of(item, {}).target for item in made]
    for _ in range(2):
        assert [target(1) for target in targets] == [6, 12, 18]
    assert sys.path == path and len(sys.meta_path) <= meta + 1
    assert "helper" not in sys.modules and "lazy" not in sys.modules
    assert not list(tmp_path.rglob("*.pyc"))
    forget(made[0])
    assert [target(1) for target in targets[1:]] == [12, 18]
    with pytest.raises(ImportError, match="unloaded"):
        targets[0](1)
    for item in made[1:]:
        forget(item)


def test_a_revision_runs_the_new_code_from_the_very_same_file(tmp_path: Path) -> None:
    stamp = 1_700_000_000
    values = []
    for revision in range(4):
        # Neither its size nor its time tells that it is another.
        write(
            tmp_path,
            model=f"from helper import number\ndef function(x):\n    return x * number + {revision}",
            helper=f"number = {revision}",
        )
        for file in tmp_path.iterdir():
            os.utime(file, (stamp, stamp))
        os.utime(tmp_path, (stamp, stamp))
        item = make_item(tmp_path, {"object": "function"}, revision=revision % 2)
        values.append(registration_of(item, {}).target(10))
    assert values == [0, 11, 22, 33]


def test_an_unloaded_item_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, model=PLAIN, helper="")
    item = make_item(tmp_path, {"object": "Net"}, inputs=X)
    before = set(sys.modules)
    host = served(item)
    kind = weakref.ref(host.engine.find("m", "").module.__class__)
    module = weakref.ref(sys.modules[kind().__module__])  # type: ignore[union-attr]
    host("evaluate", "m", {"x": real(2, 3)}, version="")
    del host
    forget(item)
    forget(item)
    gc.collect()
    assert kind() is None and module() is None
    assert not [name for name in set(sys.modules) - before if "_pullback_items" in name]


def test_torch_finds_the_source_of_an_items_code(tmp_path: Path) -> None:
    write(
        tmp_path,
        model="""
        import torch
        from helper import double
        class Net(torch.nn.Module):
            def forward(self, x):
                return double(x)
        def scripted():
            return torch.jit.script(Net())
        """,
        helper="import torch\ndef double(x: torch.Tensor):\n    return 2 * x",
    )
    x = real(2, 3)
    assert torch.equal(evaluate(make_item(tmp_path, {"object": "scripted"}, inputs=X), x), 2 * x)


# Entry points.


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"installed_{tmp_path.name}".replace("-", "_")
    write(tmp_path, **{name: PLAIN, f"{name}_broken": "import nothing_like_this"})
    info = tmp_path / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        f"[pullback.models]\nnet = {name}:Net\ndecorated = {name}:Registered\nwhole = {name}\n"
        f"broken = {name}_broken:x\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_entry_points(installed: str, tmp_path: Path) -> None:
    assert [one.name for one in load_source("entry-point:net")] == ["net"]
    assert [one.name for one in load_source("entry-point:decorated")] == ["registered"]
    assert [one.name for one in load_source("entry-point:whole")] == ["registered"]
    item = make_item(tmp_path, {"kind": "entry-point", "entry_point": "net", "arguments": {"width": 2}}, inputs=X)
    assert evaluate(item, real(2, 3)).shape == (2, 2)
    with pytest.raises(LoadError, match=r"entry-point:other: .*there are broken, decorated, net, whole"):
        load_source("entry-point:other")
    for source in ("entry-point:broken", "entry-point:*"):
        with pytest.raises(LoadError, match=r"entry-point:broken .*ModuleNotFoundError.*nothing_like_this"):
            load_source(source)


# Weights.

TIED = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, meta=False):
            super().__init__()
            with torch.device("meta" if meta else "cpu"):
                self.a = nn.Linear(3, 3, dtype=torch.float64)
                self.b = nn.Linear(3, 3, dtype=torch.float64)
                self.b.weight = self.a.weight
                self.b.bias.requires_grad_(False)
                self.register_buffer("kept", torch.ones(3, dtype=torch.float64))
            self.register_buffer("made", torch.full((3,), 2.0, dtype=torch.float64), persistent=False)
            self.listed = [self.a.bias]

        def forward(self, x):
            return self.b(self.a(x).sin()) * self.kept + self.made + self.listed[0]

    def lost():
        with torch.device("meta"):
            net = Net()
            net.made = torch.ones(3)
            return net

    def function(x):
        return x
"""


def state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (3, 3), "a.bias": (3,), "b.bias": (3,), "kept": (3,)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def expected(values: dict[str, Tensor], x: Tensor) -> Tensor:
    h = torch.nn.functional.linear(x, values["a.weight"], values["a.bias"]).sin()
    return torch.nn.functional.linear(h, values["a.weight"], values["b.bias"]) * values["kept"] + 2 + values["a.bias"]


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    write(tmp_path, model=TIED)
    return tmp_path


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", ["safetensors", "pickle", "old pickle", "misaligned"])
def test_weights(tied: Path, kind: str, both: bool) -> None:
    values = state()
    given = dict(values) | ({"b.weight": values["a.weight"].clone()} if both else {})
    source: dict[str, Any] = {"object": "Net"}
    if kind == "safetensors":
        save_file(given, tied / "weights.safetensors")
    elif kind == "misaligned":
        save_file(given, tied / "weights.safetensors")
        raw = (tied / "weights.safetensors").read_bytes()
        size = int.from_bytes(raw[:8], "little")
        (tied / "weights.safetensors").write_bytes(
            (size + 3).to_bytes(8, "little") + raw[8 : 8 + size] + b"   " + raw[8 + size :]
        )
    else:
        source |= {"weights": "weights.pt", "allow_pickle": True}
        torch.save(given, tied / "weights.pt", _use_new_zipfile_serialization=kind == "pickle")
    host = served(make_item(tied, source, inputs=X))
    hosted = host.engine.find("m", "")
    assert hosted.natural == {"a.weight": True, "a.bias": True, "b.bias": False}
    assert hosted.aliases == {"b.weight": "a.weight"}
    assert all(p.data_ptr() % 8 == 0 for p in hosted.parameters.values())
    x, v = real(2, 3), real(2, 3)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in values.items()}
    local = expected(leaves, x)
    reply = host("vjp", "m", {"x": x}, version="3", wrt=["param:a.weight", "param:a.bias"], cotangents={"output": v})
    torch.testing.assert_close(reply.outputs["output"], local.detach())
    grads = torch.autograd.grad(local, [leaves["a.weight"], leaves["a.bias"]], v)
    for name, grad in zip(("a.weight", "a.bias"), grads, strict=True):
        torch.testing.assert_close(reply.grads[f"param:{name}"], grad)


@pytest.mark.parametrize("suffix", ["safetensors", "upload"])
def test_a_header_whose_length_begins_like_a_pickle(tied: Path, suffix: str) -> None:
    values = state()
    for size in range(0, 400, 8):
        save_file(values, tied / f"weights.{suffix}", metadata={"note": "x" * size})
        if (tied / f"weights.{suffix}").read_bytes()[:1] == b"\x80":
            break
    else:
        raise AssertionError("no header is of such a length")
    x = real(2, 3)
    item = make_item(tied, {"object": "Net"}, inputs=X, weights=str(tied / f"weights.{suffix}"))
    torch.testing.assert_close(evaluate(item, x), expected(values, x))


THRICE = """
    import torch
    from torch import nn
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(3, 3, bias=False) for _ in range(3))
            self.b.weight = self.c.weight = self.a.weight
        def forward(self, x):
            return self.c(self.b(self.a(x)))
"""


@pytest.mark.parametrize("names", ["ab", "bc", "ca", "abc"])
def test_each_name_of_a_tied_parameter_is_compared(tmp_path: Path, names: str) -> None:
    write(tmp_path, model=THRICE)
    item = make_item(tmp_path, {"object": "Net"}, inputs={"x": {"dtype": "float32"}})
    value = torch.tensor([[1.0, float("nan"), 3.0]] * 3)
    save_file({f"{name}.weight": value.clone() for name in names}, tmp_path / "weights.safetensors")
    loaded = registration_of(item, {}).target()  # type: ignore[operator]
    torch.testing.assert_close(loaded.a.weight.detach(), value, equal_nan=True)
    save_file({f"{name}.weight": i + value for i, name in enumerate(names)}, tmp_path / "weights.safetensors")
    with pytest.raises(LoadError, match="are one parameter in the model, and differ here"):
        registration_of(item, {}).target()  # type: ignore[operator]


def test_weights_that_are_narrow_empty_or_numbers(tmp_path: Path) -> None:
    text = """
        import torch
        from torch import nn
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.narrow = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
                self.number = nn.Parameter(torch.zeros(()))
                self.nothing = nn.Parameter(torch.zeros(0, 3))
                self.register_buffer("count", torch.tensor(0))
            def forward(self, x):
                return x * self.narrow.float() * self.number + self.nothing.sum() + self.count
    """
    write(tmp_path, model=text)
    values = {
        "narrow": torch.tensor([1.0, 2.0, 3.0]).bfloat16(),
        "number": torch.tensor(2.0),
        "nothing": torch.zeros(0, 3),
        "count": torch.tensor(5),
    }
    save_file(values, tmp_path / "weights.safetensors")
    loaded = registration_of(make_item(tmp_path, {"object": "Net"}), {}).target()  # type: ignore[operator]
    for name, value in values.items():
        own = loaded.state_dict()[name]
        assert own.dtype == value.dtype and torch.equal(own, value)


def test_a_model_that_writes_into_its_weights_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    text = """
        import torch
        from torch import nn
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(3))
            def forward(self, x):
                with torch.no_grad():
                    self.weight.add_(1)
                return x * self.weight
    """
    write(tmp_path, model=text)
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(3)}, path)
    before = path.read_bytes()
    item = make_item(tmp_path, {"object": "Net"}, inputs={"x": {"dtype": "float32"}})
    one, other = (registration_of(item, {}).target() for _ in range(2))  # type: ignore[operator]
    assert one(torch.ones(3)).tolist() == [2, 2, 2] and other.weight.tolist() == [1, 1, 1]
    assert path.read_bytes() == before


def test_weights_into_a_model_on_the_meta_device(tied: Path) -> None:
    values = state()
    save_file(values, tied / "weights.safetensors")
    text = TIED.replace("self.listed = [self.a.bias]", "").replace("self.listed[0]", "self.a.bias")
    write(tied, model=text)
    x = real(2, 3)
    item = make_item(tied, {"object": "Net", "arguments": {"meta": True}}, inputs=X)
    host = served(item)
    torch.testing.assert_close(host("evaluate", "m", {"x": x}, version="3").outputs["output"], expected(values, x))
    hosted = host.engine.find("m", "")
    assert hosted.natural == {"a.weight": True, "a.bias": True, "b.bias": False}
    assert hosted.aliases == {"b.weight": "a.weight"}
    fails(make_item(tied, {"object": "lost"}), "1 stay on the meta device", "'made'", build=True)


def test_views_of_weights_see_what_is_loaded(tmp_path: Path) -> None:
    write(
        tmp_path,
        model="""
        from torch import nn
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 3).double()
                self.turned = self.layer.weight.detach().t()
            def forward(self, x):
                return self.layer(x) @ self.turned
        """,
    )
    values = {"layer.weight": real(3, 3), "layer.bias": real(3)}
    save_file(values, tmp_path / "weights.safetensors")
    x = real(2, 3)
    local = torch.nn.functional.linear(x, values["layer.weight"], values["layer.bias"]) @ values["layer.weight"].t()
    found = registration_of(make_item(tmp_path, {"object": "Net"}), {})
    torch.testing.assert_close(found.target()(x).detach(), local)


def test_weights_are_shared_until_they_are_written_to(tied: Path) -> None:
    """Two processes with one file: what each has to itself is a small part of it."""
    size = 64 << 20
    save_file({"weight": torch.ones(size // 4)}, tied / "big.safetensors")
    program = """
import sys, torch
from pathlib import Path
from torch import nn
from pullback_server.engine.weights import load_weights
module, size = nn.Module(), int(sys.argv[2])
module.weight = nn.Parameter(torch.empty(size // 4, device="meta"))
load_weights(module, Path(sys.argv[1]), "model 'm'")
assert float(module.weight.sum()) == size // 4
print("ready", flush=True)
sys.stdin.readline()
text, used = Path("/proc/self/smaps").read_text(), 0
for part in text.split("VmFlags")[:-1]:
    if "big.safetensors" in part:
        used += sum(int(line.split()[1]) for line in part.splitlines() if line.startswith("Private_"))
print(used << 10, flush=True)
sys.stdin.readline()
"""
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tied / "big.safetensors"), str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for _ in range(2)
    ]
    for line in ("ready", ""):
        answers = []
        for one in pair:
            assert one.stdin is not None and one.stdout is not None
            answers.append(one.stdout.readline().strip())
        if line:
            assert answers == [line, line]
        else:
            assert max(map(int, answers)) < size // 8, answers
        for one in pair:
            assert one.stdin is not None
            one.stdin.write("\n")
            one.stdin.flush()
    for one in pair:
        one.communicate()


def replaced(**changes: Tensor | None) -> dict[str, Tensor]:
    names = {name.replace("_", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in (state() | names).items() if tensor is not None}


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (replaced(a_bias=None), ["1 missing: 'a.bias'"]),
        (replaced(more=torch.ones(1)), ["1 unexpected: 'more'"]),
        (replaced(a_bias=torch.ones(4).double()), ["1 of another shape: 'a.bias'", "[4]", "[3]"]),
        (replaced(a_bias=torch.ones(3)), ["'a.bias' is torch.float32, expected torch.float64", "nothing is cast"]),
        (replaced(b_weight=torch.ones(3, 3).double()), ["'a.weight' and 'b.weight' are one parameter"]),
        ({f"x{i}": torch.ones(1) for i in range(30)}, ["4 missing", "30 unexpected", "and 20 more"]),
    ],
)
def test_weights_that_do_not_fit(tied: Path, given: dict[str, Tensor], parts: list[str]) -> None:
    save_file(given, tied / "weights.safetensors")
    fails(make_item(tied, {"object": "Net"}), "weights.safetensors", *parts, build=True)


@pytest.mark.parametrize("broken", ["short", "empty", "text", "header", "pickle", "old pickle", "gone"])
def test_files_that_are_no_safetensors(tied: Path, broken: str) -> None:
    path = tied / "weights.safetensors"
    save_file(state(), path)
    raw = path.read_bytes()
    contents = {"short": raw[:-9], "empty": b"", "text": b"weights!" * 9, "header": raw[:20], "gone": raw}
    parts = ["weights.safetensors", "not a whole safetensors file"]
    if "pickle" in broken:
        torch.save(state(), path, _use_new_zipfile_serialization=broken == "pickle")
        parts = ["weights.safetensors", "it is a pickle (torch.save), expected safetensors", "save_file"]
    else:
        path.write_bytes(contents[broken])
    source = {"object": "Net", "weights": "weights.safetensors"}
    if broken == "gone":
        path.unlink()
        parts = ["weights.safetensors", "cannot be read: No such file"]
    fails(make_item(tied, source), *parts, build=True)


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.canary, "run"))


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_a_malicious_pickle_is_not_run(tied: Path, tmp_path: Path, allowed: bool, form: str) -> None:
    canary = tmp_path / "canary"
    path = tied / ("weights.pt" if allowed else "weights.safetensors")
    if form == "bare":
        path.write_bytes(pickle.dumps({"a.weight": Evil(canary)}))
    else:
        torch.save({"a.weight": Evil(canary)}, path, _use_new_zipfile_serialization=form == "zip")
    source = {"object": "Net", "weights": path.name, "allow_pickle": allowed}
    text = fails(make_item(tied, source), path.name, build=True)
    assert not canary.exists()
    assert "weights_only=False" not in text.replace("weights_only=True", "") and len(text) < 400, text
    # Proof that it would have done harm.
    if form == "zip":
        torch.load(path.rename(tmp_path / "harm.pt"), weights_only=False)
        assert canary.exists()


@pytest.mark.parametrize(
    ("saved", "parts"),
    [
        ({"state_dict": state(), "epoch": 3}, ["checkpoint whose state dict is under 'state_dict'", "epoch"]),
        ({"model": state(), "optimizer": {}}, ["under 'model'", "optimizer"]),
        ([1, 2], ["holds a list"]),
        (state() | {"step": 3}, ["step are no tensors"]),
    ],
)
def test_pickles_that_are_no_state_dict(tied: Path, saved: Any, parts: list[str]) -> None:
    torch.save(saved, tied / "weights.pt")
    source = {"object": "Net", "weights": "weights.pt", "allow_pickle": True}
    fails(make_item(tied, source), "weights.pt", *parts, build=True)


def test_an_upload_replaces_the_weights(tied: Path, tmp_path: Path) -> None:
    save_file(state(), tied / "weights.safetensors")
    save_file(state(5), tied / "uploaded")
    x = real(2, 3)
    item = make_item(tied, {"object": "Net"}, inputs=X, weights=str(tied / "uploaded"))
    torch.testing.assert_close(evaluate(item, x), expected(state(5), x))
    torch.save(state(), tied / "uploaded")
    source = {"object": "Net", "allow_pickle": True}
    fails(make_item(tied, source, weights=str(tied / "uploaded")), "it is a pickle", build=True)
    fails(make_item(tied, {"object": "function"}, weights=str(tied / "uploaded")), "no weights")


def test_an_upload_for_a_model_of_the_start(tmp_path: Path) -> None:
    known = {
        ("a", "1"): Registration("a", lambda: nn.Linear(3, 3).double(), description="of the start"),
        ("f", "1"): Registration("f", lambda x: x, kind="function"),
        ("i", "1"): Registration("i", nn.Linear(3, 3).double()),
    }
    values = {"weight": real(3, 3), "bias": real(3)}
    save_file(values, tmp_path / "w")

    def upload(name: str, number: str = "1") -> Item:
        return Item("m", "7", 1, "", "", "dd", str(tmp_path / "w"), (name, number))

    x = real(2, 3)
    for name in ("a", "i"):
        found = registration_of(upload(name), known)
        assert (found.name, found.version, found.revision, found.digest) == ("m", "7", 1, "dd")
        local = torch.nn.functional.linear(x, values["weight"], values["bias"])
        host = jobs.Host(found)
        torch.testing.assert_close(host("evaluate", "m", {"input": x}, version="").outputs["output"], local)
    fails(upload("f"), "a function of tensors, which has no weights", known=known)
    fails(upload("a", "2"), "no model 'a' version 2", "a version 1", known=known)
    # The model of the start is as it was.
    assert not torch.equal(known["i", "1"].target.weight, values["weight"])  # type: ignore[attr-defined]
