"""Principals: the file, whose a token or a certificate is, what that one may, and how much."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tests.credentials import AUDIENCE, ISSUER, Authority, Issuer, key_set, place

from pullback_server.faults import Fault
from pullback_server.rpc import Access, PrincipalsError, new_key
from pullback_server.rpc.security.callers import Credentials, caller, sees
from pullback_server.rpc.security.gate import NEEDED, OPEN
from pullback_server.rpc.security.principals import RIGHTS, Quota, read_book
from pullback_server.rpc.security.quotas import SessionUse, Usage
from pullback_server.telemetry import Metrics
from pullback_wire import Reason
from pullback_wire.inference import open_inference_pb2
from pullback_wire.v1 import gradient_service_pb2, model_service_pb2, session_service_pb2

JWT = f'[jwt]\nissuer = "{ISSUER}"\naudience = "{AUDIENCE}"\njwks = "keys.json"\n'


def entry(name: str, *fields: str, rights: str = '["call"]') -> str:
    return "\n".join(("[[principal]]", f'name = "{name}"', f"rights = {rights}", *fields, ""))


def access(folder: Path, text: str, *issuers: Issuer) -> Access:
    (folder / "principals.toml").write_text(text)
    if issuers:
        (folder / "keys.json").write_text(key_set(*issuers))
    return Access(str(folder / "principals.toml"), Metrics())


def bearer(*tokens: str) -> Credentials:
    return Credentials(tuple(f"Bearer {token}" for token in tokens))


def refused(access: Access, credentials: Credentials) -> str:
    """What somebody is told whom nobody knows."""
    with pytest.raises(Fault) as caught:
        access.admit(credentials)
    assert caught.value.reason is Reason.UNAUTHENTICATED
    return caught.value.message


async def until(condition: Any) -> None:
    for _ in range(600):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise TimeoutError


class TestFile:
    def test_everything_that_is_wrong_is_told_and_where(self) -> None:
        digest = "0" * 64
        text = "\n".join((
            entry("good", f'sha256 = ["{digest}"]', "sessions = 2", "calls_per_second = 3"),
            entry("bad name", 'sha256 = ["a secret that was pasted"]', 'surname = "x"', rights='["cal"]'),
            entry("late", f'sha256 = ["{digest}"]', 'calls_per_second = "5"', "bytes_per_second = 0"),
            "[anonymous]", 'rights = ["call"]', 'sha256 = []', "[extra]",
        ))  # fmt: skip
        with pytest.raises(PrincipalsError) as caught:
            read_book("p.toml", text.encode())
        told = str(caught.value)
        assert told.startswith("principals p.toml: ")
        for part in (
            "principal 2 ('bad name'): name: ", "principal 2 ('bad name'): sha256[0]: ", "surname: Extra",
            "rights[0]: Input should be 'call', 'session'", "principal 3 ('late'): calls_per_second: ",
            "principal 3 ('late'): bytes_per_second: ", "anonymous.sha256: Extra", "extra: Extra",
        ):  # fmt: skip
            assert part in told
        assert "pasted" not in told

    def test_what_only_several_entries_show(self) -> None:
        digest = "0" * 64
        text = (
            entry("one", f'sha256 = ["{digest}"]', 'certificates = ["a.example"]')
            + entry("one", 'subjects = ["s-*"]')
            + entry("two", f'sha256 = ["{digest}"]', 'certificates = ["a.example"]')
            + entry("idle")
            + entry("anonymous", f'sha256 = ["{"1" * 64}"]')
        )
        with pytest.raises(PrincipalsError) as caught:
            read_book("p.toml", text.encode())
        told = str(caught.value)
        for part in (
            "2 principals are called 'one'", "'one' and 'two' have '00000000...' in sha256",
            "'one' and 'two' have 'a.example' in certificates", "'idle' has neither", "'one' has subjects, and",
            "a principal is called 'anonymous'",
        ):  # fmt: skip
            assert part in told

    @pytest.mark.parametrize("data", [b"\xff", b"[[principal", b"\x00", b"principal = 3", b"[jwt]\nissuer = 1"])
    def test_what_is_no_such_file(self, data: bytes) -> None:
        with pytest.raises(PrincipalsError, match=r"^principals p.toml: "):
            read_book("p.toml", data)

    def test_there_must_be_one(self, tmp_path: Path) -> None:
        with pytest.raises(PrincipalsError, match="No such file"):
            Access(str(tmp_path / "none.toml"), Metrics())
        (tmp_path / "p.toml").write_text(entry("one", 'subjects = ["one"]') + JWT)
        with pytest.raises(PrincipalsError, match=r"key set .*keys.json: No such file"):
            Access(str(tmp_path / "p.toml"), Metrics())

    @pytest.mark.parametrize(
        ("algorithms", "what"),
        [('["HS256"]', "Input should be 'RS256'"), ('["none"]', "Input should"), ("[]", "least 1")],
    )
    def test_shared_secrets_are_no_keys(self, algorithms: str, what: str) -> None:
        with pytest.raises(PrincipalsError, match=what):
            read_book("p.toml", f"{JWT}algorithms = {algorithms}\n".encode())

    def test_a_new_entry(self) -> None:
        token, text = new_key("ci", ["call", "admin"], ["team-*"], {"sessions": 2, "calls_per_second": 0.5})
        (read,) = tomllib.loads(text)["principal"]
        assert read["sha256"] == [hashlib.sha256(token.encode()).hexdigest()] and token not in text
        book = read_book("p.toml", text.encode())
        principal = book.by_digest[read["sha256"][0]]
        assert principal.quota == Quota(sessions=2, calls_per_second=0.5)
        assert principal.sees("team-a") and not principal.sees("ateam-a")
        for wrong in (("", ["call"]), ("a/b", ["call"]), ("a", []), ("a", ["load"])):
            with pytest.raises(ValueError):
                new_key(*wrong)

    def test_a_new_token_can_follow_an_option(self) -> None:
        assert not any(new_key("one", ["call"])[0].startswith("-") for _ in range(500))


class TestTokens:
    def test_whose_it_is(self, tmp_path: Path) -> None:
        one, first = new_key("one", ["call"])
        two, second = new_key("two", ["session"])
        known = access(tmp_path, first + second)
        assert known.admit(bearer(one)).name == "one"
        assert known.admit(Credentials((f"bEaReR   {two}  ",))).name == "two"
        for credentials, told in (
            (Credentials(), "only callers whom it knows"),
            (bearer("x"), "does not know the token"),
            (bearer(one[:-1]), "does not know"),
            (bearer(one + "\0"), "does not know"),
            (bearer(hashlib.sha256(one.encode()).hexdigest()), "does not know"),
            (bearer(one, one), "2 authorization headers"),
            (bearer(one, "x"), "2 authorization headers"),
            (bearer(""), "0 characters"),
            (bearer("x" * 8193), "8193 characters"),
            (Credentials((one,)), "not of the form"),
            (Credentials((f"Basic {one}",)), "not of the form"),
            (Credentials(("",)), "not of the form"),
            (Credentials((f"Bearer\t{one}",)), "not of the form"),
            (bearer(one + "\N{SNOWMAN}"), "not of the form"),
            (bearer("\ud800"), "not of the form"),
        ):
            message = refused(known, credentials)
            assert told in message and one not in message

    def test_a_bad_token_does_not_make_its_bearer_somebody_else(self, tmp_path: Path) -> None:
        _, text = new_key("one", ["call"])
        known = access(tmp_path, text + 'certificates = ["*"]\n[anonymous]\nrights = ["call"]\n')
        pem, _ = Authority().certify("a.example")
        assert known.admit(Credentials()).name == "anonymous"
        assert known.admit(Credentials((), pem)).name == "one"
        refused(known, Credentials(("Bearer x",), pem))

    def test_there_being_no_file_everybody_may_call_and_nobody_administer(self) -> None:
        known = Access(None, Metrics())
        anybody = known.admit(bearer("x", "y"))
        anybody.need("call")
        anybody.need("session")
        anybody.need_model("any")
        known.admit_metrics("Bearer x")
        for right in ("admin", "upload"):
            with pytest.raises(Fault, match="--principals") as caught:
                anybody.need(right)
            assert caught.value.reason is Reason.ADMIN_DISABLED


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer()


class TestJwt:
    @pytest.fixture
    def known(self, tmp_path: Path, issuer: Issuer) -> Access:
        text = entry("alice", 'subjects = ["alice"]') + entry("staff", 'subjects = ["alice*", "spiffe://x/*"]') + JWT
        return access(tmp_path, text, issuer)

    def test_whose_it_is(self, known: Access, issuer: Issuer) -> None:
        for subject, name in (
            ("alice", "alice"), ("alice2", "staff"), ("alice\nx", "staff"), ("spiffe://x/ns/y", "staff"),
        ):  # fmt: skip
            assert known.admit(bearer(issuer.token(subject))).name == name
        assert "no principal's" in refused(known, bearer(issuer.token("Alice")))
        assert known.admit(bearer(issuer.token(aud=["another", AUDIENCE]))).name == "alice"
        # Within the leeway.
        assert known.admit(bearer(issuer.token(exp=time.time() - 3, nbf=time.time() + 3))).name == "alice"

    @pytest.mark.parametrize(
        ("claims", "told"),
        [
            ({"exp": 1}, "it has expired"),
            ({"exp": time.time() - 60}, "it has expired"),
            ({"exp": None}, "lacks one of"),
            ({"exp": "soon"}, "malformed"),
            ({"exp": float("inf")}, "malformed"),
            ({"exp": 10**400}, "malformed"),
            ({"nbf": time.time() + 3600}, "not valid yet"),
            ({"iat": time.time() + 3600}, "not valid yet"),
            ({"aud": "another"}, "another audience"),
            ({"aud": []}, "lacks one of"),
            ({"aud": ["a", "b"]}, "another audience"),
            ({"aud": {AUDIENCE: 1}}, "another audience"),
            ({"aud": None}, "lacks one of"),
            ({"iss": "https://issuer.example/"}, "another issuer"),
            ({"iss": None}, "lacks one of"),
            ({"sub": None}, "lacks one of"),
            ({"sub": ""}, "no text"),
        ],
    )
    def test_claims(self, known: Access, issuer: Issuer, claims: dict[str, Any], told: str) -> None:
        assert told in refused(known, bearer(issuer.token(**claims)))

    def test_signatures(self, known: Access, issuer: Issuer) -> None:
        head, claims, signature = issuer.token().split(".")

        def made(header: dict[str, Any], key: bytes | None = None) -> str:
            first = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=").decode()
            text = f"{first}.{claims}"
            mac = b"" if key is None else hmac.digest(key, text.encode(), "sha256")
            return f"{text}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"

        jwk = json.dumps(issuer.jwk).encode()
        for token, told in (
            (Issuer().token(), "signature is wrong"),
            (f"{head}.{claims}.{signature[:-8]}AAAAAAAA", "signature is wrong"),
            (f"{head}.{claims}.", "signature is wrong"),
            (Issuer("two").token(), "not in the key set"),
            (made({"alg": "ES256", "kid": 1}), "malformed"),
            (made({"alg": "ES256", "kid": "one", "b64": False, "crit": ["b64"]}), ""),
            (issuer.token(headers={"crit": ["x"], "x": 1}), ""),
            (made({"alg": "none"}), "not allowed"),
            (made({"alg": "None", "kid": "one"}), "not allowed"),
            (made({"alg": "HS256", "kid": "one"}, issuer.public_pem), "not allowed"),
            (made({"alg": "HS256", "kid": "one"}, jwk), "not allowed"),
            (made({"alg": ["ES256"]}), "not allowed"),
            (made({}), "not allowed"),
            (Issuer(kind="RSA").token(), "not in the key set"),
            ("a.b.c", "malformed"),
            ("..", "malformed"),
            ("." * 2 + "x" * 8000, "malformed"),
        ):
            assert told in refused(known, bearer(token))

    def test_a_token_that_has_expired_since_it_was_last_seen(self, known: Access, issuer: Issuer) -> None:
        token = issuer.token(exp=time.time() - 9)
        caller = known.admit(bearer(token))
        caller.need("call")
        while time.time() < caller._expires:
            time.sleep(0.05)
        assert "expired" in refused(known, bearer(token))
        with pytest.raises(Fault, match="expired"):
            caller.need("call")

    def test_key_sets(self, tmp_path: Path) -> None:
        unnamed, other, rsa = Issuer(None), Issuer("two"), Issuer("rsa", "RSA")
        text = entry("alice", 'subjects = ["alice"]') + JWT
        strange = ({"kty": "EC", "crv": "P-256", "x": "!", "y": ""}, {"kty": "new"}, {}, {"kty": "EC", "use": "enc"})
        (tmp_path / "keys.json").write_text(key_set(unnamed, rsa, more=strange))
        known = access(tmp_path, text)
        for issuer in (unnamed, rsa):
            assert known.admit(bearer(issuer.token())).name == "alice"
        # Without a name in the header it is open which of two keys is meant.
        known = access(tmp_path, text, unnamed, other)
        assert "several could be meant" in refused(known, bearer(unnamed.token()))
        assert known.admit(bearer(other.token())).name == "alice"
        # A set in the middle of a rotation.
        twin = Issuer("two")
        known = access(tmp_path, text, twin, other)
        for issuer in (other, twin):
            assert known.admit(bearer(issuer.token())).name == "alice"
        assert "signature" in refused(known, bearer(Issuer("two").token()))
        for keys, told in (
            ("{}", "list of keys"), ("[]", "list of keys"), ("{", "list of keys"), ('{"keys": [1]}', "list of keys"),
            ('{"keys": []}', "no key is for"), (json.dumps({"keys": [*strange]}), "no key is for"),
            ('{"keys": [{"kty": "oct", "k": "AAAA"}]}', "secret"), (key_set(more=({**other.jwk, "d": "x"},)), "secret"),
        ):  # fmt: skip
            (tmp_path / "keys.json").write_text(keys)
            with pytest.raises(PrincipalsError, match=told):
                access(tmp_path, text)

    def test_without_the_table_it_is_a_token_like_others(self, tmp_path: Path, issuer: Issuer) -> None:
        token = issuer.token()
        digest = hashlib.sha256(token.encode()).hexdigest()
        known = access(tmp_path, entry("one", f'sha256 = ["{digest}"]'))
        assert known.admit(bearer(token)).name == "one"


class TestCertificates:
    def test_whose_it_is(self, tmp_path: Path) -> None:
        known = access(
            tmp_path,
            entry("host", 'certificates = ["*.example.org"]')
            + entry("workload", 'certificates = ["spiffe://cluster/ns/team/*"]')
            + entry("common", 'certificates = ["robot ?"]'),
        )
        ca = Authority()
        for (pem, _), name in (
            (ca.certify("a.example.org"), "host"),
            (ca.certify("x", "a.b.example.org"), "host"),
            (ca.certify(uris=("spiffe://cluster/ns/team/sa/x",)), "workload"),
            (ca.certify("a.example.org", uris=("spiffe://cluster/ns/team/sa/x",)), "host"),
            (ca.certify(common="robot 1"), "common"),
        ):
            assert known.admit(Credentials((), pem)).name == name
        for pem, _ in (
            ca.certify("example.org"),
            ca.certify("a.example.org.evil"),
            # Names of one kind do not pass for those of another, and a common name is none where there are others.
            ca.certify("spiffe://cluster/ns/team/sa/x"),
            ca.certify(uris=("https://a.example.org",)),
            ca.certify(common="spiffe://cluster/ns/team/x"),
            ca.certify("elsewhere", common="robot 1"),
            ca.certify(common="robot 11"),
        ):
            assert "no principal's" in refused(known, Credentials((), pem))
        assert "expired" in refused(known, Credentials((), ca.certify("a.example.org", ends=-0.5)[0]))
        assert "not valid yet" in refused(known, Credentials((), ca.certify("a.example.org", begins=1)[0]))
        assert "cannot be read" in refused(known, Credentials((), b"x"))


class TestCallers:
    def test_rights_and_models(self, tmp_path: Path) -> None:
        token, text = new_key("one", ["call"], ["team-*", "shared/[ab]"])
        known = access(tmp_path, text + '[anonymous]\nrights = ["session"]\nmodels = []\n')
        one, nobody = known.admit(bearer(token)), known.admit(Credentials())
        one.need("call", "session")
        for model in ("team-", "team-a/b", "shared/a"):
            one.need_model(model)
        for model in ("", "team", "Team-a", "shared/c", "xteam-a", "x\nteam-a", "t" * 10**6):
            with pytest.raises(Fault, match="no right to a model") as caught:
                one.need_model(model)
            assert caught.value.reason is Reason.PERMISSION_DENIED and len(caught.value.message) < 300
        with pytest.raises(Fault) as caught:
            one.need("admin")
        assert caught.value.reason is Reason.PERMISSION_DENIED
        # Credentials would help.
        with pytest.raises(Fault) as caught:
            nobody.need("call")
        assert caught.value.reason is Reason.UNAUTHENTICATED
        with pytest.raises(Fault):
            nobody.need_model("team-a")

    def test_nobody_is_let_through_whom_the_gate_has_not_seen(self) -> None:
        with pytest.raises(Fault, match="not asked") as caught:
            caller()
        assert caught.value.reason is Reason.INTERNAL
        assert not sees("any")

    def test_whom_calls_are_counted_for(self, tmp_path: Path) -> None:
        token, text = new_key("one", ["call"])
        known = access(tmp_path, text + '[anonymous]\nrights = ["call"]\n')
        assert known.admit(bearer(token)).counted_as("two", "peer") == "one"
        assert known.admit(Credentials()).counted_as("one", "peer") == "anonymous/one"
        assert known.admit(Credentials()).counted_as("", "peer") == "anonymous/peer"
        assert Access(None, Metrics()).admit(Credentials()).counted_as("one", "peer") == "one"

    def test_every_method_needs_something(self) -> None:
        files = (gradient_service_pb2, model_service_pb2, session_service_pb2, open_inference_pb2)
        offered = {
            f"/{service.full_name}/{method.name}"
            for file in files
            for service in file.DESCRIPTOR.services_by_name.values()
            for method in service.methods
        }
        assert offered - OPEN == {method for method in NEEDED if not method.startswith("/grpc.")}
        # As of health, whoever asks learns nothing of models.
        assert {method.rpartition("/")[2] for method in OPEN} == {"ServerLive", "ServerReady"}
        assert all(NEEDED.values())

    def test_metrics(self, tmp_path: Path) -> None:
        token, text = new_key("one", ["metrics"])
        other, more = new_key("two", ["call"])
        known = access(tmp_path, text + more + 'certificates = ["scraper"]\n')
        known.admit_metrics(f"Bearer {token}")
        for header, reason in (
            (None, Reason.UNAUTHENTICATED), ("", Reason.UNAUTHENTICATED), ("Bearer x", Reason.UNAUTHENTICATED),
            (f"Bearer {token},Bearer {token}", Reason.UNAUTHENTICATED), (f"Bearer {other}", Reason.PERMISSION_DENIED),
        ):  # fmt: skip
            with pytest.raises(Fault) as caught:
                known.admit_metrics(header)
            assert caught.value.reason is reason
        threads = [threading.Thread(target=known.admit_metrics, args=(f"Bearer {token}",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class TestFollowing:
    def test_the_file_is_followed(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        token, text = new_key("one", ["call", "session"])
        issuer, later = Issuer("a"), Issuer("b")
        text += 'subjects = ["alice"]\n'
        known = access(tmp_path, text + JWT, issuer)
        file, ended = tmp_path / "principals.toml", []

        async def main() -> None:
            following = asyncio.create_task(known.follow())
            by_token, by_jwt = known.admit(bearer(token)), known.admit(bearer(issuer.token()))
            with known.keep(by_token, "session", ended.append), known.keep(by_jwt, "session", ended.append):
                # What is broken changes nothing.
                place(file, text + JWT + "x")
                await until(lambda: "the file is broken" in caplog.text)
                by_token.need("call")
                await asyncio.sleep(2.5)
                assert caplog.text.count("the file is broken") == 1
                # Nor does what is gone; and it is read when it is back, with a key set of others.
                file.unlink()
                await until(lambda: "No such file" in caplog.text)
                by_jwt.need("call")
                (tmp_path / "keys.json").write_text(key_set(later))
                place(file, text + JWT)
                await until(lambda: known.generation == 1)
                assert known.admit(bearer(later.token())).name == "one"
                refused(known, bearer(issuer.token()))
                await until(lambda: ended)
                assert [fault.reason for fault in ended] == [Reason.UNAUTHENTICATED]
                by_token.need("call")
                # A key set alone that changes; one that is broken.
                place(tmp_path / "keys.json", key_set(issuer))
                await until(lambda: known.generation == 2)
                place(tmp_path / "keys.json", "{")
                await until(lambda: "list of keys" in caplog.text)
                known.admit(bearer(issuer.token()))
                # The right that is needed goes, then everything.
                place(tmp_path / "keys.json", key_set(issuer))
                place(file, (text + JWT).replace('"call", "session"', '"call"'))
                await until(lambda: len(ended) == 2)
                assert ended[1].reason is Reason.PERMISSION_DENIED
                by_token.need("call")
                place(file, entry("two", 'subjects = ["x"]') + JWT)
                await until(lambda: known.generation >= 4)
                with pytest.raises(Fault) as caught:
                    by_token.need("call")
                assert caught.value.reason is Reason.UNAUTHENTICATED
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

        asyncio.run(main())

    def test_a_folder_behind_a_link_is_swapped(self, tmp_path: Path) -> None:
        """As Kubernetes does it with what it mounts; size and time may be the same."""
        texts = [new_key("one", ["call"]) for _ in range(2)]
        for number, (_, text) in enumerate(texts):
            (tmp_path / str(number)).mkdir()
            (tmp_path / str(number) / "principals.toml").write_text(text)
        (tmp_path / "data").symlink_to("0")
        (tmp_path / "principals.toml").symlink_to("data/principals.toml")
        known = Access(str(tmp_path / "principals.toml"), Metrics())

        async def main() -> None:
            following = asyncio.create_task(known.follow())
            known.admit(bearer(texts[0][0]))
            (tmp_path / "data.new").symlink_to("1")
            (tmp_path / "data.new").rename(tmp_path / "data")
            await until(lambda: known.generation == 1)
            known.admit(bearer(texts[1][0]))
            refused(known, bearer(texts[0][0]))
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

        asyncio.run(main())

    def test_credentials_that_are_another_principals_by_now(self, tmp_path: Path) -> None:
        token, text = new_key("one", ["call"])
        known = access(tmp_path, text)
        before = known.admit(bearer(token))
        (tmp_path / "principals.toml").write_text(text.replace('"one"', '"two"'))

        async def main() -> None:
            await known._refresh(known._source)

        asyncio.run(main())
        with pytest.raises(Fault, match="another principal's"):
            before.need("call")


class _Room:
    """Admits everything."""

    def __init__(self) -> None:
        self.inside = 0

    def admit_upload(self, size: int) -> None:
        self.inside += size

    def forget_upload(self, size: int) -> None:
        self.inside -= size


class TestQuotas:
    def test_calls(self) -> None:
        told: list[str] = []
        usage = Usage("one", Quota(calls_per_second=0.001), told.append)
        usage.call(0)
        with pytest.raises(Fault, match=r"'one' has used up its quota of 0.001 calls") as caught:
            usage.call(0)
        assert caught.value.reason is Reason.QUOTA_EXCEEDED and told == ["calls"]
        assert caught.value.retry_after is not None and 990 < caught.value.retry_after <= 1000
        # A file that was read anew gives nothing for nothing, unless it says something else.
        usage.set(Quota(calls_per_second=0.001, sessions=3))
        with pytest.raises(Fault):
            usage.call(0)
        usage.set(Quota())
        usage.call(10**12)

    def test_bytes_are_owed(self) -> None:
        usage = Usage("one", Quota(bytes_per_second=1000.0), lambda _: None)
        usage.call(5_000_000)
        with pytest.raises(Fault) as caught:
            usage.call(1)
        assert caught.value.retry_after is not None and 4990 < caught.value.retry_after < 5000
        answered = Usage("one", Quota(bytes_per_second=1000.0), lambda _: None)
        answered.sent(5_000_000)
        with pytest.raises(Fault):
            answered.bring(1)

    def test_sessions_and_what_they_retain(self) -> None:
        told: list[str] = []
        usage = Usage("one", Quota(sessions=2, retained_bytes=1000), told.append)
        room = _Room()
        with SessionUse(usage, room) as first, SessionUse(usage, room) as second:
            with pytest.raises(Fault) as caught, SessionUse(usage, room):
                pass
            assert caught.value.reason is Reason.QUOTA_EXCEEDED and caught.value.retry_after is None
            held = 0
            first.retained = lambda: held
            first.admit_upload(400)
            second.admit_op("put", 500)
            assert first.budget(10_000) == 500 and second.budget(300) == 300
            with pytest.raises(Fault):
                second.admit_op("put", 101)
            second.admit_op("get", 5000)
            second.forget_upload(5000)
            first.forget_upload(400)
            held = 500
            with pytest.raises(Fault):
                second.admit_op("call", 0)
            with pytest.raises(Fault):
                second.admit_upload(1)
            second.admit_op("release_only", 0)
            second.forget_upload(500)
            assert room.inside == 0
        assert told == ["sessions", *["retained"] * 3] and usage.idle
        with SessionUse(usage, room):
            pass


def test_the_documented_file_is_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    example = text.partition("```toml\n")[2].partition("```")[0]
    book = read_book("docs/security.md", example.encode())
    assert book.names == {"ci", "training", "prometheus", "anonymous"} and book.jwt is not None
    assert book.anonymous is not None and book.anonymous.sees("demo")
    for reason in (Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED, Reason.ADMIN_DISABLED, Reason.QUOTA_EXCEEDED):
        assert f"| `{reason.value}` | {reason.code.name} |" in text
    for right in RIGHTS:
        assert f"| `{right}` |" in text
    for quota in Quota.model_fields:
        assert f"| `{quota}` |" in text
