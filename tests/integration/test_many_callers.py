"""Many callers of one server: merged, admitted, queued, ordered, given up and placed; each gets its own answer.

Order is made by hand: the worker is kept at a gate while calls arrive one after the other, and then let through.
"""

from __future__ import annotations

import itertools
import math
import re
import runpy
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from tests.serving import Served

import pullback as pb

BASE = """
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

from pullback_server import Batching, model, spec

HERE = Path(__file__).parent
ROWS = {"x": spec("float64", ["n", 3])}
BATCHING = Batching(max_rows=64)


@model("gate", kind="function", devices=WHERE)
def gate(x):
    "Waits until the file of its number is there."
    number = int(x)
    (HERE / f"began-{number}").touch()
    while not (HERE / f"gate-{number}").exists():
        time.sleep(0.001)
    return x


def note(values):
    with (HERE / "journal").open("a") as journal:
        journal.writelines(f"{value:g}\\n" for value in values)


@model("journal", kind="function")
def journal(x):
    "Writes down what it computes, in the order in which it does."
    note(x[:1])
    return 2 * x


@model("nap", kind="function")
def nap(x):
    time.sleep(float(x))
    return x
"""

NET = """

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@model("net", inputs=ROWS, batch_axis=0, batching=BATCHING)
def net():
    torch.manual_seed(7)
    return Net().double()


"""

ROWS = """

@model("rows", inputs=ROWS, batch_axis=0, batching=BATCHING)
def rows(x):
    "Writes down what it computes."
    note(x[:, 0].detach().tolist())
    return x**3


"""

MOODY = """

@model("moody", inputs=ROWS, batch_axis=0, batching=BATCHING, hard_timeout=1.0, devices=WHERE)
def moody(x):
    "Cubes; but 13 raises, 666 takes the worker along, and 999 never ends."
    values = x.detach()
    if bool((values == 13).any()):
        raise ValueError("thirteen")
    if bool((values == 666).any()):
        os.kill(os.getpid(), signal.SIGKILL)
    while bool((values == 999).any()):
        pass
    return x**3
"""

MODELS = BASE + NET + ROWS + MOODY


class House:
    """A server process whose workers can be kept busy, and calls to it that arrive one after the other."""

    def __init__(self, folder: Path, *arguments: str, where: Sequence[str] = (), models: str = MODELS) -> None:
        self.folder = folder
        (folder / "models.py").write_text(models.replace("WHERE", repr(tuple(where))))
        self.served = Served(folder, "models.py", *arguments)
        self.target = self.served.target
        self.pool = ThreadPoolExecutor(200)
        self._clients: dict[tuple[str, str], pb.Client] = {}
        self._gates = itertools.count()

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        self.pool.shutdown()
        self.served.process.terminate()
        assert self.served.process.wait(30) == 0, self.served.log.read_text()

    def client(self, caller: str = "", priority: Any = "normal") -> pb.Client:
        """Retries nothing, so that what is refused is seen."""
        if (caller, priority) not in self._clients:
            self._clients[caller, priority] = self.connect(caller=caller, priority=priority)
        return self._clients[caller, priority]

    def connect(self, **options: Any) -> pb.Client:
        return pb.connect(self.target, timeout=60, retry=pb.RetryPolicy(attempts=1), **options)

    def value(self, name: str, **labels: str) -> float:
        """The sum over a metric's samples that have these labels."""
        total = 0.0
        for found, told, value in re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", self.served.get("/metrics"), re.MULTILINE):
            if found == name and all(f'{key}="{wanted}"' in told for key, wanted in labels.items()):
                total += float(value)
        return total

    def until(self, name: str, wanted: float, unless: Future[Any] | None = None, **labels: str) -> None:
        """Waits until a metric has a value. unless: a call that is not answered before that."""
        end = time.monotonic() + 30
        while (value := self.value(name, **labels)) != wanted:
            assert unless is None or not unless.done(), unless.exception() or unless.result()
            assert time.monotonic() < end, f"{name} is {value}, expected {wanted}\n{self.served.log.read_text()}"

    @property
    def in_flight(self) -> float:
        return self.value("pullback_requests_in_flight")

    def queue(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Future[Any]:
        """Has a call made in a thread, and returns when it waits for a worker."""
        waiting = self.value("pullback_queue_length")
        future = self.pool.submit(work, *arguments, **options)
        self.until("pullback_queue_length", waiting + 1, unless=future)
        return future

    def all_of(self, works: Sequence[Callable[[], Any]]) -> list[Future[Any]]:
        """Has calls made at once, in whatever order, and returns when they all wait."""
        waiting = self.value("pullback_queue_length")
        futures = [self.pool.submit(work) for work in works]
        self.until("pullback_queue_length", waiting + len(works))
        return futures

    @contextmanager
    def busy(self) -> Iterator[Gates]:
        """One worker computes, and has a second job before it: whoever comes now waits in the queue."""
        # What is known to take long gets no second job before it; an estimate falls at once.
        (self.folder / "gate--1").touch()
        for _ in range(3):
            self.client("gates").model("gate").evaluate(np.float64(-1))
        gates = Gates(self, (next(self._gates), next(self._gates)))
        try:
            yield gates
        finally:
            gates.open(0)
            gates.open(1)
            for call in gates.calls:
                call.exception(60)

    def journal(self) -> list[float]:
        """What the models have written down so far."""
        path = self.folder / "journal"
        return [float(line) for line in path.read_text().split()] if path.exists() else []

    def settled(self) -> None:
        """Waits until nothing is in flight, and asserts that nothing is counted that is not there."""
        self.until("pullback_requests_in_flight", 0)
        self.until("pullback_bytes_in_flight", 0)
        self.until("pullback_queue_length", 0)
        assert self.value("pullback_queue_age_seconds") == 0


class Gates:
    """Two calls that a worker has, and that end when told to."""

    def __init__(self, house: House, numbers: tuple[int, int]) -> None:
        self._house = house
        self._numbers = numbers
        gate = house.client("gates").model("gate")
        already = house.in_flight
        self.calls = [house.pool.submit(gate.evaluate, np.float64(numbers[0]))]
        self.began(0)
        self.calls.append(house.pool.submit(gate.evaluate, np.float64(numbers[1])))
        house.until("pullback_requests_in_flight", already + 2)

    def began(self, which: int) -> None:
        """Returns when one is being computed. If it is the second, the first batch of those who wait is staged."""
        path = self._house.folder / f"began-{self._numbers[which]}"
        end = time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < end
            time.sleep(0.001)

    def open(self, which: int) -> None:
        (self._house.folder / f"gate-{self._numbers[which]}").touch()


@contextmanager
def house(folder: Path, *arguments: str, **options: Any) -> Iterator[House]:
    found = House(folder, *arguments, **options)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A server with one worker."""
    with house(tmp_path_factory.mktemp("one"), "--caller-weights", "heavy=3") as found:
        yield found


def numbers(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


# Merging.

SIZES = (1, 3, 2, 1, 4, 2)
LOSSES: list[tuple[str, dict[str, Any]]] = [
    (name, {"reduction": reduction}) for name in ("mse_loss", "cross_entropy") for reduction in ("mean", "sum", "none")
]


class Local:
    """The same model in this process."""

    def __init__(self, folder: Path) -> None:
        self.net = runpy.run_path(str(folder / "models.py"))["net"]()

    def value(self, x: Any, loss: tuple[str, dict[str, Any]] | None, target: Any) -> Callable[[Any], Any]:
        """A function of x alone."""
        if loss is None:
            return lambda at: self.net(at)
        name, options = loss
        function = getattr(torch.nn.functional, name)
        return lambda at: function(self.net(at), torch.from_numpy(target), **options)

    def answers(self, kind: str, x: Any, v: Any, t: Any, loss: Any, target: Any) -> list[Any]:
        """What the client's method of this name should give."""
        function = self.value(x, loss, target)
        at = torch.from_numpy(x).requires_grad_()
        output = function(at)
        if kind == "evaluate":
            return [output]
        if kind == "jvp":
            # The derivative of Jᵀu by u is Jᵀ, whatever u is.
            u = torch.zeros_like(output, requires_grad=True)
            (pulled,) = torch.autograd.grad(output, at, u, create_graph=True)
            return [output, *torch.autograd.grad(pulled, u, torch.from_numpy(t))]
        cotangent = torch.ones_like(output) if v is None else torch.from_numpy(v)
        (gradient,) = torch.autograd.grad(output, at, cotangent, create_graph=True)
        if kind == "vjp":
            return [output, gradient]
        (second,) = torch.autograd.grad((gradient * torch.from_numpy(t)).sum(), at)
        return [output, gradient, second]


@pytest.fixture(scope="module")
def local(one: House) -> Local:
    return Local(one.folder)


def target_of(loss: tuple[str, dict[str, Any]], seed: int, rows: int) -> Any:
    return numbers(seed, rows, 3) if loss[0] == "mse_loss" else np.random.default_rng(seed).integers(0, 3, rows)


def ask(model: pb.RemoteModel, kind: str, x: Any, v: Any, t: Any, **options: Any) -> list[Any]:
    """The client's method of this name, its results in a list."""
    if kind == "evaluate":
        return [model.evaluate(x, **options)]
    if kind == "jvp":
        return list(model.jvp(x, t, **options))
    if kind == "vjp":
        return list(model.vjp(x, v, **options))
    return list(model.hvp(x, t, v, **options))[:3]


CASES = [(kind, loss) for loss in (None, *LOSSES) for kind in ("evaluate", "vjp", "jvp", "hvp")]


def test_calls_that_wait_are_computed_in_one_and_each_gets_its_own_answer(one: House, local: Local) -> None:
    """Every kind of request, every reduction, with different numbers of rows."""
    merged = one.value("pullback_merged_calls_total", model="net")
    batches = one.value("pullback_batch_rows_count", model="net")
    rows = one.value("pullback_batch_rows_sum", model="net")
    asked: list[tuple[str, list[Any]]] = []
    works = []
    for number, (kind, loss) in enumerate(CASES):
        for caller, size in enumerate(SIZES):
            seed = 100 * number + caller
            x, t = numbers(seed, size, 3), numbers(seed + 10, size, 3)
            target = None if loss is None else target_of(loss, seed + 20, size)
            v = numbers(seed + 30, size, 3) if loss is None else None
            options: dict[str, Any] = {}
            if loss is not None:
                options = {"loss": pb.Loss(loss[0], **loss[1]), "target": target}
                if loss[1]["reduction"] == "none":
                    v = numbers(seed + 30, *((size, 3) if loss[0] == "mse_loss" else (size,)))
            asked.append((f"{kind} {loss} {caller}", local.answers(kind, x, v, t, loss, target)))
            model = one.client(f"caller {caller}").model("net")
            works.append(lambda m=model, k=kind, x=x, v=v, t=t, o=options: ask(m, k, x, v, t, **o))
    with one.busy():
        futures = one.all_of(works)
    for (what, expected), future in zip(asked, futures, strict=True):
        for mine, theirs in zip(future.result(60), expected, strict=True):
            np.testing.assert_allclose(mine, theirs.detach().numpy(), rtol=1e-10, atol=1e-12, err_msg=what)
    assert one.value("pullback_merged_calls_total", model="net") == merged + len(works)
    assert one.value("pullback_batch_rows_count", model="net") <= batches + 2 * len(CASES)
    assert one.value("pullback_batch_rows_sum", model="net") == rows + len(CASES) * sum(SIZES)
    one.settled()


def test_what_has_randomness_or_sums_over_rows_is_computed_alone(one: House, local: Local) -> None:
    merged = one.value("pullback_merged_calls_total")
    model = one.client().model("net")
    options: list[dict[str, Any]] = [{"seed": 3}, {"train": True}, {"wrt": ["first.weight", "x"]}, {"max_norm": 0.1}]
    asked = []
    with one.busy():
        for which, option in enumerate(options * 3):
            x, v = numbers(which, 2, 3), numbers(which + 50, 2, 3)
            asked.append((x, v, option, one.queue(model.vjp, x, v, **option)))
    for x, v, option, future in asked:
        _, found = future.result(60)
        at = torch.from_numpy(x).requires_grad_()
        by = [at, *([local.net.first.weight] if "wrt" in option else [])]
        expected = torch.autograd.grad(local.net(at), by, torch.from_numpy(v))
        scale = min(1.0, 0.1 / float(expected[0].norm() + 1e-6)) if "max_norm" in option else 1.0
        gradients = found if isinstance(found, dict) else {"x": found}
        np.testing.assert_allclose(gradients["x"], scale * expected[0].numpy(), rtol=1e-10)
        if "wrt" in option:
            np.testing.assert_allclose(gradients["first.weight"], expected[1].numpy(), rtol=1e-10)
    # A bound on the norm is each member's own affair.
    assert one.value("pullback_merged_calls_total") <= merged + 3
    one.settled()


@pytest.mark.parametrize("kind", ["evaluate", "vjp", "jvp", "hvp"])
def test_a_member_that_fails_is_the_only_one_that_does(one: House, kind: str) -> None:
    """One raises in the model's code, one brings NaN, one's time passes and one leaves, all in one batch."""
    before = one.journal(), one.value("pullback_dropped_calls_total", where="worker")
    x = {caller: numbers(caller, caller % 3 + 1, 3) for caller in range(8)}
    x[2][0, 1] = 13
    x[5][0, 2] = math.nan
    v, t = ({caller: numbers(caller + offset, *one_x.shape) for caller, one_x in x.items()} for offset in (20, 40))

    def make(caller: int, client: pb.Client, **options: Any) -> Callable[[], Any]:
        model = client.model("moody")
        return lambda: ask(model, kind, x[caller], v[caller], t[caller], **options)

    leaving = one.connect()
    with one.busy() as gates:
        futures = {caller: one.queue(make(caller, one.client(f"caller {caller}"))) for caller in range(6)}
        futures[6] = one.queue(make(6, one.client("late"), timeout=0.5))
        futures[7] = one.queue(make(7, leaving))
        gates.open(0)
        gates.began(1)
        one.until("pullback_queue_length", 0)
        with pytest.raises(pb.errors.DeadlineExceeded):
            futures[6].result(60)
        leaving.close()
        with pytest.raises(pb.errors.ClientClosed):
            futures[7].result(60)
        # The second gate, and six of the batch.
        one.until("pullback_requests_in_flight", 7)
    for caller in (0, 1, 3, 4, 5):
        found = futures[caller].result(60)
        mine, along, moved = x[caller], v[caller], t[caller]
        expected = {
            "evaluate": [mine**3],
            "vjp": [mine**3, 3 * mine**2 * along],
            "jvp": [mine**3, 3 * mine**2 * moved],
            "hvp": [mine**3, 3 * mine**2 * along, 6 * mine * moved * along],
        }[kind]
        for one_found, one_expected in zip(found, expected, strict=True):
            np.testing.assert_allclose(one_found, one_expected, rtol=1e-12)
    with pytest.raises(pb.errors.ModelError, match="thirteen"):
        futures[2].result(60)
    assert one.value("pullback_dropped_calls_total", where="worker") == before[1] + 2
    one.settled()
    # Nothing that was right stands against merging.
    info = one.connect().model("moody").info
    assert info.max_batch_rows == 64, info.batch_evidence


def test_a_members_own_mistakes_are_its_own(one: House, local: Local) -> None:
    """Targets that are no classes, and cotangents of another shape than the output."""
    model = one.client().model("net")
    x = [numbers(seed, 2, 3) for seed in range(6)]
    classes = [np.array([0, 2]), np.array([1, 3]), np.array([2, 2]), np.array([-1, 0]), np.array([1, 1]), np.array([0])]
    loss = "cross_entropy"
    with one.busy():
        by_loss = [one.queue(model.vjp, a, loss=loss, target=b) for a, b in zip(x, classes, strict=True)]
        shapes = [(2, 3), (2, 2), (2, 3), (1, 3), (2, 3), (6,)]
        by_shape = [one.pool.submit(model.vjp, a, numbers(9, *shape)) for a, shape in zip(x, shapes, strict=True)]
        # What is wrong at sight never waits.
        one.until("pullback_queue_length", 12 - sum(future.done() for future in by_shape))
    for number in (0, 2, 4):
        expected = local.answers("vjp", x[number], None, None, (loss, {}), classes[number])
        for mine, theirs in zip(by_loss[number].result(60), expected, strict=True):
            np.testing.assert_allclose(mine, theirs.detach().numpy(), rtol=1e-10)
        expected = local.answers("vjp", x[number], numbers(9, 2, 3), None, None, None)
        for mine, theirs in zip(by_shape[number].result(60), expected, strict=True):
            np.testing.assert_allclose(mine, theirs.detach().numpy(), rtol=1e-10)
        with pytest.raises(pb.errors.BadCotangent):
            by_shape[number + 1].result(60)
    for number in (1, 3):
        with pytest.raises(pb.errors.ValueOutOfRange):
            by_loss[number].result(60)
    with pytest.raises(pb.errors.InvalidArgument):
        by_loss[5].result(60)
    one.settled()
    assert one.connect().model("net").info.max_batch_rows == 64


# Giving up.


@pytest.mark.parametrize("name", ["journal", "rows"])
def test_calls_that_are_given_up_in_the_queue_are_never_computed(one: House, name: str) -> None:
    dropped = one.value("pullback_dropped_calls_total", where="queue")
    seen = len(one.journal())

    def call(client: pb.Client, number: float, **options: Any) -> Any:
        return client.model(name).evaluate(np.full((1, 3) if name == "rows" else 3, float(number)), **options)

    leaving = one.connect()
    with one.busy():
        kept = [one.queue(call, one.client("kept"), number) for number in (1, 2)]
        late = [one.queue(call, one.client("late"), number, timeout=0.5) for number in (3, 4)]
        left = [one.queue(call, leaving, number) for number in (5, 6)]
        leaving.close()
        for future in left:
            with pytest.raises(pb.errors.ClientClosed):
                future.result(60)
        for future in late:
            with pytest.raises(pb.errors.DeadlineExceeded):
                future.result(60)
        one.until("pullback_queue_length", 2)
    for future in kept:
        future.result(60)
    one.settled()
    assert one.value("pullback_dropped_calls_total", where="queue") == dropped + 4
    # Of a first merged computation one member is computed alone as well.
    assert set(one.journal()[seen:]) == {1, 2}


def test_calls_that_are_given_up_at_the_worker_are_never_computed(one: House) -> None:
    """The staged batch loses some of its members, then another loses all."""
    seen = len(one.journal())
    passed_over = one.value("pullback_worker_passed_over_total")

    def call(client: pb.Client, number: float, **options: Any) -> Any:
        return client.model("rows").evaluate(np.full((1, 3), float(number)), **options)

    for group in ((10, 11), ()):
        leaving = one.connect()
        with one.busy() as gates:
            kept = [one.queue(call, one.client("kept"), number) for number in group]
            late = one.queue(call, one.client("late"), 12, timeout=0.5)
            left = [one.queue(call, leaving, number) for number in (13, 14)]
            gates.open(0)
            gates.began(1)
            one.until("pullback_queue_length", 0)
            leaving.close()
            with pytest.raises(pb.errors.DeadlineExceeded):
                late.result(60)
            one.until("pullback_requests_in_flight", 1 + len(group))
        for future in (*kept, *left):
            assert isinstance(future.exception(60), pb.errors.ClientClosed) == (future in left)
        one.settled()
    assert set(one.journal()[seen:]) == {10, 11}
    assert one.value("pullback_worker_passed_over_total") == passed_over + 1


# Order.


def in_order(one: House, calls: Sequence[tuple[str, str, float]]) -> list[float]:
    """Queues calls (caller, priority, number) one after the other, and tells in which order they were computed."""
    seen = len(one.journal())
    with one.busy():
        futures = [
            one.queue(one.client(caller, priority).model("journal").evaluate, np.full(3, number))
            for caller, priority, number in calls
        ]
    for future in futures:
        future.result(60)
    one.settled()
    return one.journal()[seen:]


def test_a_polite_caller_is_served_beside_a_flood(one: House) -> None:
    flood = [("flood", "normal", float(number)) for number in range(30)]
    order = in_order(one, [*flood, ("polite", "normal", 100.0), ("other", "normal", 101.0)])
    assert order.index(100.0) <= 2
    assert order.index(101.0) <= 3
    assert [number for number in order if number < 100] == list(range(30))


def test_weights_are_shares(one: House) -> None:
    calls = [(caller, "normal", float(number)) for number in range(16) for caller in ("light", "heavy")]
    calls = [(caller, priority, number + 100 * (caller == "heavy")) for caller, priority, number in calls]
    order = in_order(one, calls)
    assert sum(number >= 100 for number in order[:12]) in (8, 9, 10)


def test_urgent_calls_go_first_among_their_callers(one: House) -> None:
    normal = [("both", "normal", float(number)) for number in range(10)]
    urgent = [("both", "high", 100.0 + number) for number in range(4)]
    order = in_order(one, [*normal, *urgent])
    assert set(order[:5]) >= {100.0, 101.0, 102.0, 103.0}


def test_a_short_deadline_is_no_reason_to_refuse_whose_turn_comes_soon(one: House) -> None:
    """What the others have waiting says nothing of how long the first call of another caller takes."""
    nap = one.client("flood").model("nap")
    nap.evaluate(np.float64(0.5))
    with one.busy():
        flood = [one.queue(nap.evaluate, np.float64(0)) for _ in range(20)]
        polite = one.queue(one.client("polite").model("journal").evaluate, np.ones(3), timeout=5)
    polite.result(60)
    for future in flood:
        future.result(60)
    one.settled()


# Admission.


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A server that lets few calls in."""
    limits = ["--max-calls", "12", "--max-model-calls", "8", "--max-caller-calls", "6"]
    limits += ["--max-bytes", "300000", "--max-caller-bytes", "100000", "--max-model-bytes", "150000"]
    with house(tmp_path_factory.mktemp("narrow"), *limits, models=BASE) as found:
        yield found


def refused(future: Future[Any] | Callable[[], Any], match: str) -> None:
    with pytest.raises(pb.errors.Overloaded, match=match) as caught:
        future.result(60) if isinstance(future, Future) else future()
    assert caught.value.reason == "OVERLOADED"
    assert caught.value.retry_after is not None
    assert 0.05 <= caught.value.retry_after <= 30


def test_limits_are_of_all_of_a_model_and_of_a_caller(narrow: House) -> None:
    def journal(caller: str) -> Callable[[], Any]:
        return lambda: narrow.client(caller).model("journal").evaluate(np.ones(3))

    def nap(caller: str) -> Callable[[], Any]:
        return lambda: narrow.client(caller).model("nap").evaluate(np.zeros(()))

    with narrow.busy():
        many = [narrow.queue(journal("many")) for _ in range(6)]
        refused(journal("many"), "6 calls of this caller are in flight, the limit is 6")
        refused(nap("many"), "6 calls of this caller")
        few = [narrow.queue(journal("few")) for _ in range(2)]
        refused(journal("few"), "8 calls for model 'journal' are in flight, the limit is 8")
        few += [narrow.queue(nap("few")) for _ in range(2)]
        # The house is full: two gates, six and four. Whoever has most makes room, by its newest call.
        last = narrow.pool.submit(nap("last"))
        refused(many[5], "others want in: 12 calls .* are in flight, 6 of them of this caller")
        narrow.until("pullback_requests_in_flight", 12)
        # One more would have as many as anyone else.
        refused(nap("many"), "12 calls are in flight, the limit is 12")
        assert narrow.value("pullback_queue_length") == 10
    for future in (*many[:5], *few, last):
        future.result(60)
    narrow.settled()


def test_limits_are_of_bytes_too(narrow: House) -> None:
    def journal(caller: str, size: int) -> Callable[[], Any]:
        return lambda: narrow.client(caller).model("journal").evaluate(np.ones(size // 8))

    with pytest.raises(grpc.RpcError) as never:
        narrow.served.vjp([0.0] * 20_000, model="journal").result()
    assert never.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "0 bytes are in flight and this call brings 320000, the limit is 300000" in never.value.details()
    with narrow.busy():
        calls = [narrow.queue(journal("first", 80_000))]
        assert narrow.value("pullback_bytes_in_flight") == 80_016
        refused(journal("first", 24_000), "80000 bytes of this caller are in flight and this call brings 24000")
        refused(journal("second", 80_000), "80000 bytes for model 'journal' are in flight")
        calls.append(narrow.queue(journal("second", 64_000)))
    for future in calls:
        future.result(60)
    narrow.settled()


# Placement, and how long a call may wait.

PLACED = (
    MODELS
    + """

@model("everywhere", kind="function")
def everywhere(x):
    return 2 * x


@model("first_two", kind="function", devices=["cpu-0", "cpu-1"])
def first_two(x):
    return 3 * x


@model("last", kind="function", devices=["cpu-2"])
def last(x):
    return 5 * x


@model("once", kind="function", replicas=1)
def once(x):
    return 7 * x


@model("twice", kind="function", devices=["cpu-[12]", "cpu-0"], replicas=2)
def twice(x):
    return 11 * x
"""
)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A server with three workers, of which one has the gates, and where no call waits for long."""
    limits = ("--devices", "cpu:3", "--max-queue-seconds", "1")
    with house(tmp_path_factory.mktemp("three"), *limits, where=["cpu-2"], models=PLACED) as found:
        yield found


FACTORS = {"everywhere": (3, 2.0), "first_two": (2, 3.0), "last": (1, 5.0), "once": (1, 7.0), "twice": (2, 11.0)}


def test_models_are_where_they_were_put(three: House) -> None:
    x = numbers(0, 4)
    listed = {info.name: info for info in three.client().models()}
    for name, (workers, factor) in FACTORS.items():
        model = three.client().model(name)
        assert model.info.devices == listed[name].devices == ("cpu",) * workers
        for future in [three.pool.submit(model.vjp, x, x) for _ in range(6)]:
            y, gradient = future.result(60)
            np.testing.assert_array_equal(y, factor * x)
            np.testing.assert_array_equal(gradient, factor * x)


def test_sessions_go_where_their_models_are(three: House) -> None:
    client = three.client()
    for names in (["first_two", "everywhere"], ["last"], ["twice", "everywhere"], ["once"]):
        for _ in range(3):
            with client.session(models=names):
                for name in names:
                    leaf = client.tensor(numbers(1, 3), requires_grad=True)
                    client.model(name)(leaf).sum().backward()
                    assert leaf.grad is not None
                    np.testing.assert_array_equal(leaf.grad.numpy(), np.full(3, FACTORS[name][1]))
    with (
        pytest.raises(pb.errors.NotOnSessionWorker, match="no worker holds all of"),
        client.session(models=["first_two", "last"]),
    ):
        client.tensor(np.ones(3)).sum().item()
    with client.session(models=["last"]):
        with pytest.raises(pb.errors.NotOnSessionWorker):
            client.model("first_two")(client.tensor(np.ones(3))).sum().item()
        # The session itself goes on.
        assert client.model("last")(client.tensor(np.ones(3))).sum().item() == 15


def test_a_model_elsewhere_does_not_wait_behind_a_busy_worker(three: House) -> None:
    with three.busy():
        waiting = three.queue(three.client().model("last").evaluate, np.ones(3))
        for name in ("first_two", "everywhere"):
            for _ in range(4):
                three.client().model(name).evaluate(np.ones(3))
    waiting.result(60)


def test_a_call_waits_no_longer_than_it_may(three: House) -> None:
    with three.busy():
        refused(three.queue(three.client().model("last").evaluate, np.ones(3)), "no worker was free for 1 s")
    three.settled()
