"""What somebody tries who wants more than they may have, or the server to do worse for others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import queue
import socket
import ssl
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from grpc_health.v1 import health_pb2
from tests.credentials import Authority, place
from tests.session_wire import OpFailed, Wire
from tests.zoo import cube, identity

import pullback as pb
from pullback import errors
from pullback_server import Server, model, spec
from pullback_server.faults import Fault
from pullback_server.rpc import Access, CertificateError, Certificates, PrincipalsError, TlsFiles, new_key
from pullback_server.rpc.security.callers import Credentials
from pullback_server.telemetry import Metrics
from pullback_wire import GRADIENT_METHODS, MODEL_METHODS, Reason, encode_message
from pullback_wire.v1 import gradient_service_pb2
from pullback_wire.v1 import session_service_pb2 as session_pb

X = np.arange(1.0, 4.0)
PLENTY = 1 << 20
HEALTH = "/grpc.health.v1.Health/"
LISTING = MODEL_METHODS["ListModels"].path
ONCE = pb.RetryPolicy(attempts=1)


@model("liveness", inputs={"x": spec("float64", ["n"])})
def liveness(x: Any) -> Any:
    return x * 2


@model("grpc.secret", inputs={"x": spec("float64", ["n"])})
def secret(x: Any) -> Any:
    return x * 2


class Rig:
    """A server with principals, an access log, and models that are called like services."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "principals.toml"
        self.tokens: dict[str, str] = {}
        entries = []
        for name, rights, models, quota in (
            ("alice", ["call", "session"], ["*"], {}),
            ("bob", ["call", "session"], ["identity"], {}),
            ("scraper", ["metrics"], ["*"], {}),
            ("small", ["session"], ["*"], {"retained_bytes": PLENTY}),
        ):
            self.tokens[name], entry = new_key(name, rights, models, quota)
            entries.append(entry)
        self.text = "".join(entries)
        self.file.write_text(self.text)
        self.server = Server(
            cube, identity, liveness, secret, principals=str(self.file), devices="cpu:2", threads=1, access_log=True,
            health_port=0, max_metadata_bytes=8 << 10,
        ).start()  # fmt: skip
        self.target = self.server.target

    def metadata(self, name: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.tokens.get(name, name)}"),)

    def call(self, path: str, metadata: Any = (), data: bytes = b"", target: str = "") -> bytes:
        with grpc.insecure_channel(target or self.target) as channel:
            return bytes(channel.unary_unary(path)(data, metadata=metadata, timeout=30))

    def health(self, name: str, metadata: Any = (), target: str = "") -> int:
        data = health_pb2.HealthCheckRequest(service=name).SerializeToString()
        return int(
            health_pb2.HealthCheckResponse.FromString(self.call(f"{HEALTH}Check", metadata, data, target)).status
        )


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("attacks"))
    try:
        yield rig
    finally:
        rig.server.stop()


def refused(work: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        work()
    return caught.value


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


class TestHealth:
    def test_models_are_not_listed_and_asking_for_it_leaves_no_traceback(
        self, rig: Rig, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = f"{HEALTH}List"
        probes = f"127.0.0.1:{rig.server._app.health_port}"
        assert refused(lambda: rig.call(path)).code() is grpc.StatusCode.UNAUTHENTICATED
        assert refused(lambda: rig.call(path, rig.metadata("alice"))).code() is grpc.StatusCode.UNIMPLEMENTED
        assert refused(lambda: rig.call(path, target=probes)).code() is grpc.StatusCode.UNIMPLEMENTED
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]

    def test_a_model_does_not_pass_for_the_server(self, rig: Rig) -> None:
        """Else unloading a model called "liveness" would have Kubernetes kill the server."""
        serving, unknown = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        front = rig.server._app._front
        for names in ((), ("liveness", "grpc.secret", "cube")):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(front._catalogue, "names", lambda names=names: list(names))
                asyncio.run_coroutine_threadsafe(front._announce_models(), rig.server._loop).result(30)
                # Still so: a worker that has loaded its models by now has them announced anew.
                assert rig.health("liveness") == serving
                assert rig.health("cube", rig.metadata("alice")) == (serving if names else unknown)
        # Nor does everybody learn of one by its name.
        assert refused(lambda: rig.health("grpc.secret")).code() is grpc.StatusCode.NOT_FOUND


class TestWhatIsWritten:
    @pytest.mark.parametrize("path", ["/x\nFAKE 127.0.0.1 served", "/x\x1b[31m", "/" + "a" * 3000, "/é"])
    def test_a_method_cannot_write_lines_of_its_own(
        self, rig: Rig, caplog: pytest.LogCaptureFixture, path: str
    ) -> None:
        caplog.set_level("INFO")
        assert refused(lambda: rig.call(path)).code() is grpc.StatusCode.UNAUTHENTICATED
        until(lambda: bool(caplog.records))
        for record in caplog.records:
            message = record.getMessage()
            assert message.isascii() and message.isprintable() and len(message) < 600, message

    def test_those_who_are_turned_away_have_an_id_and_a_line(self, rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO", "pullback_server.access")
        error = refused(lambda: rig.call(LISTING, (("pullback-request-id", "call-17"), *rig.metadata("nobody"))))
        assert ("pullback-request-id", "call-17") in [tuple(one) for one in error.trailing_metadata()]
        (line,) = [one for one in caplog.records if one.name == "pullback_server.access"]
        assert line.method == "ListModels" and line.code == "UNAUTHENTICATED" and line.request_id == "call-17"
        assert line.caller.startswith("ipv4:127.0.0.1") and "nobody" not in str(vars(line))

    @pytest.mark.parametrize("header", ["Basic \xe9", "Basic =", "Basic //79", "Basic " + "A" * 5, "Bearer \xe9"])
    def test_authorization_that_is_none(self, rig: Rig, caplog: pytest.LogCaptureFixture, header: str) -> None:
        with socket.create_connection(("127.0.0.1", rig.server.metrics_port), timeout=30) as connection:
            connection.sendall(b"GET /metrics HTTP/1.0\r\nAuthorization: " + header.encode("latin-1") + b"\r\n\r\n")
            assert b" 401 " in connection.makefile("rb").readline()
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


class TestMetadata:
    @pytest.mark.parametrize("size", [12_000, 28_000])
    def test_many_small_ones_are_refused_on_a_fresh_connection_too(self, rig: Rig, size: int) -> None:
        """gRPC by itself holds a peer to the limit only once it has heard of it."""
        more = tuple((f"x-{number}", "v" * 400) for number in range(size // 440))
        assert rig.call(LISTING, (*rig.metadata("alice"), *more[:10]))
        for path, metadata in ((LISTING, rig.metadata("alice")), (LISTING, ()), (f"{HEALTH}Check", ())):
            for _ in range(5):
                error = refused(lambda path=path, metadata=metadata: rig.call(path, (*metadata, *more)))
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "metadata size" in error.details()

    def test_first_words_that_come_before_the_limit_is_agreed_to(self, rig: Rig) -> None:
        """Frames by hand, as proxies send them: the headers of a call right behind the preface."""
        status = first_answer(rig.server.port, LISTING, [(b"x-%d" % number, b"v" * 400) for number in range(50)])
        assert status == b"8", status
        assert first_answer(rig.server.port, LISTING, []) == b"16"


def first_answer(port: int, path: str, metadata: list[tuple[bytes, bytes]]) -> bytes:
    """The grpc-status of a call that is sent without having waited for the server's settings."""

    def literal(name: bytes, value: bytes) -> bytes:
        return b"\x00" + _length(name) + name + _length(value) + value

    def frame(kind: int, flags: int, stream: int, data: bytes) -> bytes:
        return len(data).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + data

    headers = b"".join(
        literal(*pair)
        for pair in (
            (b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()), (b":authority", b"x"),
            (b"content-type", b"application/grpc"), (b"te", b"trailers"), *metadata,
        )
    )  # fmt: skip
    parts = [headers[at : at + 16_000] for at in range(0, len(headers), 16_000)]
    sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
    for number, part in enumerate(parts):
        sent += frame(9 if number else 1, 4 if number == len(parts) - 1 else 0, 1, part)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(sent + frame(0, 1, 1, b"\0" * 5))
        received = b""
        while b"grpc-status" not in received:
            more = connection.recv(1 << 16)
            assert more, received
            received += more
        while len(after := received.partition(b"grpc-status")[2]) < 4:
            received += connection.recv(1 << 16)
    return after[1 : 1 + after[0]]


def _length(text: bytes) -> bytes:
    """HPACK's integer of seven bits."""
    if len(text) < 127:
        return bytes((len(text),))
    rest, found = len(text) - 127, [127]
    while rest >= 128:
        found.append(rest % 128 + 128)
        rest //= 128
    return bytes((*found, rest))


class TestOthersModels:
    def test_a_request_of_somebody_else_that_is_known_here(self, rig: Rig) -> None:
        """Byte for byte, also once the model has gone."""
        request = gradient_service_pb2.EvaluateRequest()
        request.function.model = "cube"
        request.inputs.add(name="x", dtype=13, shape=[3], payload=0)
        data = encode_message(request, [X.tobytes()])
        path = GRADIENT_METHODS["Evaluate"].path
        for _ in range(2):
            assert rig.call(path, rig.metadata("alice"), data)
        assert refused(lambda: rig.call(path, rig.metadata("bob"), data)).code() is grpc.StatusCode.PERMISSION_DENIED
        catalogue = rig.server._app._front._catalogue
        with pytest.MonkeyPatch.context() as patch:
            gone = Fault(Reason.MODEL_NOT_FOUND, "no version of model 'cube' is in service")
            patch.setattr(catalogue, "find", lambda *_: (_ for _ in ()).throw(gone))
            assert refused(lambda: rig.call(path, rig.metadata("alice"), data)).code() is grpc.StatusCode.NOT_FOUND
            error = refused(lambda: rig.call(path, rig.metadata("bob"), data))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED


class TestRetained:
    def test_sessions_that_do_not_read_their_answers(self, rig: Rig) -> None:
        """Each makes what is left to all of them, and none fetches what was answered: the quota holds all the same."""
        eighth = np.ones(PLENTY // 8 // 8)
        wires = [Wire(rig.target, "cube", metadata=rig.metadata("small")) for _ in range(3)]
        try:
            handles = []
            for wire in wires:
                op, handle = wire.put(eighth, requires_grad=True)
                wire.wait(op)
                handles.append(handle)
            latest = []
            for wire, handle in zip(wires, handles, strict=True):
                for _ in range(8):
                    wire.send(session_pb.SessionRequest(get=session_pb.GetOp(handles=[handle])))
                latest.append([wire.call_op("model:cube", {"x": handle})[0] for _ in range(8)][-1])
            time.sleep(2)
            # Now they do, so that what they hold is known whoever counts it.
            for wire, op in zip(wires, latest, strict=True):
                with contextlib.suppress(OpFailed, grpc.RpcError):
                    wire.wait(op)
            workers = rig.server._app._fleet.workers
            assert 0 < sum(seat.retained for worker in workers for seat in list(worker.seats)) <= PLENTY
        finally:
            for wire in wires:
                wire.close()


class TestLateRequests:
    def test_a_request_long_after_its_metadata(self, rig: Rig) -> None:
        """Who has lost the right meanwhile is not served for having been let in at the time."""
        parts: queue.Queue[bytes | None] = queue.Queue()
        with grpc.insecure_channel(rig.target) as channel:
            method = channel.stream_unary(LISTING)
            call = method.future(iter(parts.get, None), metadata=rig.metadata("bob"), timeout=60)
            time.sleep(1)
            try:
                place(rig.file, rig.text.replace('["call", "session"]\nmodels = ["identity"]', '["metrics"]'))
                until(lambda: not known(rig, "bob"))
                parts.put(b"")
                parts.put(None)
                assert refused(call.result).code() is grpc.StatusCode.PERMISSION_DENIED
            finally:
                place(rig.file, rig.text)
                until(lambda: known(rig, "bob"))

    def test_who_watches_the_health_of_a_model(self, rig: Rig) -> None:
        request = health_pb2.HealthCheckRequest(service="identity").SerializeToString()
        with grpc.insecure_channel(rig.target) as channel:
            watch = channel.unary_stream(f"{HEALTH}Watch")
            mine, others = (watch(request, metadata=rig.metadata(name), timeout=60) for name in ("bob", "alice"))
            open_to_all = watch(b"", timeout=60)
            assert all(next(one) for one in (mine, others, open_to_all))
            place(rig.file, rig.text.replace('["identity"]', '["cube"]'))
            try:
                assert refused(lambda: next(mine)).code() is grpc.StatusCode.PERMISSION_DENIED
                assert others.is_active() and open_to_all.is_active()
            finally:
                place(rig.file, rig.text)
                until(lambda: healthy(rig, "identity", "bob"))


def healthy(rig: Rig, model: str, name: str) -> bool:
    try:
        return rig.health(model, rig.metadata(name)) == health_pb2.HealthCheckResponse.SERVING
    except grpc.RpcError:
        return False


def known(rig: Rig, name: str) -> bool:
    try:
        return bool(rig.call(LISTING, rig.metadata(name)))
    except grpc.RpcError:
        return False


class TestFileOfPrincipals:
    def test_it_is_broken_in_every_way_and_nobody_is_locked_out(self, rig: Rig) -> None:
        """Sessions go on, and calls: with what was good before."""
        half = rig.text[: rig.text.index("[[principal]]", 20)]
        with Wire(rig.target, "identity", metadata=rig.metadata("bob")) as wire:
            wire.wait(wire.put(X)[0])
            for wrong in ("", "\n# nobody\n", rig.text[: len(rig.text) // 2], "principal = 1", "\0", "[anonymous"):
                # In place, not at once.
                rig.file.write_text(wrong)
                time.sleep(1.5)
                assert known(rig, "bob"), wrong
                wire.wait(wire.put(X)[0])
            rig.file.unlink()
            time.sleep(1.2)
            rig.file.mkdir()
            time.sleep(1.2)
            assert known(rig, "bob")
            rig.file.rmdir()
            # The first half of the file makes sense by itself. Whoever writes is not done at once.
            for _ in range(20):
                rig.file.write_text(half)
                time.sleep(0.1)
                rig.file.write_text(rig.text)
                time.sleep(0.1)
            assert known(rig, "bob")
            wire.wait(wire.put(X)[0])

    def test_links_as_kubernetes_has_them(self, tmp_path: Path) -> None:
        token, entry = new_key("one", ["call"])
        other, more = new_key("two", ["call"])
        for name, text in (("a", entry), ("b", more)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "principals.toml").write_text(text)
        (tmp_path / "..data").symlink_to("a")
        (tmp_path / "principals.toml").symlink_to("..data/principals.toml")

        async def followed() -> None:
            access = Access(str(tmp_path / "principals.toml"), Metrics())
            task = asyncio.create_task(access.follow())
            (tmp_path / "..new").symlink_to("b")
            (tmp_path / "..new").replace(tmp_path / "..data")
            end = time.monotonic() + 60
            while access.generation == 0:
                assert time.monotonic() < end
                await asyncio.sleep(0.05)
            task.cancel()
            assert access.admit(Credentials((f"Bearer {other}",))).name == "two"
            with pytest.raises(Fault):
                access.admit(Credentials((f"Bearer {token}",)))

        asyncio.run(followed())

    def test_an_empty_one_is_no_start(self, tmp_path: Path) -> None:
        for text in ("", "# nobody\n"):
            (tmp_path / "p.toml").write_text(text)
            with pytest.raises(PrincipalsError, match="nobody in it"):
                Access(str(tmp_path / "p.toml"), Metrics())
        (tmp_path / "p.toml").write_text("[anonymous]\nrights = []\n")
        Access(str(tmp_path / "p.toml"), Metrics())


class TestTls:
    @pytest.mark.parametrize(
        "key",
        [
            ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP521R1()),
            ec.generate_private_key(ec.SECP256K1()), rsa.generate_private_key(public_exponent=65537, key_size=1024),
        ],
        ids=["Ed25519", "P-521", "secp256k1", "RSA-1024"],
    )  # fmt: skip
    def test_keys_with_which_nobody_would_get_in(self, tmp_path: Path, key: Any) -> None:
        """gRPC would take them and refuse every connection, be it from the start or after a rotation."""
        cert, pem = Authority().certify("localhost", key=key)
        (tmp_path / "cert").write_bytes(cert)
        (tmp_path / "key").write_bytes(pem)
        with pytest.raises(CertificateError, match="expected an RSA key"):
            Certificates(TlsFiles(str(tmp_path / "cert"), str(tmp_path / "key")), lambda _: None)

    def test_remarks_in_other_letters(self, tmp_path: Path) -> None:
        """As bundles of authorities have them."""
        servers, clients = Authority(), Authority()
        with secured(tmp_path, servers, clients, remark="# Autorit\u00e9s \u6f22\n".encode()) as server:
            tls = pb.TLS(ca=servers.pem, cert=(mine := clients.certify("a"))[0], key=mine[1])
            with pb.connect(f"localhost:{server.port}", tls=tls, retry=ONCE) as client:
                assert np.allclose(client.model("identity").evaluate(X), X)
            assert fetched(server, "/livez", servers) == 200

    def test_the_metrics_port_asks_for_certificates_and_takes_tokens_too(self, tmp_path: Path) -> None:
        servers, clients = Authority(), Authority()
        token, entry = new_key("by-token", ["metrics"])
        (tmp_path / "principals.toml").write_text(
            entry + '[[principal]]\nname = "team"\ncertificates = ["*.team"]\nrights = ["metrics"]\n'
        )
        with secured(tmp_path, servers, clients, principals=str(tmp_path / "principals.toml")) as server:
            assert fetched(server, "/livez", servers) == fetched(server, "/readyz", servers) == 200
            assert fetched(server, "/metrics", servers) == 401
            assert fetched(server, "/metrics", servers, token=token) == 200
            assert fetched(server, "/metrics", servers, clients.certify("a.team")) == 200
            assert fetched(server, "/metrics", servers, clients.certify("a.other")) == 401
            for stranger in (Authority(), servers):
                with pytest.raises(OSError):
                    fetched(server, "/livez", servers, stranger.certify("a.team"))

    def test_where_there_are_no_principals_the_certificate_is_what_counts(self, tmp_path: Path) -> None:
        servers, clients = Authority(), Authority()
        with secured(tmp_path, servers, clients) as server:
            assert fetched(server, "/livez", servers) == 200
            for path in ("/metrics", "/", "/status.json", "/tables"):
                assert fetched(server, path, servers) == fetched(server, path, servers, token="x") == 401
                assert fetched(server, path, servers, clients.certify("anybody")) == 200


def secured(folder: Path, servers: Authority, clients: Authority, remark: bytes = b"", **settings: Any) -> Server:
    cert, key = servers.certify("localhost")
    for name, data in (("cert", cert), ("key", key), ("ca", clients.pem)):
        (folder / name).write_bytes(remark + data)
    files = {
        f"tls_{name}": str(folder / file) for name, file in (("cert", "cert"), ("key", "key"), ("client_ca", "ca"))
    }
    return Server(identity, devices="cpu", threads=1, metrics_tls=True, **files, **settings)


def fetched(
    server: Server, path: str, servers: Authority, mine: tuple[bytes, bytes] | None = None, token: str = ""
) -> int:
    """The status of an HTTPS request. Raises OSError where there is no connection."""
    context = ssl.create_default_context(cadata=servers.pem.decode())
    if mine is not None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(mine[1] + mine[0])
            file.flush()
            context.load_cert_chain(file.name)
    request = urllib.request.Request(f"https://localhost:{server.metrics_port}{path}")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, context=context, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_client_gives_tokens_to_nobody_else(rig: Rig) -> None:
    with pytest.raises(ValueError, match="token is"):
        pb.connect(rig.target, token=b"bytes")  # type: ignore[arg-type]
    for target in (
        "127.0.0.1.evil.example:1",
        "dns://8.8.8.8/localhost:1",
        "ipv4:127.0.0.1:1,10.0.0.1:1",
        "localhost.:1",
    ):
        with pytest.raises(ValueError, match="in plain text"):
            pb.connect(target, token="secret-token")
    with pytest.raises(ValueError) as caught:
        pb.connect(rig.target, token="secret\ntoken")
    assert "secret" not in str(caught.value)
    with pb.connect(rig.target, token=lambda: "secret\r\nx: y") as client, pytest.raises(ValueError) as caught:
        client.models()
    assert "secret" not in str(caught.value)
    with pb.connect(rig.target, token="secret-token") as client:
        assert "secret" not in repr(vars(client._transport)) and "secret" not in repr(client._transport.address)
        with pytest.raises(errors.Unauthenticated) as failed:
            client.models()
    assert "secret" not in repr(failed.value) and "secret" not in json.dumps(str(failed.value.__cause__))
