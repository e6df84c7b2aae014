"""TLS: whose certificates are taken, and what happens when they are renewed under a server."""

from __future__ import annotations

import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2
from tests.credentials import Authority, place
from tests.zoo import cube, identity

import pullback as pb
from pullback import errors
from pullback_server import Server
from pullback_server.fleet import StartError
from pullback_server.rpc import CertificateError, Certificates, TlsFiles, new_key

X = np.arange(1.0, 4.0)
ONCE = pb.RetryPolicy(attempts=1)


class Rig:
    """A server that wants certificates, and those who have some."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers, self.clients = Authority("servers"), Authority("clients")
        self.member = self.clients.certify("a.team.example")
        self.put(self.servers.certify("localhost"), self.clients.pem)
        self.token, entry = new_key("by-token", ["call", "metrics"], ["identity"])
        (folder / "principals.toml").write_text(
            entry + '[[principal]]\nname = "team"\ncertificates = ["*.team.example"]\nrights = ["call", "session"]\n'
        )
        self.server = Server(
            cube, identity, devices="cpu", threads=1, principals=str(folder / "principals.toml"), metrics_tls=True,
            **self.options,
        ).start()  # fmt: skip
        self.target = f"localhost:{self.server.port}"

    @property
    def options(self) -> dict[str, str]:
        names = ("tls_cert", "tls_key", "tls_client_ca")
        return dict(zip(names, (str(self.folder / name) for name in ("cert", "key", "ca")), strict=True))

    def put(self, certified: tuple[bytes, bytes], ca: bytes) -> None:
        """Another certificate, its key, and who vouches for clients: one after the other."""
        for name, data in zip(("cert", "key", "ca"), (*certified, ca), strict=True):
            place(self.folder / name, data)

    def tls(self, certified: tuple[bytes, bytes] | None, ca: bytes | None = None) -> pb.TLS:
        cert, key = certified or (None, None)
        return pb.TLS(ca=ca or self.servers.pem, cert=cert, key=key)

    def connect(self, certified: tuple[bytes, bytes] | None, ca: bytes | None = None, **settings: Any) -> pb.Client:
        return pb.connect(self.target, tls=self.tls(certified, ca), **{"retry": ONCE, **settings})

    def shown(self, ca: bytes) -> x509.Certificate:
        """What a new connection to the gRPC port is shown, by one whom `ca` vouches for."""
        cert, key = self.member
        (self.folder / "mine.pem").write_bytes(key + cert)
        context = ssl.create_default_context(cadata=ca.decode())
        context.load_cert_chain(str(self.folder / "mine.pem"))
        with (
            socket.create_connection(("localhost", self.server.port), 30) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secured,
        ):
            found = secured.getpeercert(binary_form=True)
        assert found is not None
        return x509.load_der_x509_certificate(found)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    try:
        yield rig
    finally:
        rig.server.stop()


def test_who_gets_in(rig: Rig) -> None:
    member = rig.member
    with rig.connect(member) as client:
        assert np.allclose(client.model("cube").vjp(X, np.ones(3)).gradients, 3 * X**2)
        with client.session():
            assert np.allclose(client.tensor(X).numpy(), X)
        with pytest.raises(errors.PermissionDenied):
            client.load_model("cube")
    # The token decides, where there is one.
    with rig.connect(member, token=rig.token) as client:
        client.model("identity").evaluate(X)
        with pytest.raises(errors.PermissionDenied, match="'by-token'"):
            client.model("cube").evaluate(X)
    with rig.connect(member, token="x") as client, pytest.raises(errors.Unauthenticated):
        client.models()
    with rig.connect(rig.clients.certify("stranger.example"), token=rig.token) as client:
        assert client.models()
    with rig.connect(rig.clients.certify("stranger.example")) as client:
        client.ping()
        with pytest.raises(errors.Unauthenticated, match="certificate is no principal's"):
            client.models()
    # These do not get as far as a call.
    for certified in (
        None,
        Authority("clients").certify("a.team.example"),
        rig.servers.certify("a.team.example"),
        rig.clients.certify("a.team.example", ends=-0.5),
        rig.clients.certify("a.team.example", begins=1),
    ):
        with rig.connect(certified, timeout=5) as client, pytest.raises(errors.PullbackError) as caught:
            client.models()
        assert isinstance(caught.value, errors.Unavailable | errors.DeadlineExceeded) and not caught.value.reason
    with pb.connect(rig.target, retry=ONCE, timeout=5) as client, pytest.raises(errors.Unavailable):
        client.models()
    # Nor does a client that does not trust the server.
    with rig.connect(member, Authority("servers").pem, timeout=5) as client, pytest.raises(errors.Unavailable):
        client.models()
    https = f"https://localhost:{rig.server.metrics_port}"
    context = ssl.create_default_context(cadata=rig.servers.pem.decode())
    # Probes bring no certificate, and what is not open needs one that is a principal's, or a token.
    assert urllib.request.urlopen(f"{https}/livez", context=context, timeout=30).read() == b"ok\n"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{https}/metrics", context=context, timeout=30)
    (rig.folder / "member.pem").write_bytes(member[1] + member[0])
    context.load_cert_chain(str(rig.folder / "member.pem"))
    assert urllib.request.urlopen(f"{https}/livez", context=context, timeout=30).read() == b"ok\n"
    request = urllib.request.Request(f"{https}/metrics", headers={"Authorization": f"Bearer {rig.token}"})
    text = urllib.request.urlopen(request, context=context, timeout=30).read().decode()
    (line,) = [one for one in text.splitlines() if one.startswith("pullback_certificate_expiry_timestamp_seconds ")]
    assert float(line.split()[1]) == rig.shown(rig.servers.pem).not_valid_after_utc.timestamp()


def test_a_rotation_under_load_loses_nothing(rig: Rig) -> None:
    member = rig.member
    stop = threading.Event()
    failures: list[BaseException] = []
    made = [0] * 8

    def calls(number: int) -> None:
        # Both clients that stay and clients that come anew, without a retry.
        try:
            while not stop.is_set():
                with rig.connect(member, ca, timeout=60) as client:
                    for _ in range(1 if number < 4 else 30):
                        client.model("cube").vjp(X, np.ones(3))
                        made[number] += 1
        except BaseException as error:
            failures.append(error)

    # The second authorities take over half-way: everybody trusts both.
    servers, clients = Authority("servers"), Authority("clients")
    ca = rig.servers.pem + servers.pem
    threads = [threading.Thread(target=calls, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        for issuer, vouching in (
            (rig.servers, rig.clients.pem),
            (rig.servers, rig.clients.pem + clients.pem),
            (servers, rig.clients.pem + clients.pem),
            (servers, rig.clients.pem + clients.pem),
        ):
            certified = issuer.certify("localhost")
            # Half of it, for a while: the certificate is another than the key's.
            place(rig.folder / "cert", certified[0])
            time.sleep(1.5)
            rig.put(certified, vouching)
            wanted = x509.load_pem_x509_certificate(certified[0])
            deadline = time.monotonic() + 60
            while rig.shown(ca).serial_number != wanted.serial_number:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        later = clients.certify("b.team.example")
        with rig.connect(later, ca) as client:
            client.model("cube").evaluate(X)
        reached = list(made)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]
    assert min(reached) > 0
    # The old authority goes: its clients do not come in any more.
    rig.put(servers.certify("localhost"), clients.pem)
    until = time.monotonic() + 60
    while True:
        try:
            with rig.connect(member, ca, timeout=5) as client:
                client.models()
        except errors.PullbackError:
            break
        assert time.monotonic() < until
        time.sleep(0.2)
    with rig.connect(later, ca) as client:
        client.model("cube").evaluate(X)


def test_a_session_ends_with_its_certificate(rig: Rig) -> None:
    seconds = 6.0
    member = rig.clients.certify("a.team.example", ends=seconds / 86400)
    with rig.connect(member) as client, client.session():
        x = client.tensor(X, requires_grad=True)
        assert np.allclose((x * 2.0).numpy(), X * 2)
        until = time.monotonic() + 60
        with pytest.raises((errors.Unauthenticated, errors.SessionLost)):
            while time.monotonic() < until:
                (x * 2.0).numpy()
                time.sleep(0.2)
        with pytest.raises(errors.PullbackError):
            client.models()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


class TestFiles:
    """What a server is started with is looked at then."""

    def check(self, folder: Path, cert: bytes, key: bytes, ca: bytes | None = None) -> Certificates:
        (folder / "cert").write_bytes(cert)
        (folder / "key").write_bytes(key)
        if ca is not None:
            (folder / "ca").write_bytes(ca)
        files = TlsFiles(str(folder / "cert"), str(folder / "key"), None if ca is None else str(folder / "ca"))
        return Certificates(files, lambda _: None)

    def test_what_is_refused(self, tmp_path: Path, authority: Authority) -> None:
        cert, key = authority.certify("localhost")
        other = authority.certify("localhost")
        expired, its_key = authority.certify("localhost", ends=-0.1)
        early, early_key = authority.certify("localhost", begins=1)
        for arguments, told in (
            ((cert, other[1]), "is not the key of the certificate"),
            ((b"", key), "expected certificates in PEM"),
            ((key, key), "expected certificates in PEM"),
            ((cert, cert), "expected a private key"),
            ((cert[:200], key), "expected certificates in PEM"),
            ((cert, key[:100]), "expected a private key"),
            ((cert, key, b"x"), r"--tls-client-ca .*: expected certificates"),
            ((expired, its_key), "has expired"),
            ((early, early_key), "not valid before"),
        ):
            with pytest.raises(CertificateError, match=told):
                self.check(tmp_path, *arguments)
        options = {"tls_cert": str(tmp_path / "cert"), "tls_key": str(tmp_path / "none")}
        with pytest.raises(StartError, match="--tls-key"), Server(identity, devices="cpu", **options):
            pass

    def test_an_end_that_is_near_is_told(
        self, tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.check(tmp_path, *authority.certify("localhost", ends=8))
        assert not caplog.records
        self.check(tmp_path, *authority.certify("localhost", ends=6))
        assert "ends at" in caplog.text


def test_others_may_reach_it_where_there_is_tls(tmp_path: Path) -> None:
    """Without client certificates: health is open, and there being no principals so is the rest."""
    authority = Authority()
    cert, key = authority.certify("localhost")
    (tmp_path / "cert").write_bytes(cert)
    (tmp_path / "key").write_bytes(key)
    options = {"tls_cert": str(tmp_path / "cert"), "tls_key": str(tmp_path / "key"), "host": "0.0.0.0"}
    with Server(identity, devices="cpu", threads=1, **options) as server:
        target = f"localhost:{server.port}"
        with pb.connect(target, tls=pb.TLS(ca=authority.pem)) as client:
            assert np.allclose(client.model("identity").evaluate(X), X)
        credentials = grpc.ssl_channel_credentials(authority.pem)
        with grpc.secure_channel(target, credentials) as channel:
            answer = channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=30)
            assert health_pb2.HealthCheckResponse.FromString(answer).status == 1


def test_a_server_whose_certificate_has_expired_is_not_trusted(tmp_path: Path) -> None:
    """It cannot be started with one, so it is given one that ends soon."""
    authority = Authority()
    cert, key = authority.certify("localhost", ends=8 / 86400)
    (tmp_path / "cert").write_bytes(cert)
    (tmp_path / "key").write_bytes(key)
    ends = time.time() + 8
    options = {"tls_cert": str(tmp_path / "cert"), "tls_key": str(tmp_path / "key")}
    with Server(identity, devices="cpu", threads=1, **options) as server:
        while time.time() < ends + 1:
            time.sleep(0.1)
        tls = pb.TLS(ca=authority.pem)
        client = pb.connect(f"localhost:{server.port}", tls=tls, retry=ONCE, timeout=5)
        with client, pytest.raises(errors.Unavailable):
            client.models()
