"""deploy/kserve is what KServe takes, and says of the server what base says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.deploy.manifests import ROOT, container, environment, needs_kubectl, one, pod
from tests.deploy.test_checkov import CHECKOV, failed, scan

from pullback_server.config import Config
from pullback_server.config_report import strangers
from pullback_server.rpc.inference.parameters import TRANSFORMS

pytestmark = needs_kubectl

#: Options that base does not share: where models lie.
_OWN = {"PULLBACK_MODELS", "PULLBACK_REPOSITORY"}
VALIDATE = Path(sys.executable).with_name("kubernetes-validate")


def runtime() -> dict[str, Any]:
    spec: dict[str, Any] = one("kserve", "ServingRuntime")["spec"]
    return spec


def predictor() -> dict[str, Any]:
    spec: dict[str, Any] = one("kserve", "InferenceService")["spec"]["predictor"]
    return spec


def server() -> dict[str, Any]:
    (only,) = runtime()["containers"]
    found: dict[str, Any] = only
    return found


def variables() -> dict[str, str]:
    return {one["name"]: one["value"] for one in server()["env"]}


def made() -> dict[str, Any]:
    """The pod that KServe makes of both, but for what it adds."""
    of_predictor = {
        key: value for key, value in predictor().items() if key not in ("model", "minReplicas", "maxReplicas")
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "gradients", "namespace": "models"},
        "spec": {**of_predictor, "containers": runtime()["containers"], "volumes": runtime()["volumes"]},
    }


def test_the_service_finds_its_runtime() -> None:
    model = predictor()["model"]
    assert model["runtime"] == one("kserve", "ServingRuntime")["metadata"]["name"]
    formats = [(format["name"], format["version"]) for format in runtime()["supportedModelFormats"]]
    assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in formats
    assert [model["protocolVersion"]] == runtime()["protocolVersions"] == ["grpc-v2"]
    # KServe looks for the container by this name.
    assert server()["name"] == "kserve-container"
    assert predictor()["serviceAccountName"] == one("kserve", "ServiceAccount")["metadata"]["name"]


def test_options_are_those_of_base(monkeypatch: pytest.MonkeyPatch) -> None:
    names = variables()
    assert strangers(names) == []
    assert {name.removeprefix("PULLBACK_").lower() for name in names} <= set(Config.model_fields)
    ours = {name: value for name, value in names.items() if name not in _OWN}
    assert ours == {name: value for name, value in environment("base").items() if name not in _OWN}
    for name in os.environ:
        if name.startswith("PULLBACK_"):
            monkeypatch.delenv(name)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    config = Config()
    # Where KServe's storage initialiser puts them.
    assert (config.repository, config.models) == ("/mnt/models", [])
    assert [(port["name"], port["containerPort"]) for port in server()["ports"]] == [("h2c", config.port)]
    annotations = runtime()["annotations"]
    assert annotations["prometheus.kserve.io/port"] == str(config.metrics_port)
    assert predictor()["terminationGracePeriodSeconds"] >= config.drain_seconds + config.grace + 10
    assert predictor()["enableServiceLinks"] is False


def test_the_container_is_that_of_base() -> None:
    base = container("base")
    for key in ("image", "args", "startupProbe", "readinessProbe", "livenessProbe", "resources"):
        assert server()[key] == base[key], key
    assert server()["securityContext"].items() >= base["securityContext"].items()
    assert predictor()["securityContext"].items() <= pod("base")["securityContext"].items()
    # Written to are the same places.
    volumes = {volume["name"]: volume for volume in pod("base")["volumes"]}
    for volume in runtime()["volumes"]:
        assert volume == volumes[volume["name"]]
    mounts = {mount["name"]: mount for mount in base["volumeMounts"]}
    for mount in server()["volumeMounts"]:
        assert mount == mounts[mount["name"]]


@pytest.mark.skipif(not VALIDATE.exists(), reason="kubernetes-validate is not installed")
@pytest.mark.parametrize("version", [["-k", "1.29.0"], []])
def test_the_pod(version: list[str], tmp_path: Path) -> None:
    path = tmp_path / "pod.yaml"
    path.write_text(yaml.safe_dump(made()))
    done = subprocess.run([VALIDATE, "--strict", *version, path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not CHECKOV.exists(), reason="checkov is not installed: make deploy-check")
def test_checkov_finds_what_it_finds_in_base(tmp_path: Path) -> None:
    path = tmp_path / "pod.yaml"
    path.write_text(yaml.safe_dump_all([made(), one("kserve", "ServiceAccount")]))
    # The image's digest is set where it is deployed, as in base; whom a NetworkPolicy lets in depends on the gateway.
    assert [line.partition(" ")[0] for line in failed(scan("kubernetes", path))] == ["CKV_K8S_43", "CKV2_K8S_6"]


def test_the_readme_tells_of_it() -> None:
    text = (ROOT / "deploy/README.md").read_text().partition("## On KServe")[2].partition("\n## ")[0]
    for part in ("ServingRuntime", "InferenceService", "storageUri", "grpc-v2", "docs/open_inference.md"):
        assert part in text
    page = (ROOT / "docs/open_inference.md").read_text()
    assert all(f"@{transform}" in page for transform in TRANSFORMS)
