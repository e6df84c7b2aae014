"""What must happen around os.fork in a process whose threads are in gRPC calls.

gRPC's own fork handlers give up when a thread is inside a call just then, and the child may crash in whatever it next
asks of gRPC. So a fork waits a moment for calls that run, and calls that begin wait for the fork. A channel never
survives into a child: `generation` tells a channel's owner that it was made before the fork.
"""

from __future__ import annotations

import os
import threading
import time

#: Seconds a fork waits for running calls. Longer ones are rare; a fork that stalls for them would be worse.
_PATIENCE = 2.0


class ForkGate:
    """Counts the threads that are inside gRPC; use as a context manager around each blocking call."""

    def __init__(self) -> None:
        self.generation = 0
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._forks = 0

    def __enter__(self) -> None:
        with self._changed:
            while self._forks:
                self._changed.wait()
            self._inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def before_fork(self) -> None:
        """Waits for running calls, within limits, and keeps new ones out."""
        self._changed.acquire()
        self._forks += 1
        end = time.monotonic() + _PATIENCE
        while self._inside and (left := end - time.monotonic()) > 0:
            self._changed.wait(left)

    def after_in_parent(self) -> None:
        """Lets calls in again."""
        self._forks -= 1
        self._changed.notify_all()
        self._changed.release()

    def after_in_child(self) -> None:
        """Forgets the threads that did not come along, and the channels of the parent."""
        self.generation += 1
        self._reset()


gate = ForkGate()

# gRPC reads this as it is imported, which the client does with its first call. Without it a process that forks while a
# session's stream is open (a DataLoader does) leaves gRPC in the child in a state that aborts it now and then.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=gate.before_fork, after_in_parent=gate.after_in_parent, after_in_child=gate.after_in_child
    )
