"""The encoder of examples/models against transformers' BertModel on the same directory, in an environment of its own:
.venv-transformers (without torch, which comes from here). Built once, in half a minute.

Run: .venv/bin/python -m pytest -m slow tests/unit/test_example_encoder.py
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-transformers"
CHECKPOINT = ROOT / "examples" / "models" / "encoder" / "1"


@pytest.fixture(scope="module")
def transformers() -> Iterator[ModuleType]:
    """The package, imported from .venv-transformers; all that is here as well, from here."""
    if not (VENV / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        pip = [VENV / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "transformers>=5"], check=True)
        (VENV / ".ready").touch()
    paths = "import json, sys; print(json.dumps(sys.path))"
    listed = subprocess.run([VENV / "bin/python", "-Ic", paths], capture_output=True, check=True).stdout
    added = [path for path in json.loads(listed) if path.startswith(str(VENV))]
    sys.path += added
    yield importlib.import_module("transformers")
    for path in added:
        sys.path.remove(path)


@pytest.fixture(scope="module")
def own() -> ModuleType:
    """examples/models/encoder/model.py."""
    found = importlib.util.spec_from_file_location("encoder", CHECKPOINT.parent / "model.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the largest element."""
    return float((one - other).detach().abs().max() / other.detach().abs().max())


def test_as_transformers(transformers: Any, own: Any) -> None:
    torch.manual_seed(0)
    theirs = transformers.BertModel.from_pretrained(CHECKPOINT, attn_implementation="eager").eval().double()
    mine = own.from_pretrained(str(CHECKPOINT)).eval().double()
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    ids = torch.randint(128, (5, 17))
    mask = (torch.arange(17) < torch.tensor([17, 1, 9, 16, 4])[:, None]).long()
    types = torch.randint(2, (5, 17))
    offset = torch.zeros(5, 17, 32, dtype=torch.float64, requires_grad=True)
    embeddings = theirs.embeddings.word_embeddings(ids).detach().requires_grad_()
    got = mine(ids, mask, types, offset)
    expected = theirs(inputs_embeds=embeddings, attention_mask=mask, token_type_ids=types)
    assert torch.equal(got["word_embeddings"], embeddings)
    for name in ("last_hidden_state", "pooler_output"):
        assert gap(got[name], expected[name]) < 1e-13, name
    v = torch.randn_like(got["last_hidden_state"])
    w = torch.randn_like(got["pooler_output"])
    # First derivatives by the embeddings and by every parameter, then second ones.
    names = [name for name, _ in mine.named_parameters() if name != "embeddings.word_embeddings.weight"]
    found = {}
    for key, model, inner, out in (("mine", mine, offset, got), ("theirs", theirs, embeddings, expected)):
        value = (out["last_hidden_state"] * v).sum() + (out["pooler_output"] * w).sum()
        by = [inner, *(dict(model.named_parameters())[name] for name in names)]
        first = torch.autograd.grad(value, by, create_graph=True)
        found[key] = [*first, *torch.autograd.grad((first[0] * v).sum(), by, materialize_grads=True)]
    for name, one, other in zip(["embeddings", *names] * 2, found["mine"], found["theirs"], strict=True):
        # The gradient by the key's bias is zero: softmax does not change when all scores move together.
        if not name.endswith("key.bias"):
            assert gap(one, other) < 1e-11, name
    worst = max(gap(a, b) for n, a, b in zip(["x", *names] * 2, *found.values(), strict=True) if "key.bias" not in n)
    print(f"float64: outputs {max(gap(got[n], expected[n]) for n in ('last_hidden_state', 'pooler_output')):.1e}, "
          f"derivatives of first and second order {worst:.1e}")  # fmt: skip


def test_in_single_precision(transformers: Any, own: Any) -> None:
    theirs = transformers.BertModel.from_pretrained(CHECKPOINT).eval()
    mine = own.from_pretrained(str(CHECKPOINT)).eval()
    ids = torch.arange(128).reshape(4, 32)
    got = mine(ids, torch.ones_like(ids))
    expected = theirs(ids)
    for name in ("last_hidden_state", "pooler_output"):
        assert gap(got[name], expected[name]) < 1e-5, name


def test_a_checkpoint_with_a_head(transformers: Any, own: Any, tmp_path: Path) -> None:
    """As on the hub: parameters below `bert.`, those of a head beside them."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
        hidden_act="gelu_new", max_position_embeddings=20,
    )  # fmt: skip
    theirs = transformers.BertForPreTraining(config).eval()
    theirs.save_pretrained(tmp_path)
    mine = own.from_pretrained(str(tmp_path)).eval()
    ids = torch.randint(30, (2, 20))
    assert gap(mine(ids, torch.ones_like(ids))["pooler_output"], theirs.bert(ids).pooler_output) < 1e-5
    old = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): one
           for name, one in load_file(tmp_path / "model.safetensors").items()}  # fmt: skip
    save_file(old | {"bert.embeddings.position_ids": torch.arange(20)[None]}, tmp_path / "model.safetensors")
    again = own.from_pretrained(str(tmp_path)).eval()
    assert torch.equal(
        again(ids, torch.ones_like(ids))["pooler_output"], mine(ids, torch.ones_like(ids))["pooler_output"]
    )
