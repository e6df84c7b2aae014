"""One contestant's client process: loads NAME/client.py, connects to ADDRESS, and measures what it is told to.

Runs in the peer's environment. Commands come as JSON lines on standard input; answers go out as lines that start with
RESULT, since libraries print too. Usage: contestant.py CLIENT.py ADDRESS CASE.npz
"""

import importlib.metadata
import importlib.util
import json
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from outcome import Unavailable, through_function


class Contestant:
    def __init__(self, path: str, address: str, case: str) -> None:
        spec = importlib.util.spec_from_file_location("client_under_test", path)
        assert spec is not None
        assert spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.address = address
        with np.load(case) as arrays:
            self.x, self.v, self.y, self.gradient = (arrays[name] for name in ("x", "v", "y", "gradient"))
        self.client = self.connect(60)
        # 16 callers have a connection each, unless the peer's client is one for a whole process.
        self.shared = getattr(self.module.Client, "SHARED", False)
        self.clients: list[Any] = []

    def connect(self, seconds: float) -> Any:
        """A client that has answered; the server may still be starting."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                client = self.module.Client(self.address)
                client.vjp(self.x, self.v)
                return client
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.25)

    def check(self) -> dict[str, Any]:
        """Whether the peer's numbers are torch's, and who is measured."""
        result = self.client.vjp(self.x, self.v)
        if result is not None:
            y, gradient = result
            np.testing.assert_allclose(np.asarray(y).reshape(self.y.shape), self.y, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(np.asarray(gradient).reshape(self.x.shape), self.gradient, rtol=1e-4, atol=1e-5)
        return {"versions": {name: importlib.metadata.version(name) for name in self.module.PACKAGES}}

    def one(self, seconds: float) -> dict[str, Any]:
        """The median seconds of a call of one caller."""
        return {"seconds": self.repeat(lambda: self.client.vjp(self.x, self.v), seconds)}

    def big(self, mebibytes: int, seconds: float) -> dict[str, Any]:
        """The median seconds in which so many MiB go there and back."""
        if not hasattr(self.client, "echo"):
            return {"seconds": None}
        array = np.random.default_rng(0).standard_normal((1, mebibytes << 18), dtype=np.float32)
        result = np.asarray(self.client.echo(array)).reshape(array.shape)
        assert np.array_equal(result, array)
        return {"seconds": self.repeat(lambda: self.client.echo(array), seconds)}

    @staticmethod
    def repeat(work: Any, seconds: float) -> float:
        taken: list[float] = []
        began = time.perf_counter()
        while not taken or time.perf_counter() - began < seconds:
            before = time.perf_counter()
            work()
            taken.append(time.perf_counter() - before)
        return median(taken)

    def many(self, callers: int, seconds: float) -> dict[str, Any]:
        """Calls per second of so many callers, each in a thread of its own."""
        while len(self.clients) < callers:
            self.clients.append(self.client if self.shared else self.connect(10))
        counts, errors = [0] * callers, []
        start, stop = threading.Barrier(callers + 1), threading.Event()

        def call(index: int) -> None:
            client = self.clients[index]
            try:
                start.wait(30)
                while not stop.is_set():
                    client.vjp(self.x, self.v)
                    counts[index] += 1
            except Exception as error:
                errors.append(error)
                stop.set()

        threads = [threading.Thread(target=call, args=(index,), daemon=True) for index in range(callers)]
        for thread in threads:
            thread.start()
        start.wait(30)
        stop.wait(min(0.3, seconds / 4))  # until all are under way
        before, began = sum(counts), time.perf_counter()
        stop.wait(seconds)
        done, elapsed = sum(counts) - before, time.perf_counter() - began
        stop.set()
        for thread in threads:
            thread.join(30)
        if errors:
            raise errors[0]
        return {"rate": done / elapsed}

    def second(self) -> dict[str, Any]:
        """What becomes of the gradient of a gradient penalty: of (g * x).sum() with g the VJP of x**3 with v."""
        rng = np.random.default_rng(1)
        x, v = (rng.uniform(0.5, 1.5, size=(4, 6)).astype(np.float32) for _ in range(2))
        own = getattr(self.client, "penalty", None)
        try:
            found = own(x, v) if own else through_function(self.client, x, v)
        except Unavailable as error:
            return {"verdict": "unavailable", "detail": str(error)}
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            how = getattr(self.client, "PENALTY", "")
            return {"verdict": "refused", "detail": f"{how}: {type(error).__name__}: {lines[0][:300]}"}
        found = np.asarray(found, dtype=np.float32).reshape(x.shape)
        right = np.allclose(found, 9 * x**2 * v, rtol=1e-4)
        verdict = getattr(self.client, "RIGHT", "right") if right else "silently wrong"
        if own is None:
            verdict = f"none; wrapped: {verdict}"
        detail = getattr(
            self.client, "PENALTY", "create_graph=True through an autograd.Function written around the call"
        )
        if not right and np.allclose(found, 3 * x**2 * v, rtol=1e-4):
            detail = f"the second-order term is missing: {detail}"
        return {"verdict": verdict, "detail": detail}


def main() -> None:
    path, address, case = sys.argv[1:]
    sys.path.append(str(Path(__file__).parent))
    contestant: Contestant | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if contestant is None:
                contestant = Contestant(path, address, case)
            answer = getattr(contestant, command.pop("do"))(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:600]}
        print("RESULT", json.dumps(answer), flush=True)
    if contestant is not None and hasattr(contestant.client, "close"):
        contestant.client.close()


if __name__ == "__main__":
    main()
