"""A repository on a server that speaks S3 (moto), in an environment of its own: .venv-s3. Built once, in half a minute.

Run: .venv/bin/python -m pytest -m slow tests/unit/test_repository_s3.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pullback_server.hosting.repository import NotSettled, Repository, RepositoryError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

VENV = Path(__file__).parents[2] / ".venv-s3"
SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    """What to tell fsspec of the server. s3fs is imported from .venv-s3; all that is here as well, from here."""
    if not (VENV / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        pip = [VENV / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "moto[server,s3]", f"s3fs=={fsspec.__version__}"], check=True)
        (VENV / ".ready").touch()
    paths = "import json, sys; print(json.dumps(sys.path))"
    listed = subprocess.run([VENV / "bin/python", "-Ic", paths], capture_output=True, check=True).stdout
    added = [path for path in json.loads(listed) if path.startswith(str(VENV))]
    sys.path += added
    environment = {"PATH": os.environ["PATH"], "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    command = [VENV / "bin/python", "-c", SERVE]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        lines = (line for line in server.stdout if line.strip().isdecimal())
        port = next(lines).strip()
        yield {"key": "key", "secret": "secret", "endpoint_url": f"http://127.0.0.1:{port}"}
        server.stdin.close()
        server.wait(30)
    for path in added:
        sys.path.remove(path)


@pytest.fixture
def bucket(s3: dict[str, Any]) -> tuple[str, Any]:
    """A bucket's name, and the store it is in."""
    store = fsspec.filesystem("s3", **s3)
    name = f"bucket-{uuid.uuid4()}"
    store.mkdir(name)
    return name, store


def put(store: Any, top: str, **files: bytes) -> None:
    for path, content in files.items():
        store.pipe(f"{top}/{path}", content)


@pytest.mark.parametrize("prefix", ["", "/deep/models", "/deep/models/"])
def test_from_listing_to_staging(s3: dict[str, Any], bucket: tuple[str, Any], prefix: str, tmp_path: Path) -> None:
    name, store = bucket
    top = f"{name}{prefix}".rstrip("/")
    big = os.urandom(12_000_000)
    put(store, top, **{"net/model.toml": b"batch_axis = 0", "net/lib/a.py": b"a", "net/1/model.py": b"1"})
    put(store, top, **{"net/2/model.py": b"2", "net/2/big": big, "net/2/.hidden": b"", "net/3.tmp/model.py": b""})
    put(store, top, **{"broken/model.toml": b"=", "net/": b""})
    repository = Repository(f"s3://{name}{prefix}", s3)
    repository.check()
    scan = repository.scan()
    assert list(scan.models) == ["broken", "net"] and "not TOML" in str(scan.models["broken"].error)
    assert sorted(scan.models["net"].versions) == ["1", "2"]
    staged = repository.stage("net", "2", tmp_path / "staged")
    files = sorted(
        path.relative_to(staged.directory).as_posix() for path in staged.directory.rglob("*") if path.is_file()
    )
    assert files == ["big", "lib/a.py", "model.py", "model.toml"]
    assert (staged.directory / "big").read_bytes() == big
    assert staged.fingerprint == scan.models["net"].versions["2"]


def test_changes(s3: dict[str, Any], bucket: tuple[str, Any], tmp_path: Path) -> None:
    name, store = bucket
    put(store, name, **{"net/model.toml": b"", "net/1/model.py": b"a", "net/2/model.py": b"a"})
    repository = Repository(f"s3://{name}", s3)
    before = repository.scan().models["net"].versions
    assert repository.scan().models["net"].versions == before
    put(store, name, **{"net/2/model.py": b"b", "net/3/model.py": b"a"})
    after = repository.scan().models["net"].versions
    assert after["1"] == before["1"] and after["2"] != before["2"] and list(after) == ["1", "2", "3"]
    put(store, name, **{"net/model.toml": b"batch_axis = 0"})
    last = repository.look("net")
    assert last == repository.scan().models["net"] and last.versions["1"] != after["1"]
    assert last.manifest is not None and last.manifest.batch_axis == 0
    put(store, name, **{"net/3/SHA256SUMS": b"0" * 64 + b"  model.py\n"})
    with pytest.raises(NotSettled, match=f"s3://{name}/net/3/model.py differs from SHA256SUMS"):
        repository.stage("net", "3", tmp_path / "staged")
    assert not (tmp_path / "staged").exists()
    store.rm(f"{name}/net/1", recursive=True)
    assert list(repository.scan().models["net"].versions) == ["2", "3"]


def test_what_cannot_be_used(s3: dict[str, Any], bucket: tuple[str, Any]) -> None:
    name, store = bucket
    put(
        store, name, **{"net/model.toml": b"", "net/1/model.py": b"", "net/2/../../../evil": b"", "net/2/model.py": b""}
    )
    found = Repository(f"s3://{name}", s3).look("net")
    assert list(found.versions) == ["1"] and "2/../../../evil is refused" in str(found.problems["2"])
    for url in (f"s3://{name}/nothing", f"s3://no-{name}"):
        for ask in (Repository(url, s3).check, Repository(url, s3).scan):
            with pytest.raises(RepositoryError, match=f"{url}: the model repository cannot be read: no such directory"):
                ask()
    gone = {**s3, "endpoint_url": "http://127.0.0.1:1", "config_kwargs": {"retries": {"max_attempts": 1}}}
    with pytest.raises(RepositoryError, match="cannot be read: "):
        Repository(f"s3://{name}", gone).scan()
