"""What is the asyncio client's own: cancellation, many tasks, loops, forks. The rest: see `tests/both_clients.py`."""

import asyncio
import gc
import os
import pickle
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tests.unit.client_server import Failure, Fake, serving
from tests.unit.test_client_process import run

import pullback as pb
from pullback import errors
from pullback_wire import REQUEST_ID_KEY

X = np.array([1.0, -2.0, 3.0])
NAMED = {"x": X}
QUICK = pb.RetryPolicy(attempts=4, initial_backoff=0.001, max_backoff=0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[Fake]:
    with serving(Fake()) as fake:
        yield fake


@pytest.fixture
def fake(server: Fake) -> Iterator[Fake]:
    server.seen.clear()
    server.cancelled.clear()
    server.upload_over.clear()
    yield server
    server.delay, server.failures = 0.0, []


def alone(target: str, test: Callable[[pb.aio.Client], Awaitable[None]], **settings: Any) -> None:
    """Runs a test with a client of its own, in a loop of its own that reports nothing it was not asked for."""
    reported: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
        async with pb.aio.connect(target, **settings) as client:
            await test(client)

    asyncio.run(main())
    gc.collect()
    assert not reported


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class TestCancelling:
    def test_a_task_cancels_its_call_at_the_server(self, fake: Fake) -> None:
        fake.delay = 60

        async def test(client: pb.aio.Client) -> None:
            task = asyncio.create_task(client.model("square").vjp(NAMED, {"output": X}))
            await until(lambda: fake.calls("ComputeVjp") == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(fake.cancelled.is_set)
            fake.delay = 0
            await client.ping()
            assert fake.calls("ComputeVjp") == 1

        alone(fake.target, test, retry=QUICK)

    def test_a_timeout_is_asyncios(self, fake: Fake) -> None:
        fake.delay = 60

        async def test(client: pb.aio.Client) -> None:
            with pytest.raises(TimeoutError) as caught:
                async with asyncio.timeout(0.2):
                    await client.models()
            assert not isinstance(caught.value, pb.PullbackError)
            with pytest.raises(errors.DeadlineExceeded):
                await client.models(timeout=0.2)
            await until(fake.cancelled.is_set)

        alone(fake.target, test)

    def test_a_pause_between_attempts_ends_too(self, fake: Fake) -> None:
        fake.failures = [Failure(14, retry_after=3600)]

        async def test(client: pb.aio.Client) -> None:
            task = asyncio.create_task(client.model("square").evaluate(NAMED, timeout=None))
            await until(lambda: bool(fake.seen))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(fake.seen) == 1

        alone(fake.target, test, timeout=None)

    def test_an_upload_ends_at_the_server(self, fake: Fake) -> None:
        going, held = threading.Event(), threading.Event()

        def progress(sent: int, total: int) -> None:
            going.set()
            held.wait(60)

        async def test(client: pb.aio.Client) -> None:
            task = asyncio.create_task(client.upload_weights("square", bytes(8 << 20), 3, progress=progress))
            await until(lambda: going.is_set() and bool(fake.seen))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            held.set()
            # The server did not get all of it.
            await until(fake.upload_over.is_set)
            assert len(fake.seen) == 1 and len(fake.seen[0].message) < 9

        alone(fake.target, test)

    def test_closing_ends_calls_as_the_sync_client_does(self, fake: Fake) -> None:
        fake.delay = 60

        async def test(client: pb.aio.Client) -> None:
            task = asyncio.create_task(client.models())
            await until(lambda: fake.calls("ListModels") == 1)
            await client.close()
            with pytest.raises(errors.ClientClosed):
                await task
            with pytest.raises(errors.ClientClosed):
                await client.ping()

        alone(fake.target, test)

    def test_a_loop_that_ends_leaves_nothing_behind(self, fake: Fake) -> None:
        fake.delay = 60
        client = pb.aio.connect(fake.target)

        async def test() -> None:
            asyncio.ensure_future(client.models())  # noqa: RUF006
            await until(lambda: fake.calls("ListModels") == 1)

        # run() cancels what is left.
        asyncio.run(test())
        assert fake.cancelled.wait(60)
        fake.delay = 0
        assert asyncio.run(client.ping()) > 0
        asyncio.run(client.close())


class TestManyTasks:
    def test_hundreds_at_once_get_their_own_answers(self, fake: Fake) -> None:
        async def test(client: pb.aio.Client) -> None:
            square = client.model("square")
            calls = [square.vjp({"x": X + one}, {"output": X}) for one in range(300)]
            for one, (outputs, gradient) in enumerate(await asyncio.gather(*calls)):
                np.testing.assert_array_equal(outputs["x"] if isinstance(outputs, dict) else outputs, (X + one) ** 2)
                np.testing.assert_array_equal(gradient["x"], 2 * (X + one) * X)
            assert fake.calls("ComputeVjp") == 300

        alone(fake.target, test)

    def test_the_loop_goes_on_during_a_call(self, fake: Fake) -> None:
        fake.delay = 0.5

        async def test(client: pb.aio.Client) -> None:
            ticks = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    await asyncio.sleep(0.01)
                    ticks += 1

            ticker = asyncio.create_task(tick())
            await client.models()
            ticker.cancel()
            assert ticks > 5

        alone(fake.target, test)

    def test_ids_are_of_the_task(self, fake: Fake) -> None:
        async def named(client: pb.aio.Client, id: str) -> None:
            with pb.request_id(id):
                await asyncio.sleep(0.01)
                await client.models()

        async def test(client: pb.aio.Client) -> None:
            wanted = [f"task-{one}" for one in range(20)]
            await asyncio.gather(*(named(client, id) for id in wanted))
            assert sorted(seen.metadata[REQUEST_ID_KEY] for seen in fake.seen) == sorted(wanted)

        alone(fake.target, test)


class TestSignatures:
    """One question, however many want the answer at once."""

    def test_they_are_asked_for_once(self, fake: Fake) -> None:
        fake.delay = 0.1

        async def test(client: pb.aio.Client) -> None:
            square = client.model("square")
            await asyncio.gather(*(square.vjp(X, X) for _ in range(5)), square.info())
            assert (fake.calls("GetModel"), fake.calls("ComputeVjp")) == (1, 5)

        alone(fake.target, test)

    def test_who_is_cancelled_fails_nobody_else(self, fake: Fake) -> None:
        fake.delay = 0.2

        async def test(client: pb.aio.Client) -> None:
            square = client.model("square")
            tasks = [asyncio.create_task(square.evaluate(X)) for _ in range(4)]
            await until(lambda: fake.calls("GetModel") == 1)
            tasks[0].cancel()
            tasks[2].cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(one, asyncio.CancelledError) for one in found] == [True, False, True, False]
            np.testing.assert_array_equal(found[3], X**2)
            assert fake.calls("GetModel") == 2

        alone(fake.target, test)

    def test_who_has_little_time_fails_nobody_else(self, fake: Fake) -> None:
        fake.delay = 0.3

        async def test(client: pb.aio.Client) -> None:
            square = client.model("square")
            # As the first, which asks, and behind one that has more.
            hasty = asyncio.create_task(square.evaluate(X, timeout=0.1))
            slow = [asyncio.create_task(square.evaluate(X)) for _ in range(3)]
            await asyncio.sleep(0.2)
            late = asyncio.create_task(square.evaluate(X, timeout=0.1))
            for one in (hasty, late):
                with pytest.raises(errors.DeadlineExceeded):
                    await one
            for one in slow:
                np.testing.assert_array_equal(await one, X**2)
            assert fake.calls("GetModel") == 2

        alone(fake.target, test)

    def test_an_error_is_told_to_all(self, fake: Fake) -> None:
        fake.failures = [Failure(5, "gone")]

        async def test(client: pb.aio.Client) -> None:
            square = client.model("square")
            found = await asyncio.gather(*(square.evaluate(X) for _ in range(3)), return_exceptions=True)
            assert {type(one) for one in found} == {errors.NotFound} and len({id(one) for one in found}) == 3
            assert fake.calls("GetModel") == 1
            await square.evaluate(X)

        alone(fake.target, test)

    def test_an_answer_of_before_a_replacement_is_not_kept(self, fake: Fake) -> None:
        fake.delay = 0.2

        async def test(client: pb.aio.Client) -> None:
            square = client.model("square")
            early = asyncio.create_task(square.info())
            await until(lambda: fake.calls("GetModel") == 1)
            # As an answer from another version has it.
            square._caller.forget()
            await square._caller.learn()
            await early
            assert fake.calls("GetModel") == 2

        alone(fake.target, test)

    def test_threads_of_the_sync_client_ask_once_too(self, fake: Fake) -> None:
        fake.delay = 0.3
        with pb.connect(fake.target) as client:
            square = client.model("square")
            found: list[Any] = []
            threads = [threading.Thread(target=lambda: found.append(square.evaluate(X))) for _ in range(5)]
            threads[0].start()
            while not fake.calls("GetModel"):
                time.sleep(0.001)
            for thread in threads[1:]:
                thread.start()
            pickle.loads(pickle.dumps(square))
            for thread in threads:
                thread.join()
            assert len(found) == 5 and fake.calls("GetModel") == 1


class TestTokens:
    def test_an_async_function(self, fake: Fake) -> None:
        asked: list[Any] = []

        async def token() -> str:
            await asyncio.sleep(0.001)
            asked.append(asyncio.get_running_loop())
            return f"token-{len(asked)}"

        async def test(client: pb.aio.Client) -> None:
            await client.models()
            # A token that the server no longer takes is asked for once more.
            fake.failures = [Failure(16)]
            await client.models()
            # From a thread it is asked for in the loop as well.
            await client.upload_weights("square", bytes(8), 3)
            sent = [seen.metadata["authorization"] for seen in fake.seen]
            assert sent == [f"Bearer token-{one}" for one in (1, 2, 3, 4)]
            assert set(asked) == {asyncio.get_running_loop()}

        alone(fake.target, test, token=token)

    @pytest.mark.parametrize("given", ["", "snow☃", 3])
    def test_what_is_none(self, fake: Fake, given: Any) -> None:
        async def token() -> Any:
            return given

        async def test(client: pb.aio.Client) -> None:
            with pytest.raises(ValueError, match=r"token|authorization"):
                await client.models()
            assert not fake.seen

        alone(fake.target, test, token=token)


class TestLoopsAndProcesses:
    def test_one_client_in_several_loops(self, fake: Fake) -> None:
        client = pb.aio.connect(fake.target)
        square = client.model("square")

        async def call() -> None:
            for _ in range(20):
                np.testing.assert_array_equal(await square.evaluate(X), X**2)

        asyncio.run(call())
        failures: list[BaseException] = []

        def in_thread() -> None:
            try:
                asyncio.run(call())
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=in_thread) for _ in range(4)]
        for thread in threads:
            thread.start()
        asyncio.run(call())
        for thread in threads:
            thread.join()
        assert not failures
        asyncio.run(client.close())

    def test_it_is_pickled_as_the_sync_one_is(self, fake: Fake) -> None:
        client = pb.aio.connect(fake.target, timeout=12)
        again = pickle.loads(pickle.dumps(client))
        model = pickle.loads(pickle.dumps(client.model("square", 2)))
        assert (repr(again), model.name, model.version) == (repr(client), "square", "2")

        async def test() -> None:
            assert await again.ping() > 0
            np.testing.assert_array_equal(await model.evaluate(X), X**2)

        asyncio.run(test())

    def test_a_forked_child_has_a_connection_of_its_own(self, server: Fake) -> None:
        said = run(
            """
            import asyncio, os, sys
            import pullback as pb

            client = pb.aio.connect(sys.argv[1])
            square = client.model("square")

            async def main():
                await square.evaluate([1.0])
                going = [asyncio.create_task(square.evaluate([2.0])) for _ in range(20)]
                await asyncio.sleep(0)
                pid = os.fork()
                if pid == 0:
                    async def child():
                        return (await square.evaluate([3.0]))[0]
                    os._exit(int(asyncio.run(child())))
                values = await asyncio.gather(*going)
                _, status = await asyncio.to_thread(os.waitpid, pid, 0)
                print(sum(value[0] for value in values), os.waitstatus_to_exitcode(status))

            asyncio.run(main())
            """,
            server.target,
        )
        assert said.split() == ["80.0", "9"]

    def test_loading_it_loads_neither_grpc_nor_sessions(self) -> None:
        loaded = set(run("import sys, pullback.aio; print(*sys.modules)").split())
        assert not loaded & {"grpc", "torch", "jax", "pullback._session", "pullback._tensor"}

    def test_calling_does_not_load_grpc_aio_or_sessions(self, server: Fake) -> None:
        loaded = run(
            """
            import asyncio, sys
            import pullback as pb

            async def main():
                async with pb.aio.connect(sys.argv[1]) as client:
                    await client.model("square").evaluate([1.0])

            asyncio.run(main())
            print(*sys.modules)
            """,
            server.target,
        ).split()
        assert not set(loaded) & {"torch", "jax", "pullback_server", "pullback._session"}


def test_the_same_names_and_arguments_as_the_sync_client() -> None:
    import inspect

    def shape(function: Any) -> list[tuple[str, Any, Any]]:
        return [(one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()]

    for sync, own, but in (
        (pb.Client, pb.aio.Client, {"tensor", "session", "target"}),
        (pb.RemoteModel, pb.aio.RemoteModel, {"info", "objective", "name", "version"}),
    ):
        names = {name for name in vars(sync) if not name.startswith("_")}
        assert names - but <= set(dir(own))
        for name in names - but:
            assert shape(getattr(sync, name)) == shape(getattr(own, name)), name
            waits = name not in ("model", "named_parameters", "parameters", "zero_grad")
            assert inspect.iscoroutinefunction(getattr(own, name)) == waits, name
            assert not inspect.iscoroutinefunction(getattr(sync, name))
            assert getattr(sync, name).__qualname__ == f"{sync.__name__}.{name}"
            assert getattr(own, name).__doc__ and getattr(sync, name).__doc__
    assert shape(pb.connect) == shape(pb.aio.connect)
    for name in pb.aio.__all__:
        assert getattr(pb.aio, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'conect'"):
        pb.aio.conect  # noqa: B018


def test_threads_are_used_again_and_end(fake: Fake) -> None:
    from pullback.aio import _threads

    async def test(client: pb.aio.Client) -> None:
        before = threading.active_count()
        for _ in range(50):
            await _threads.in_thread(time.sleep, 0)
        assert threading.active_count() <= before + 2
        at_once = await asyncio.gather(*(_threads.in_thread(threading.get_ident) for _ in range(50)))
        assert len(at_once) == 50
        with pytest.raises(ZeroDivisionError):
            await _threads.in_thread(lambda: 1 // 0)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await _threads.in_thread(lambda: next(iter(())))

    alone(fake.target, test)
    assert os.getpid()
