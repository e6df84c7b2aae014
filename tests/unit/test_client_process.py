"""Processes and threads: what importing loads, fork, pickle, many threads at once, Ctrl-C."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tests.unit.client_server import Fake, serving

import pullback as pb

ROOT = Path(__file__).parents[2]
X = np.array([1.0, 2.0, 3.0])


@pytest.fixture(scope="module")
def server() -> Iterator[Fake]:
    with serving(Fake()) as fake:
        yield fake


def run(code: str, *arguments: str, timeout: float = 60) -> str:
    """Runs a program in a fresh process; its output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_importing_is_light() -> None:
    loaded = set(run("import sys, pullback; print(*sys.modules)").split())
    heavy = {"torch", "jax", "scipy", "pullback_server", "grpc", "google.rpc", "asyncio", "ssl", "importlib.metadata"}
    assert not loaded & heavy


def test_calling_loads_neither_torch_nor_the_server(server: Fake) -> None:
    loaded = run(
        """
        import sys, pullback
        client = pullback.connect(sys.argv[1])
        client.ping(), client.models(), client.model("square").vjp([1.0], [1.0])
        print(*sys.modules)
        """,
        server.target,
    ).split()
    assert not set(loaded) & {"torch", "jax", "scipy", "pullback_server", "msgspec"}


def test_connecting_calls_nobody() -> None:
    client = pb.connect("no-such-host.invalid:1")
    assert "square" in repr(client.model("square"))


FORKING = """
    import os, signal, sys, threading
    import numpy as np
    import pullback as pb

    def child():
        signal.alarm(30)
        for _ in range(3):
            outputs, gradient = model.vjp(np.arange(3.0), np.ones(3))
            assert gradient.tolist() == [0.0, 2.0, 4.0]

    def fork_many(times):
        for _ in range(times):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    child()
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(pid, 0)[1] == 0
"""


def test_a_forked_child_and_its_parent_both_go_on(server: Fake) -> None:
    run(
        FORKING
        + """
    client = pb.connect(sys.argv[1])
    model = client.model("square")
    fork_many(2)  # before the first call
    child()
    fork_many(5)  # after it
    child()
    pid = os.fork()
    if pid == 0:  # a child that closes its client leaves the parent's alone
        client.close()
        del client, model
        import gc; gc.collect()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    child()
    """,
        server.target,
    )


def test_a_fork_while_other_threads_call(server: Fake) -> None:
    run(
        FORKING
        + """
    client = pb.connect(sys.argv[1])
    model = client.model("square")
    model.info
    over = threading.Event()
    failures = []

    def calling():
        while not over.is_set():
            try:
                model.vjp(np.ones(3), np.ones(3))
            except BaseException as error:
                failures.append(error)
                raise

    threads = [threading.Thread(target=calling) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        fork_many(40)
    finally:
        over.set()
    for thread in threads:
        thread.join()
    assert not failures
    """,
        server.target,
    )


def test_a_fork_does_not_wait_long_for_a_long_call() -> None:
    fake = Fake()
    with serving(fake), pb.connect(fake.target) as client:
        client.ping()
        fake.delay = 60

        def call() -> None:
            with pytest.raises(pb.errors.ClientClosed):
                client.models()

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        while not fake.seen[1:]:
            time.sleep(0.01)
        from pullback._fork import gate

        began = time.monotonic()
        gate.before_fork()
        gate.after_in_parent()
        assert time.monotonic() - began < 30
        client.close()
        thread.join(30)
        assert not thread.is_alive()


def _square(model: pb.RemoteModel, x: float) -> float:
    return float(model.evaluate({"x": x}))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_models_travel_to_multiprocessing_workers(server: Fake, method: str) -> None:
    # In a process of its own: this one has a gRPC server, which no fork survives.
    script = ROOT / "tests" / "unit" / "client_server.py"
    assert script.exists()
    output = run(
        """
        import multiprocessing, sys
        import pullback as pb
        from tests.unit.test_client_process import _square

        if __name__ == "__main__":
            model = pb.connect(sys.argv[1]).model("square")
            assert _square(model, 3.0) == 9.0
            with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:
                print(pool.starmap(_square, [(model, float(x)) for x in range(4)]))
        """,
        server.target,
        method,
    )
    assert output.strip() == "[0.0, 1.0, 4.0, 9.0]"
    assert method in multiprocessing.get_all_start_methods()


def test_pickling_keeps_the_settings(server: Fake) -> None:
    retry = pb.RetryPolicy(attempts=2)
    client = pb.connect(server.target, timeout=12, retry=retry, metadata={"authorization": "Bearer x"}, name="me")
    model = client.model("square", 1)
    assert model.info.name == "square"
    before = server.calls("GetModel")
    client2, model2 = pickle.loads(pickle.dumps((client, model)))
    assert client2.target == client.target
    assert (model2.name, model2.version, model2.info) == ("square", "1", model.info)
    assert server.calls("GetModel") == before
    np.testing.assert_array_equal(model2.evaluate(X), X**2)
    metadata = server.seen[-1].metadata
    assert metadata["authorization"] == "Bearer x"
    assert metadata["user-agent"].startswith("me pullback-python")
    transport = client2._transport
    assert (transport.timeout, transport.retry) == (12, retry)
    # The settings travel, not their state: a closed client comes back open.
    client.close()
    assert pickle.loads(pickle.dumps(client)).ping() > 0


def test_many_threads_on_one_client(server: Fake) -> None:
    with pb.connect(server.target) as client:
        square = client.model("square")

        def call(number: int) -> bool:
            x = np.full(100, float(number))
            outputs, gradient = square.vjp(x, x)
            return bool((outputs == x**2).all() and (gradient == 2 * x * x).all())

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(call, range(400)))


def test_closing_ends_calls_that_run() -> None:
    fake = Fake()
    with serving(fake):
        client = pb.connect(fake.target)
        fake.delay = 60
        caught: list[BaseException] = []

        def call() -> None:
            try:
                client.models()
            except BaseException as error:
                caught.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        while not fake.seen:
            time.sleep(0.01)
        client.close()
        thread.join(30)
        assert [type(error) for error in caught] == [pb.errors.ClientClosed]
        assert fake.cancelled.wait(30)


def test_an_interrupt_cancels_the_call() -> None:
    fake = Fake()
    with serving(fake):
        fake.delay = 60
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys, pullback\n"
                "try: pullback.connect(sys.argv[1], timeout=50).models()\n"
                "except KeyboardInterrupt: print('interrupted', flush=True); sys.stdin.read()",
                fake.target,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            while not fake.seen:
                time.sleep(0.01)
            process.send_signal(2)
            assert process.stdout is not None
            assert process.stdout.readline() == "interrupted\n"
            # While the process still lives.
            assert fake.cancelled.wait(30)
            assert process.poll() is None
        finally:
            process.communicate("", timeout=30)


def test_the_public_surface() -> None:
    for name in pb.__all__:
        assert getattr(pb, name) is not None
    assert pb.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="has no attribute 'tensr'"):
        pb.tensr  # type: ignore[attr-defined]  # noqa: B018


def test_tune_malloc() -> None:
    code = "import pullback as pb; print(pb.tune_malloc(), pb.tune_malloc())"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment.pop("GLIBC_TUNABLES", None)

    def tuned(**more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | more, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout.strip()

    import platform

    pinned = platform.libc_ver()[0] == "glibc"
    assert tuned() == f"{pinned} {pinned}"
    assert tuned(MALLOC_ARENA_MAX="2") == "False False"
    assert tuned(GLIBC_TUNABLES="glibc.malloc.trim_threshold=1000000") == "False False"
