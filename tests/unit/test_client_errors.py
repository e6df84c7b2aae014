"""Every failure arrives as its documented exception."""

import inspect
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from tests.both_clients import Connect
from tests.unit.client_server import Failure, Fake, serving

import pullback as pb
from pullback import errors
from pullback_wire import Code, Reason

ONCE = pb.RetryPolicy(attempts=1)
CLASSES = [one for one in vars(errors).values() if inspect.isclass(one) and issubclass(one, errors.PullbackError)]


@pytest.fixture(scope="module")
def server() -> Iterator[Fake]:
    with serving(Fake()) as fake:
        yield fake


@pytest.fixture(scope="module")
def square(connect: Connect, server: Fake) -> Iterator[pb.RemoteModel]:
    with connect(server.target, retry=ONCE) as client:
        yield client.model("square")


def fail(fake: Fake, model: pb.RemoteModel, failure: Failure) -> errors.PullbackError:
    fake.failures = [failure]
    with pytest.raises(pb.PullbackError) as caught:
        model.evaluate({"x": np.ones(2)})
    assert not fake.failures
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    return caught.value


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_class_of_its_own(server: Fake, square: pb.RemoteModel, reason: Reason) -> None:
    error = fail(server, square, Failure.of(reason, message="what it is", field="inputs[0].shape"))
    assert type(error) is errors.BY_REASON[reason.value]
    assert type(error).cause is reason
    assert error.reason == reason.value
    assert error.code == reason.code
    assert str(error) == error.message == "what it is"
    assert error.violations == (errors.Violation("inputs[0].shape", "what it is"),)
    assert error.retry_after is None


def test_no_two_reasons_share_a_class() -> None:
    assert set(errors.BY_REASON) == {reason.value for reason in Reason}
    assert len(set(errors.BY_REASON.values())) == len(Reason)
    for reason in Reason:
        assert errors.BY_REASON[reason.value].default_code == reason.code
        assert issubclass(errors.BY_REASON[reason.value], errors.BY_CODE[reason.code])


@pytest.mark.parametrize("status", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_code_without_details(server: Fake, square: pb.RemoteModel, status: grpc.StatusCode) -> None:
    number = status.value[0]
    error = fail(server, square, Failure(number, "a proxy said no"))
    assert type(error) is errors.BY_CODE.get(number, errors.PullbackError)
    assert (number in errors.BY_CODE) == (number in list(Code))
    assert error.code == number
    assert error.reason == ""
    assert "model 'square': evaluate" in str(error)


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (errors.InvalidArgument, ValueError),
        (errors.MissingCotangent, RuntimeError),
        (errors.NotFound, LookupError),
        (errors.FailedPrecondition, RuntimeError),
        (errors.AlreadyExists, FileExistsError),
        (errors.ResourceExhausted, RuntimeError),
        (errors.OutOfMemory, MemoryError),
        (errors.StorageFull, OSError),
        (errors.LoadFailed, RuntimeError),
        (errors.BadUpload, ValueError),
        (errors.VersionExists, OSError),
        (errors.InternalError, RuntimeError),
        (errors.Unavailable, ConnectionError),
        (errors.Aborted, RuntimeError),
        (errors.DeadlineExceeded, TimeoutError),
        (errors.PermissionDenied, PermissionError),
        (errors.Unauthenticated, PermissionError),
        (errors.Unimplemented, NotImplementedError),
        (errors.Cancelled, RuntimeError),
    ],
)
def test_python_bases(kind: type[Exception], base: type[Exception]) -> None:
    assert issubclass(kind, base)


@pytest.mark.parametrize("kind", CLASSES)
def test_exceptions_survive_pickling(kind: type[errors.PullbackError]) -> None:
    error = kind("what", violations=[errors.Violation("a", "b")], retry_after=1.5)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert vars(back) == vars(error)
    assert str(back) == "what"
    assert repr(back) == f"{kind.__name__}('what')"


def test_an_unknown_reason_falls_back_to_its_code(server: Fake, square: pb.RemoteModel) -> None:
    error = fail(server, square, Failure(3, reason="INVENTED_TOMORROW"))
    assert type(error) is errors.InvalidArgument
    assert error.reason == "INVENTED_TOMORROW"


def test_another_domains_reason_is_not_ours(server: Fake, square: pb.RemoteModel) -> None:
    error = fail(server, square, Failure(14, reason="WORKER_LOST", domain="proxy.example"))
    assert type(error) is errors.Unavailable
    assert error.reason == ""


def test_retry_after(server: Fake, square: pb.RemoteModel) -> None:
    error = fail(server, square, Failure.of(Reason.OVERLOADED, retry_after=1.25))
    assert error.retry_after == 1.25


@pytest.mark.parametrize("details", [b"\xff\xff", b"", b"\x08\x05"])
def test_details_that_cannot_be_read_or_mean_another_status(connect: Connect, details: bytes) -> None:
    class Torn(Failure):
        def details(self) -> bytes:
            return details

    fake = Fake()
    with serving(fake), connect(fake.target, retry=ONCE) as client:
        error = fail(fake, client.model("square"), Torn(3, "message", reason="BAD_TENSOR"))
    assert type(error) is errors.InvalidArgument
    assert "message" in str(error)


def test_a_deadline_says_how_long_it_was(server: Fake, square: pb.RemoteModel) -> None:
    server.delay = 5
    try:
        with pytest.raises(TimeoutError, match=r"evaluate: no answer from .* within 0\.2 s; timeout= sets") as caught:
            square.evaluate({"x": 1.0}, timeout=0.2)
    finally:
        server.delay = 0
    assert isinstance(caught.value, errors.DeadlineExceeded)


def test_nobody_there(connect: Connect) -> None:
    with connect("127.0.0.1:1", retry=ONCE) as client, pytest.raises(ConnectionError) as caught:
        client.models()
    assert isinstance(caught.value, errors.Unavailable)
    assert "models: 127.0.0.1:1 cannot be reached" in str(caught.value)


def test_a_server_that_is_no_pullback_server(connect: Connect) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with connect(f"127.0.0.1:{port}") as client, pytest.raises(NotImplementedError, match="is it a Pullback"):
            client.models()
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize("serving_status", [b"\x08\x02", b"", b"\x08\x03"])
def test_ping_of_a_server_that_does_not_serve(connect: Connect, server: Fake, serving_status: bytes) -> None:
    with connect(server.target) as client:
        assert 0 < client.ping() < 30
        server.health = serving_status
        try:
            with pytest.raises(errors.NotReady, match="answers, but is not serving"):
                client.ping()
        finally:
            server.health = b"\x08\x01"


class TestTooLarge:
    """Both ways, both sides: the message names the setting that is in the way."""

    def test_request_over_the_clients_limit(self, connect: Connect) -> None:
        fake = Fake()
        with serving(fake), connect(fake.target, max_message_bytes=1000) as client:
            with pytest.raises(
                errors.MessageTooLarge, match=r"request has .*\(max_message_bytes of pullback.connect\) is 1,000"
            ):
                client.model("echo").evaluate({"x": np.zeros(1000)})
            assert not fake.seen

    def test_request_over_the_servers_limit(self, connect: Connect) -> None:
        with (
            serving(Fake(), grpc__max_receive_message_length=1000) as fake,
            connect(fake.target) as client,
            pytest.raises(errors.MessageTooLarge, match=r"request has 8,\d+ bytes, the server's limit .* is 1,000"),
        ):
            client.model("echo").evaluate({"x": np.zeros(1000)})

    def test_answer_over_the_clients_limit(self, connect: Connect) -> None:
        fake = Fake()
        with serving(fake), connect(fake.target, max_message_bytes=1000) as client:
            square = client.model("square")
            fake.raw = bytes(2000)
            with pytest.raises(errors.MessageTooLarge, match=r"answer has 2,000 bytes, this client's limit .* 1,000"):
                square.evaluate({"x": np.zeros(1)})
            assert len(fake.seen) == 1

    def test_answer_over_the_servers_limit(self, connect: Connect) -> None:
        with (
            serving(Fake(), grpc__max_send_message_length=1000) as fake,
            connect(fake.target) as client,
            pytest.raises(errors.MessageTooLarge, match=r"answer has .* bytes, the server's limit .* is 1,000"),
        ):
            client.model("echo").evaluate({"x": np.zeros(1000)})

    def test_beyond_grpcs_default(self, connect: Connect) -> None:
        with (
            serving(Fake(), grpc__max_receive_message_length=-1, grpc__max_send_message_length=-1) as fake,
            connect(fake.target) as client,
        ):
            x = np.arange(2 << 20, dtype=np.float64)
            np.testing.assert_array_equal(client.model("echo").evaluate(x), x)


def test_closing(connect: Connect, server: Fake) -> None:
    client = connect(server.target)
    client.ping()
    client.close()
    client.close()
    assert repr(client).endswith("closed>")
    for call in (client.ping, client.models, lambda: client.model("square").evaluate({"x": 1.0})):
        with pytest.raises(errors.ClientClosed, match="is closed"):
            call()
