"""What the client really sends: requests and sessions, recorded on their way to a server."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np

import pullback as client_library
from pullback_wire import GRADIENT_METHODS, MODEL_METHODS, SESSION_SERVICE

SESSION = f"/{SESSION_SERVICE}/Session"
_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Recording:
    """unary: requests by path. sessions: of each, its frames in order."""

    def __init__(self) -> None:
        self.unary: defaultdict[str, list[bytes]] = defaultdict(list)
        self.sessions: list[list[bytes]] = []


class _Between(grpc.GenericRpcHandler):
    """Hands every call on, and keeps what was sent."""

    def __init__(self, channel: grpc.Channel, recording: Recording) -> None:
        self._channel = channel
        self._recording = recording

    def service(self, details: Any) -> grpc.RpcMethodHandler:
        path = details.method
        if path == SESSION:
            return grpc.stream_stream_rpc_method_handler(self._session)
        return grpc.unary_unary_rpc_method_handler(self._unary(path))

    def _unary(self, path: str) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        def answer(data: bytes, context: grpc.ServicerContext) -> bytes:
            self._recording.unary[path].append(data)
            found: bytes = self._channel.unary_unary(path)(data, timeout=60)
            return found

        return answer

    def _session(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        kept: list[bytes] = []
        self._recording.sessions.append(kept)

        def passed() -> Iterator[bytes]:
            for frame in frames:
                kept.append(frame)
                yield frame

        yield from self._channel.stream_stream(SESSION)(passed())


def record(target: str) -> Recording:
    """Of a client that makes every kind of call to a server of tests/zoo.py."""
    recording = Recording()
    with grpc.insecure_channel(target, options=_UNLIMITED) as channel:
        server = grpc.server(
            ThreadPoolExecutor(16),
            handlers=[_Between(channel, recording)],
            options=[*_UNLIMITED, ("grpc.so_reuseport", 0)],
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with client_library.connect(f"127.0.0.1:{port}", timeout=60) as client:
                _call_everything(client)
                _sessions(client)
        finally:
            stopped: threading.Event = server.stop(5)
            stopped.wait(10)
    for method in (*GRADIENT_METHODS.values(), MODEL_METHODS["GetModel"], MODEL_METHODS["ListModels"]):
        assert recording.unary[method.path], method
    assert recording.sessions
    return recording


def _call_everything(client: client_library.Client) -> None:
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(2, 3)), rng.normal(size=(2, 3))
    client.models()
    cube, small, mixed = client.model("cube"), client.model("small"), client.model("mixed")
    cube.evaluate(x)
    cube.vjp(x, v)
    cube.vjp(x, loss="mse_loss", target=v, max_norm=1.0)
    cube.jvp(x, v)
    cube.hvp(x, v, v)
    cube.jacobian(x)
    client.model("square_sum").hessian(x[0])
    small.vjp(
        x, wrt=["*weight", "input"], loss=client_library.Loss("cross_entropy", label_smoothing=0.1), target=[0, 1]
    )
    mixed.evaluate({"x": x[0], "y": v[0], "scale": np.array(2.0)})
    client.model("words").evaluate(np.array([[1, 2, 3]]))
    client.model("holomorphic").vjp(x[0] + 1j, v[0] + 0j)
    cube.evaluate(x.astype(np.float32))


def _sessions(client: client_library.Client) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3))
    with client.session():
        leaf = client.tensor(x, requires_grad=True)
        y = client.model("cube")(leaf)
        (first,) = client_library.autograd.grad(y.sum(), leaf, create_graph=True)
        assert first is not None
        (first * leaf + leaf[0]).sum().backward()
        assert leaf.grad is not None
        leaf.grad.numpy()
    with client.session() as session:
        weights = dict(client.model("small").named_parameters(session))
        output = client.model("small")(client.tensor(x))
        (output * output).mean().backward()
        assert next(iter(weights.values())).grad is not None
        client.model("cube").vjp(x, x)
    with client.session():
        # Large enough to go in chunks, both ways.
        large = client.tensor(rng.normal(size=(200, 1000)), requires_grad=True)
        client.model("cube")(large).sum().backward()
        assert large.grad is not None
        large.grad.numpy()
