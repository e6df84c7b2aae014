"""The same small VJP on Pullback and on every peer that runs on this machine, in one run.

An MLP 784-256-10, batch 32, float32: outputs and the gradient with respect to the input, for a given cotangent. Every
server is a process of its own on loopback with one torch thread, every client another one; contestants take turns
within each round, figures are medians of rounds, ratios are taken within a round. Prints a table, writes
benchmarks/peers/RESULTS.md and benchmarks/peers/chart.png. Run: python benchmarks/peers.py
"""

import argparse
import contextlib
import json
import os
import platform
import queue
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from models import mlp
from serving import HERE, free_port

PEERS = HERE / "peers"
COMMON = PEERS / "common"
VENVS = HERE.parent / ".venv-peers"
CALLERS = 16
MEBIBYTES = 16


@dataclass(frozen=True)
class Peer:
    """One contestant: how its server is started and what a reader must know."""

    folder: str
    title: str
    note: str = ""
    own_venv: bool = True
    # After the interpreter; {port} and {other} are free ports. None: there is no server.
    server: tuple[str, ...] | None = ("server.py", "{port}")
    environment: dict[str, str] = field(default_factory=dict)
    # Where clients connect to: this, or what the server prints after ADDRESS.
    address: str = "{port}"
    announces: bool = False
    # Sockets that it leaves in the folder for temporary files, whatever way it ends.
    leaves: str = ""


CONTESTANTS = [
    Peer("in_process", "torch, in process", "nothing is remote", own_venv=False, server=None),
    Peer(
        "raw_grpc",
        "raw gRPC echo",
        "as many bytes, nothing computed",
        own_venv=False,
        server=(str(HERE / "echo_server.py"),),
        announces=True,
    ),
    Peer(
        "pullback",
        "Pullback",
        "default settings, one worker; `ComputeVjp`",
        own_venv=False,
        server=(
            *("-m", "pullback_server.cli", "serve", "server.py", "--threads", "1", "--log-level", "warning"),
            *("--port", "{port}", "--metrics-port", "{other}"),
        ),
    ),
    Peer("by_hand", "gRPC by hand", "grpcio, raw bytes, one thread; one connection per caller", own_venv=False),
    Peer(
        "torch_rpc",
        "torch RPC",
        "`rpc_sync` of a VJP function; TensorPipe over TCP; one agent for all callers, calls run in threads",
        own_venv=False,
        server=("server.py", "{rendezvous}"),
        address="{rendezvous}",
    ),
    Peer(
        "dist_autograd",
        "torch dist_autograd",
        "forward by `rpc_sync`, then `dist_autograd.backward`; otherwise as torch RPC",
        own_venv=False,
        server=("server.py", "{rendezvous}"),
        address="{rendezvous}",
    ),
    Peer("fastapi", "FastAPI", "uvicorn; bodies by `torch.save`; httpx"),
    Peer("mosec", "mosec", "batches of up to 16 calls, waits 1 ms; msgpack; httpx"),
    Peer(
        "pytriton",
        "PyTriton",
        "Triton's dynamic batching; its own client over gRPC",
        server=("server.py", "{port}", "{other}"),
        # Triton's Python backend loads libpython; without this it may find the system's, of another patch version than
        # the standard library of this interpreter, and fails.
        environment={"LD_LIBRARY_PATH": "{libraries}", "PYTRITON_HOME": "{scratch}"},
        address="{other}",
    ),
    Peer(
        "hivemind",
        "hivemind",
        "`RemoteExpert`; forward and backward are two calls; libp2p, encrypted; batches",
        announces=True,
        leaves="hivemind-p2p*.sock",
    ),
    Peer(
        "tesseract",
        "Tesseract",
        "`apply` and `vector_jacobian_product` are two calls; base64 in JSON over HTTP",
        server=("-m", "tesseract_core.runtime", "serve", "--host", "127.0.0.1", "--port", "{port}"),
        environment={"TESSERACT_API_PATH": "{folder}/server.py", "TESSERACT_OUTPUT_FORMAT": "json+base64"}
        | {"TESSERACT_OUTPUT_PATH": "{scratch}"},
    ),
    Peer("um_bridge", "UM-Bridge", "`Evaluate` and `Gradient` are two calls; numbers as JSON over HTTP"),
]


class Failed(Exception):
    """Why a contestant is not, or no longer, in the run."""


def environment_of(peer: Peer) -> Path:
    """The interpreter of a peer; its environment is made when there is none or its requirements are others.

    Peers need other versions of packages than Pullback and than each other, hence an environment each. torch is the
    same for all and large (and a bare `pip install torch` fetches gigabytes of CUDA), so each has a .pth file that puts
    this environment's packages at the end of its path: what the peer pins wins, torch and the rest come from here. The
    pins are complete, so nothing is resolved (--no-deps) and torch is never fetched.
    """
    if not peer.own_venv:
        return Path(sys.executable)
    home, requirements = VENVS / peer.folder, PEERS / peer.folder / "requirements.txt"
    python, ready = home / "bin" / "python", home / "ready.txt"
    if ready.exists() and ready.read_text() == requirements.read_text():
        return python
    print(f"making the environment of {peer.title}", flush=True)

    def step(*command: str, seconds: float) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise Failed(f"its environment was not made within {seconds:.0f} s") from error
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            errors = [line for line in lines if "ERROR" in line or "error:" in line]
            raise Failed(f"its environment cannot be made: {(errors or lines or ['?'])[-1].strip()[:300]}")
        return done.stdout.strip()

    step(sys.executable, "-m", "venv", "--clear", str(home), seconds=120)
    packages = "import sysconfig; print(sysconfig.get_path('purelib'))"
    here, there = (step(python_, "-c", packages, seconds=30) for python_ in (sys.executable, str(python)))
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    step(*pip, "-r", str(requirements), seconds=600)
    (Path(there) / "zz_shared_torch.pth").write_text(here + "\n")
    ready.write_text(requirements.read_text())
    return python


def end(process: subprocess.Popen[Any]) -> None:
    """Ends a process that this one started and what that started, by their ids."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    if process.stdin is not None:
        # Clients and the echo server end when this does, and clear up behind them.
        with contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(15)
    # torch's manager of shared memory goes, and removes what it manages, after those that it serves.
    _, left = psutil.wait_procs(family, timeout=3)
    for served in (True, False):
        for child in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                if not (served and child.name().startswith("torch_shm")):
                    child.kill()
        _, left = psutil.wait_procs(left, timeout=5)


class Lines:
    """Lines of a pipe, read with a deadline."""

    def __init__(self, pipe: Any) -> None:
        self.queue: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self.read, args=(pipe,), daemon=True).start()

    def read(self, pipe: Any) -> None:
        for line in pipe:
            self.queue.put(line)
        self.queue.put("")

    def next(self, wanted: Callable[[str], bool], seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self.queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty as error:
                raise Failed(f"no answer within {seconds:.0f} s") from error
            if not line:
                raise Failed("its process ended")
            if wanted(line):
                return line


class Contestant:
    """A running peer: its server, its client, and what has been measured."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.failure = ""
        self.log = Path(os.devnull)
        self.versions: dict[str, str] = {}
        self.second = {"verdict": "", "detail": ""}
        self.one: list[float] = []
        self.one_ratio: list[float] = []
        self.many: list[float] = []
        self.big: list[float] = []
        self.big_ratio: list[float] = []

    @contextmanager
    def started(self, python: Path, scratch: Path, case: Path) -> Iterator[None]:
        """Starts the server and the client, which connects when it is first asked for something."""
        folder = PEERS / self.peer.folder
        # The numbers of threads are what `workload` and `--threads 1` set, for libraries that look here instead.
        variables = os.environ | {"PYTHONPATH": str(COMMON), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        variables["TMPDIR"] = str(scratch)
        self.log = scratch / f"{self.peer.folder}.log"
        with ExitStack() as stack:
            if self.peer.leaves:
                place = Path(tempfile.gettempdir())
                there = set(place.glob(self.peer.leaves))
                stack.callback(lambda: [left.unlink() for left in set(place.glob(self.peer.leaves)) - there])
            named = {
                "port": str(free_port()),
                "other": str(free_port()),
                "folder": str(folder),
                "scratch": str(scratch),
                "rendezvous": str(scratch / f"{self.peer.folder}.rendezvous"),
                "libraries": str(sysconfig.get_config_var("LIBDIR")),
            }
            address = self.peer.address.format(**named)
            if self.peer.server is not None:
                words = [word.format(**named) for word in self.peer.server]
                own = {name: value.format(**named) for name, value in self.peer.environment.items()}
                errors = stack.enter_context(self.log.open("w"))
                server = subprocess.Popen(
                    [str(python), *words],
                    cwd=folder,
                    env=variables | own,
                    stdin=subprocess.PIPE if self.peer.folder == "raw_grpc" else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if self.peer.announces else errors,
                    stderr=errors,
                    text=True,
                )
                stack.callback(end, server)
                self.server = server
                if self.peer.announces:
                    line = Lines(server.stdout).next(lambda line: bool(re.match(r"ADDRESS |\d+$", line)), 90)
                    address = line.split()[-1]
            self.client = subprocess.Popen(
                [str(python), str(COMMON / "contestant.py"), str(folder / "client.py"), address, str(case)],
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stack.enter_context((scratch / f"{self.peer.folder}.client.log").open("w")),
                text=True,
            )
            stack.callback(end, self.client)
            self.lines = Lines(self.client.stdout)
            yield

    def reason(self) -> str:
        """The last error in the logs, without the paths of this machine."""
        found: list[str] = []
        for log in (self.log, self.log.with_suffix(".client.log")):
            text = log.read_text(errors="replace") if log.exists() else ""
            found += [line.strip() for line in text.splitlines() if re.match(r"\s*[\w.]*(Error|Exception)\b.*:", line)]
        return re.sub(r"(/[\w.+-]+)+/", "", found[-1])[:300] if found else ""

    def processes(self) -> dict[int, psutil.Process]:
        """The server's and the client's, with what they started."""
        found: dict[int, psutil.Process] = {}
        for process in (getattr(self, "server", None), self.client):
            if process is not None and process.poll() is None:
                root = psutil.Process(process.pid)
                found |= {one.pid: one for one in (root, *root.children(recursive=True))}
        return found

    def cpu_seconds(self) -> float:
        """What they have used so far."""
        total = 0.0
        for process in self.processes().values():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    def ask(self, do: str, wait: float, **arguments: Any) -> dict[str, Any]:
        """One command to the client."""
        assert self.client.stdin is not None
        try:
            self.client.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.client.stdin.flush()
        except BrokenPipeError as error:
            raise Failed("its client process ended") from error
        answer: dict[str, Any] = json.loads(self.lines.next(lambda line: line.startswith("RESULT "), wait)[7:])
        if "error" in answer:
            raise Failed(answer["error"])
        return answer


def measure(field_: list[Contestant], rounds: int) -> None:
    """All contestants in turn, round for round; the order is turned around every other round."""

    def turn(work: Callable[[Contestant], None], order: list[Contestant]) -> None:
        for contestant in order:
            if not contestant.failure:
                try:
                    work(contestant)
                except Failed as error:
                    reason = contestant.reason()
                    contestant.failure = f"{error}" + (f" ({reason})" if reason and reason not in str(error) else "")

    def check(contestant: Contestant) -> None:
        contestant.versions = contestant.ask("check", 120)["versions"]
        if contestant.peer.folder != "raw_grpc":
            contestant.second = contestant.ask("second", 60)
        contestant.ask("one", 60, seconds=0.3)
        contestant.ask("many", 120, callers=CALLERS, seconds=0.5)

    def one(contestant: Contestant) -> None:
        contestant.one.append(contestant.ask("one", 60, seconds=0.4)["seconds"])

    def many(contestant: Contestant) -> None:
        contestant.many.append(contestant.ask("many", 120, callers=CALLERS, seconds=1.5)["rate"])

    def big(contestant: Contestant) -> None:
        if contestant.big and contestant.big[-1] > 2:
            return  # it will not get better
        seconds = contestant.ask("big", 90, mebibytes=MEBIBYTES, seconds=0.3)["seconds"]
        if seconds is not None:
            contestant.big.append(seconds)

    def ratios(values: str, results: str, base: str) -> None:
        floor = next((found for found in field_ if found.peer.folder == base), None)
        for contestant in field_:
            measured = getattr(contestant, values)
            if floor is not None and measured:
                found = [value / under for value, under in zip(measured, getattr(floor, values), strict=False)]
                setattr(contestant, results, found)

    turn(check, field_)
    # All stay up for the whole run: one that is busy while it has nothing to do would disturb the others.
    running = [contestant for contestant in field_ if not contestant.failure]
    before = {contestant: contestant.cpu_seconds() for contestant in running}
    time.sleep(2)
    for contestant in running:
        share = (contestant.cpu_seconds() - before[contestant]) / 2
        if share > 0.03:
            print(f"while idle {contestant.peer.title} uses {share:.0%} of a core", flush=True)
    for index in range(rounds):
        order = field_ if index % 2 == 0 else field_[::-1]
        for work in (one, many):
            turn(work, order)
        print(f"round {index + 1} of {rounds}", flush=True)
    for index in range(3):
        turn(big, field_ if index % 2 == 0 else field_[::-1])
    ratios("one", "one_ratio", "in_process")
    ratios("big", "big_ratio", "raw_grpc")


def user_lines(folder: str) -> int:
    """Lines between `# user code` and `# end`: without blank ones, comments, and the model itself, which all share."""
    count = 0
    for name in ("server.py", "client.py"):
        path, inside = PEERS / folder / name, False
        for line in path.read_text().splitlines() if path.exists() else ():
            text = line.strip()
            if text in ("# user code", "# end"):
                inside = text == "# user code"
            elif inside and text and not text.startswith(("#", '"""')):
                count += 1
    return count


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(field_: list[Contestant]) -> str:
    lines = [
        f"| | one caller | × in process | {CALLERS} callers | {MEBIBYTES} MiB there and back | × raw gRPC "
        "| second order | lines |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in field_:
        title = f"**{found.peer.title}**" if found.peer.folder == "pullback" else found.peer.title
        if not found.one:
            lines.append(f"| {title} | did not run | | | | | | |")
            continue
        cells = [title, f"{number(median(found.one) * 1e3)} ms", number(median(found.one_ratio or [float("nan")]))]
        cells.append(f"{number(median(found.many))}/s" if found.many else "-")
        cells += (
            [f"{number(median(found.big) * 1e3)} ms", number(median(found.big_ratio))] if found.big_ratio else ["-"] * 2
        )
        cells += [found.second["verdict"] or "-", str(user_lines(found.peer.folder) or "-")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def details(field_: list[Contestant]) -> str:
    lines = ["| | versions | how | second order |", "|---|---|---|---|"]
    for found in field_:
        versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
        detail = found.second["detail"].replace("|", "\\|")
        lines.append(f"| {found.peer.title} | {versions} | {found.peer.note} | {detail} |")
    failures = [f"- {found.peer.title}: {found.failure}" for found in field_ if found.failure]
    if failures:
        lines += ["", "Not, or not wholly, measured:", "", *failures]
    return "\n".join(lines)


NOTES = f"""What the columns say: **one caller** is the median time of a call that gives outputs and gradient as numpy
arrays, by the peer's own client; where its API returns no outputs with the gradient, of the two calls that it takes.
**{CALLERS} callers** are {CALLERS} threads of one client process, so the client's interpreter limits all of them alike.
**Second order** is the gradient of (g·x).sum() with g the VJP of x³, compared with 9x²v: *silently wrong* means that a
number came back, without an error, from which the second-order term is missing. *None; wrapped* is a peer that has no
derivatives of its own: its call was put into the backward of a `torch.autograd.Function`, as one does, and
`create_graph=True` went through that. A server that one writes oneself can of course be given an HVP method too; the
column says what differentiating the gradient does. **Lines** are what a user writes, server and client, without the
model, blank lines and comments. Every gradient is checked against torch before it is timed. Servers have one torch
thread."""


def report(field_: list[Contestant], rounds: int) -> str:
    cores = os.cpu_count()
    return "\n\n".join(
        [
            f"## Peers — {date.today()}, {cores} cores, no GPU, Python {platform.python_version()}, "
            f"torch {torch.__version__} (1 thread)",
            f"`python benchmarks/peers.py --rounds {rounds}`. The VJP of an MLP 784-256-10, batch 32, float32.",
            table(field_),
            NOTES,
            details(field_),
            "The same as a chart: `benchmarks/peers/chart.png`.",
        ]
    )


def chart(field_: list[Contestant], path: Path) -> None:
    """Two panels of bars on a log scale: one caller's milliseconds, and calls per second of many."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    shown = sorted((found for found in field_ if found.one and found.many), key=lambda found: -median(found.one))
    colours = {"pullback": "#d1495b", "in_process": "#b8b8b8", "raw_grpc": "#b8b8b8"}
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.42 * len(shown) + 1.3), sharey=True, layout="constrained")
    panels = (
        ("One caller: ms per VJP (less is better)", [median(found.one) * 1e3 for found in shown]),
        (f"{CALLERS} callers: VJPs per second (more is better)", [median(found.many) for found in shown]),
    )
    for axis, (title, values) in zip(axes, panels, strict=True):
        bars = axis.barh(
            range(len(shown)), values, color=[colours.get(found.peer.folder, "#4a7fb0") for found in shown]
        )
        axis.bar_label(bars, [number(value) for value in values], padding=4, fontsize=9)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.set_xlim(min(values) / 2, max(values) * 3)
        axis.set_title(title, fontsize=11, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    labels = []
    for found in shown:
        verdict = found.second["verdict"].partition(";")[0]
        labels.append(f"{found.peer.title}\n2nd order: {verdict}" if verdict else found.peer.title)
    axes[0].set_yticks(range(len(shown)), labels, fontsize=8.5)
    for label, found in zip(axes[0].get_yticklabels(), shown, strict=True):
        label.set_fontweight("bold" if found.peer.folder == "pullback" else "normal")
    figure.suptitle(
        "VJP of an MLP 784-256-10, batch 32, float32, CPU, loopback: outputs and input gradient", fontsize=11
    )
    figure.savefig(path, dpi=130)


def write_case(path: Path) -> None:
    """The inputs, and what torch makes of benchmarks/models.py's MLP with them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 784), dtype=np.float32)
    v = rng.standard_normal((32, 10), dtype=np.float32)
    module, leaf = mlp(), torch.from_numpy(x).requires_grad_()
    y = module(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, torch.from_numpy(v))
    np.savez(path, x=x, v=v, y=y.detach().numpy(), gradient=gradient.numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="folders of benchmarks/peers; nothing is written then")
    parser.add_argument("--environments", action="store_true", help="only make the peers' environments")
    arguments = parser.parse_args()
    # A polite end runs the clean-up below too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    torch.set_num_threads(1)
    field_ = [Contestant(peer) for peer in CONTESTANTS if not arguments.only or peer.folder in arguments.only]
    pythons: dict[str, Path] = {}
    for contestant in field_:
        try:
            pythons[contestant.peer.folder] = environment_of(contestant.peer)
        except Failed as error:
            contestant.failure = str(error)
    if arguments.environments:
        print("\n".join(f"{found.peer.title}: {found.failure or 'ready'}" for found in field_))
        return
    began = time.monotonic()
    # Libraries leave files that they are still writing when they are ended.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, ExitStack() as stack:
        case = Path(scratch) / "case.npz"
        write_case(case)
        for contestant in field_:
            if not contestant.failure:
                try:
                    stack.enter_context(contestant.started(pythons[contestant.peer.folder], Path(scratch), case))
                except (Failed, OSError) as error:
                    reason = contestant.reason()
                    contestant.failure = f"its server did not start: {error}" + (f" ({reason})" if reason else "")
        measure(field_, arguments.rounds)
        for contestant in field_:
            if contestant.failure and contestant.peer.folder in pythons:
                for log in (contestant.log, contestant.log.with_suffix(".client.log")):
                    tail = log.read_text(errors="replace")[-1500:] if log.exists() else ""
                    print(f"--- {contestant.peer.title}: {contestant.failure}\n{tail}", file=sys.stderr)
    text = report(field_, arguments.rounds)
    print(f"\n{text}\n\n{time.monotonic() - began:.0f} s")
    if any(found.failure for found in field_ if found.peer.folder == "pullback"):
        raise SystemExit("Pullback itself was not measured; nothing is written")
    if not arguments.only:
        (PEERS / "RESULTS.md").write_text(text + "\n")
        chart(field_, PEERS / "chart.png")


if __name__ == "__main__":
    main()
