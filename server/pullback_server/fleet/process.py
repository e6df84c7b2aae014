"""Starting, watching and ending a worker's process."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from pullback_server.fleet import output

#: Libraries that make their thread pools when they are loaded, before torch.set_num_threads can be called.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Process:
    """A started worker process, reaped as soon as it has ended."""

    def __init__(self, child: subprocess.Popen[bytes], on_exit: Callable[[], None]) -> None:
        self._child = child
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(child.pid)
        self._loop.add_reader(self._pidfd, self._exited)

    @property
    def pid(self) -> int:
        return self._child.pid

    def kill(self) -> None:
        """Ends the process by force; does nothing when it has ended."""
        self._child.kill()

    def how_it_ended(self) -> str:
        """In words, for a log."""
        code = self._child.returncode
        if code is None:
            return "still runs"
        if code >= 0:
            return f"exited with status {code}"
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
        return f"was killed by signal {-code}"

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._child.wait()
        self._on_exit()


class Spawner:
    """Starts processes from one thread that lasts: a child is killed when the very thread that started it ends."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "pullback-spawner", initializer=_hold_signals)

    async def spawn(self, sock: socket.socket, threads: int, on_exit: Callable[[], None], relayed: str = "") -> Process:
        """Starts a worker that talks on `sock`, which is then closed here. Raises OSError.

        relayed: as whose what it writes to stdout and stderr is logged here; empty: both are this process's own.
        """
        started = self._thread.submit(_popen, sock, threads, relayed)
        try:
            child = await asyncio.wrap_future(started)
        except asyncio.CancelledError:
            # Nobody would know of it any more.
            started.add_done_callback(functools.partial(_undo, sock))
            raise
        try:
            return Process(child, on_exit)
        except OSError:
            child.kill()
            child.wait()
            raise

    def close(self) -> None:
        """To be called when every process has ended."""
        self._thread.shutdown(wait=False)


def _hold_signals() -> None:
    """A child begins with its thread's mask: until it has handlers, which it sets before it unblocks them, a signal to
    the whole container must not end it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))


def _popen(sock: socket.socket, threads: int, relayed: str) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    environment.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    # -P: a file in the current directory must not pass for a library (torch imports a `queue`, a `types`).
    command = [sys.executable, "-P", "-m", "pullback_server.engine.worker"]
    command += ["--socket", str(sock.fileno()), "--parent", str(os.getpid())]
    with sock, contextlib.ExitStack() as ours:
        theirs: int | None = None
        if relayed:
            reading, theirs = output.pipe()
            ours.callback(os.close, theirs)
            output.relay(reading, relayed)
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            pass_fds=(sock.fileno(),),
            # Ctrl-C in a terminal is for the front, which ends its workers when it has drained.
            start_new_session=True,
        )


def _undo(sock: socket.socket, started: Future[subprocess.Popen[bytes]]) -> None:
    sock.close()
    if not started.cancelled() and started.exception() is None:
        started.result().kill()
        started.result().wait()
