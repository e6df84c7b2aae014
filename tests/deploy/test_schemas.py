"""deploy/ is what Kubernetes and the operators take: every field known, every type right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.deploy.manifests import ALL, DEPLOY, needs_kubectl, rendered

pytestmark = needs_kubectl

SCHEMAS = {path.stem: path for path in (DEPLOY / "schemas").glob("*.json")}
#: Versions of Kubernetes: the oldest that knows all that is used, and the newest that the validator knows.
VERSIONS = ("1.29.0", "")


def command(name: str) -> list[str]:
    return [str(Path(sys.executable).with_name(name))]


needs = {
    name: pytest.mark.skipif(not Path(command(name)[0]).exists(), reason=f"{name} is not installed")
    for name in ("kubernetes-validate", "check-jsonschema")
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120)


@needs["kubernetes-validate"]
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ALL)
def test_builtin_kinds(name: str, version: str, tmp_path: Path) -> None:
    objects = [item for item in rendered(name) if item["kind"] not in SCHEMAS]
    assert objects
    path = tmp_path / "objects.yaml"
    path.write_text(yaml.safe_dump_all(objects))
    done = run(*command("kubernetes-validate"), "--strict", *(["-k", version] if version else []), str(path))
    assert done.returncode == 0, done.stdout + done.stderr


@needs["check-jsonschema"]
@pytest.mark.parametrize("name", ALL)
def test_custom_kinds(name: str, tmp_path: Path) -> None:
    for index, item in enumerate(rendered(name)):
        if item["kind"] in SCHEMAS:
            path = tmp_path / f"{index}.yaml"
            path.write_text(yaml.safe_dump(item))
            done = run(*command("check-jsonschema"), "--schemafile", str(SCHEMAS[item["kind"]]), str(path))
            assert done.returncode == 0, done.stdout + done.stderr


def test_every_schema_is_used() -> None:
    assert set(SCHEMAS) <= {item["kind"] for name in ALL for item in rendered(name)}


@needs["check-jsonschema"]
@pytest.mark.parametrize("kind", SCHEMAS)
def test_schemas_refuse_what_they_do_not_know(kind: str, tmp_path: Path) -> None:
    item = next(item for name in ALL for item in rendered(name) if item["kind"] == kind)
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({**item, "spec": {**item["spec"], "podMetricEndpoint": []}}))
    done = run(*command("check-jsonschema"), "--schemafile", str(SCHEMAS[kind]), str(path))
    assert done.returncode == 1, done.stdout
    assert "podMetricEndpoint" in done.stdout
