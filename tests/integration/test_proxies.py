"""Envoy and nginx before two servers, by the configurations in deploy/proxies, and what a client sees of them."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.proxies import Proxy, binary, serving_pair
from tests.serving import Served

import pullback
from pullback import errors
from pullback_wire import GRADIENT_METHODS, TensorWriter, encode_message
from pullback_wire.v1 import gradient_service_pb2 as pb

MODELS = """
import torch
from pullback_server import model, spec

@model("square", inputs={"x": spec("float64", ["n"])}, batch_axis=0)
def square(x):
    return x * x

@model("cubes", inputs={"x": spec("float64", ["n"])})
def cubes(x):
    return (x**3).sum()

@model("slow")
def slow(x):
    import time
    time.sleep(float(x.detach().sum()))
    return x

@model("broken")
def broken(x):
    raise RuntimeError("as asked")
"""
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(binary(kind) is None, reason=f"{kind} is not installed"))
    for kind in ("envoy", "nginx")
]
#: Each proxy's own time for silence, shortened; heartbeats come every 2 s (a third of --session-heartbeat-seconds).
SILENCE = 5
SHORT = {
    "envoy": {f"idle_timeout: {seconds}s": f"idle_timeout: {SILENCE}s" for seconds in (60, 660)},
    "nginx": {
        f"{name} {seconds}s;": f"{name} {SILENCE}s;"
        for name, seconds in [
            ("grpc_read_timeout", 60),
            ("grpc_read_timeout", 660),
            ("grpc_send_timeout", 60),
            ("client_body_timeout", 60),
            ("send_timeout", 60),
        ]
    },
}
ONCE = pullback.RetryPolicy(attempts=1)
X = np.array([1.0, 2.0, 3.0])


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Served]]:
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    with serving_pair(folders, MODELS, "--session-heartbeat-seconds", "6") as found:
        yield found


@pytest.fixture(scope="module", params=KINDS)
def proxy(
    request: pytest.FixtureRequest, servers: list[Served], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    with Proxy(request.param, tmp_path_factory.mktemp("proxy"), [server.target for server in servers]) as running:
        yield running


@pytest.fixture
def client(proxy: Proxy) -> Iterator[pullback.Client]:
    with pullback.connect(proxy.target, retry=ONCE) as connected:
        yield connected


def total(server: Served, metric: str, *labels: str) -> float:
    """The sum over all series of a metric that have these labels, written as in the exposition."""
    rows = [
        row.rsplit(" ", 1)
        for row in server.get("/metrics").splitlines()
        if row.startswith((metric + "{", metric + " "))
    ]
    return sum(float(value) for name, value in rows if all(label in name for label in labels))


def until(done: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_every_kind_of_call(client: pullback.Client) -> None:
    square, cubes = client.model("square"), client.model("cubes")
    assert client.ping() > 0
    assert [model.name for model in client.models()] == ["broken", "cubes", "slow", "square"]
    np.testing.assert_array_equal(square.evaluate(X), X**2)
    outputs, gradients = square.vjp(X, X)
    np.testing.assert_array_equal(outputs, X**2)
    np.testing.assert_array_equal(gradients, 2 * X * X)
    value, named = cubes.value_and_grad(X)
    assert value == 36.0
    np.testing.assert_array_equal(named["x"], 3 * X**2)
    np.testing.assert_array_equal(square.jvp(X, X).tangents, 2 * X * X)
    np.testing.assert_array_equal(cubes.hvp(X, X).hvps, 6 * X * X)
    np.testing.assert_array_equal(square.jacobian(X), np.diag(2 * X))
    np.testing.assert_array_equal(cubes.hessian(X), np.diag(6 * X))


def test_a_session_with_second_order(client: pullback.Client) -> None:
    with client.session() as session:
        x = session.tensor(X, requires_grad=True)
        y = client.model("square")(x).sum() ** 2
        (gradient,) = pullback.autograd.grad(y, x, create_graph=True)
        np.testing.assert_array_equal(gradient.numpy(), 4 * X * 14.0)
        gradient.sum().backward()
        np.testing.assert_array_equal(x.grad.numpy(), 4 * 14.0 + 8 * X * X.sum())


def test_a_message_of_64_mib(client: pullback.Client) -> None:
    x = np.arange(8 << 20, dtype=np.float64)
    outputs, gradients = client.model("square").vjp(x, np.full_like(x, 0.5), timeout=100)
    np.testing.assert_array_equal(outputs, x * x)
    np.testing.assert_array_equal(gradients, x)


def test_100_mib_in_chunks(client: pullback.Client) -> None:
    x = np.arange(100 << 17, dtype=np.float64)
    with client.session(timeout=100) as session:
        tensor = session.tensor(x, requires_grad=True)
        client.model("square")(tensor).backward(np.full_like(x, 0.5))
        np.testing.assert_array_equal(tensor.grad.numpy(), x)


def test_calls_are_spread_and_a_session_stays_where_it_is(client: pullback.Client, servers: list[Served]) -> None:
    until(lambda: all(total(server, "pullback_sessions") == 0 for server in servers))
    before = [total(server, "pullback_requests_total") for server in servers]
    ops = [total(server, "pullback_session_ops_total") for server in servers]
    with client.session() as session:
        x = session.tensor(X)
        for _ in range(20):
            client.model("square").vjp(X, X)
            x = x * 1.0
            np.testing.assert_array_equal(x.numpy(), X)
        assert sorted(total(server, "pullback_sessions") for server in servers) == [0, 1]
    rose = [total(server, "pullback_requests_total") - was for server, was in zip(servers, before, strict=True)]
    assert min(rose) >= 5
    rose = [total(server, "pullback_session_ops_total") - was for server, was in zip(servers, ops, strict=True)]
    assert min(rose) == 0
    assert max(rose) >= 20


def test_errors_keep_code_reason_and_details(client: pullback.Client) -> None:
    with pytest.raises(errors.BadTensor, match=r"shape \[2, 2\], expected \[n\]") as caught:
        client.model("square").vjp(np.ones((2, 2)), X)
    assert (caught.value.code, caught.value.reason) == (3, "BAD_TENSOR")
    assert [violation.field for violation in caught.value.violations] == ["inputs[0].shape"]
    with pytest.raises(errors.ModelNotFound, match="nobody"):
        client.model("nobody").evaluate(X)
    with client.session() as session, pytest.raises(errors.BadOperand):
        (session.tensor(X) @ session.tensor(np.ones(2))).numpy()


def test_errors_of_models_put_no_server_out(client: pullback.Client, servers: list[Served]) -> None:
    for _ in range(20):
        with pytest.raises(errors.ModelError, match="as asked"):
            client.model("broken").evaluate(X)
    before = [total(server, "pullback_requests_total", 'code="OK"') for server in servers]
    for _ in range(20):
        client.model("square").vjp(X, X)
    after = [total(server, "pullback_requests_total", 'code="OK"') for server in servers]
    assert all(now - was >= 5 for now, was in zip(after, before, strict=True))


def test_a_deadline_arrives(client: pullback.Client, servers: list[Served]) -> None:
    def ended() -> float:
        return sum(
            total(server, "pullback_requests_total", 'model="slow"', f'code="{code}"')
            for server in servers
            for code in ("DEADLINE_EXCEEDED", "CANCELLED")
        )

    before = ended()
    with pytest.raises(errors.DeadlineExceeded):
        client.model("slow").evaluate(np.array([1.5]), timeout=0.3)
    # Well before the model would have been done with it: nobody is told OK.
    until(lambda: ended() == before + 1)


def test_a_cancellation_arrives(proxy: Proxy, servers: list[Served]) -> None:
    writer = TensorWriter()
    request = pb.EvaluateRequest(function={"model": "slow"}, inputs=[writer.add("x", np.array([1.5]))])
    labels = ("pullback_requests_total", 'model="slow"', 'code="CANCELLED"')
    before = sum(total(server, *labels) for server in servers)
    with grpc.insecure_channel(proxy.target) as channel:
        call = channel.unary_unary(GRADIENT_METHODS["Evaluate"].path).future(encode_message(request, writer.payloads))
        until(lambda: sum(total(server, "pullback_requests_in_flight", 'method="Evaluate"') for server in servers) == 1)
        call.cancel()
        until(lambda: sum(total(server, *labels) for server in servers) == before + 1)


def test_metadata_beyond_the_limit_are_refused_by_the_server(proxy: Proxy) -> None:
    value = np.random.default_rng(0).bytes(60_000).hex()
    with pullback.connect(proxy.target, retry=ONCE, metadata={"x-big": value[:12_000]}) as client:
        assert client.ping() > 0
    with (
        pullback.connect(proxy.target, retry=ONCE, metadata={"x-big": value[:28_000]}) as client,
        pytest.raises(errors.ResourceExhausted, match="--max-metadata-bytes"),
    ):
        # gRPC holds a peer to its limits from when that has confirmed them, and nginx does not wait for them: the first
        # call on each of its connections to a server may pass.
        for _ in range(3):
            client.ping()
    with (
        pullback.connect(proxy.target, retry=ONCE, metadata={"x-big": value[:90_000]}) as client,
        pytest.raises(errors.PullbackError),
    ):
        client.ping()


def test_heartbeats_keep_idle_sessions_through_both(servers: list[Served], tmp_path: Path) -> None:
    targets = [server.target for server in servers]
    running = []
    try:
        for kind in ("envoy", "nginx"):
            if binary(kind) is not None:
                (tmp_path / kind).mkdir()
                running.append(Proxy(kind, tmp_path / kind, targets, SHORT[kind]))
        if not running:
            pytest.skip("neither is installed")
        clients = [pullback.connect(proxy.target, retry=ONCE) for proxy in running]
        sessions = [client.session() for client in clients]
        tensors = [session.tensor(X, requires_grad=True) for session in sessions]
        for client, x in zip(clients, tensors, strict=True):
            client.model("cubes")(x).backward()
        began = time.monotonic()
        for client in clients:
            # What says nothing for so long ends: it is the heartbeats that make the difference.
            with pytest.raises(errors.Unavailable):
                client.model("slow").evaluate(np.array([SILENCE + 2.0]))
        time.sleep(max(began + 2.5 * SILENCE - time.monotonic(), 0))
        for session, x in zip(sessions, tensors, strict=True):
            np.testing.assert_array_equal(x.grad.numpy(), 3 * X**2)
            session.close()
        for client in clients:
            client.close()
    finally:
        for proxy in running:
            proxy.__exit__()


@pytest.mark.skipif(binary("nginx") is None, reason="nginx is not installed")
@pytest.mark.parametrize(
    "edit",
    [
        {"keepalive_requests 1000000;": "keepalive_requests 50;"},
        {"keepalive_time 24h;": "keepalive_time 1s;"},
    ],
    ids=["requests", "time"],
)
def test_connections_that_nginx_closes_cost_neither_calls_nor_sessions(
    servers: list[Served], tmp_path: Path, edit: dict[str, str]
) -> None:
    targets = [server.target for server in servers]
    with (
        Proxy("nginx", tmp_path, targets, edit) as proxy,
        pullback.connect(proxy.target) as client,
        client.session() as session,
    ):
        x = session.tensor(X, requires_grad=True)
        client.model("cubes")(x).backward()
        end = time.monotonic() + 2
        made = 0
        while time.monotonic() < end or made < 200:
            np.testing.assert_array_equal(client.model("square").vjp(X, X).gradients, 2 * X * X)
            made += 1
        np.testing.assert_array_equal(x.grad.numpy(), 3 * X**2)
