"""What one caller does to a worker is not the others' affair: endless loops, deaths, lost memory. Nothing stays."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tests.integration.test_many_callers import BASE, MOODY, ROWS, House, house, numbers

import pullback as pb

MIB = 1 << 20
#: Besides those of many callers: one that takes memory as it is told.
GREEDY = """

@model("greedy", inputs={"x": spec("float64", ["n", 3])}, batch_axis=0, batching=BATCHING, devices=WHERE)
def greedy(x):
    "Its input; each row with 77 needs 16 MiB, each with 88 needs 320."
    rows = int((x.detach() == 77).any(1).sum()) + 20 * int((x.detach() == 88).any(1).sum())
    return x + x.new_zeros(rows, 1 << 21).sum() if rows else x + 0
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A server with two workers, the first of which has the gates and the models that kill."""
    options = ("--devices", "cpu:2", "--worker-memory-bytes", str(200 * MIB), "--max-message-bytes", str(32 * MIB))
    with house(tmp_path_factory.mktemp("two"), *options, where=["cpu-0"], models=BASE + ROWS + MOODY + GREEDY) as found:
        yield found


def moody(two: House, caller: str, x: Any) -> Any:
    """A VJP with ones."""
    return two.client(caller).model("moody").vjp(x, np.ones_like(x))


def check(x: Any, found: Any) -> None:
    y, gradient = found
    np.testing.assert_allclose(y, x**3, rtol=1e-12)
    np.testing.assert_allclose(gradient, 3 * x**2, rtol=1e-12)


def poisoned(value: float, seed: int) -> Any:
    x = numbers(seed, 2, 3)
    x[1, 1] = value
    return x


def ready(two: House) -> None:
    two.until("pullback_workers", 2, state="ready")


def test_who_kills_a_worker_is_refused_and_the_others_of_his_batch_are_answered(two: House) -> None:
    ready(two)
    before = two.value("pullback_worker_restarts_total")
    innocent = [numbers(seed, seed % 3 + 1, 3) for seed in range(6)]
    killer = poisoned(666, 100)
    with two.busy():
        first = [two.queue(moody, two, f"caller {seed}", x) for seed, x in enumerate(innocent[:3])]
        deadly = two.queue(moody, two, "killer", killer)
        last = [two.queue(moody, two, f"caller {seed + 3}", x) for seed, x in enumerate(innocent[3:])]
    with pytest.raises(pb.errors.WorkerLost, match="so did the one that retried it"):
        deadly.result(60)
    for x, future in zip(innocent, [*first, *last], strict=True):
        check(x, future.result(60))
    for _ in range(2):
        with pytest.raises(pb.errors.Quarantined, match="it is not tried again"):
            moody(two, "killer", killer)
    # Another's call for the same model is not held against it.
    check(innocent[0], moody(two, "killer", innocent[0]))
    ready(two)
    assert two.value("pullback_worker_restarts_total") == before + 2
    assert two.value("pullback_worker_deaths_total", model="moody", why="died") >= 1
    two.settled()


def test_an_endless_loop_is_ended_and_costs_only_its_caller(two: House) -> None:
    ready(two)
    before = two.value("pullback_worker_restarts_total")
    assert two.client().model("moody").info.hard_timeout == 1.0
    innocent = [numbers(seed, seed % 3 + 1, 3) for seed in range(4)]
    with two.busy() as gates:
        endless = two.queue(moody, two, "endless", poisoned(999, 200))
        gates.open(0)
        gates.began(1)
        two.until("pullback_queue_length", 0)
        # They come when it has been staged, so that it computes alone.
        behind = [two.queue(moody, two, f"caller {seed}", x) for seed, x in enumerate(innocent)]
    with pytest.raises(pb.errors.HardTimeout, match="hard limit"):
        endless.result(60)
    for x, future in zip(innocent, behind, strict=True):
        check(x, future.result(60))
    ready(two)
    assert two.value("pullback_worker_restarts_total") == before + 1
    assert two.value("pullback_worker_deaths_total", model="moody", why="timeout") == 1
    two.settled()


def test_an_endless_loop_in_a_batch_costs_only_its_caller(two: House) -> None:
    ready(two)
    innocent = [numbers(seed, seed % 3 + 1, 3) for seed in range(4)]
    with two.busy():
        futures = [two.queue(moody, two, f"caller {seed}", x) for seed, x in enumerate(innocent)]
        endless = two.queue(moody, two, "endless", poisoned(999, 300))
    with pytest.raises(pb.errors.HardTimeout, match="hard limit"):
        endless.result(60)
    for x, future in zip(innocent, futures, strict=True):
        check(x, future.result(60))
    two.settled()


def test_rows_that_do_not_fit_together_are_computed_in_parts(two: House) -> None:
    """Within the memory that a worker may have, 12 rows fit at most, be they one call's or several."""
    ready(two)
    restarts = two.value("pullback_worker_restarts_total")
    x = [np.full((rows, 3), 77.0) for rows in (2, 20, 7, 8)]
    model = two.client().model("greedy")
    for one in x[:2]:
        np.testing.assert_array_equal(model.evaluate(one), one)
    with two.busy():
        futures = [two.queue(two.client(f"caller {len(one)}").model("greedy").evaluate, one) for one in x[2:]]
    for one, future in zip(x[2:], futures, strict=True):
        np.testing.assert_array_equal(future.result(60), one)
    assert two.value("pullback_memory_splits_total", model="greedy") >= 1
    with two.busy():
        small = two.queue(two.client("small").model("greedy").evaluate, x[0])
        large = two.queue(two.client("large").model("greedy").evaluate, np.full((2, 3), 88.0))
    np.testing.assert_array_equal(small.result(60), x[0])
    with pytest.raises(pb.errors.OutOfMemory):
        large.result(60)
    assert two.value("pullback_worker_restarts_total") == restarts
    two.settled()


# Everything at once, in no order.

VANISHING = """
import sys, threading
import numpy as np
import pullback as pb

client = pb.connect(sys.argv[1])
held = [client.tensor(np.ones((50, 3)), requires_grad=True) for _ in range(5)]
held += [client.model("rows")(leaf) for leaf in held]
print("ready", flush=True)
while True:
    client.model("moody").vjp(np.random.default_rng().normal(size=(500, 3)), np.ones((500, 3)))
"""


class Callers:
    """Each checks every answer, and counts what else it is told."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.told: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.over = threading.Event()
        self.threads = [
            threading.Thread(target=self._until_over, args=(work, seed))
            for seed, work in enumerate([self._unary] * 4 + [self._session] * 2 + [self._spoiler] * 2)
        ]

    def _until_over(self, work: Any, seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not self.over.is_set():
            with pb.connect(self.target, timeout=30, retry=pb.RetryPolicy(attempts=1)) as client:
                try:
                    work(client, rng)
                    self.told["OK"] += 1
                except pb.errors.PullbackError as error:
                    self.told[error.reason or type(error).__name__] += 1
                except AssertionError as error:
                    self.wrong.append(f"{work.__name__}: {error}")

    def _unary(self, client: pb.Client, rng: np.random.Generator) -> None:
        for _ in range(10):
            x = rng.normal(size=(int(rng.integers(1, 5)) if rng.random() < 0.9 else 2000, 3))
            model = client.model(str(rng.choice(["moody", "rows"])))
            if rng.random() < 0.5:
                check(x, model.vjp(x, np.ones_like(x)))
            else:
                t = rng.normal(size=x.shape)
                np.testing.assert_allclose(model.hvp(x, t, np.ones_like(x)).hvps, 6 * x * t, rtol=1e-12)

    def _session(self, client: pb.Client, rng: np.random.Generator) -> None:
        x = rng.normal(size=(5, 3))
        leaf = client.tensor(x, requires_grad=True)
        client.model("rows")(leaf).sum().backward()
        assert leaf.grad is not None
        np.testing.assert_allclose(leaf.grad.numpy(), 3 * x**2, rtol=1e-12)

    def _spoiler(self, client: pb.Client, rng: np.random.Generator) -> None:
        time.sleep(0.05)
        kind = int(rng.integers(4))
        x = rng.normal(size=(2, 3))
        if kind == 0:
            x[0, 0] = 13
            client.model("moody").evaluate(x)
        elif kind == 1:
            client.model("moody").evaluate(np.full((2, 3), np.nan))
        elif kind == 2:
            client.model("rows").evaluate(x, timeout=0.002)
        else:
            x[0, 0] = 999 if rng.random() < 0.5 else 666
            if rng.random() < 0.2:
                client.model("moody").evaluate(x)

    def end(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(60)
            if thread.is_alive():
                self.wrong.append("a call hangs past its deadline")


#: What a caller may be told while workers die.
DOCUMENTED = {
    "OK", "WORKER_LOST", "HARD_TIMEOUT", "MODEL_ERROR", "DEADLINE_EXCEEDED", "DeadlineExceeded", "SESSION_LOST",
    "QUARANTINED", "OVERLOADED", "NOT_READY",
}  # fmt: skip


def held(front: psutil.Process) -> dict[str, float]:
    """What the front holds."""
    segments = 0
    for descriptor in Path(f"/proc/{front.pid}/fd").iterdir():
        try:
            segments += "memfd:" in str(descriptor.readlink())
        except FileNotFoundError:
            continue
    return {
        "children": len(front.children(recursive=True)),
        "threads": front.num_threads(),
        "descriptors": front.num_fds() - segments,
    }


def nothing_counted(two: House) -> None:
    two.settled()
    for gauge in ("sessions", "session_handles", "session_retained_bytes"):
        two.until(f"pullback_{gauge}", 0)


def test_chaos_leaves_right_answers_and_nothing_else(two: House) -> None:
    front = psutil.Process(two.served.process.pid)
    random.seed(0)

    def load(seconds: float) -> Callers:
        callers = Callers(two.target)
        for thread in callers.threads:
            thread.start()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            child = subprocess.Popen(
                [sys.executable, "-c", VANISHING, two.target], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(0.2)
            child.send_signal(signal.SIGKILL)
            child.communicate()
            workers = [one for one in front.children() if "engine.worker" in " ".join(one.cmdline())]
            if workers:
                random.choice(workers).kill()
        callers.end()
        ready(two)
        nothing_counted(two)
        return callers

    load(0)
    before = held(front)
    callers = load(4)
    assert not callers.wrong
    assert callers.told["OK"] > 0
    assert set(callers.told) <= DOCUMENTED, callers.told
    after = held(front)
    assert after["children"] == before["children"]
    assert after["threads"] <= before["threads"] + 2
    assert after["descriptors"] <= before["descriptors"] + 4
    for seed in range(3):
        check(numbers(seed, 2, 3), moody(two, "after", numbers(seed, 2, 3)))
    assert not re.search("inside the server|on_change failed", two.served.log.read_text())
