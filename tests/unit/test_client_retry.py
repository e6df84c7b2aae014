"""What is tried again, what never is, and that all attempts end in time."""

import time

import numpy as np
import pytest
from tests.both_clients import Connect
from tests.unit.client_server import Failure, Fake, serving

import pullback as pb
from pullback import errors
from pullback_wire import Reason

QUICK = pb.RetryPolicy(attempts=4, initial_backoff=0.001, max_backoff=0.01)
X = np.array([2.0])


@pytest.mark.parametrize(
    "failure",
    [
        Failure(14),
        Failure(1),
        Failure.of(Reason.NOT_READY),
        Failure.of(Reason.NOT_READY, retry_after=0.01),
        Failure.of(Reason.OVERLOADED, retry_after=0.01),
        Failure(8, retry_after=0.01),
        Failure(14, reason="UPSTREAM", domain="proxy.example"),
    ],
)
def test_what_is_tried_again(connect: Connect, failure: Failure) -> None:
    with serving(Fake()) as fake, connect(fake.target, retry=QUICK) as client:
        fake.failures = [failure] * 3
        np.testing.assert_array_equal(client.model("square").evaluate({"x": X}), X**2)
        assert fake.calls("Evaluate") == 4
        fake.failures = [failure] * 4
        with pytest.raises(pb.PullbackError):
            client.models()
        assert fake.calls("ListModels") == 4


@pytest.mark.parametrize(
    "failure",
    [
        *(Failure.of(reason) for reason in Reason if reason is not Reason.NOT_READY),
        *(Failure(code) for code in range(2, 17) if code != 14),
        Failure(1, reason="STOPPED", domain="pullback.v1"),
        Failure.of(Reason.WORKER_LOST, retry_after=0.01),
        Failure(4, retry_after=0.01),
    ],
)
def test_what_never_is(connect: Connect, failure: Failure) -> None:
    with serving(Fake()) as fake, connect(fake.target, retry=QUICK) as client:
        fake.failures = [failure, failure]
        with pytest.raises(pb.PullbackError):
            client.model("square").evaluate({"x": X})
        assert fake.calls("Evaluate") == 1


def test_a_ping_is_never_tried_again(connect: Connect) -> None:
    with serving(Fake()) as fake, connect(fake.target, retry=QUICK) as client:
        fake.failures = [Failure(14)]
        with pytest.raises(errors.Unavailable):
            client.ping()


def test_the_servers_wish_is_waited_for(connect: Connect) -> None:
    with serving(Fake()) as fake, connect(fake.target, retry=QUICK) as client:
        client.ping()
        fake.failures = [Failure.of(Reason.OVERLOADED, retry_after=0.3)]
        began = time.monotonic()
        client.model("square").evaluate({"x": X})
        assert time.monotonic() - began >= 0.3


def test_a_pause_beyond_the_deadline_is_not_begun(connect: Connect) -> None:
    with serving(Fake()) as fake, connect(fake.target, retry=QUICK) as client:
        fake.failures = [Failure.of(Reason.OVERLOADED, retry_after=60.0)]
        began = time.monotonic()
        with pytest.raises(errors.Overloaded):
            client.model("square").evaluate({"x": X}, timeout=30)
        assert time.monotonic() - began < 20


def test_all_attempts_share_one_deadline(connect: Connect) -> None:
    policy = pb.RetryPolicy(attempts=1000, initial_backoff=0.05, max_backoff=0.05, jitter=0)
    with serving(Fake()) as fake, connect(fake.target, retry=policy) as client:
        fake.failures = [Failure(14)] * 1000
        began = time.monotonic()
        with pytest.raises((errors.Unavailable, errors.DeadlineExceeded)):
            client.model("square").evaluate({"x": X}, timeout=0.5)
        assert time.monotonic() - began < 10
        assert 1 < fake.calls("Evaluate") < 30


def test_another_attempt_repeats_the_same_seed_and_bytes(connect: Connect) -> None:
    with serving(Fake()) as fake, connect(fake.target, retry=QUICK) as client:
        fake.failures = [Failure(14)] * 2
        client.model("square").evaluate({"x": X}, train=True)
        seeds = {seen.message.function.seed for seen in fake.seen}
        assert len(fake.seen) == 3
        assert len(seeds) == 1


def test_a_server_that_comes_up_later_is_reached(connect: Connect, unused_tcp: int) -> None:
    policy = pb.RetryPolicy(attempts=100, initial_backoff=0.2, max_backoff=0.2, jitter=0.5)
    with connect(f"127.0.0.1:{unused_tcp}", retry=policy, timeout=30) as client:
        with pytest.raises(errors.Unavailable):
            client.ping()
        with serving(Fake(), address=f"127.0.0.1:{unused_tcp}") as fake:
            np.testing.assert_array_equal(client.model("square").evaluate({"x": X}), X**2)
            assert fake.seen


@pytest.fixture
def unused_tcp() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_backoff_grows_to_its_limit_and_jitters_downwards() -> None:
    error = errors.Unavailable("gone")
    steady = pb.RetryPolicy(attempts=100, initial_backoff=0.1, max_backoff=1.0, jitter=0)
    assert [steady.pause(error, attempt) for attempt in (1, 2, 3, 4, 5, 99)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert steady.pause(error, 100) is None
    full = pb.RetryPolicy(attempts=100, initial_backoff=0.1, max_backoff=1.0)
    pauses = [full.pause(error, 5) for _ in range(200)]
    assert all(pause is not None and 0 <= pause <= 1 for pause in pauses)
    assert len(set(pauses)) > 100
    wished = [full.pause(errors.Overloaded("full", retry_after=3.0), 1) for _ in range(50)]
    assert all(pause is not None and 3.0 <= pause <= 3.1 for pause in wished)


@pytest.mark.parametrize(
    "settings",
    [{"attempts": 0}, {"attempts": 1.5}, {"attempts": True}, {"initial_backoff": -1}, {"max_backoff": float("inf")},
     {"max_backoff": float("nan")}, {"jitter": 1.1}],
)  # fmt: skip
def test_policies_that_cannot_be(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        pb.RetryPolicy(**settings)  # type: ignore[arg-type]
