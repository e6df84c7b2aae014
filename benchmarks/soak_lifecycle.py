"""Versions added, replaced, reloaded, uploaded and removed, again and again, under callers that check every answer.

Every version computes a x^2 with a number `a` of its own, in three inputs, beside parameters that only take room; so
a gradient tells which contents computed it, and that must be those that the answer names.

Run: python benchmarks/soak_lifecycle.py --changes 200
"""

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
from safetensors.numpy import save, save_file
from serving import Running, pullback_server
from soak_holdings import Figures, family, memory_files, resident, settled, workers

import pullback as pb

#: Elements that only take room: 4 MiB.
_ROOM = 1 << 20
_KEPT = 6

_MANIFEST = """
batch_axis = 0

[inputs.x]
dtype = "float64"
shape = ["batch", 3]

[versions]
all = true
"""

_CODE = f'''
import torch
from torch import nn

from pullback_server import model


@model("scale")
class Scale(nn.Module):
    """a x^2."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.room = nn.Parameter(torch.zeros({_ROOM}))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a * x * x
'''


def _weights(a: float) -> dict[str, np.ndarray]:
    return {"a": np.array(a), "room": np.zeros(_ROOM, np.float32)}


class Operator:
    """Changes what is served, one change after the other, and knows what every version and revision computes."""

    def __init__(self, root: Path, target: str, key: str) -> None:
        self._folder = root / "scale"
        self._client = pb.connect(target, token=key, timeout=120)
        self._rng = random.Random(0)
        self._number = 0
        self._factors: dict[int, float] = {}
        #: By version and revision, as the server counts them.
        self.known: dict[tuple[str, int], float] = {}
        self.present: list[int] = []
        self._uploaded: set[int] = set()
        self.removed: set[str] = set()
        self.told: Counter[str] = Counter()
        self.seconds: list[float] = []

    def change(self, kind: str = "") -> None:
        """One change, of whatever kind, unless said."""
        own = [number for number in self.present if number not in self._uploaded]
        kinds = ["add", "upload"]
        if own:
            kinds += ["replace", "reload"]
        if len(self.present) > 2:
            kinds.append("remove")
        kind = kind or ("remove" if len(self.present) >= _KEPT else self._rng.choice(kinds))
        began = time.monotonic()
        if kind == "remove":
            # Never the latest: callers of "the latest" must not notice anything.
            number = self._rng.choice(self.present[:-1])
            self.removed.add(str(number))
            self.present.remove(number)
            self._client.unload_model("scale", str(number))
        elif kind == "upload":
            number, a = self._next()
            self._told(self._client.upload_weights("scale", save(_weights(a)), str(number)), number, a)
            self._uploaded.add(number)
            self.present.append(number)
        else:
            number, a = self._next() if kind == "add" else (self._rng.choice(own), self._rng.uniform(1, 9))
            if kind == "reload":
                a = self._factors[number]
            else:
                self._put(number, a)
            self._told(self._client.load_model("scale", str(number)), number, a)
            if kind == "add":
                self.present.append(number)
        self.seconds.append(time.monotonic() - began)
        self.told[kind] += 1

    def _next(self) -> tuple[int, float]:
        self._number += 1
        return self._number, self._rng.uniform(1, 9)

    def _told(self, info: pb.ModelInfo, number: int, a: float) -> None:
        self._factors[number] = a
        self.known[str(number), info.revision] = a

    def _put(self, number: int, a: float) -> None:
        partial = self._folder / f"{number}.partial"
        partial.mkdir()
        save_file(_weights(a), partial / "weights.safetensors")
        place = self._folder / str(number)
        if place.exists():
            shutil.rmtree(place)
        partial.rename(place)


class Caller:
    """Checks answers: of the latest version, of one that it names, or of sessions that last a while."""

    def __init__(self, target: str, number: int, operator: Operator, over: threading.Event) -> None:
        self._client = pb.connect(target, timeout=30, retry=pb.RetryPolicy(attempts=1))
        self._rng = np.random.default_rng(number)
        self._operator = operator
        self._over = over
        work = (self._latest, self._named, self._latest, self._session)[number % 4]
        self.told: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.answers: list[tuple[str, int, float]] = []
        self.thread = threading.Thread(target=self._run, args=(work,))

    def _run(self, work: object) -> None:
        while not self._over.is_set():
            try:
                work()  # type: ignore[operator]
                self.told["OK"] += 1
            except pb.errors.PullbackError as error:
                gone = re.search(r"version '?(\d+)'?", str(error))
                known = gone is not None and gone[1] in self._operator.removed
                self.told[f"{error.reason}{', which was removed' if known else ''}"] += 1
                if not known:
                    self.wrong.append(f"{type(error).__name__}: {error}"[:300])
        self._client.close()

    def _point(self) -> np.ndarray:
        return self._rng.normal(size=(int(self._rng.integers(1, 5)), 3)) + 3.0

    def _factor(self, gradient: np.ndarray, x: np.ndarray) -> float:
        found = gradient / (2 * x)
        assert np.ptp(found) < 1e-9, "rows of one answer come from several contents"
        return float(found.flat[0])

    def _latest(self, version: str | None = None) -> None:
        x = self._point()
        found = self._client.model("scale", version=version).vjp(x, np.ones_like(x))
        self.answers.append((found.model_version, found.model_revision, self._factor(found.gradients, x)))
        if version is not None and found.model_version != version:
            self.wrong.append(f"asked for {version}, answered by {found.model_version}")

    def _named(self) -> None:
        self._latest(str(self._rng.choice(self._operator.present)))

    def _session(self) -> None:
        with pb.connect(self._client.target, timeout=30) as client:
            model = client.model("scale")
            first = None
            until = time.monotonic() + float(self._rng.uniform(0, 4))
            while first is None or (time.monotonic() < until and not self._over.is_set()):
                x = self._point()
                leaf = pb.tensor(x, requires_grad=True)
                y = model(leaf)
                time.sleep(float(self._rng.uniform(0, 0.3)))
                y.sum().backward()
                factor = self._factor(leaf.grad.numpy(), x)
                if first is not None and abs(factor - first) > 1e-9:
                    self.wrong.append(f"a session's version changed under it: {first}, then {factor}")
                first = factor


def lifecycle(changes: int, callers: int = 16) -> list[str]:
    """Returns the names of the figures that are not as they should be."""
    figures = Figures(f"Versions that come and go: {changes} changes under {callers} checking callers")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "repository"
        (root / "scale").mkdir(parents=True)
        (root / "scale" / "model.toml").write_text(_MANIFEST)
        (root / "scale" / "model.py").write_text(_CODE)
        made = subprocess.run(
            [sys.executable, "-m", "pullback_server", "key", "soak", "--rights", "call,session,admin,upload"],
            capture_output=True,
            text=True,
            check=True,
        )
        keys = Path(folder) / "keys.toml"
        keys.write_text(made.stdout + '[anonymous]\nrights = ["call", "session", "metrics"]\n')
        key = made.stderr.split()[-1]
        with pullback_server(
            "--repository", str(root), "--repository-mode", "explicit", "--principals", str(keys),
            "--uploads", str(Path(folder) / "uploads"), "--state-dir", str(Path(folder) / "state"),
        ) as running:  # fmt: skip
            _soak(figures, root, Path(folder), key, running, changes, callers)
    return figures.failed


def _soak(figures: Figures, root: Path, folder: Path, key: str, running: Running, changes: int, callers: int) -> None:
    target, front = running.target, psutil.Process(running.process.pid)
    operator = Operator(root, target, key)
    for _ in range(3):
        operator.change("add")
    over = threading.Event()
    calling = [Caller(target, number, operator, over) for number in range(callers)]
    for caller in calling:
        caller.thread.start()
    held: list[tuple[int, int, int]] = []
    for count in range(changes):
        operator.change()
        if count in (changes // 5, changes - 1):
            # Everybody has come and gone a few times by then.
            held.append(_held(front))
    over.set()
    for caller in calling:
        caller.thread.join(60)
    told, wrong, answers = Counter[str](), [], []
    for caller in calling:
        told += caller.told
        wrong += caller.wrong
        answers += caller.answers
    false = [one for one in answers if abs(operator.known.get(one[:2], -1.0) - one[2]) > 1e-9]
    figures.tell("changes", ", ".join(f"{number} {kind}" for kind, number in sorted(operator.told.items())))
    figures.tell(
        "seconds of a change", f"{np.median(operator.seconds):.2f} median, {max(operator.seconds):.2f} at most"
    )
    figures.tell("calls", ", ".join(f"{number} {what}" for what, number in told.most_common()))
    figures.tell("failed otherwise, or wrong", f"{len(wrong)} {wrong[:3] if wrong else ''}", not wrong)
    figures.tell("answers that name what computed them", f"{len(answers) - len(false)} of {len(answers)}", not false)
    left = settled(running.metrics, 20)
    figures.tell("gauges that are not zero", left or "none", not left)
    _unload_all(operator)
    time.sleep(2)
    end = _held(front)
    names = ("resident MiB", "descriptors", "memory files")
    for name, early, late, last in zip(names, *held, end, strict=True):
        good = late <= early * 1.1 + (64 if name == "resident MiB" else 8)
        figures.tell(f"{name}: early, late, with one version", f"{early}, {late}, {last}", good)
    copies = len(list((folder / "state").glob("*/*/weights.safetensors")))
    figures.tell("copies of versions on the disk", copies, copies <= 1)


def _unload_all(operator: Operator) -> None:
    while len(operator.present) > 1:
        operator.change("remove")


def _held(front: psutil.Process) -> tuple[int, int, int]:
    processes = [front, *workers(front)]
    files = sum(len(memory_files(process)) for process in processes)
    return resident(family(front)) >> 20, sum(process.num_fds() for process in processes), files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--callers", type=int, default=16)
    chosen = parser.parse_args()
    raise SystemExit(1 if lifecycle(chosen.changes, chosen.callers) else 0)
