"""Callers of every kind, in processes of their own: those that check each answer, and those that do harm."""

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import pullback as pb

#: Seconds for each call, and by how much longer it may take until it counts as hanging.
LIMIT, GRACE = 10.0, 2.0
ONCE = pb.RetryPolicy(attempts=1)


@dataclass
class Checked:
    """What callers were told. wrong: answers that were not as they should be. late: calls that came back too late."""

    told: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def add(self, other: "Checked") -> None:
        self.told += other.told
        self.wrong += other.wrong
        self.late += other.late
        self.slowest = max(self.slowest, other.slowest)


class Checker:
    """One caller. Every input is unique; what comes back must be the closed form's."""

    def __init__(self, target: str, seed: int, until: float) -> None:
        self.found = Checked()
        self._target = target
        self._rng = np.random.default_rng(seed)
        self._until = until

    def run(self, work: "Callable[[Checker, pb.Client], None]") -> None:
        """Calls until its time is over, with a new connection now and then; the old one goes without a goodbye."""
        count = 0
        client = pb.connect(self._target, timeout=LIMIT, retry=ONCE)
        while time.monotonic() < self._until:
            count += 1
            if count % 200 == 0:
                client = pb.connect(self._target, timeout=LIMIT, retry=ONCE)
            if work in PAUSES:
                time.sleep(float(self._rng.uniform(*PAUSES[work])))
            began = time.monotonic()
            outcome = "OK"
            try:
                work(self, client)
            except pb.errors.PullbackError as error:
                outcome = error.reason or f"{type(error).__name__}, by the client"
            except AssertionError as error:
                outcome = "wrong"
                self.found.wrong.append(f"{work.__name__}: {' '.join(str(error).split())[:200]}")
            seconds = time.monotonic() - began
            self.found.told[outcome] += 1
            self.found.slowest = max(self.found.slowest, seconds)
            if seconds > LIMIT + GRACE:
                self.found.late.append(f"{work.__name__}: {outcome} after {seconds:.1f} s")
        client.close()

    def rows(self) -> Any:
        """Inputs on both sides of what travels inline."""
        few = self._rng.random() < 0.9
        return self._rng.normal(size=(int(self._rng.integers(1, 9)) if few else 4000, 3))

    def unary(self, client: pb.Client) -> None:
        x = self.rows()
        model = client.model(str(self._rng.choice(["rows", "moody", "cube"])))
        if model.name == "cube":
            x = x.reshape(-1)
        v = self._rng.normal(size=x.shape)
        kind = self._rng.integers(3)
        if kind == 0:
            np.testing.assert_allclose(model.evaluate(x), x**3, rtol=1e-12)
        elif kind == 1:
            y, gradient = model.vjp(x, v)
            np.testing.assert_allclose(y, x**3, rtol=1e-12)
            np.testing.assert_allclose(gradient, 3 * x**2 * v, rtol=1e-12)
        else:
            t = self._rng.normal(size=x.shape)
            found = model.hvp(x, t, v)
            np.testing.assert_allclose(found.gradients, 3 * x**2 * v, rtol=1e-12)
            np.testing.assert_allclose(found.hvps, 6 * x * t * v, rtol=1e-12)

    def loss(self, client: pb.Client) -> None:
        x, target = self.rows(), self._rng.normal(size=())
        target = np.broadcast_to(target, x.shape).copy()
        reduction = str(self._rng.choice(["mean", "sum"]))
        value, gradient = client.model("rows").vjp(x, loss=pb.Loss("mse_loss", reduction=reduction), target=target)
        scale = 1 / x.size if reduction == "mean" else 1.0
        np.testing.assert_allclose(value, scale * ((x**3 - target) ** 2).sum(), rtol=1e-10)
        np.testing.assert_allclose(gradient, scale * 2 * (x**3 - target) * 3 * x**2, rtol=1e-10, atol=1e-14)

    def session(self, client: pb.Client) -> None:
        x = self.rows()
        with client.session():
            leaf = client.tensor(x, requires_grad=True)
            y = client.model("rows")(leaf)
            (first,) = pb.autograd.grad(y.sum(), leaf, create_graph=True)
            assert first is not None
            (first * leaf).sum().backward()
            assert leaf.grad is not None
            # d/dx (3 x^2) x = 9 x^2
            np.testing.assert_allclose(leaf.grad.numpy(), 9 * x**2, rtol=1e-11)

    def harm(self, client: pb.Client) -> None:
        """Raises, brings NaN, classes that are none, or shapes that do not fit; leaves, or comes too late."""
        x = self._rng.normal(size=(int(self._rng.integers(1, 5)), 3))
        model = client.model("moody")
        kind = int(self._rng.integers(7))
        if kind == 0:
            x[0, 0] = 13
            with contextlib.suppress(pb.errors.ModelError):
                model.vjp(x, np.ones_like(x))
                raise AssertionError("13 was answered")
        elif kind == 1:
            x[0, 1] = np.nan
            found = model.vjp(x, np.ones_like(x)).outputs
            np.testing.assert_array_equal(np.isnan(found), np.isnan(x))
        elif kind == 2:
            with contextlib.suppress(pb.errors.ValueOutOfRange):
                client.model("rows").vjp(x, loss="cross_entropy", target=np.full(len(x), 3))
                raise AssertionError("a class that is none was answered")
        elif kind == 3:
            with contextlib.suppress(pb.errors.BadCotangent):
                model.vjp(x, np.ones((len(x), 2)))
                raise AssertionError("a cotangent that does not fit was answered")
        elif kind == 4:
            with contextlib.suppress(pb.errors.DeadlineExceeded):
                model.vjp(x, np.ones_like(x), timeout=float(self._rng.uniform(0.0005, 0.02)))
        elif kind == 5:
            leaving = pb.connect(self._target, timeout=LIMIT, retry=ONCE)
            timer = threading.Timer(float(self._rng.uniform(0.0, 0.02)), leaving.close)
            timer.start()
            with contextlib.suppress(pb.errors.Cancelled):
                leaving.model("moody").vjp(x, np.ones_like(x))
            timer.join()
        else:
            # Rows that are too many for the worker's memory, or one that is too much.
            size, value = (int(self._rng.integers(1, 9)), 77.0) if self._rng.random() < 0.7 else (2, 88.0)
            x = self._rng.normal(size=(size, 3))
            x[:, 0] = value
            try:
                np.testing.assert_allclose(model.evaluate(x), x**3, rtol=1e-12)
            except pb.errors.OutOfMemory:
                self.found.told["OUT_OF_MEMORY"] += 1

    def kill(self, client: pb.Client) -> None:
        """A call that takes its worker along, or never ends."""
        x = self._rng.normal(size=(2, 3))
        x[1, 2] = self._rng.choice([666.0, 999.0])
        client.model("moody").vjp(x, np.ones_like(x))
        raise AssertionError(f"{x[1, 2]} was answered")


#: Seconds between the calls of those that do harm.
PAUSES = {Checker.harm: (0.01, 0.05), Checker.kill: (4.0, 16.0)}
#: What the callers of one process do.
WORKS = (
    Checker.unary, Checker.unary, Checker.unary, Checker.unary, Checker.unary, Checker.loss, Checker.session,
    Checker.session,
)  # fmt: skip


def check(target: str, seed: int, until: float, harm: bool) -> tuple[Checked, Checked]:
    """Has callers call until then. What those that check were told, and those that do harm."""
    checkers = [(Checker(target, seed + number, until), work) for number, work in enumerate(WORKS)]
    harmful = [(Checker(target, seed + 50 + n, until), w) for n, w in enumerate((Checker.harm, Checker.kill)) if harm]
    threads = [threading.Thread(target=one.run, args=(work,), daemon=True) for one, work in (*checkers, *harmful)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0) + 3 * (LIMIT + GRACE))
    found = Checked(), Checked()
    for which, group in enumerate((checkers, harmful)):
        for one, _ in group:
            found[which].add(one.found)
    found[0].late += [f"a call never came back: {thread}" for thread in threads if thread.is_alive()]
    return found


def vanish(target: str) -> None:
    """Holds tensors and graphs in a session, and calls, until it is killed."""
    with contextlib.suppress(pb.errors.PullbackError):
        client = pb.connect(target, timeout=LIMIT, retry=ONCE)
        rng = np.random.default_rng()
        held: list[Any] = []
        while True:
            held = [*held[-20:], client.model("rows")(client.tensor(rng.normal(size=(5000, 3)), requires_grad=True))]
            held[-1].sum().backward(retain_graph=True)
            client.model("moody").vjp(rng.normal(size=(4000, 3)), np.ones((4000, 3)))


if __name__ == "__main__":
    vanish(sys.argv[1])
