"""Options from flags, environment and file: which comes first, what is said of wrong ones, and what `config` prints."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from pathlib import Path

import pytest
from tests.serving import command

from pullback_server.config import Config
from pullback_server.config_report import MASK, report, strangers


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PULLBACK_")}
    return subprocess.run(
        command(*arguments), cwd=folder, env={**clean, **environment}, capture_output=True, text=True, timeout=60
    )


def test_flags_come_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pullback.toml"
    path.write_text('models = ["a.py", "b c.py"]\nport = 1\ngrace = 1.5\nhard_timeout = 3\n')
    monkeypatch.setenv("PULLBACK_GRACE", "2.5")
    monkeypatch.setenv("PULLBACK_HARD_TIMEOUT", "7")
    arguments = ["--config", str(path), "--hard-timeout", "9"]
    found = json.loads(report(arguments, as_json=True))
    assert found["port"] == {"value": 1, "source": f"file {path}"}
    assert found["grace"] == {"value": 2.5, "source": "environment PULLBACK_GRACE"}
    assert found["hard_timeout"] == {"value": 9.0, "source": "flag"}
    assert found["models"]["value"] == ["a.py", "b c.py"]
    assert found["host"] == {"value": "127.0.0.1", "source": "default"}
    # The environment may name the file.
    monkeypatch.setenv("PULLBACK_CONFIG", str(path))
    assert json.loads(report([], as_json=True))["port"]["value"] == 1


def test_what_config_prints_is_a_file_that_it_takes(tmp_path: Path) -> None:
    arguments = [
        "models.py", "--caller-weights", "a=2", "--repository-options", '{"anon": true}', "--no-batching",
        "--load-model", "m", "--log-format", "json",
    ]  # fmt: skip
    first = run(tmp_path, "config", *arguments)
    assert first.returncode == 0, first.stderr
    (tmp_path / "printed.toml").write_text(first.stdout)
    again = run(tmp_path, "config", "--config", "printed.toml")
    assert again.returncode == 0, again.stderr
    assert tomllib.loads(again.stdout) == tomllib.loads(first.stdout)
    assert tomllib.loads(first.stdout)["caller_weights"] == {"a": 2.0}
    assert set(json.loads(run(tmp_path, "config", "--json").stdout)) == set(Config.model_fields) - {"config"}


def test_secrets_are_masked(tmp_path: Path) -> None:
    options = (
        '{"key": "AKIA", "secret": "s3cr3t", "client_kwargs": {"aws_secret_access_key": "s3cr3t", "region": "eu"}}'
    )
    found = run(
        tmp_path, "config", "--repository", "s3://user:s3cr3t@bucket/models", PULLBACK_REPOSITORY_OPTIONS=options
    )
    assert found.returncode == 0, found.stderr
    assert "s3cr3t" not in found.stdout + found.stderr and "AKIA" not in found.stdout
    shown = tomllib.loads(found.stdout)
    assert shown["repository"] == f"s3://{MASK}@bucket/models"
    assert shown["repository_options"]["client_kwargs"] == {"aws_secret_access_key": MASK, "region": "eu"}
    found = run(
        tmp_path, "config", "--repository", "https://host/models?sig=s3cr3t&X-Amz-Signature=s3cr3t",
        PULLBACK_REPOSITORY_OPTIONS='{"headers": {"Authorization": "s3cr3t"}, "connection_string": "s3cr3t"}',
    )  # fmt: skip
    assert found.returncode == 0 and "s3cr3t" not in found.stdout + found.stderr
    assert tomllib.loads(found.stdout)["repository"] == f"https://host/models?sig={MASK}&X-Amz-Signature={MASK}"
    # Nor are they told in an error.
    wrong = run(tmp_path, "config", "--repository", "x", PULLBACK_REPOSITORY_OPTIONS='["s3cr3t"]')
    assert wrong.returncode == 2
    assert "--repository-options" in wrong.stderr and "s3cr3t" not in wrong.stderr
    wrong = run(tmp_path, "config", PULLBACK_REPOSITORY_OPTIONS='{"key": "s3cr3t"')
    assert wrong.returncode == 2
    assert "PULLBACK_REPOSITORY_OPTIONS in the environment is not" in wrong.stderr and "s3cr3t" not in wrong.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", "there is no option prot; did you mean 'port'"),
        ("port = 'x'", "--port: "),
        ("port = ", "config wrong.toml: "),
        ("config = 'other.toml'", "cannot name another file"),
        ("tls_cert = 3", "--tls-cert: "),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "wrong.toml").write_text(text)
    for name in ("config", "serve"):
        done = run(tmp_path, name, "m.py", "--config", "wrong.toml")
        assert done.returncode == 2
        assert words in done.stderr, done.stderr


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "serve", "m.py", "--config", "none.toml")
    assert done.returncode == 2
    assert "config none.toml: No such file" in done.stderr


def test_the_environment_takes_lists_and_shares_as_people_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for models, weights in (("a, b:2", "team-a=3, x=y=0.5"), ('["a", "b:2"]', '{"team-a": 3, "x=y": 0.5}')):
        monkeypatch.setenv("PULLBACK_LOAD_MODEL", models)
        monkeypatch.setenv("PULLBACK_CALLER_WEIGHTS", weights)
        found = json.loads(report([], as_json=True))
        assert found["load_model"]["value"] == ["a", "b:2"]
        assert found["caller_weights"] == {
            "value": {"team-a": 3.0, "x=y": 0.5},
            "source": "environment PULLBACK_CALLER_WEIGHTS",
        }
    arguments = ["--load-model", "a", "--load-model", "b", "--caller-weights", '{"a": 2}', "--caller-weights", "x=1"]
    found = json.loads(report(arguments, as_json=True))
    assert found["load_model"]["value"] == ["a", "b"]
    assert found["caller_weights"]["value"] == {"a": 2.0, "x": 1.0}


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        # A variable that a template left empty: not a server of no models, nor one that lets in everybody.
        ("REPOSITORY", "", "--repository: String should have at least 1 character"),
        ("PRINCIPALS", "", "--principals: String should have at least 1 character"),
        ("CALLER_WEIGHTS", "team-a:3", "--caller-weights: Value error, expected caller=weight"),
        ("CALLER_WEIGHTS", "team-a=-3", "--caller-weights.team-a: Input should be greater than 0"),
        ("CALLER_WEIGHTS", "{bad", "--caller-weights"),
        ("LOAD_MODEL", "[bad", "--load-model"),
    ],
)
def test_a_wrong_variable_is_refused(tmp_path: Path, variable: str, value: str, words: str) -> None:
    found = run(tmp_path, "serve", **{f"PULLBACK_{variable}": value})
    assert found.returncode == 2
    assert words in found.stderr and "Traceback" not in found.stderr


def test_variables_that_are_no_options_are_told() -> None:
    told = strangers({"PULLBACK_PROT": "1", "PULLBACK_PORT": "1", "PULLBACK_TARGET": "x", "PATH": "y"})
    assert len(told) == 1
    assert told[0].startswith("PULLBACK_PROT in the environment is no option; did you mean 'PULLBACK_PORT'")
