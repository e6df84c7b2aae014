"""What importing loads, seen in a fresh process: static contracts cannot see lazy or dynamic imports."""

import subprocess
import sys

import pytest


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    ("statement", "never"),
    [
        ("import pullback", {"torch", "jax", "scipy", "pullback_server", "msgspec", "pydantic"}),
        ("import pullback._cli", {"torch", "jax", "scipy", "rich", "safetensors", "pullback_server"}),
        ("import pullback; pullback.Objective", {"torch", "jax", "scipy", "pullback_server", "grpc"}),
        ("import pullback.jax", {"torch", "pullback_server"}),
        ("import pullback_wire", {"torch", "jax", "grpc", "pullback", "pullback_server"}),
        ("import pullback_server", {"torch", "grpc", "pullback"}),
        ("import pullback_server.app, pullback_server.cli, pullback_server.embedded", {"torch", "pullback"}),
        ("import pullback_server.fleet, pullback_server.scheduling", {"torch", "grpc"}),
        ("import pullback_server.engine.worker", {"grpc", "pullback", "prometheus_client", "pydantic"}),
    ],
)
def test_importing_loads_only_what_its_floor_needs(statement: str, never: set[str]) -> None:
    assert not loaded_by(statement) & never
