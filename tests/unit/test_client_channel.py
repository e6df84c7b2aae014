"""Targets, TLS, metadata, and settings that cannot be."""

import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.both_clients import Connect
from tests.unit.client_server import Fake, serving

import pullback as pb
from pullback._channel import Address

ONCE = pb.RetryPolicy(attempts=1)


def options(target: str, **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tls": None, "connect_timeout": 10.0, "max_message_bytes": 1 << 20, "metadata": (), "name": ""
    } | more  # fmt: skip
    return dict(Address(target, **settings).options())


def test_unix_sockets(connect: Connect, tmp_path: Path) -> None:
    with serving(Fake(), address=f"unix:{tmp_path / 'socket'}") as fake, connect(fake.target) as client:
        np.testing.assert_array_equal(client.model("square").evaluate([2.0]), [4.0])


@pytest.mark.parametrize("prefix", ["", "dns:///", "ipv4:"])
def test_targets(connect: Connect, prefix: str) -> None:
    with serving(Fake()) as fake, connect(prefix + fake.target) as client:
        assert client.ping() > 0
    assert ("grpc.service_config" in options(prefix + fake.target)) == (prefix == "dns:///")


def test_calls_are_spread_over_listed_addresses(connect: Connect) -> None:
    with serving(Fake()) as one, serving(Fake()) as two, connect(f"ipv4:{one.target},{two.target}") as client:
        model = client.model("square")
        for _ in range(20):
            np.testing.assert_array_equal(model.evaluate([2.0]), [4.0])
        assert min(len(one.seen), len(two.seen)) >= 5


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "dns:///localhost"])
def test_a_proxy_is_not_asked_for_loopback(connect: Connect, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(Fake()) as fake:
        port = fake.target.rpartition(":")[2]
        with connect(f"{host}:{port}", retry=ONCE) as client:
            assert client.ping() > 0


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("localhost:8470", True),
        ("LOCALHOST", True),
        ("127.0.0.1:1", True),
        ("127.1.2.3", True),
        ("[::1]:8470", True),
        ("ipv6:[::1]:8470", True),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("ipv4:127.0.0.1:1,10.0.0.1:2", False),
        ("127.0.0.1:1,127.0.0.1:2", False),
        ("unix:/run/pullback", True),
        ("unix-abstract:name", True),
        ("dns:///localhost:8470", True),
        ("localhost.example:8470", False),
        ("example:8470", False),
        ("128.0.0.1:8470", False),
        ("dns:///service:8470", False),
    ],
)
def test_what_counts_as_local(target: str, local: bool) -> None:
    assert ("grpc.enable_http_proxy" in options(target)) == local


def test_metadata_travels(connect: Connect) -> None:
    metadata = {"Authorization": "Bearer token", "trace-bin": b"\x00\xff"}
    with serving(Fake()) as fake, connect(fake.target, metadata=metadata) as client:
        client.models()
        assert fake.seen[-1].metadata["authorization"] == "Bearer token"
        assert fake.seen[-1].metadata["trace-bin"] == b"\x00\xff"
    assert "token" not in repr(client) + repr(client._transport.address)


@pytest.mark.parametrize(
    "settings",
    [
        {"target": ""},
        {"target": None},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"connect_timeout": 0},
        {"max_message_bytes": 0},
        {"max_message_bytes": 2**31},
        {"metadata": {"a key": "x"}},
        {"metadata": {"grpc-timeout": "x"}},
        {"metadata": {"key": "line\nbreak"}},
        {"metadata": {"key": "größe"}},
        {"metadata": {"key": b"bytes"}},
        {"metadata": {"key-bin": "text"}},
        {"name": "line\nbreak"},
    ],
)
def test_settings_that_cannot_be(connect: Connect, settings: dict[str, Any]) -> None:
    name = next(iter(settings))
    with pytest.raises(ValueError, match=name):
        connect(**{"target": "localhost:1", **settings})


def test_connect_timeout(connect: Connect) -> None:
    with socket.socket() as mute:
        # Takes connections, and never says a word of HTTP/2.
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        with connect(f"127.0.0.1:{mute.getsockname()[1]}", connect_timeout=0.5, retry=ONCE) as client:
            began = time.monotonic()
            with pytest.raises(pb.errors.Unavailable):
                client.ping(timeout=60)
            assert time.monotonic() - began < 30


def test_a_model_is_named_by_a_str(connect: Connect) -> None:
    client = connect("localhost:1")
    for name in ("", None, 3):
        with pytest.raises(TypeError, match="named by a str"):
            client.model(name)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.pem, and a certificate and key for a server and for a client."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("authority")

    def make(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True, timeout=60)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    make("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2")
    for name, alternative in (("server", "DNS:gradients.example"), ("client", "DNS:client.example")):
        make("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "ext").write_text(f"subjectAltName={alternative}\n")
        make("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
             "-out", f"{name}.pem", "-days", "2", "-extfile", "ext")  # fmt: skip
    return folder


@pytest.mark.parametrize("mutual", [False, True])
def test_tls(connect: Connect, authority: Path, mutual: bool) -> None:
    ca = (authority / "ca.pem").read_bytes()
    pair = ((authority / "server.key").read_bytes(), (authority / "server.pem").read_bytes())
    credentials = grpc.ssl_server_credentials([pair], ca if mutual else None, mutual)
    own: dict[str, Any] = (
        {"cert": authority / "client.pem", "key": (authority / "client.key").read_bytes()} if mutual else {}
    )
    name = "gradients.example"
    with serving(Fake(), credentials=credentials) as fake:
        with connect(fake.target, tls=pb.TLS(ca=authority / "ca.pem", server_name=name, **own)) as client:
            np.testing.assert_array_equal(client.model("square").evaluate([2.0]), [4.0])
        strangers = [None, pb.TLS(server_name=name), pb.TLS(ca=ca)] + ([pb.TLS(ca=ca, server_name=name)] * mutual)
        for tls in strangers:
            with connect(fake.target, tls=tls, retry=ONCE) as client, pytest.raises(pb.errors.Unavailable):
                client.ping()


def test_tls_settings_that_cannot_be(connect: Connect, authority: Path) -> None:
    with pytest.raises(ValueError, match="belong together"):
        pb.TLS(cert=authority / "client.pem")
    with pytest.raises(FileNotFoundError):
        connect("localhost:1", tls=pb.TLS(ca=authority / "none.pem"))
    assert "secret" not in repr(pb.TLS(cert=b"public", key=b"secret"))
