"""What both clients do alike against a real server: every method, errors, sessions. Held against torch in float64.

Each test is a coroutine over a `Kind`; with the sync client nothing in it ever waits.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import functools
import inspect
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.asking import ask
from torch import nn

import pullback as pb
from pullback import errors
from pullback._blocking import run
from pullback_server import Server, model, spec

F64 = "float64"
DOCS = Path(__file__).parents[2] / "docs"


class Small(nn.Module):
    """3-4-2."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(3, 4)
        self.fc2 = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc2(torch.tanh(self.fc1(x)))
        return result


def built() -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Small().double()


class Once(torch.autograd.Function):
    """x ** 2, of which no second derivative is right."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


@model("small", inputs={"x": spec(F64, ["n", 3])})
def small() -> nn.Module:
    return built()


@model("once", inputs={"x": spec(F64, ["n"])})
def once(x: torch.Tensor) -> torch.Tensor:
    return Once.apply(x)


@model("cube", inputs={"x": spec(F64, ["n"])})
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


@model("two", inputs={"x": spec(F64, ["n"]), "y": spec(F64, ["n"])}, outputs=["product", "total"])
def two(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x * y, x.sum() + y.sum()


@model("energy", inputs={"x": spec(F64, ["n", 3])})
def energy(x: torch.Tensor) -> torch.Tensor:
    return x.pow(4).sum()


@model("double")
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@model("slow", inputs={"x": spec(F64, ["n"])})
def slow(x: torch.Tensor) -> torch.Tensor:
    # Milliseconds above 1000, which no sample for the probes has.
    time.sleep(max(float(x.detach().max()) - 1000, 0.0) / 1000)
    return x * 1.0


MODELS = (small, once, cube, two, energy, double, slow)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(*MODELS, devices="cpu:1", threads=1) as server:
        yield server


async def got(found: Any) -> Any:
    """What is awaited with one client and returned by the other."""
    return await found if inspect.isawaitable(found) else found


class Kind:
    """One of the clients, and how it is waited for."""

    def __init__(self, name: str, target: str) -> None:
        self.name = name
        self.target = target
        self.aio = name == "aio"

    @contextlib.asynccontextmanager
    async def client(self, **settings: Any) -> AsyncIterator[Any]:
        client: Any = (pb.aio.connect if self.aio else pb.connect)(self.target, **{"timeout": 60, **settings})
        try:
            yield client
        finally:
            await got(client.close())

    @contextlib.asynccontextmanager
    async def session(self, client: Any, *models: Any, **settings: Any) -> AsyncIterator[Any]:
        if self.aio:
            async with client.session(models=models, **settings) as session:
                yield session
        else:
            with client.session(models=models, pipelined=self.name == "pipelined", **settings) as session:
                yield session

    async def info(self, remote: Any) -> pb.ModelInfo:
        return await remote.info() if self.aio else remote.info

    async def grad(self, *args: Any, **kwargs: Any) -> Any:
        return await got((pb.aio.grad if self.aio else pb.autograd.grad)(*args, **kwargs))


def both(*kinds: str) -> Callable[[Callable[..., Awaitable[None]]], Any]:
    """Runs a test with each of the clients."""

    def made(test: Callable[..., Awaitable[None]]) -> Any:
        @pytest.mark.parametrize("name", kinds or ("sync", "aio"))
        def tested(name: str, server: Server) -> None:
            kind = Kind(name, server.target)
            (asyncio.run if kind.aio else run)(test(kind))

        functools.update_wrapper(tested, test, assigned=("__name__", "__qualname__", "__doc__", "__module__"))
        del tested.__wrapped__  # type: ignore[attr-defined]
        return tested

    return made


SESSIONS = ("sync", "pipelined", "aio")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 3))
V = RNG.normal(size=(5, 2))
T = RNG.normal(size=(5, 3))
C = np.array([1.0, -2.0, 0.5])


def taking(seconds: float) -> Any:
    """What `slow` takes so long for."""
    return np.array([1000 * (1 + seconds)])


def same(found: Any, wanted: Any) -> None:
    wanted = wanted.detach().numpy() if isinstance(wanted, torch.Tensor) else np.asarray(wanted)
    assert isinstance(found, np.ndarray) and found.dtype == wanted.dtype and found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


@both()
async def test_every_method(kind: Kind) -> None:
    local = built()
    x = torch.tensor(X, requires_grad=True)
    v = torch.tensor(V, requires_grad=True)
    y = local(x)
    (g,) = torch.autograd.grad(y, x, v, create_graph=True)
    (h,) = torch.autograd.grad((g * torch.tensor(T)).sum(), x)
    loss = torch.nn.functional.mse_loss(local(x), torch.tensor(V))
    async with kind.client() as client:
        remote = client.model("small")
        same(await got(remote.evaluate(X)), y)
        outputs, gradient = await got(remote.vjp(X, V))
        same(outputs, y)
        same(gradient, g)
        result = await got(remote.value_and_grad(X, loss="mse_loss", target=V, wrt=["x", "fc1.*"]))
        same(result.outputs, loss)
        parameters = dict(local.named_parameters())
        names = ["x", "fc1.weight", "fc1.bias"]
        wanted = torch.autograd.grad(loss, [x, parameters["fc1.weight"], parameters["fc1.bias"]])
        assert sorted(result.gradients) == sorted(names)
        for name, one in zip(names, wanted, strict=True):
            same(result.gradients[name], one)
        _, tangent = torch.func.jvp(local, (torch.tensor(X),), (torch.tensor(T),))
        same((await got(remote.jvp(X, T))).tangents, tangent)
        found = await got(remote.hvp(X, T, V))
        same(found.gradients, g)
        same(found.hvps, h)
        same(await got(remote.jacobian(X)), torch.autograd.functional.jacobian(local, torch.tensor(X)))
        scalar = functools.partial(lambda one: torch.nn.functional.mse_loss(local(one), torch.tensor(V)))
        same(
            await got(remote.hessian(X, loss="mse_loss", target=V)),
            torch.autograd.functional.hessian(scalar, torch.tensor(X)),
        )
        info = await kind.info(remote)
        assert (info.name, info.state, [one.name for one in info.inputs]) == ("small", "ready", ["x"])
        assert {"small", "cube"} <= {one.name for one in await got(client.models())}
        assert await got(client.ping()) > 0
        graph = await got(client.model("cube").graph())
        assert any("Pow" in node.name for node in graph.nodes)


@both()
async def test_several_inputs_and_outputs(kind: Kind) -> None:
    async with kind.client() as client:
        outputs, gradients = await got(client.model("two").vjp((C, 2 * C), {"product": C, "total": np.array(1.0)}))
        same(outputs["product"], 2 * C * C)
        same(gradients[0], 2 * C * C + 1)
        same(gradients[1], C * C + 1)
        batched = await got(client.model("cube").vjp(C, np.eye(3), batched=True))
        same(batched.gradients, np.diag(3 * C**2))


@both()
async def test_what_is_wrong_is_the_same_error(kind: Kind) -> None:
    async with kind.client(retry=pb.RetryPolicy(attempts=1)) as client:
        cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
            (errors.ModelNotFound, "nothing", lambda: client.model("nothing").evaluate(C)),
            (errors.VersionNotFound, "9", lambda: client.model("cube", 9).evaluate({"x": C})),
            (errors.BadName, "'z'", lambda: client.model("cube").evaluate({"z": C})),
            (errors.BadName, "2 inputs", lambda: client.model("cube").evaluate((C, C))),
            (errors.BadName, "one input is given", lambda: client.model("two").evaluate(C)),
            (errors.BadTensor, "shape", lambda: client.model("cube").evaluate(np.ones((2, 2)))),
            (errors.BadTensor, "float32", lambda: client.model("cube").evaluate(np.ones(2, np.float32))),
            (errors.BadCotangent, "shape", lambda: client.model("cube").vjp(C, np.ones(7))),
            (errors.MissingCotangent, "scalar", lambda: client.model("cube").vjp(C)),
            (errors.OrderUnavailable, "once", lambda: client.model("once").hvp(C, C, C)),
            (errors.LossNotFound, "no_loss", lambda: client.model("cube").vjp(C, loss="no_loss", target=C)),
            (errors.BadName, "fc2", lambda: client.model("small").vjp(X, V, wrt=["fc2.nothing"])),
            (errors.AdminDisabled, "admin", lambda: client.load_model("cube")),
            (TypeError, "loss", lambda: client.model("cube").evaluate(C, loss=3)),
            (ValueError, "seed", lambda: client.model("cube").evaluate(C, seed=-1)),
            (ValueError, "timeout", lambda: client.model("cube").evaluate(C, timeout=-1)),
        ]
        for error, words, call in cases:
            with pytest.raises(error, match=words) as caught:
                await got(call())
            if isinstance(caught.value, pb.PullbackError) and caught.value.__cause__ is not None:
                assert caught.value.request_id


@both()
async def test_a_deadline(kind: Kind) -> None:
    async with kind.client() as client:
        with pytest.raises(errors.DeadlineExceeded):
            await got(client.model("slow").evaluate({"x": taking(0.8)}, timeout=0.3))
        same(await got(client.model("slow").evaluate({"x": C})), C)


@both()
async def test_ids_timings_and_anomalies(kind: Kind) -> None:
    async with kind.client() as client:
        cube = client.model("cube")
        with pb.request_id("both-clients"), pb.record_timings() as timings:
            await got(cube.vjp({"x": C}, {"output": C}))
        (told,) = timings
        assert told.request_id == "both-clients" and told.stages["backward"] > 0 and told.call == "model 'cube': vjp"
        await got(cube.vjp({"x": C}, {"output": C}))
        assert len(timings) == 1
        bad = {"x": np.array([np.nan])}
        with pytest.raises(errors.NonFinite), pb.autograd.detect_anomaly():
            await got(cube.evaluate(bad))
        assert np.isnan(await got(cube.evaluate(bad)))


@both()
async def test_what_is_too_large_for_a_message_goes_through_a_session(kind: Kind) -> None:
    async with kind.client(max_message_bytes=2 << 20) as client:
        x = np.random.default_rng(1).normal(size=3 << 20)
        for _ in range(2):
            same(await got(client.model("double").evaluate({"x": x})), 2 * x)
        outputs, gradient = await got(client.model("double").vjp({"x": x}, {"output": x}))
        same(outputs, 2 * x)
        same(gradient["x"], 2 * x)
        with pytest.raises(errors.BadCotangent):
            await got(client.model("double").vjp({"x": x}, {"output": x[1:]}))


@both(*SESSIONS)
async def test_forward_backward_and_second_order(kind: Kind) -> None:
    local = built()
    x = torch.tensor(X, requires_grad=True)
    energy = local(x).pow(2).sum()
    (force,) = torch.autograd.grad(energy, x, create_graph=True)
    (force * x).sum().backward()
    async with kind.client() as client:
        remote = client.model("small")
        async with kind.session(client, remote) as session:
            mine = await got(session.tensor(X, requires_grad=True))
            its_energy = remote(mine).pow(2).sum()
            (its_force,) = await kind.grad(its_energy, mine, create_graph=True)
            same(await got(its_force.numpy()), force)
            await got((its_force * mine).sum().backward())
            same(await got(mine.grad.numpy()), x.grad)
            assert await got(its_energy.item()) == pytest.approx(energy.item(), rel=1e-12)
            with pytest.raises(errors.GraphFreed):
                await kind.grad(its_energy, mine)
            none, zeros = [
                (await kind.grad(mine.sum() * 1.0, (await got(session.tensor(C, True)),), **more))[0]
                for more in ({"allow_unused": True}, {"materialize_grads": True})
            ]
            assert none is None
            same(await got(zeros.numpy()), np.zeros(3))


@both(*SESSIONS)
async def test_training_in_a_session(kind: Kind) -> None:
    local = built()
    for _ in range(3):
        loss = torch.nn.functional.mse_loss(local(torch.tensor(X)), torch.tensor(V))
        local.zero_grad()
        loss.backward()
        with torch.no_grad():
            for one in local.parameters():
                one -= 0.1 * one.grad
    async with kind.client() as client:
        remote = client.model("small")
        async with kind.session(client, remote) as session:
            target = await got(session.tensor(V))
            x = await got(session.tensor(X))
            parameters = dict(remote.named_parameters())
            for _ in range(3):
                its_loss = pb.functional.mse_loss(remote(x), target)
                remote.zero_grad()
                await got(its_loss.backward())
                with pb.no_grad():
                    for parameter in remote.parameters():
                        parameter -= 0.1 * parameter.grad
            for name, one in local.named_parameters():
                same(await got(parameters[name].numpy()), one)


@both(*SESSIONS)
async def test_large_tensors_in_a_session(kind: Kind) -> None:
    x = np.random.default_rng(2).normal(size=1 << 20)
    async with kind.client() as client:
        remote = client.model("double")
        async with kind.session(client, remote) as session:
            mine = await got(session.tensor(x, requires_grad=True))
            y = await remote.forward(mine) if kind.aio else remote(mine)
            same(await got(y.numpy()), 2 * x)
            await got(y.sum().backward())
            same(await got(mine.grad.numpy()), np.full_like(x, 2.0))


@both("pipelined", "aio")
async def test_a_failure_is_told_by_what_is_awaited_next(kind: Kind) -> None:
    async with kind.client() as client:
        cube = client.model("cube")
        async with kind.session(client, cube) as session:
            x = await got(session.tensor(C, requires_grad=True))
            wrong = x.reshape(7)
            after = wrong * 2
            with pytest.raises(errors.InvalidArgument, match=r"op \d+ \(reshape\)"):
                await got(after.numpy())
            same(await got(cube(x).numpy()), C**3)
        with pytest.raises(errors.InvalidArgument, match="reshape"):
            async with kind.session(client, cube) as session:
                (await got(session.tensor(C))).reshape(7)
        assert not session.usable


@both(*SESSIONS)
async def test_tensors_of_a_session_that_is_over(kind: Kind) -> None:
    async with kind.client() as client:
        cube = client.model("cube")
        async with kind.session(client, cube) as session:
            x = await got(session.tensor(C, requires_grad=True))
            y = cube(x).sum()
            await got(session.close())
            with pytest.raises(errors.SessionLost):
                await got(y.backward())
            with pytest.raises(errors.SessionLost):
                (await got(session.tensor(C))).sum()
        async with kind.session(client, cube) as session:
            same(await got(cube(await got(session.tensor(C))).numpy()), C**3)


# What is the asyncio client's own.


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def metric(server: Server, name: str) -> float:
    """The sum of a metric's series."""
    lines = ask(server.metrics_port, "/metrics")[2].splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((name + " ", name + "{")))


@contextlib.asynccontextmanager
async def ticking() -> AsyncIterator[list[float]]:
    """The times at which the event loop came round, about every 5 ms where nothing holds it up."""
    ticks: list[float] = []

    async def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.005)

    task = asyncio.create_task(tick())
    try:
        yield ticks
    finally:
        task.cancel()


def alone(test: Callable[[Server, Any], Awaitable[None]]) -> Any:
    """A test of the asyncio client."""

    def tested(server: Server) -> None:
        async def main() -> None:
            async with pb.aio.connect(server.target, timeout=60) as client:
                await test(server, client)

        asyncio.run(main())

    tested.__name__, tested.__doc__ = test.__name__, test.__doc__
    return tested


@alone
async def test_hundreds_of_tasks(server: Server, client: pb.aio.Client) -> None:
    remote = client.model("small")
    inputs = [X + one for one in range(300)]
    results = await asyncio.gather(*(remote.vjp({"x": one}, {"output": V}) for one in inputs))
    local = built()
    for one, (outputs, gradient) in zip(inputs, results, strict=True):
        x = torch.tensor(one, requires_grad=True)
        y = local(x)
        same(outputs, y)
        same(gradient["x"], torch.autograd.grad(y, x, torch.tensor(V))[0])


@alone
async def test_a_cancelled_task_leaves_nothing_at_the_server(server: Server, client: pb.aio.Client) -> None:
    dropped = metric(server, "pullback_dropped_calls_total")
    slow = client.model("slow")
    tasks = [asyncio.create_task(slow.evaluate({"x": taking(0.8)})) for _ in range(4)]
    await until(lambda: metric(server, "pullback_requests_in_flight") >= 4)
    for task in tasks:
        task.cancel()
    assert all(isinstance(one, asyncio.CancelledError) for one in await asyncio.gather(*tasks, return_exceptions=True))
    await until(lambda: metric(server, "pullback_requests_in_flight") == 0)
    assert metric(server, "pullback_dropped_calls_total") > dropped
    same(await client.model("cube").evaluate(C), C**3)


@alone
async def test_a_cancelled_large_call_ends_its_session(server: Server, client: pb.aio.Client) -> None:
    narrow = pb.aio.connect(server.target, max_message_bytes=2 << 20)
    x = np.full(1 << 20, 2000.0)
    task = asyncio.create_task(narrow.model("slow").evaluate({"x": x}))
    await until(lambda: metric(server, "pullback_sessions") == 1)
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: metric(server, "pullback_sessions") == 0)
    x[0] = -1.0
    same(await narrow.model("slow").evaluate({"x": x}), x)
    await narrow.close()


@alone
async def test_the_loop_goes_on_during_calls_and_transfers(server: Server, client: pb.aio.Client) -> None:
    x = np.random.default_rng(3).normal(size=2 << 20)
    double, cube = client.model("double"), client.model("cube")
    await double.evaluate({"x": C})
    async with client.session(models=[double, cube]) as session, ticking() as ticks:
        await client.model("slow").evaluate({"x": taking(0.5)})
        assert len(ticks) > 10
        before = len(ticks)
        for _ in range(3):
            same(await double.evaluate({"x": x}), 2 * x)
        y = await double.forward(x)
        same(await y.numpy(), 2 * x)
        same(await session.run(lambda: double(pb.tensor(x)).numpy()), 2 * x)
        assert len(ticks) > before + 10


@alone
async def test_the_notebook_of_the_docs(server: Server, client: pb.aio.Client) -> None:
    code = re.findall(r"```python\n(.*?)```", (DOCS / "asyncio.md").read_text(), re.DOTALL)[1]
    names = {"asyncio": asyncio, "np": np, "pb": pb, "many": [X, 2 * X], "positions": X}
    code = code.replace("localhost:8470", server.target)
    await eval(compile(code, "asyncio.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
    same(names["results"][1].gradients["x"], 4 * (2 * X) ** 3)
    # Of the squared force, 16 x ** 6.
    same(await names["x"].grad.numpy(), 96 * X**5)
    await names["client"].close()


class TestSessions:
    @staticmethod
    def with_session(test: Callable[..., Awaitable[None]]) -> Any:
        def tested(self: Any, server: Server) -> None:
            async def main() -> None:
                async with pb.aio.connect(server.target, timeout=60) as client:
                    cube = client.model("cube")
                    async with client.session(models=[cube]) as session:
                        await test(self, session, cube, client)

            asyncio.run(main())

        tested.__name__ = test.__name__
        return tested

    @with_session
    async def test_what_would_block_the_loop_is_refused_and_nothing_is_sent(
        self, session: pb.aio.Session, cube: pb.aio.RemoteModel, client: pb.aio.Client
    ) -> None:
        x = await session.tensor(C, requires_grad=True)
        y = cube(x).sum()
        for use in (float, bool, int, len, np.asarray, list, lambda one: one.shape, lambda one: one.dtype,
                    lambda one: one.requires_grad, lambda one: f"{one:.3f}", lambda one: one.T):  # fmt: skip
            with pytest.raises(RuntimeError, match=r"event loop.*await"):
                use(cube(x).sum())
        with pytest.raises(RuntimeError, match=r"event loop.*await tensor\.backward"):
            pb.autograd.grad(y, x)
        with pytest.raises(RuntimeError, match=r"event loop.*session\.run"):
            z = x * 2
            z += y
        with pytest.raises(RuntimeError, match=r"event loop.*await session\.tensor"):
            cube(np.zeros(1 << 20))
        with pytest.raises(RuntimeError, match=r"event loop.*session\.use"):
            client.model("double")(x)
        # None of it has changed anything.
        assert x.grad is None
        await y.backward()
        same(await x.grad.numpy(), 3 * C**2)
        same(await z.numpy(), 2 * C)
        await session.use(client.model("double"))
        with pytest.raises(RuntimeError, match=r"outputs are not known.*await model\.forward"):
            client.model("double")(x)
        same(await (await client.model("double").forward(x)).numpy(), 2 * C)
        await session.use(client.model("slow"))
        same(await client.model("slow")(x * 0).numpy(), 0 * C)

    @with_session
    async def test_what_is_here_need_not_be_awaited(
        self, session: pb.aio.Session, cube: pb.aio.RemoteModel, client: pb.aio.Client
    ) -> None:
        y = cube(await session.tensor(C)).sum()
        assert (await y.ready()).shape == ()
        assert float(y) == pytest.approx((C**3).sum()) and int(y) == int((C**3).sum())
        assert await y.tolist() == await y.item()

    @with_session
    async def test_ordinary_code_in_a_thread(
        self, session: pb.aio.Session, cube: pb.aio.RemoteModel, client: pb.aio.Client
    ) -> None:
        def newton(start: float, steps: int) -> float:
            x = pb.tensor(np.array([start]), requires_grad=True)
            for _ in range(steps):
                (g,) = pb.autograd.grad((cube(x) - 3 * x).sum(), x, create_graph=True)
                (h,) = pb.autograd.grad(g.sum(), x)
                x = pb.tensor(x.numpy() - g.detach().numpy() / h.numpy(), requires_grad=True)
            assert not pb.is_grad_enabled() or float(x.sum()) == x.item()
            return float(x.item())

        assert await session.run(newton, 2.0, steps=6) == pytest.approx(1.0)
        with pytest.raises(ZeroDivisionError):
            await session.run(lambda: 1 // 0)
        with pb.no_grad():
            assert not await session.run(pb.is_grad_enabled)
        assert await session.run(pb.is_grad_enabled)

    @with_session
    async def test_thousands_of_ops_without_waiting(
        self, session: pb.aio.Session, cube: pb.aio.RemoteModel, client: pb.aio.Client
    ) -> None:
        x = await session.tensor(np.array([0.0]))
        for _ in range(1500):
            x = x + 1.0
        assert await x.item() == 1500.0
        assert session._held._stream.in_flight == 0

    @with_session
    async def test_tasks_share_a_session(
        self, session: pb.aio.Session, cube: pb.aio.RemoteModel, client: pb.aio.Client
    ) -> None:
        async def gradient(at: float) -> float:
            x = await session.tensor(np.array([at]), requires_grad=True)
            await cube(x).sum().backward()
            return await x.grad.item()

        found = await asyncio.gather(*(gradient(float(at)) for at in range(50)))
        assert found == [3.0 * at**2 for at in range(50)]

    @with_session
    async def test_cancelling_what_awaits_a_value_leaves_the_session(
        self, session: pb.aio.Session, cube: pb.aio.RemoteModel, client: pb.aio.Client
    ) -> None:
        slow = client.model("slow")
        await session.use(slow)
        async with client.session(models=[slow], timeout=1.5) as patient:
            y = slow(await patient.tensor(taking(2.0)))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await y.numpy()
            await asyncio.sleep(1.0)
            # This one's time is not over when that of the first would have been.
            same(await y.numpy(), taking(2.0))
            assert patient.usable

    @with_session
    async def test_a_cancelled_backward_accumulates_nothing_later(
        self, session: pb.aio.Session, cube: pb.aio.RemoteModel, client: pb.aio.Client
    ) -> None:
        slow = client.model("slow")
        await session.use(slow)
        x = await session.tensor(taking(0.4), requires_grad=True)
        y = slow(x).sum()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await y.backward(retain_graph=True)
        await y.item()
        await session.synchronize()
        await asyncio.sleep(0.1)
        assert x.grad is None
        await y.backward(retain_graph=True)
        await pb.aio.backward(y, retain_graph=True)
        same(await x.grad.numpy(), [2.0])

    @with_session
    async def test_a_cancelled_upload_is_given_up_and_the_session_goes_on(
        self, session: pb.aio.Session, cube: pb.aio.RemoteModel, client: pb.aio.Client
    ) -> None:
        stream: Any = session._held._stream
        send, loop, begun, sizes = stream.send, asyncio.get_running_loop(), asyncio.Event(), []

        def watched(frame: Any, *args: Any) -> None:
            if frame.WhichOneof("frame") == "chunk":
                sizes.append(frame.chunk.size)
                loop.call_soon_threadsafe(begun.set)
            send(frame, *args)

        stream.send = watched
        task = asyncio.create_task(session.tensor(np.zeros(16 << 20)))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        same(await cube(await session.tensor(C)).numpy(), C**3)
        await until(lambda: sizes[-1] == 0)
        assert len(sizes) < 128

    @with_session
    async def test_many_uploads_at_once(
        self, session: pb.aio.Session, cube: pb.aio.RemoteModel, client: pb.aio.Client
    ) -> None:
        made = await asyncio.gather(*(session.tensor(np.full(1 << 20, float(one))) for one in range(8)))
        for one, x in enumerate(made):
            assert await x.sum().item() == one * 2.0**20

    @with_session
    async def test_tensors_of_all_that_holds_numbers(
        self, session: pb.aio.Session, cube: pb.aio.RemoteModel, client: pb.aio.Client
    ) -> None:
        with pb.connect(session._held.transport.address.target) as other:
            elsewhere = other.tensor(np.ones(1 << 20))
            makes: list[Any] = [
                torch.ones(1 << 20),
                [1.0] * (1 << 20),
                np.ones(1 << 20),
                await session.tensor(np.ones(1 << 20)),
                await asyncio.to_thread(lambda: elsewhere * 1),
                float(1 << 20),
                np.float64(1 << 20),
                [[float(1 << 20)]],
            ]
            for made in makes:
                assert await (await session.tensor(made)).sum().item() == 1 << 20

    @with_session
    async def test_showing_a_tensor_asks_nobody(
        self, session: pb.aio.Session, cube: pb.aio.RemoteModel, client: pb.aio.Client
    ) -> None:
        y = cube(await session.tensor(C))
        sent = session._held._stream._op
        assert repr(y) == await asyncio.to_thread(repr, y) == "tensor(<not here yet>)"
        assert session._held._stream._op == sent
        await y.ready()
        assert "-8." in repr(y) and "-8." in await session.run(repr, cube(await session.tensor(C)))

    @pytest.mark.parametrize("how", ["ended", "closed"])
    def test_a_block_that_another_task_leaves(self, server: Server, how: str) -> None:
        async def fixture(client: pb.aio.Client) -> AsyncIterator[pb.aio.Session]:
            async with client.session(models=[client.model("cube")]) as session:
                yield session

        async def main() -> None:
            async with pb.aio.connect(server.target, timeout=60) as client:
                generator = fixture(client)
                session = await asyncio.create_task(anext(generator))
                await asyncio.create_task(anext(generator, None) if how == "ended" else generator.aclose())
                assert not session.usable
                await until(lambda: metric(server, "pullback_sessions") == 0)

        asyncio.run(main())

    @with_session
    async def test_what_ends_a_session_is_told_to_all_who_wait(
        self, session: pb.aio.Session, cube: pb.aio.RemoteModel, client: pb.aio.Client
    ) -> None:
        slow = client.model("slow")
        async with pb.aio.connect(session._held.transport.address.target) as other:
            theirs = await other.session(models=[slow])
            late = slow(await theirs.tensor(taking(1.0)))
            waiting = [asyncio.create_task(one.numpy()) for one in (late, *(late * k for k in range(20)))]
            waiting.append(asyncio.create_task(theirs.run(late.numpy)))
            await asyncio.sleep(0.1)
            await other.close()
            told = await asyncio.gather(*waiting, return_exceptions=True)
            assert {type(one) for one in told} == {errors.ClientClosed}, told

    def test_leaving_by_cancellation_ends_the_session_at_once(self, server: Server) -> None:
        async def main() -> None:
            async with pb.aio.connect(server.target, timeout=60) as client:
                slow = client.model("slow")
                inside = asyncio.Event()

                async def work() -> None:
                    async with client.session(models=[slow]) as session:
                        y = slow(await session.tensor(taking(0.8)))
                        inside.set()
                        await y.numpy()

                for how in (work, lambda: self._running(client, slow, inside)):
                    inside.clear()
                    task = asyncio.create_task(how())
                    await inside.wait()
                    await asyncio.sleep(0.1)
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
                    await until(lambda: metric(server, "pullback_sessions") == 0)

        asyncio.run(main())

    @staticmethod
    async def _running(client: Any, slow: Any, inside: asyncio.Event) -> None:
        session = await client.session(models=[slow])
        loop = asyncio.get_running_loop()

        def ordinary() -> None:
            y = slow(pb.tensor(taking(0.8)))
            loop.call_soon_threadsafe(inside.set)
            y.numpy()

        await session.run(ordinary)

    def test_without_a_session_or_in_another_loop(self, server: Server) -> None:
        client = pb.aio.connect(server.target, timeout=60)
        cube = client.model("cube")

        async def opened() -> tuple[Any, Any]:
            with pytest.raises(RuntimeError, match=r"async with client\.session"):
                cube(pb.tensor(C))
            session = await client.session(models=[cube])
            return session, cube(await session.tensor(C))

        async def used(y: Any) -> None:
            with pytest.raises(RuntimeError, match="another event loop"):
                await y.numpy()

        session, y = asyncio.run(opened())
        asyncio.run(used(y))
        # Without an event loop it is a tensor like any other.
        same(y.numpy(), C**3)
        asyncio.run(session.close())
        asyncio.run(client.close())
