"""checkov finds nothing in deploy/ that is not explained where it stands. `make deploy-check` installs it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.deploy.manifests import DEPLOY, ROOT, SERVED, needs_kubectl, rendered

CHECKOV = ROOT / ".venv-deploy/bin/checkov"

pytestmark = pytest.mark.skipif(not CHECKOV.exists(), reason="checkov is not installed: make deploy-check")


def scan(framework: str, *files: Path) -> dict[str, Any]:
    """What checkov found. It asks nobody on the network."""
    command = [CHECKOV, "--framework", framework, "--output", "json", "--skip-download", "--compact", "--file", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["summary"]["parsing_errors"] == 0
    assert found["summary"]["passed"] > 50
    return found


def failed(found: dict[str, Any]) -> list[str]:
    return [f"{one['check_id']} {one['check_name']}: {one['resource']}" for one in found["results"]["failed_checks"]]


def skipped(found: dict[str, Any]) -> dict[str, str]:
    """Check -> why it does not apply."""
    return {one["check_id"]: one["check_result"]["suppress_comment"] for one in found["results"]["skipped_checks"]}


@needs_kubectl
@pytest.mark.parametrize("name", SERVED)
def test_manifests(name: str, tmp_path: Path) -> None:
    path = tmp_path / "manifests.yaml"
    path.write_text(yaml.safe_dump_all(rendered(name)))
    found = scan("kubernetes", path)
    assert failed(found) == []
    # Only what is skipped there, and what is said there of why. A skip that nothing needs any more goes.
    told = dict(
        value.split("=", 1)
        for item in rendered(name)
        for key, value in item["metadata"].get("annotations", {}).items()
        if key.startswith("checkov.io/skip")
    )
    assert skipped(found).keys() == told.keys()
    assert all(len(reason) > 40 for reason in told.values())


def test_dockerfile() -> None:
    found = scan("dockerfile", DEPLOY / "Dockerfile")
    assert failed(found) == []
    assert set(skipped(found)) == {"CKV_DOCKER_2"}
    assert all(len(reason) > 40 for reason in skipped(found).values())
