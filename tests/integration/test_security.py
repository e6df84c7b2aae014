"""Who gets in, and to what: tokens, JWTs, models, quotas and revocation, against a server that knows its callers."""

from __future__ import annotations

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tests.credentials import AUDIENCE, ISSUER, Issuer, key_set, place
from tests.serving import command
from tests.session_wire import OpFailed, Wire
from tests.zoo import cube, identity

import pullback as pb
from pullback import errors
from pullback_server import Server
from pullback_server.fleet import StartError
from pullback_server.rpc import new_key
from pullback_wire import MODEL_METHODS, SESSION_SERVICE, Reason, encode_message
from pullback_wire.v1 import model_service_pb2
from pullback_wire.v1 import session_service_pb2 as session_pb

X = np.arange(1.0, 4.0)
PLENTY = 1 << 20
HEALTH = "/grpc.health.v1.Health/Check"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
ONCE = pb.RetryPolicy(attempts=1)


class Rig:
    """A server, its principals file, and their tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "principals.toml"
        self.issuer = Issuer()
        self.tokens: dict[str, str] = {}
        entries = []
        for name, rights, models, quota in (
            ("alice", ["call", "session"], ["cube", "cu*"], {}),
            ("bob", ["call", "session"], ["identity"], {}),
            ("operator", ["admin", "upload"], ["identity"], {}),
            ("caller", ["call"], ["*"], {}),
            ("holder", ["session"], ["*"], {}),
            ("scraper", ["metrics"], ["*"], {}),
            ("slow", ["call", "session"], ["*"], {"calls_per_second": 0.001}),
            ("few", ["call", "session"], ["*"], {"bytes_per_second": 20_000.0}),
            ("single", ["session"], ["*"], {"sessions": 1}),
            ("small", ["session"], ["*"], {"retained_bytes": PLENTY}),
        ):
            self.tokens[name], entry = new_key(name, rights, models, quota)
            if name == "alice":
                entry += 'subjects = ["alice"]\n'
            entries.append(entry)
        self.text = "".join(entries) + f'[jwt]\nissuer = "{ISSUER}"\naudience = "{AUDIENCE}"\njwks = "keys.json"\n'
        self.file.write_text(self.text)
        (folder / "keys.json").write_text(key_set(self.issuer))
        self.server = Server(
            cube, identity, principals=str(self.file), devices="cpu", threads=1, uploads=str(folder / "uploads")
        ).start()
        self.target = self.server.target

    def connect(self, name: str, **settings: Any) -> pb.Client:
        return pb.connect(self.target, token=self.tokens.get(name, name), **{"retry": ONCE, **settings})

    def metadata(self, name: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.tokens.get(name, name)}"),)

    def wire(self, name: str, *models: str, **options: Any) -> Wire:
        return Wire(self.target, *models, metadata=self.metadata(name), **options)

    def call(self, path: str, metadata: Any = (), data: bytes = b"") -> bytes:
        with grpc.insecure_channel(self.target) as channel:
            return bytes(channel.unary_unary(path)(data, metadata=metadata, timeout=30))

    def metric(self, name: str) -> float:
        request = urllib.request.Request(f"http://127.0.0.1:{self.server.metrics_port}/metrics")
        request.add_header("Authorization", f"Bearer {self.tokens['scraper']}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith(name + " "):
                    return float(line.split()[-1])
        return 0.0


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("security"))
    try:
        yield rig
    finally:
        rig.server.stop()


def code_of(work: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        work()
    return caught.value.code()


def failed(wire: Wire, op: int) -> str:
    with pytest.raises(OpFailed) as caught:
        wire.wait(op)
    return str(caught.value.reason.value)


class TestCredentials:
    def test_those_that_are_known(self, rig: Rig) -> None:
        for token in (rig.tokens["alice"], rig.issuer.token()):
            with rig.connect(token) as client:
                assert np.allclose(client.model("cube").vjp(X, np.ones(3)).gradients, 3 * X**2)
                with client.session():
                    x = client.tensor(X, requires_grad=True)
                    client.model("cube")(x).sum().backward()
                    assert np.allclose(x.grad.numpy(), 3 * X**2)

    @pytest.mark.parametrize(
        ("claims", "told"),
        [
            ({"exp": 1}, "expired"), ({"nbf": 2**33}, "not valid yet"), ({"aud": "x"}, "audience"),
            ({"iss": "x"}, "issuer"), ({"sub": "mallory"}, "no principal's"),
        ],
    )  # fmt: skip
    def test_tokens_of_the_issuer_that_are_no_good(self, rig: Rig, claims: dict[str, Any], told: str) -> None:
        token = rig.issuer.token(**claims)
        with rig.connect(token) as client, pytest.raises(errors.Unauthenticated, match=told) as caught:
            client.models()
        assert caught.value.reason == "UNAUTHENTICATED" and token not in str(caught.value)

    def test_no_others(self, rig: Rig) -> None:
        before = rig.metric('pullback_auth_failures_total{reason="UNAUTHENTICATED"}')
        tokens = (Issuer().token(), "a.b.c", "x", "x" * 9000)
        for token in tokens:
            with rig.connect(token) as client:
                with pytest.raises(errors.Unauthenticated):
                    client.models()
                with pytest.raises(errors.Unauthenticated):
                    client.model("cube").evaluate(X)
                with pytest.raises(errors.Unauthenticated):
                    client.load_model("cube")
                with pytest.raises(errors.Unauthenticated), client.session():
                    client.tensor(X)
        assert rig.metric('pullback_auth_failures_total{reason="UNAUTHENTICATED"}') == before + 4 * len(tokens)

    def test_headers_that_are_strange(self, rig: Rig) -> None:
        listing = MODEL_METHODS["ListModels"].path
        good = rig.metadata("alice")
        assert rig.call(listing, good)
        assert rig.call(listing, (*good, ("authorization-bin", b"\xff"), ("x-authorization", "Bearer x")))
        for metadata in (
            (), good * 2, (*good, ("authorization", "Bearer x")), (("authorization", ""),),
            (("authorization", "Bearer "),), (("authorization-bin", good[0][1].encode()),),
            (("authorization", rig.tokens["alice"]),),
            (("authorization", "Basic " + rig.tokens["alice"]),), (("x-forwarded-user", "alice"),),
        ):  # fmt: skip
            assert code_of(lambda metadata=metadata: rig.call(listing, metadata)) is grpc.StatusCode.UNAUTHENTICATED

    def test_a_large_request_of_somebody_unknown_is_not_read(self, rig: Rig) -> None:
        before = rig.metric('pullback_request_bytes_total{method="ComputeVjp"}')
        with rig.connect("x") as client, pytest.raises(errors.Unauthenticated):
            client.model("cube").vjp(np.ones(6_000_000), np.ones(6_000_000))
        assert rig.metric('pullback_request_bytes_total{method="ComputeVjp"}') == before

    def test_what_there_is_concerns_nobody_else(self, rig: Rig) -> None:
        for path in ("/pullback.v1.GradientService/Nothing", "/x.Y/Z"):
            assert code_of(lambda path=path: rig.call(path)) is grpc.StatusCode.UNAUTHENTICATED
            assert code_of(lambda path=path: rig.call(path, rig.metadata("bob"))) is grpc.StatusCode.UNIMPLEMENTED


class TestRights:
    def test_each_call_needs_its_own(self, rig: Rig) -> None:
        work: dict[str, Callable[[pb.Client], Any]] = {
            "call": lambda client: client.model("identity").evaluate(X),
            "session": lambda client: client.session().close(),
            "list": lambda client: client.models(),
            "load": lambda client: client.load_model("identity"),
            "unload": lambda client: client.unload_model("identity", delete_uploads=True),
            "upload": lambda client: client.upload_weights("identity", {"a": X}, 2),
        }
        may = {
            "alice": {"session", "list"}, "bob": {"call", "session", "list"}, "caller": {"call", "list"},
            "holder": {"session", "list"}, "scraper": set(), "operator": {"list", "load", "unload", "upload"},
        }  # fmt: skip
        for name, allowed in may.items():
            for what, one in work.items():
                with rig.connect(name) as client:
                    try:
                        one(client)
                    except errors.AdminDisabled:
                        assert name == "operator", (name, what)
                    except errors.PermissionDenied:
                        assert what not in allowed, (name, what)
                    except errors.PullbackError as error:
                        # Registered models cannot be loaded anew; but that is found out by those alone who might.
                        assert name == "operator", (name, what, error)
                    else:
                        assert what in allowed, (name, what)

    def test_reflection(self, rig: Rig) -> None:
        request = reflection_pb2.ServerReflectionRequest(list_services="")

        def asked(metadata: Any, target: str = rig.target) -> Any:
            with grpc.insecure_channel(target) as channel:
                method = channel.stream_stream(
                    REFLECTION,
                    request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                    response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
                )
                return next(method(iter([request]), metadata=metadata, timeout=30))

        assert len(asked(rig.metadata("bob")).list_services_response.service) >= 4
        assert code_of(lambda: asked(())) is grpc.StatusCode.UNAUTHENTICATED
        assert code_of(lambda: asked(rig.metadata("scraper"))) is grpc.StatusCode.PERMISSION_DENIED
        with Server(identity, devices="cpu", threads=1, reflection=False) as server:
            assert code_of(lambda: asked((), server.target)) is grpc.StatusCode.UNIMPLEMENTED

    def test_health_is_open_but_does_not_tell_of_models(self, rig: Rig) -> None:
        def health(name: str, metadata: Any = ()) -> int:
            data = health_pb2.HealthCheckRequest(service=name).SerializeToString()
            return int(health_pb2.HealthCheckResponse.FromString(rig.call(HEALTH, metadata, data)).status)

        for name in ("", "liveness", "readiness", SESSION_SERVICE):
            assert health(name) == health_pb2.HealthCheckResponse.SERVING
        assert health("", rig.metadata("x")) == health_pb2.HealthCheckResponse.SERVING
        assert health("cube", rig.metadata("alice")) == health_pb2.HealthCheckResponse.SERVING
        for name in ("cube", "no-such-model"):
            assert code_of(lambda name=name: health(name)) is grpc.StatusCode.UNAUTHENTICATED
            assert code_of(lambda name=name: health(name, rig.metadata("bob"))) is grpc.StatusCode.PERMISSION_DENIED
        with rig.connect("x") as client:
            client.ping()

    def test_metrics(self, rig: Rig) -> None:
        def get(path: str, token: str | None) -> int:
            request = urllib.request.Request(f"http://127.0.0.1:{rig.server.metrics_port}{path}")
            if token is not None:
                request.add_header("Authorization", f"Bearer {token}")
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                return error.code

        assert get("/metrics", rig.tokens["scraper"]) == 200
        assert get("/metrics", None) == get("/metrics", "x") == 401
        assert get("/metrics", rig.tokens["alice"]) == 403
        assert get("/livez", None) == get("/readyz", None) == 200


class TestModels:
    """Whether a model that is not yours exists is nothing that you could find out."""

    @pytest.mark.parametrize(
        "name", ["cube", "no-such-model", "CUBE", "cube\n", "cu*", "*", "../cube", "ｃube", "cub\u0435"]
    )
    def test_everywhere_that_a_model_is_named(self, rig: Rig, name: str) -> None:
        told: set[str] = set()

        def denied(work: Callable[[], Any]) -> None:
            with pytest.raises(errors.PermissionDenied) as caught:
                work()
            assert caught.value.reason == "PERMISSION_DENIED"
            told.add(str(caught.value).replace(name, "").replace(repr(name), ""))

        with rig.connect("bob") as client, rig.connect("operator") as operator:
            model = client.model(name)
            denied(lambda: model.evaluate(X))
            denied(lambda: model.vjp(X, X))
            denied(lambda: model.jvp(X, X))
            denied(lambda: model.info)
            denied(lambda: operator.load_model(name))
            denied(lambda: operator.unload_model(name))
            denied(lambda: operator.upload_weights(name, {"a": X}, 2))
            denied(lambda: client.session(models=[name]))
            with client.session():
                x = client.tensor(X, requires_grad=True)
                denied(lambda: model(x))
                # It goes on.
                assert np.allclose(client.model("identity")(x).numpy(), X)
        assert all("cube" not in one for one in told)

    def test_ops_of_a_session(self, rig: Rig) -> None:
        with rig.wire("bob", "identity") as wire:
            op, x = wire.put(X, requires_grad=True)
            wire.wait(op)
            assert failed(wire, wire.call_op("model:cube", {"x": x})[0]) == "PERMISSION_DENIED"
            parameters = session_pb.ParametersOp(handles=[5])
            parameters.model.name = "cube"
            assert failed(wire, wire.send(session_pb.SessionRequest(parameters=parameters))) == "PERMISSION_DENIED"
            stateless = session_pb.StatelessOp()
            stateless.evaluate.function.model = "cube"
            assert failed(wire, wire.send(session_pb.SessionRequest(stateless=stateless))) == "PERMISSION_DENIED"
            wire.wait(wire.call_op("model:identity", {"x": x})[0])
        assert code_of(lambda: rig.wire("bob", "cube")) is grpc.StatusCode.PERMISSION_DENIED

    def test_handles_are_of_one_session(self, rig: Rig) -> None:
        with rig.wire("alice", "cube") as mine, rig.wire("bob", "identity") as other:
            op, x = mine.put(X, handle=77)
            mine.wait(op)
            for work in (lambda: other.call_op("model:identity", {"x": x})[0], lambda: other.grad([x], [x])[0]):
                assert failed(other, work()) == "BAD_HANDLE"
            with pytest.raises(OpFailed) as caught:
                other.get(x)
            assert caught.value.reason is Reason.BAD_HANDLE
            assert np.allclose(mine.get(x)[0], X)

    def test_lists_and_suggestions(self, rig: Rig) -> None:
        with rig.connect("alice") as client:
            assert [model.name for model in client.models()] == ["cube"]
            with pytest.raises(errors.ModelNotFound) as caught:
                client.model("cux").evaluate(X)
            assert "cube" in str(caught.value) and "identity" not in str(caught.value)
        with rig.connect("bob") as client:
            assert [model.name for model in client.models()] == ["identity"]
        with rig.connect("caller") as client:
            assert [model.name for model in client.models()] == ["cube", "identity"]

    def test_what_one_asked_before_is_not_known_to_another(self, rig: Rig) -> None:
        with rig.connect("alice") as alice, rig.connect("bob") as bob:
            for _ in range(3):
                assert np.allclose(alice.model("cube").vjp(X, np.ones(3)).gradients, 3 * X**2)
                with pytest.raises(errors.PermissionDenied):
                    bob.model("cube").vjp(X, np.ones(3))

    def test_many_at_once_are_not_mixed_up(self, rig: Rig) -> None:
        """Whoever it is that a task is started for, it answers for its own caller."""
        from concurrent.futures import ThreadPoolExecutor

        def one(number: int) -> bool:
            name, model = (("alice", "cube"), ("bob", "identity"))[number % 2]
            other = {"cube": "identity", "identity": "cube"}[model]
            with rig.connect(name, retry=pb.RetryPolicy()) as client:
                for _ in range(20):
                    client.model(model).evaluate(X)
                    with pytest.raises(errors.PermissionDenied):
                        client.model(other).evaluate(X)
            return True

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(one, range(8)))


class TestQuotas:
    def test_calls(self, rig: Rig) -> None:
        before = rig.metric('pullback_quota_refusals_total{quota="calls"}')
        with rig.connect("slow") as client, rig.connect("slow") as another:
            client.models()
            for one in (client, another):
                with pytest.raises(errors.QuotaExceeded, match=r"'slow' has used up .* 0\.001 calls") as caught:
                    one.model("cube").evaluate(X)
                assert caught.value.code == 8 and (caught.value.retry_after or 0) > 900
            with pytest.raises(errors.QuotaExceeded):
                client.session()
            client.ping()
        assert rig.metric('pullback_quota_refusals_total{quota="calls"}') == before + 3

    def test_bytes(self, rig: Rig) -> None:
        before = rig.metric('pullback_quota_refusals_total{quota="bytes"}')
        with rig.connect("few") as client, rig.wire("few") as wire:
            client.model("cube").evaluate(np.ones(50_000))
            with pytest.raises(errors.QuotaExceeded, match="20,000 bytes per second") as caught:
                client.models()
            assert (caught.value.retry_after or 0) > 5
            assert failed(wire, wire.put(X)[0]) == "QUOTA_EXCEEDED"
            # What comes in chunks is refused before it has come.
            transfer = wire.upload(np.ones(1000))
            put = session_pb.PutOp(handles=[9], requires_grad=[False])
            put.tensors.add(dtype=2, shape=[1000], transfer=transfer)
            assert failed(wire, wire.send(session_pb.SessionRequest(put=put))) == "QUOTA_EXCEEDED"
        assert rig.metric('pullback_quota_refusals_total{quota="bytes"}') >= before + 3

    def test_sessions(self, rig: Rig) -> None:
        before = rig.metric('pullback_quota_refusals_total{quota="sessions"}')
        # One that never says what it wants counts as well.
        with rig.wire("single", open=False) as silent:
            until(lambda: not opens(rig, "single"))
            assert code_of(lambda: rig.wire("single")) is grpc.StatusCode.RESOURCE_EXHAUSTED
            silent.half_close()
        until(lambda: opens(rig, "single"))
        with rig.wire("single") as wire:
            assert code_of(lambda: rig.wire("single")) is grpc.StatusCode.RESOURCE_EXHAUSTED
            op, x = wire.put(X)
            wire.wait(op)
            assert np.allclose(wire.get(x)[0], X)
        until(lambda: opens(rig, "single"))
        assert rig.metric('pullback_quota_refusals_total{quota="sessions"}') >= before + 2

    def test_what_sessions_retain(self, rig: Rig) -> None:
        before = rig.metric('pullback_quota_refusals_total{quota="retained"}')
        most = PLENTY // 8
        with rig.wire("small", "cube") as one, rig.wire("small") as other:
            op, x = one.put(np.ones(most // 2), requires_grad=True)
            one.wait(op)
            op, _ = other.put(np.ones(most // 4))
            other.wait(op)
            # More than is left: as a tensor, as the result of a model, in chunks.
            assert failed(other, other.put(np.ones(most // 3))[0]) == "QUOTA_EXCEEDED"
            assert failed(one, one.call_op("model:cube", {"x": x})[0]) == "QUOTA_EXCEEDED"
            transfer = other.upload(np.ones(most // 3))
            put = session_pb.PutOp(handles=[9], requires_grad=[False])
            put.tensors.add(dtype=2, shape=[most // 3], transfer=transfer)
            assert failed(other, other.send(session_pb.SessionRequest(put=put))) == "QUOTA_EXCEEDED"
            # Reading what is there is always possible, and releasing makes room.
            assert one.get(x)[0].nbytes == PLENTY // 2
            one.wait(one.release(x))
            other.wait(other.put(np.ones(most // 3))[0])
        assert rig.metric('pullback_quota_refusals_total{quota="retained"}') >= before + 3


def opens(rig: Rig, name: str, *models: str) -> bool:
    try:
        rig.wire(name, *models).close()
    except grpc.RpcError:
        return False
    return True


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


class TestRevocation:
    @pytest.fixture
    def restored(self, rig: Rig) -> Iterator[None]:
        yield
        place(rig.file, rig.text)
        until(lambda: self._known(rig, "alice") and opens(rig, "alice", "cube"))

    def _known(self, rig: Rig, name: str) -> bool:
        try:
            return bool(rig.call(MODEL_METHODS["ListModels"].path, rig.metadata(name)))
        except grpc.RpcError:
            return False

    def test_a_revoked_token(self, rig: Rig, restored: None) -> None:
        with rig.wire("alice", "cube") as wire, rig.wire("bob", "identity") as other, rig.connect("alice") as client:
            wire.wait(wire.put(X, requires_grad=True)[0])
            digest = next(line for line in rig.text.splitlines() if line.startswith("sha256"))
            place(rig.file, rig.text.replace(digest, f'sha256 = ["{"0" * 64}"]', 1))
            until(lambda: not self._known(rig, "alice"))
            with pytest.raises(errors.Unauthenticated):
                client.model("cube").vjp(X, np.ones(3))
            assert code_of(lambda: wire.wait(99)) is grpc.StatusCode.UNAUTHENTICATED
            other.wait(other.put(X)[0])

    @pytest.mark.parametrize(
        ("old", "new"),
        [('rights = ["call", "session"]', 'rights = ["call"]'), ('models = ["cube", "cu*"]', 'models = ["square"]')],
    )
    def test_a_right_and_a_model_that_are_taken_away(self, rig: Rig, restored: None, old: str, new: str) -> None:
        with rig.wire("alice", "cube") as wire, rig.wire("bob", "identity") as other:
            wire.wait(wire.put(X)[0])
            place(rig.file, rig.text.replace(old, new, 1))
            assert code_of(lambda: wire.wait(99)) is grpc.StatusCode.PERMISSION_DENIED
            other.wait(other.put(X)[0])

    def test_a_session_does_not_outlive_its_token(self, rig: Rig) -> None:
        token = rig.issuer.token(exp=time.time() - 5)
        with rig.wire(token, "cube") as wire:
            wire.wait(wire.put(X)[0])
            assert code_of(lambda: wire.wait(99)) is grpc.StatusCode.UNAUTHENTICATED

    def test_the_file_is_replaced_under_load(self, rig: Rig) -> None:
        """No call of somebody who is in all of them fails, whatever else changes."""
        from concurrent.futures import ThreadPoolExecutor

        stop = time.monotonic() + 6

        def calls(number: int) -> int:
            made = 0
            with rig.connect("alice" if number % 2 else rig.issuer.token()) as client:
                while time.monotonic() < stop:
                    client.model("cube").vjp(X, np.ones(3))
                    made += 1
            return made

        with ThreadPoolExecutor(8) as pool:
            work = [pool.submit(calls, number) for number in range(8)]
            for number in range(6):
                _, more = new_key(f"more-{number}", ["call"])
                place(rig.file, ("broken [" if number % 3 == 2 else "") + more + rig.text)
                time.sleep(0.9)
            place(rig.file, rig.text)
            assert all(one.result() for one in work)


class TestClient:
    def test_a_provider_of_tokens(self, rig: Rig) -> None:
        """One that has expired is asked for once more, and no more than that."""
        given: list[str] = []

        def provider() -> str:
            given.append(rig.issuer.token(exp=1) if len(given) == 1 else rig.issuer.token())
            return given[-1]

        with pb.connect(rig.target, token=provider) as client:
            client.models()
            assert len(given) == 1
            client.models()
            assert len(given) == 3
            with client.session():
                assert np.allclose(client.tensor(X).numpy(), X)
        asked = []

        def stubborn() -> str:
            asked.append(1)
            return f"x{len(asked)}"

        with pb.connect(rig.target, token=stubborn) as client, pytest.raises(errors.Unauthenticated):
            client.models()
        assert len(asked) == 2
        with pb.connect(rig.target, token="x") as client, pytest.raises(errors.Unauthenticated):
            client.models()

    def test_the_command_line(self, rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
        from pullback._cli import main

        assert main(["models", "--target", rig.target, "--token", rig.tokens["bob"]]) == 0
        assert "identity" in capsys.readouterr().out
        assert main(["models", "--target", rig.target]) == 1
        assert "authorization" in capsys.readouterr().err


class TestStarting:
    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"host": "0.0.0.0"}, "--host 0.0.0.0 can be reached by others"),
            ({"host": "::"}, "can be reached by others"),
            ({"host": "some.host.example"}, "can be reached by others"),
            ({"tls_cert": "c.pem"}, "belong together"),
            ({"tls_key": "k.pem"}, "belong together"),
            ({"tls_client_ca": "c.pem"}, "--tls-client-ca is of no use"),
            ({"metrics_tls": True}, "--metrics-tls is of no use"),
            ({"tls_cert": "/none", "tls_key": "/none"}, "--tls-cert /none: No such file"),
            ({"principals": "/none"}, "principals /none: No such file"),
        ],
    )
    def test_what_is_refused(self, settings: dict[str, Any], told: str) -> None:
        with pytest.raises(StartError, match=told), Server(identity, devices="cpu", **settings):
            pass

    def test_a_key_by_the_command_line(self, tmp_path: Path) -> None:
        made = subprocess.run(
            command("key", "ci", "--rights", "call,metrics", "--models", "a-*,b", "--sessions", "3"),
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert 'rights = ["call", "metrics"]\nmodels = ["a-*", "b"]\nsessions = 3\n' in made.stdout
        assert made.stderr.split()[-1] not in made.stdout
        wrong = subprocess.run(command("key", "ci", "--rights", "load"), capture_output=True, text=True)
        assert wrong.returncode == 2 and "rights[0]" in wrong.stderr


def test_nothing_that_was_said_is_in_the_log(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with rig.connect("a-token-that-nobody-knows") as client, pytest.raises(errors.Unauthenticated):
        client.models()
    listing = model_service_pb2.ListModelsRequest()
    assert rig.call(MODEL_METHODS["ListModels"].path, rig.metadata("bob"), encode_message(listing, []))
    for secret in ("a-token-that-nobody-knows", *rig.tokens.values()):
        assert secret not in caplog.text
