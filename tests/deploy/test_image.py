"""The Dockerfile: linted, and in agreement with what Kubernetes is told of the image."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tests.deploy.manifests import DEPLOY, ROOT, container, environment, needs_kubectl, pod

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
HADOLINT = Path(sys.executable).with_name("hadolint")


@pytest.mark.skipif(not HADOLINT.exists() and shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint() -> None:
    program = str(HADOLINT) if HADOLINT.exists() else "hadolint"
    done = subprocess.run([program, DEPLOY / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_stages() -> None:
    stages = {name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)}
    assert stages["cpu"] == stages["cuda"] == "runtime"
    # No latest, and the same for all stages.
    assert {base for base in stages.values() if base not in stages} == {"python:${PYTHON}"}
    assert re.search(r"^ARG PYTHON=\d+\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)


def test_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r"\[([a-z,]+)\]", DOCKERFILE)
    assert asked == ["server,otel", "server,nvidia,otel"]
    assert {name for one in asked for name in one.split(",")} <= set(extras)


def test_the_context_holds_what_is_copied_and_what_the_wheel_needs() -> None:
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    }
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / one).exists() for one in copied)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {path.partition("/")[0] for path in wheel["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert needed | {"pyproject.toml", wheel["project"]["readme"], *wheel["project"]["license-files"]} <= copied


@needs_kubectl
def test_kubernetes_runs_it_as_it_was_built() -> None:
    (user,) = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    security = pod("base")["securityContext"]
    assert (int(user[0]), int(user[1])) == (security["runAsUser"], security["runAsGroup"])
    (exposed,) = re.findall(r"^EXPOSE (.+)$", DOCKERFILE, re.MULTILINE)
    assert {int(port) for port in exposed.split()} == {port["containerPort"] for port in container("base")["ports"]}
    assert f"PULLBACK_STATE_DIR={environment('base')['PULLBACK_STATE_DIR']}" in DOCKERFILE
    # The exec form: no shell stands between Kubernetes' SIGTERM and the server.
    assert 'ENTRYPOINT ["pullback-server"]' in DOCKERFILE
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert "pullback-server" in scripts
