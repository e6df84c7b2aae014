"""Items as a repository or an upload makes them: what the tests of model sources have in common."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pullback_server.hosting.items import Item
from pullback_server.hosting.manifest import Manifest

__all__ = ["make_item", "write"]


def write(directory: Path, **files: str) -> None:
    """Python files, by their names without .py."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / f"{name}.py").write_text(textwrap.dedent(text))


def make_item(directory: Path, source: Mapping[str, Any] | None = None, **more: Any) -> Item:
    """An item called m of version 3. Keys that an item has go to it, others to its manifest."""
    fields: dict[str, Any] = {"name": "m", "version": "3", "revision": 0, "digest": "abc"}
    fields |= {key: more.pop(key) for key in ("revision", "weights", "base", "version") if key in more}
    data = {**more, **({} if source is None else {"source": dict(source)})}
    manifest = Manifest.model_validate_json(json.dumps(data))
    return Item(directory=str(directory), manifest=manifest.model_dump_json(), **fields)


def real(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)
