"""What deploy/ says of the server is what the server does."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.deploy.manifests import (
    DEPLOY,
    ROOT,
    SERVED,
    WHOLE,
    container,
    environment,
    needs_kubectl,
    one,
    pod,
    quantity,
    rendered,
)

from pullback_server.config import Config
from pullback_server.config_report import strangers
from pullback_server.rpc.probes import LIVENESS, READINESS
from pullback_server.rpc.security.principals import read_book

pytestmark = needs_kubectl

#: Seconds that the server may need, besides draining and grace, to end its workers and to write its last words.
_ENDING = 10
_MIB = 2**20


@pytest.fixture(params=SERVED)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(overlay: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """What the server makes of the pod's environment."""
    for name in os.environ:
        if name.startswith("PULLBACK_"):
            monkeypatch.delenv(name)
    for name, value in environment(overlay).items():
        monkeypatch.setenv(name, value)
    yield Config()


def test_every_variable_is_an_option(overlay: str) -> None:
    names = environment(overlay)
    assert {name.removeprefix("PULLBACK_").lower() for name in names} <= set(Config.model_fields)
    assert strangers(names) == []


def test_no_service_can_put_variables_into_the_environment(overlay: str) -> None:
    # PULLBACK_PORT=tcp://10.0.0.1:8470 is what Kubernetes says of a Service called pullback.
    assert pod(overlay)["enableServiceLinks"] is False


def test_something_is_served(overlay: str, config: Config) -> None:
    assert config.models or config.repository
    for source in config.models:
        folder = mounted(overlay, str(Path(source).parent))
        files = one(overlay, "ConfigMap", "pullback-models")
        assert folder["configMap"]["name"] == files["metadata"]["name"]
        assert Path(source).name in files["data"]


def test_the_model_of_base_is_that_of_the_readme() -> None:
    ours = (DEPLOY / "base/models/energy.py").read_text()
    assert ours == (ROOT / "examples/models/energy.py").read_text()


def test_ports(overlay: str, config: Config) -> None:
    ports = {port["name"]: port["containerPort"] for port in container(overlay)["ports"]}
    assert ports == {"grpc": config.port, "metrics": config.metrics_port, "health": config.health_port}
    service = one(overlay, "Service")["spec"]
    assert service["clusterIP"] == "None"
    assert [(port["port"], port["targetPort"]) for port in service["ports"]] == [(config.port, "grpc")]
    policy = one(overlay, "NetworkPolicy")["spec"]
    assert [[port["port"] for port in rule["ports"]] for rule in policy["ingress"]] == [["grpc"], ["metrics"]]
    for monitor in (item for item in rendered(overlay) if item["kind"] == "PodMonitor"):
        assert [end["port"] for end in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]
        assert (monitor["spec"]["podMetricsEndpoints"][0].get("scheme") == "https") == config.metrics_tls


def test_probes_ask_the_health_port_for_its_services(overlay: str, config: Config) -> None:
    server = container(overlay)
    asked = {name: server[name]["grpc"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert asked == {
        "startupProbe": {"port": config.health_port, "service": READINESS},
        "readinessProbe": {"port": config.health_port, "service": READINESS},
        "livenessProbe": {"port": config.health_port, "service": LIVENESS},
    }


def test_starting_may_take_as_long_as_loading_may(overlay: str, config: Config) -> None:
    probe = container(overlay)["startupProbe"]
    patience = probe["periodSeconds"] * probe["failureThreshold"]
    assert patience > config.load_timeout
    assert one(overlay, "Deployment")["spec"]["progressDeadlineSeconds"] > patience


def test_grace_periods_add_up(overlay: str, config: Config) -> None:
    spec = pod(overlay)
    assert spec["terminationGracePeriodSeconds"] >= config.drain_seconds + config.grace + _ENDING
    assert "lifecycle" not in container(overlay)
    # Endpoints must have forgotten the pod before it stops taking calls: two looks of the kubelet, and DNS' 5 s.
    if one(overlay, "Deployment")["spec"].get("replicas", 2) > 1:
        assert config.drain_seconds >= 10


def test_reachable_addresses_are_named_as_such(overlay: str, config: Config) -> None:
    assert config.host == "0.0.0.0"
    assert config.insecure != bool(config.tls_cert)


def test_files_that_options_name_are_mounted(overlay: str, config: Config) -> None:
    kept = {
        "pullback-tls": {"tls.crt", "tls.key", "ca.crt"},
        "pullback-principals": {"principals.toml"},
    }
    for path in (config.tls_cert, config.tls_key, config.tls_client_ca, config.principals):
        if path is not None:
            secret = mounted(overlay, str(Path(path).parent))["secret"]
            assert Path(path).name in kept[secret["secretName"]]
            # The group's, which is the pod's fsGroup.
            assert secret["defaultMode"] == 0o440


def test_what_is_written_lies_where_it_may(overlay: str, config: Config) -> None:
    assert config.state_dir is not None
    for folder in (config.state_dir, "/tmp"):
        assert mounted(overlay, folder)["emptyDir"]["sizeLimit"]


def test_cores(overlay: str, config: Config) -> None:
    resources = container(overlay)["resources"]
    if config.devices == "cuda":
        assert resources["limits"]["nvidia.com/gpu"] == "1"
        return
    kind, _, workers = config.devices.partition(":")
    assert kind == "cpu"
    assert config.threads is not None
    assert int(workers) * config.threads + 1 <= quantity(resources["limits"]["cpu"])


def test_memory(overlay: str, config: Config) -> None:
    """The sum that deploy/README.md tells people to make."""
    resources = container(overlay)["resources"]
    limit = quantity(resources["limits"]["memory"])
    assert config.max_message_bytes <= config.max_bytes
    assert config.session_bytes is not None
    assert config.worker_memory_bytes is not None
    assert config.session_bytes <= config.worker_memory_bytes
    front = 150 * _MIB + 5 * config.max_bytes
    shared = config.max_bytes + 512 * _MIB
    # A worker on a GPU allocates there, but maps CUDA here.
    worker = 3072 * _MIB if config.devices == "cuda" else 400 * _MIB + config.worker_memory_bytes
    rehearsal = 3072 * _MIB if config.devices == "cuda" else 400 * _MIB
    assert front + shared + worker + rehearsal <= limit
    # What cannot be taken back is not lent out twice.
    if overlay != "overlays/cpu-dev":
        assert resources["requests"]["memory"] == resources["limits"]["memory"]


def test_the_restricted_profile(overlay: str) -> None:
    spec, server = pod(overlay), container(overlay)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] >= 10_000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert one(overlay, "ServiceAccount")["automountServiceAccountToken"] is False
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert all(set(volume) - {"name"} <= {"configMap", "secret", "emptyDir", "persistentVolumeClaim"}
               for volume in spec["volumes"])  # fmt: skip
    labels = one(overlay, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_everything_selects_these_pods_and_no_others(overlay: str) -> None:
    labels = one(overlay, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert labels
    selectors: dict[str, Any] = {
        "Deployment": one(overlay, "Deployment")["spec"]["selector"]["matchLabels"],
        "Service": one(overlay, "Service")["spec"]["selector"],
        "NetworkPolicy": one(overlay, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    }
    for item in rendered(overlay):
        if item["kind"] in ("PodDisruptionBudget", "PodMonitor"):
            selectors[item["kind"]] = item["spec"]["selector"]["matchLabels"]
    for index, spread in enumerate(pod(overlay)["topologySpreadConstraints"]):
        selectors[f"spread {index}"] = spread["labelSelector"]["matchLabels"]
    assert all(selector == labels for selector in selectors.values()), selectors


def test_rules_select_by_the_job_that_the_monitor_sets() -> None:
    monitor = one("base", "PodMonitor")["spec"]
    labels = one("base", "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert labels[monitor["jobLabel"]] == "pullback"


@pytest.mark.parametrize("name", WHOLE)
def test_the_image_is_one_that_the_dockerfile_makes(name: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    target = "cuda" if name == "overlays/gpu" else "cpu"
    assert container(name)["image"] == f"pullback-server:{version}-{target}"
    # The entry point is the program, the argument what it does.
    assert container(name)["args"] == ["serve"]
    assert "command" not in container(name)


def test_the_autoscaler_has_the_replicas_for_itself() -> None:
    assert "replicas" not in one("overlays/autoscaling", "Deployment")["spec"]
    scaled = one("overlays/autoscaling", "ScaledObject")["spec"]
    assert scaled["scaleTargetRef"]["name"] == one("overlays/autoscaling", "Deployment")["metadata"]["name"]
    # Pods that go take their sessions along: later and slower than they come.
    behaviour = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behaviour["scaleDown"]["stabilizationWindowSeconds"] > behaviour["scaleUp"]["stabilizationWindowSeconds"]


def test_certificates_are_renewed_before_anybody_is_warned() -> None:
    certificates = {
        item["metadata"]["name"]: item["spec"] for item in rendered("overlays/mtls") if item["kind"] == "Certificate"
    }
    for name in ("pullback", "pullback-client"):
        assert int(certificates[name]["renewBefore"].removesuffix("h")) > 7 * 24
    names = certificates["pullback"]["dnsNames"]
    assert "pullback.pullback.svc" in names
    monitor = one("overlays/mtls", "PodMonitor")["spec"]["podMetricsEndpoints"][0]
    assert monitor["tlsConfig"]["serverName"] in names


def test_principals_of_the_overlay_are_read() -> None:
    path = DEPLOY / "overlays/mtls/principals.toml"
    book = read_book(str(path), path.read_bytes())
    certificates = {
        item["metadata"]["name"]: item["spec"] for item in rendered("overlays/mtls") if item["kind"] == "Certificate"
    }
    (uri,) = certificates["pullback-client"]["uris"]
    client = book.of_certificate([uri])
    assert client is not None
    assert client.rights == {"call", "session"}
    # Prometheus brings no credentials.
    assert book.anonymous is not None
    assert book.anonymous.rights == {"metrics"}


def mounted(overlay: str, folder: str) -> dict[str, Any]:
    """The volume that is mounted at a folder."""
    (mount,) = [mount for mount in container(overlay)["volumeMounts"] if mount["mountPath"] == folder]
    (volume,) = [volume for volume in pod(overlay)["volumes"] if volume["name"] == mount["name"]]
    found: dict[str, Any] = volume
    return found
