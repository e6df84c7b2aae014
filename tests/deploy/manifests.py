"""What `kubectl kustomize` makes of deploy/, and what it needs to be told of it."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")

#: Each folder that is applied, and base with each component.
WHOLE = ["base", *sorted(f"overlays/{path.name}" for path in (DEPLOY / "overlays").iterdir())]
COMPONENTS = sorted(f"components/{path.name}" for path in (DEPLOY / "components").iterdir())
#: Those that make pods.
SERVED = [*WHOLE, *COMPONENTS]
ALL = [*SERVED, "monitoring", "kserve"]


@functools.cache
def rendered(name: str) -> tuple[dict[str, Any], ...]:
    """The objects of a folder of deploy/, as a cluster would get them."""
    if name not in COMPONENTS:
        return _built(DEPLOY / name)
    with tempfile.TemporaryDirectory() as folder:
        base, component = (os.path.relpath(DEPLOY / one, Path(folder).resolve()) for one in ("base", name))
        made = {"resources": [base], "components": [component], "namespace": "pullback"}
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(made))
        return _built(Path(folder))


def _built(folder: Path) -> tuple[dict[str, Any], ...]:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def one(name: str, kind: str, called: str | None = None) -> dict[str, Any]:
    """The object of this kind; called: whose name begins so, where there are several."""
    found = [
        item
        for item in rendered(name)
        if item["kind"] == kind and (called is None or item["metadata"]["name"].startswith(called))
    ]
    assert len(found) == 1, (name, kind, called, len(found))
    return found[0]


def pod(name: str) -> dict[str, Any]:
    """The pod's spec."""
    spec: dict[str, Any] = one(name, "Deployment")["spec"]["template"]["spec"]
    return spec


def container(name: str) -> dict[str, Any]:
    """The server's container."""
    (only,) = pod(name)["containers"]
    found: dict[str, Any] = only
    return found


def environment(name: str) -> dict[str, str]:
    """What the server finds in its environment."""
    (source,) = container(name)["envFrom"]
    config = one(name, "ConfigMap", "pullback-config")
    assert source["configMapRef"]["name"] == config["metadata"]["name"]
    assert "env" not in container(name)
    data: dict[str, str] = config["data"]
    return data


def quantity(text: str) -> float:
    """A number of Kubernetes', such as 500m, 2 or 5Gi."""
    for unit, factor in (("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30), ("m", 1e-3)):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text)
